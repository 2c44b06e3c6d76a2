// Studies as MLflow has them: the front of each, and which of its points is served.

import { get, post } from "./api.js";
import { colour, draw, figure } from "./charts.js";
import { byId, confirmed, el, num, percent, table, time } from "./dom.js";

const AXES = { budget: "compute, as a share of full", tpot_ms: "predicted TPOT (ms)" };
const chart = figure("Pareto front", { tall: true });

let listed = null; // the answer of data/studies
let opened = null; // the answer of data/studies/ID
let serving = null; // the answer of /v1/operating_points
let chosen = null; // name of a point
let onServed = () => {};
let mayPromote = true;

/** Wire the view up. changed: called when other points are served. */
export function startStudies(changed) {
  onServed = changed;
  chart.node.querySelector("figcaption").hidden = true;
  chart.node.classList.remove("card");
  byId("front-chart").append(chart.node);
  byId("axis").addEventListener("change", showFront);
  byId("rollback").addEventListener("click", rollBack);
}

/** Whether this key may change what is served. */
export function setMayPromote(may) {
  mayPromote = may;
  byId("no-operator").hidden = may;
  if (listed) showServing(), showFront();
}

/** Read everything again. */
export async function refreshStudies() {
  const [studies, points] = await Promise.allSettled([get("dashboard/data/studies"), get("v1/operating_points")]);
  serving = points.status === "fulfilled" ? points.value : null;
  if (studies.status === "fulfilled") listed = studies.value;
  else listed = { studies: [], why: studies.reason.message };
  showServing();
  showList();
  if (!opened && listed.studies.length) await open(listed.studies[0].run_id);
  else showFront();
}

async function open(runId) {
  try {
    opened = await get(`dashboard/data/studies/${runId}`);
    chosen = null;
  } catch (error) {
    opened = { run_id: runId, front: [], figures: [], why: error.message };
  }
  showList();
  showFront();
}

function showServing() {
  const place = byId("serving");
  if (!serving) {
    place.replaceChildren(el("p", { class: "empty" }, "The server does not answer."));
    byId("rollback").hidden = true;
    return;
  }
  byId("rollback").hidden = !serving.can_roll_back || !mayPromote;
  const own = serving.data.find(({ id }) => id === serving.default);
  const facts = [
    ["Point", serving.default ?? "none: requests get the server's own setting"],
    ["Compute", own ? fields(own.compute) : null],
    ["Measured", own && own.measured.agreement !== undefined
      ? `agreement ${percent(own.measured.agreement, 2)}, exits ${percent(own.measured.exit_rate)}, speed-up × ${num(own.measured.predicted_speedup)} (predicted)` : null],
    ["Since", serving.since ? time(1000 * serving.since) : serving.data.length ? "the server's start" : null],
    ["From", serving.source ?? null],
  ].filter(([, value]) => value);
  place.replaceChildren(el("dl", { class: "facts" }, ...facts.flatMap(([name, value]) => [el("dt", {}, name), el("dd", {}, value)])));
}

const fields = (compute) => Object.entries(compute)
  .map(([name, value]) => `${name} ${typeof value === "number" ? num(value, 4) : value}`).join(", ");

function showList() {
  const place = byId("study-list");
  if (!listed.studies.length) {
    place.replaceChildren(el("p", { class: "empty" }, listed.why ?? "No study yet. `fathom tune study.yaml --mlflow URI` runs one."));
    return;
  }
  const linked = listed.studies.some((study) => study.url);
  const columns = [{ name: "Study" }, { name: "Begun" }, { name: "Status", left: true }, { name: "Trials" }, { name: "Hypervolume" }, ...(linked ? [{ name: "MLflow" }] : [])];
  const made = table(columns, listed.studies.map((study) => [
    el("button", { class: "linkish", type: "button", "aria-pressed": String(study.run_id === opened?.run_id), click: () => open(study.run_id) }, study.study),
    time(1000 * study.started), study.status.toLowerCase(), num(study.trials), num(study.hypervolume, 4),
    ...(linked ? [el("a", { href: study.url, target: "_blank", rel: "noreferrer" }, "run")] : []),
  ]));
  [...made.tBodies[0].rows].forEach((row, i) => row.classList.toggle("chosen", listed.studies[i].run_id === opened?.run_id));
  place.replaceChildren(made);
}

function showFront() {
  const any = Boolean(opened);
  byId("front-card").hidden = byId("points-card").hidden = !any;
  if (!any) return;
  byId("front-title").textContent = `Pareto front of ${opened.study ?? opened.run_id}`;
  showTable();
  if (opened.front.length || opened.figures.length) showChart();
}

