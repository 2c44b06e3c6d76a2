// The live view: reads /metrics every two seconds and /v1/exits now and then, while it is seen.

import { ask, get } from "./api.js";
import { blank, colour, draw, figure, line } from "./charts.js";
import { component, confidenceAt, counted, KINDS, placeOf } from "./densities.js";
import { byId, duration, el, num, percent, table, tiles } from "./dom.js";
import { byReplica, figures, lifetime } from "./figures.js";
import { parse } from "./metrics.js";
import { showShadow } from "./shadow.js";

const EVERY_MS = 2000;
const KEEP_MS = 5 * 60 * 1000;
const EXITS_EVERY = 3;
const TONES = ["one", "two", "three", "four", "five"];
const LOG_TICKS = [0.1, 1, 10, 100, 1000, 10000].flatMap((each) => [each, 2 * each, 5 * each]);
const TICKS = [0, 0.1, 0.5, 0.9, 0.99];

const readings = []; // {at, reading}
const points = []; // figures of every reading
let layersOfModel = null;
let exits = null;
let measure = null;
let turn = 0;

const plots = {
  tokens: figure("Tokens", { note: "tokens/s" }),
  latency: figure("Latency", { note: "ms, last 30 s" }),
  exits: figure("Exits and acceptance", { note: "%" }),
  layers: figure("Layers per token", { note: "drafts included" }),
  lambda: figure("Exit threshold λ", { note: "mean of replicas" }),
  density: figure("Confidence of drafts", { note: "density, beta mixture" }),
  cache: figure("KV reuse", { note: "%" }),
  store: figure("KV store", { note: "tokens/s" }),
};
const chooser = el("select", { "aria-label": "Confidence measure", change: (event) => { measure = event.target.value; showExits(); } });

/** Draw the view, and keep it up to date for as long as the page is open. */
export function startLive(onState) {
  byId("charts").append(...Object.values(plots).map((each) => each.node));
  plots.density.small.before(chooser);
  chooser.hidden = true;
  const step = async () => {
    if (document.hidden) return;
    try {
      await read();
      onState({ up: true, replicas: points.at(-1).replicas });
      show();
    } catch (error) {
      onState({ up: false, error });
    }
  };
  document.addEventListener("visibilitychange", step);
  const loop = async () => {
    await step();
    setTimeout(loop, EVERY_MS);
  };
  loop();
}

/** How many layers the model has; charts of depth need it. */
export const setLayers = (count) => { layersOfModel = count; };

async function read() {
  const reading = parse(await (await ask("metrics")).text());
  if (turn++ % EXITS_EVERY === 0) exits = await get("v1/exits");
  const at = Date.now();
  readings.push({ at, reading });
  while (at - readings[0].at > KEEP_MS) readings.shift();
  points.push(figures(readings));
  while (at - points[0].at > KEEP_MS) points.shift();
}

function show() {
  if (byId("view-live").hidden) return;
  showTiles();
  showCharts();
  showExits();
  showReplicas();
  showShadow(readings.at(-1).reading);
}

/** The view again, after it was hidden. */
export const refreshLive = () => { if (points.length) show(); };

