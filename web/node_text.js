// Shows the text that a StepQuant node puts out below its widgets, line by line. Nothing is drawn on the canvas,
// so it works in both renderers of the front end.
import { app } from "../../scripts/app.js";

const NAME = "stepquant_text";
const LINE_HEIGHT = 16;
const PADDING = 8;

function addTextWidget(node) {
  const element = document.createElement("pre");
  Object.assign(element.style, {
    margin: "0",
    padding: `${PADDING}px`,
    boxSizing: "border-box",
    overflow: "auto",
    whiteSpace: "pre-wrap",
    font: `12px/${LINE_HEIGHT}px sans-serif`,
    color: "var(--input-text)",
    background: "var(--comfy-input-bg)",
    borderRadius: "4px",
    userSelect: "text",
  });
  const widget = node.addDOMWidget(NAME, NAME, element, {
    serialize: false, // not sent with the prompt
    hideOnZoom: false,
    getValue: () => element.textContent,
    setValue: (text) => (element.textContent = text),
    getMinHeight: () => element.textContent.split("\n").length * LINE_HEIGHT + 2 * PADDING,
  });
  widget.serialize = false; // not saved with the workflow: it would shift the values of the real widgets
  return widget;
}

function showText(node, text) {
  const widget = node.widgets?.find((one) => one.name === NAME) ?? addTextWidget(node);
  widget.element.textContent = text;
  const [width, height] = node.computeSize();
  node.setSize([Math.max(node.size[0], width), Math.max(node.size[1], height)]);
  node.setDirtyCanvas(true, true);
}

app.registerExtension({
  name: "StepQuant.NodeText",
  // Once per kind of node, before the first is made. onExecuted is also called for results from ComfyUI's cache.
  beforeRegisterNodeDef(nodeType, nodeData) {
    if (!nodeData.name.startsWith("StepQuant")) return;
    const onExecuted = nodeType.prototype.onExecuted;
    nodeType.prototype.onExecuted = function (output, ...rest) {
      onExecuted?.call(this, output, ...rest);
      if (output?.text) showText(this, output.text.join("\n"));
    };
  },
});