function showChart() {
  const axis = byId("axis").value;
  // Points by what held-out requests say of them; trials by what they were chosen on.
  const held = opened.front.filter((row) => row.point);
  const at = (row) => (axis === "budget" ? row.held_out.budget : row.held_out.predicted_tpot_ms);
  const sorted = [...held].sort((a, b) => at(a) - at(b));
  const tone = (row) => colour(row.point === chosen ? "two" : "one");
  // Of a front in three dimensions, what is best in the two that are shown.
  let best = -Infinity;
  const edge = sorted.filter(({ held_out: own }) => own.agreement > best && (best = own.agreement, true));
  const agreement = (rows) => rows.map((row) => 100 * row.held_out.agreement);
  draw(
    chart,
    () => [
      { type: "scatter", mode: "markers", name: "trials", x: opened.figures.map((t) => t[axis]), y: opened.figures.map((t) => 100 * t.quality),
        marker: { color: colour("soft"), size: 5, opacity: 0.55 }, hovertemplate: "trial: %{y:.2f} % at %{x:.3g}<extra></extra>" },
      { type: "scatter", mode: "lines", name: "best on these two axes", x: edge.map(at), y: agreement(edge), line: { color: colour("one"), width: 1.25, shape: "hv" }, hoverinfo: "skip" },
      { type: "scatter", mode: "markers", name: "points, on held-out requests", x: sorted.map(at), y: agreement(sorted), text: sorted.map((row) => row.point), customdata: sorted.map((row) => row.point),
        marker: { color: sorted.map(tone), size: sorted.map((row) => (isServed(row) ? 15 : 9)), symbol: sorted.map((row) => (isServed(row) ? "star" : "circle")), opacity: 1 },
        hovertemplate: "%{text}: %{y:.2f} % at %{x:.3g}<extra></extra>" },
    ],
    () => ({ hovermode: "closest", margin: { l: 52, b: 40 }, xaxis: { title: AXES[axis] }, yaxis: { title: "agreement with the full model (%)", rangemode: "normal" } }),
    () => ({
      columns: [{ name: "Point" }, { name: AXES[axis] }, { name: "agreement" }],
      rows: sorted.map((row) => [row.point, num(at(row), 4), percent(row.held_out.agreement, 2)]),
    }),
  );
  if (!chart.plot.dataset.listens) {
    chart.plot.dataset.listens = "1";
    chart.plot.on("plotly_click", ({ points }) => {
      if (!points[0].customdata) return;
      chosen = points[0].customdata;
      showFront();
    });
  }
}

/** Whether the server has a row's point as its default: by name and by what it computes. */
const isServed = (row) => Boolean(opened.digest) && serving?.digest === opened.digest && serving.default === row.point;

function showTable() {
  const place = byId("front-table"), held = opened.front.filter((row) => row.point);
  if (!held.length) {
    place.replaceChildren(el("p", { class: "empty" }, opened.why ?? "No point keeps to the constraints, or the study is not done."));
    return;
  }
  const columns = [
    { name: "Point" }, { name: "Served", left: true }, { name: "Mode", left: true }, { name: "Policy", left: true }, { name: "Confidence", left: true }, { name: "λ or budget" }, { name: "Stack" },
    { name: "Agreement" }, { name: "Exits" }, { name: "Compute" }, { name: "TPOT" }, { name: "Speed-up" },
  ];
  const made = table(columns, held.map((row) => {
    const { setting, held_out: own } = row, place = setting.exit_threshold ?? setting.budget;
    return [
      row.point,
      isServed(row) ? el("strong", {}, "served")
        : el("button", { type: "button", "aria-label": `Promote ${row.point}`, "data-point": row.point, disabled: !serving || !mayPromote, click: () => promote(row) }, "Promote"),
      setting.mode, setting.policy, setting.confidence, place === undefined ? "follows" : num(place), num(setting.max_stack),
      percent(own.agreement, 2), percent(own.exit_rate), num(own.budget), `${num(own.predicted_tpot_ms)} ms`, `× ${num(own.predicted_speedup)}`,
    ];
  }), `Points of ${opened.study}`);
  [...made.tBodies[0].rows].forEach((row, i) => row.classList.toggle("chosen", held[i].point === chosen));
  place.replaceChildren(made);
}

async function promote(row) {
  const own = row.held_out;
  const yes = await confirmed(
    `Promote ${row.point}?`,
    `Requests that name no compute get ${row.point} of ${opened.study}: ${fields(row.setting)}. Agreement ${percent(own.agreement, 2)} on held-out requests, ` +
      `predicted × ${num(own.predicted_speedup)}. Requests under way end with what they began with.`,
    "Promote",
  );
  if (yes) await change(() => post(`dashboard/data/studies/${opened.run_id}/promote`, { point: row.point }));
}

async function rollBack() {
  const yes = await confirmed("Roll back?", "The server goes back to what it served before the last promotion.", "Roll back");
  if (yes) await change(() => post("dashboard/data/rollback", {}));
}

async function change(work) {
  const banner = byId("banner");
  try {
    await work();
    banner.hidden = true;
  } catch (error) {
    banner.textContent = error.message;
    banner.hidden = false;
  }
  await refreshStudies();
  onServed();
}