function showTiles() {
  const now = points.at(-1), ever = lifetime(readings.at(-1).reading);
  const either = (name, shown) =>
    now[name] !== null ? { value: shown(now[name]), note: "now" }
      : { value: shown(ever[name]), note: ever[name] === null ? "nothing yet" : "since start" };
  const latency = (label, name) => {
    const [value, unit] = duration(now[`${name}50`]);
    const [high, highUnit] = duration(now[`${name}95`]);
    return { label, value, unit, note: value === "–" ? "no request in 30 s" : `p95 ${high} ${highUnit}` };
  };
  const layers = either("layers", num);
  tiles(byId("tiles"), [
    { label: "Throughput", value: num(now.tokens ?? 0), unit: "tokens/s", note: `${ever.tokens.toLocaleString("en")} in all` },
    latency("TTFT, median", "ttft"),
    latency("TPOT, median", "tpot"),
    { label: "Exit rate", ...either("exits", percent) },
    { label: "Drafts accepted", ...either("accepted", percent) },
    { label: "Layers per token", ...layers, unit: layersOfModel ? `of ${layersOfModel}` : "" },
    { label: "Prefix cache hits", ...either("cached", percent) },
    { label: "KV store hits", value: num(now.stored ?? 0), unit: "tokens/s", note: `${ever.stored.toLocaleString("en")} in all` },
    { label: "KV blocks in use", value: percent(now.kv), note: "fullest replica" },
    { label: "Requests", value: num(now.running), unit: "running", note: `${num(now.waiting)} waiting` },
    { label: "Replicas", value: num(now.replicas), unit: "up" },
    lambdaTile(now.thresholds),
  ]);
}

function lambdaTile(thresholds) {
  const [name, value] = Object.entries(thresholds)[0] ?? ["no policy has one yet", null];
  return { label: "Exit threshold λ", value: value === null ? "–" : value.toFixed(3), note: name };
}

function showCharts() {
  const x = points.map((each) => new Date(each.at));
  const first = points[0].at, last = points.at(-1).at;
  const xaxis = { type: "date", tickformat: "%H:%M:%S", nticks: 6, range: [Math.min(first, last - 60000), last] };
  const lines = (target, series, layout = {}) => {
    if (series.every(([, values]) => values.every((value) => value === null))) {
      blank(target, "No traffic in the last minutes");
      return;
    }
    draw(
      target,
      () => series.map(([name, values, tone, more]) => line(name, x, values, tone, more)),
      () => ({ xaxis, ...layout }),
      () => ({
        columns: [{ name: "Time" }, ...series.map(([name]) => ({ name }))],
        rows: points.map((each, i) => [new Date(each.at).toLocaleTimeString("en-GB"), ...series.map(([, values]) => num(values[i]))]).reverse().slice(0, 30),
      }),
    );
  };
  const of = (name, factor = 1) => points.map((each) => (each[name] === null ? null : factor * each[name]));
  const dash = { line: { dash: "dot" } };
  lines(plots.tokens, [["generated", of("tokens"), "one"], ["prompt", of("prompts"), "three", dash]]);
  lines(plots.latency, [
    ["TTFT p50", of("ttft50", 1000), "one"], ["TTFT p95", of("ttft95", 1000), "one", dash],
    ["TPOT p50", of("tpot50", 1000), "two"], ["TPOT p95", of("tpot95", 1000), "two", dash],
  ], { yaxis: { type: "log", rangemode: "normal", tickvals: LOG_TICKS, ticktext: LOG_TICKS.map(String) } });
  lines(plots.exits, [["exit rate", of("exits", 100), "one"], ["drafts accepted", of("accepted", 100), "two"]], { yaxis: { range: [0, 102] } });
  lines(plots.layers, [
    ["layers per token", of("layers"), "one"],
    ...(layersOfModel ? [["full depth", points.map(() => layersOfModel), "soft", dash]] : []),
  ]);
  lines(plots.cache, [["prefix cache hits", of("cached", 100), "one"], ["KV blocks in use", of("kv", 100), "two"]], { yaxis: { range: [0, 102] } });
  lines(plots.store, [["found in the KV store", of("stored"), "three"]]);
  const names = [...new Set(points.flatMap((each) => Object.keys(each.thresholds)))].sort();
  if (names.length)
    lines(plots.lambda, names.map((name, i) => [
      name, points.map((each) => each.thresholds[name] ?? null), TONES[i % TONES.length],
    ]), { yaxis: { range: [0, 1.02] } });
  else blank(plots.lambda, "No policy has learned a threshold yet");
}

