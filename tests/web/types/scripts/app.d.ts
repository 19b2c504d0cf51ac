// The front end's own module, as its types package describes it; the browser loads the real one from the server.
import type { ComfyApp } from "@comfyorg/comfyui-frontend-types";
export declare const app: ComfyApp;
