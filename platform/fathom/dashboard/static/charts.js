// Charts in the page's own colours, each with a table that says the same.

import { el, table } from "./dom.js";

const CONFIG = { displayModeBar: false, responsive: true, showTips: false };
const drawn = new Map(); // plot -> what draws it again

document.addEventListener("scheme", () => drawn.forEach((draw) => draw()));

/** A colour of the style sheet, as the scheme has it now. */
export const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();

/** A figure with its caption, what its colours mean, an empty plot, and a table below. */
export function figure(title, { note = "", tall = false } = {}) {
  const plot = el("div", { class: tall ? "plot tall" : "plot", "aria-hidden": "true" });
  const small = el("small", {}, note);
  const keys = el("ul", { class: "keys" });
  const values = el("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": `${title}, as a table` });
  const details = el("details", {}, el("summary", {}, "Table"), values);
  const node = el("figure", { class: "card" }, el("figcaption", {}, title, small), keys, plot, details);
  return { node, title, plot, small, keys, details, values };
}

/**
 * Draw, or draw again in place.
 *
 * traces: makes plotly's traces, and layout its layout, so that a change of scheme can ask for them
 * again.
 * rows: makes the table: {columns, rows}; asked for only while it is open.
 */
export function draw(target, traces, layout, rows) {
  const { plot, keys, details, values, title } = target;
  const put = () => {
    if (plot.classList.contains("none")) {
      plot.classList.remove("none");
      plot.replaceChildren();
    }
    const made = traces();
    globalThis.Plotly.react(plot, made, filled(layout()), CONFIG);
    explain(keys, made);
  };
  const tell = () => {
    if (!details.open) return;
    const { columns, rows: lines } = rows();
    values.replaceChildren(table(columns, lines, title));
  };
  drawn.set(plot, put);
  details.ontoggle = tell;
  put();
  tell();
}

/** Say why there is nothing to draw. */
export function blank(target, why) {
  if (target.plot.textContent === why && target.plot.classList.contains("none")) return;
  drawn.delete(target.plot);
  globalThis.Plotly.purge(target.plot);
  target.plot.classList.add("none");
  target.plot.textContent = why;
  target.keys.replaceChildren();
  target.values.replaceChildren(why);
}

/** What each trace is, beside a sample of it; one alone is the title's. */
function explain(keys, traces) {
  const wanted = traces.length > 1 ? traces : [];
  const marks = wanted.map(({ name, type, mode, line: own, marker }) => ({
    name, shape: type === "bar" ? "bar" : mode === "markers" ? "dot" : own?.dash ? "dashed" : "solid",
    tone: own?.color ?? [marker.color].flat()[0],
  }));
  const said = JSON.stringify(marks);
  if (keys.dataset.said === said) return;
  keys.dataset.said = said;
  keys.replaceChildren(...marks.map(({ name, shape, tone }) => {
    const sample = el("i", { class: shape });
    sample.style.color = tone;
    return el("li", {}, sample, name);
  }));
}

/** A line; names of colours are the style sheet's. */
export const line = (name, x, y, tone, more = {}) => ({
  type: "scatter", mode: "lines", name, x, y, connectgaps: false,
  line: { color: colour(tone), width: 1.75, ...more.line },
  ...Object.fromEntries(Object.entries(more).filter(([key]) => key !== "line")),
});

function filled({ xaxis = {}, yaxis = {}, margin = {}, ...rest }) {
  const text = colour("text"), soft = colour("soft"), grid = colour("grid");
  const axis = {
    gridcolor: grid, linecolor: colour("line"), zeroline: false, automargin: false,
    tickfont: { size: 11, color: soft }, fixedrange: true,
  };
  const named = (own) => (own.title ? { title: { text: own.title, font: { size: 11, color: soft }, standoff: 6 } } : {});
  return {
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    font: { family: "system-ui, 'Segoe UI', Roboto, 'DejaVu Sans', sans-serif", size: 11, color: text },
    margin: { l: 40, r: 8, t: 8, b: 24, ...margin },
    showlegend: false,
    hovermode: "x unified",
    hoverlabel: { bgcolor: colour("card"), bordercolor: colour("line"), font: { color: text, size: 11 } },
    ...rest,
    xaxis: { ...axis, ...xaxis, ...named(xaxis) },
    yaxis: { ...axis, rangemode: "tozero", ...yaxis, ...named(yaxis) },
  };
}
