// Shows below a StepQuant node's widgets what its last run put out: the text, and the report if there is one.
// Nothing is drawn on the canvas, so it works in both renderers of the front end.
// @ts-check
import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";
import { drawReport, element } from "./report_view.js";

const NAME = "stepquant_panel";
const MOST_HEIGHT = 760;
const PADDING = 8; // as in report.css

/** @typedef {import("@comfyorg/comfyui-frontend-types").ComfyApp} App */
/** @typedef {NonNullable<ReturnType<App["graph"]["getNodeById"]>>} Node */

/** @param {import("./report_view.js").Picture} picture */
export function addressOf({ filename, subfolder, type }) {
  return api.apiURL(`/view?${new URLSearchParams({ filename, subfolder, type })}`);
}

function loadStyles() {
  const address = new URL("./report.css", import.meta.url).href;
  if (document.querySelector(`link[href="${address}"]`)) return;
  document.head.append(Object.assign(document.createElement("link"), { rel: "stylesheet", href: address }));
}

/** What it needs, not what it has been given. @param {HTMLElement} panel */
function heightOf(panel) {
  const content = /** @type {HTMLElement | null} */ (panel.firstElementChild);
  return (content?.offsetHeight ?? 0) + 2 * PADDING;
}

/** @param {Node} node */
function addPanel(node) {
  const panel = element("div", "stepquant-panel");
  const widget = /** @type {any} */ (node).addDOMWidget(NAME, NAME, panel, {
    serialize: false, // not sent with the prompt
    hideOnZoom: false,
    getValue: () => "",
    setValue: () => {},
    getMinHeight: () => Math.min(MOST_HEIGHT, heightOf(panel)),
  });
  widget.serialize = false; // not saved with the workflow: it would shift the values of the real widgets
  return panel;
}

/** @param {Node} node @returns {HTMLElement} */
function panelOf(node) {
  const widget = /** @type {any} */ (node.widgets?.find((one) => one.name === NAME));
  return widget?.element ?? addPanel(node);
}

/** Make room for what the panel shows now. @param {Node} node */
function fit(node) {
  const [width, height] = node.computeSize();
  node.setSize([Math.max(node.size[0], width), Math.max(node.size[1], height)]);
  node.setDirtyCanvas(true, true);
}

/** @param {Node} node @param {string} text @param {import("./report_view.js").Report} [report] */
export function show(node, text, report) {
  const panel = panelOf(node);
  // With a report the text would say most of it twice.
  const content = report ? drawReport(report, addressOf) : element("pre", "stepquant-text", text);
  panel.replaceChildren(content);
  const observer = new ResizeObserver(() => (content.isConnected ? fit(node) : observer.disconnect())); // pictures arrive later
  observer.observe(content);
}

app.registerExtension({
  name: "StepQuant.NodePanel",
  init: loadStyles,
  // Once per kind of node, before the first is made. onExecuted is also called for results from ComfyUI's cache.
  beforeRegisterNodeDef(nodeType, nodeData) {
    if (!nodeData.name.startsWith("StepQuant")) return;
    const prototype = /** @type {any} */ (nodeType.prototype); // the types leave onExecuted out
    const onExecuted = prototype.onExecuted;
    prototype.onExecuted = function (/** @type {any} */ output, /** @type {any[]} */ ...rest) {
      onExecuted?.call(this, output, ...rest);
      if (output?.text) show(this, output.text.join("\n"), output.stepquant_report?.[0]);
    };
  },
});
