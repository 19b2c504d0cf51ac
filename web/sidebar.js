// A sidebar tab with the last report of every StepQuant node that ran in this session, newest first.
// @ts-check
import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";
import { addressOf } from "./node_panel.js";
import { drawReport, element } from "./report_view.js";

const MOST_REPORTS = 12;

/** @type {Map<string, { title: string, report: import("./report_view.js").Report }>} by node id, oldest first */
const reports = new Map();
/** @type {HTMLElement | null} while the tab is open */
let opened = null;

/** @param {string} id as the server names it: in a subgraph "outer:inner", whose title is not looked for */
function titleOf(id) {
  const graph = /** @type {any} */ (app.graph);
  return (graph.getNodeById(id) ?? graph.getNodeById(Number(id)))?.title ?? "StepQuant";
}

function draw() {
  if (!opened) return;
  const list = element("div", "stepquant-sidebar");
  list.append(element("div", "stepquant-sidebar-title", "StepQuant"));
  if (!reports.size) {
    list.append(element("div", "stepquant-figure", "Nothing to show yet: run a graph with Quantize SDXL, Load quantized or Compare in it."));
  }
  for (const { title, report } of [...reports.values()].reverse()) {
    const card = element("div", "stepquant-card");
    card.append(element("div", "stepquant-node", title), drawReport(report, addressOf));
    list.append(card);
  }
  opened.replaceChildren(list);
}

app.registerExtension({
  name: "StepQuant.Sidebar",
  setup() {
    api.addEventListener("executed", (/** @type {any} */ event) => {
      const { node, output } = event.detail ?? {};
      const report = output?.stepquant_report?.[0];
      if (!report) return;
      reports.delete(String(node));
      reports.set(String(node), { title: titleOf(String(node)), report });
      if (reports.size > MOST_REPORTS) reports.delete([...reports.keys()][0]);
      draw();
    });
    app.extensionManager.registerSidebarTab({
      id: "stepquant",
      icon: "pi pi-chart-bar",
      title: "StepQuant",
      tooltip: "StepQuant: what was quantized, and what it cost",
      type: "custom",
      render(container) {
        opened = container;
        draw();
      },
      destroy() {
        opened = null;
      },
    });
  },
});
