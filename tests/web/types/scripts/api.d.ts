// As app.d.ts.
import type { ComfyApp } from "@comfyorg/comfyui-frontend-types";
export declare const api: ComfyApp["api"];