function showExits() {
  const measures = exits?.merged.measures ?? {};
  const names = Object.keys(measures);
  chooser.hidden = names.length < 2;
  if (!names.length) {
    blank(plots.density, "No draft seen yet: stream something in mode exact, free or rollback");
    return;
  }
  if (!names.includes(measure)) measure = names[0];
  if (chooser.options.length !== names.length || names.some((name, i) => chooser.options[i].value !== name))
    chooser.replaceChildren(...names.map((name) => el("option", { value: name }, name)));
  chooser.value = measure;
  const { histogram, mixture, adaptive_threshold: lambda, rows } = measures[measure];
  const bars = counted(histogram);
  const tones = { agrees: "one", disagrees: "two", unlabelled: "soft" };
  const fitted = !mixture.fallback;
  const parts = { agrees: mixture.weight, disagrees: 1 - mixture.weight };
  draw(
    plots.density,
    () => [
      ...KINDS.filter((kind) => rows[kind]).map((kind) => ({
        type: "bar", name: `${kind} (${rows[kind].toLocaleString("en")})`, x: bars.u, y: bars[kind],
        marker: { color: colour(tones[kind]), opacity: 0.45 }, hoverinfo: "skip",
      })),
      ...(fitted ? Object.entries(parts) : []).map(([kind, area]) => {
        const { u, density } = component(mixture[kind], area);
        return line(`beta, ${kind}`, u, density, tones[kind], { hoverinfo: "skip" });
      }),
    ],
    () => ({
      barmode: "stack", bargap: 0, hovermode: false,
      xaxis: { range: [0, 1], tickvals: TICKS.map(placeOf), ticktext: TICKS.map(String), tickangle: 0, showgrid: false },
      yaxis: { showticklabels: false, range: [0, 1.08 * Math.max(...bars.u.map((_, i) => KINDS.reduce((sum, kind) => sum + bars[kind][i], 0)))] },
      margin: { l: 8 },
      shapes: [{ type: "line", x0: placeOf(lambda), x1: placeOf(lambda), yref: "paper", y0: 0, y1: 1, line: { color: colour("text"), width: 1.5, dash: "dash" } }],
      annotations: [{ x: placeOf(lambda), yref: "paper", y: 0.98, text: `λ of the fit ${lambda.toFixed(3)}`, showarrow: false, xanchor: placeOf(lambda) > 0.5 ? "right" : "left", xshift: placeOf(lambda) > 0.5 ? -4 : 4, font: { size: 11, color: colour("text") } }],
    }),
    () => ({
      columns: [{ name: "Confidence" }, ...KINDS.map((kind) => ({ name: `${kind}, density` }))],
      rows: bars.u.map((u, i) => [confidenceAt(u).toFixed(4), ...KINDS.map((kind) => num(bars[kind][i]))]),
    }),
  );
}

function showReplicas() {
  const now = readings.at(-1), before = readings.at(-4) ?? readings[0];
  const found = byReplica(before.reading, now.reading, (now.at - before.at) / 1000);
  const stages = found.some((each) => each.flush !== undefined);
  const ms = (seconds) => (seconds === undefined ? "–" : `${num(1000 * seconds)} ms`);
  const columns = [
    { name: "Replica" }, { name: "Running" }, { name: "Waiting" }, { name: "Tokens/s" }, { name: "KV in use" },
    { name: "Exit rate", title: "since its start" }, { name: "Accepted", title: "since its start" },
    { name: "Layers/token", title: "since its start" },
    ...(stages ? [{ name: "Flush" }, { name: "Queue" }, { name: "Deep pass" }] : []),
  ];
  byId("replicas").replaceChildren(found.length ? table(columns, found.map((each) => [
    el("code", {}, each.replica), num(each.running), num(each.waiting), num(each.rate), percent(each.kv),
    percent(each.exits), percent(each.accepted), num(each.layers),
    ...(stages ? [ms(each.flush), ms(each.queue), ms(each.deep)] : []),
  ])) : el("p", { class: "empty" }, "No replica answers."));
}
