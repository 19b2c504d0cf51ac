// Keeps in the workflow which quantized file it was made with, and says so when the file is another one, newer or not here.
// What is kept is made by nodes/shared_file.py, and judged there.
// @ts-check
import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";
import { show } from "./node_panel.js";

const LOAD = "StepQuantLoad";
const PROPERTY = "stepquant_file";

/** @param {import("./node_panel.js").Node} node */
async function check(node) {
  const known = /** @type {any} */ (node.properties?.[PROPERTY]);
  const chosen = node.widgets?.find((widget) => widget.name === "file_name")?.value;
  if (!known || known.file !== chosen) return; // another file was chosen since: it will be remembered when it has run
  const answer = await api.fetchApi("/stepquant/v1/file", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(known),
  });
  const { message } = answer.ok ? await answer.json() : { message: null };
  if (!message) return;
  show(node, message);
  app.extensionManager.toast.add({ severity: "warn", summary: "StepQuant", detail: message });
}

app.registerExtension({
  name: "StepQuant.SharedFile",
  beforeRegisterNodeDef(nodeType, nodeData) {
    if (nodeData.name !== LOAD) return;
    const prototype = /** @type {any} */ (nodeType.prototype); // the types leave onExecuted out
    const onExecuted = prototype.onExecuted;
    prototype.onExecuted = function (/** @type {any} */ output, /** @type {any[]} */ ...rest) {
      onExecuted?.call(this, output, ...rest);
      if (output?.[PROPERTY]) this.properties[PROPERTY] = output[PROPERTY][0];
    };
  },
  // For each node of a workflow that is opened: from a file, from a picture, or the one of before.
  loadedGraphNode(node) {
    if (node.type === LOAD || node.comfyClass === LOAD) void check(node);
  },
});
