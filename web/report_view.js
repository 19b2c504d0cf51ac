// Draws one report (see nodes/report.py) as plain DOM. Knows neither nodes nor the sidebar; fetches nothing but pictures.
// @ts-check

/**
 * @typedef {{ label: string, bytes: number }} Size
 * @typedef {{ filename: string, subfolder: string, type: string }} Picture
 * @typedef {{
 *   title?: string, figures?: string[], sizes?: Size[], schemes?: { label: string, layers: number }[],
 *   layers?: { name: string, why: string }[], steps_db?: (number | null)[], pictures?: { before: Picture, after: Picture }
 * }} Report
 */

const SVG = "http://www.w3.org/2000/svg";
const PLOT = { width: 300, height: 90, left: 34, bottom: 14, top: 6 };

/**
 * @param {string} tag
 * @param {string} [className]
 * @param {string} [text]
 * @returns {HTMLElement}
 */
export function element(tag, className = "", text = "") {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text) made.textContent = text; // never innerHTML: texts come from files
  return made;
}

/** @param {Report} report @param {(picture: Picture) => string} addressOf @returns {HTMLElement} */
export function drawReport(report, addressOf) {
  const panel = element("div", "stepquant-report");
  if (report.title) panel.append(element("div", "stepquant-title", report.title));
  for (const part of [drawSizes(report), drawSchemes(report), drawSteps(report), drawSlider(report, addressOf), drawLayers(report)]) {
    if (part) panel.append(part);
  }
  for (const figure of report.figures ?? []) panel.append(element("div", "stepquant-figure", figure));
  return panel;
}

/** @param {string} title */
function section(title) {
  const made = element("div", "stepquant-section");
  made.append(element("div", "stepquant-heading", title));
  return made;
}

/** @param {string} label @param {string} value @param {number} share of the full width, 0 to 1 */
function bar(label, value, share) {
  const row = element("div", "stepquant-row");
  const track = element("div", "stepquant-track");
  const fill = element("div", "stepquant-fill");
  fill.style.width = `${Math.max(1, 100 * share)}%`;
  track.append(fill);
  row.append(element("span", "stepquant-label", label), track, element("span", "stepquant-value", value));
  return row;
}

/** @param {Report} report */
function drawSizes({ sizes }) {
  if (!sizes?.length) return null;
  const part = section("UNet weights, file and VRAM");
  const largest = Math.max(...sizes.map((size) => size.bytes));
  for (const { label, bytes } of sizes) part.append(bar(label, sizeText(bytes), bytes / largest));
  return part;
}

/** @param {number} bytes */
function sizeText(bytes) {
  return bytes >= 2 ** 30 ? `${(bytes / 2 ** 30).toFixed(2)} GiB` : `${(bytes / 2 ** 20).toFixed(1)} MiB`;
}

/** @param {Report} report */
function drawSchemes({ schemes }) {
  if (!schemes?.length) return null;
  const part = section("Recipe");
  const all = schemes.reduce((sum, scheme) => sum + scheme.layers, 0);
  for (const { label, layers } of schemes) part.append(bar(label, `${layers} layers`, layers / all));
  return part;
}

/** @param {Report} report */
function drawLayers({ layers }) {
  if (!layers?.length) return null;
  const part = element("details", "stepquant-section");
  part.append(element("summary", "stepquant-heading", `Layers to look at (${layers.length})`));
  for (const { name, why } of layers) part.append(element("div", "stepquant-figure", `${name}: ${why}`));
  return part;
}

/** @param {string} tag @param {Record<string, string | number>} attributes @param {string} [text] */
function shape(tag, attributes, text = "") {
  const made = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, String(value));
  made.textContent = text;
  return made;
}

/** @param {Report} report */
function drawSteps({ steps_db: steps }) {
  const known = (steps ?? []).filter((value) => value !== null);
  if (!steps || !known.length) return null;
  const part = section("SQNR at each step of the last run, dB (higher is better)");
  const low = Math.floor(Math.min(...known)), high = Math.max(Math.ceil(Math.max(...known)), low + 1);
  const { width, height, left, bottom, top } = PLOT;
  const x = (/** @type {number} */ step) => left + ((width - left - 6) * step) / Math.max(1, steps.length - 1);
  const y = (/** @type {number} */ value) => top + ((height - top - bottom) * (high - value)) / (high - low);
  const plot = shape("svg", { viewBox: `0 0 ${width} ${height}`, class: "stepquant-plot", role: "img" });
  for (const value of [low, high]) {
    plot.append(shape("line", { x1: left, x2: width - 6, y1: y(value), y2: y(value), class: "stepquant-grid" }));
    plot.append(shape("text", { x: left - 4, y: y(value) + 3, "text-anchor": "end" }, String(value)));
  }
  plot.append(shape("text", { x: left, y: height - 2 }, "first step"));
  plot.append(shape("text", { x: width - 6, y: height - 2, "text-anchor": "end" }, `step ${steps.length}`));
  const points = steps.map((value, step) => ({ value, step })).filter((point) => point.value !== null);
  plot.append(shape("polyline", { points: points.map((p) => `${x(p.step)},${y(Number(p.value))}`).join(" "), class: "stepquant-line" }));
  for (const point of points) {
    const dot = shape("circle", { cx: x(point.step), cy: y(Number(point.value)), r: 2.5, class: "stepquant-dot" });
    dot.append(shape("title", {}, `step ${point.step + 1}: ${point.value} dB`));
    plot.append(dot);
  }
  part.append(plot);
  return part;
}

/** @param {Report} report @param {(picture: Picture) => string} addressOf */
function drawSlider({ pictures }, addressOf) {
  if (!pictures) return null;
  const part = section("Original (left) and quantized (right)");
  const frame = element("div", "stepquant-pair");
  const after = document.createElement("img"), before = document.createElement("img");
  Object.assign(after, { src: addressOf(pictures.after), alt: "quantized", draggable: false });
  Object.assign(before, { src: addressOf(pictures.before), alt: "original", draggable: false, className: "stepquant-before" });
  const slider = document.createElement("input");
  Object.assign(slider, { type: "range", min: "0", max: "100", value: "50", className: "stepquant-slider", ariaLabel: "original or quantized" });
  const show = () => (before.style.clipPath = `inset(0 ${100 - Number(slider.value)}% 0 0)`);
  slider.addEventListener("input", show);
  slider.addEventListener("pointerdown", (event) => event.stopPropagation()); // do not drag the node
  show();
  frame.append(after, before);
  part.append(frame, slider);
  return part;
}
