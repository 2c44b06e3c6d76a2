// The playground: streams an answer, each token coloured by the layers that decided it.

import { ask, events, get } from "./api.js";
import { byId, duration, el, num, percent, table, tiles } from "./dom.js";
import { TokenText } from "./tokens.js";

const MODES = {
  default: "As requests get it that say nothing.",
  full: "Every token runs all layers.",
  exact: "Early tokens are checked: the same output as full.",
  rollback: "Early tokens stay while the deep stage finds them likely enough.",
  free: "Early tokens stay; their keys and values are computed exactly, later.",
  copy: "Early tokens stay, and their deep keys and values are copied from the exit (CALM).",
};

let model = null; // card of /v1/models
let abort = null;
const runs = [];

/** Wire the form up. */
export function startPlayground() {
  byId("modes").append(...Object.keys(MODES).map((mode) =>
    el("label", {}, el("input", { type: "radio", name: "mode", value: mode, checked: mode === "default" }), el("span", {}, mode))));
  byId("modes").addEventListener("change", showHint);
  byId("knob").addEventListener("change", showKnob);
  byId("numbers").addEventListener("change", (event) => byId("answer").classList.toggle("numbered", event.target.checked));
  byId("ask").addEventListener("submit", (event) => {
    event.preventDefault();
    if (!abort) stream();
  });
  byId("prompt").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) byId("ask").requestSubmit();
  });
  byId("stop").addEventListener("click", () => abort?.abort());
  showHint();
  showRuns();
}

/** The model that is asked. */
export const setModel = (card) => { model = card; };

/** Read the operating points that can be named. */
export async function readPoints() {
  const { data } = await get("v1/operating_points");
  const select = byId("point"), chosen = select.value;
  select.replaceChildren(el("option", { value: "" }, "none"), ...data.map(({ id }) => el("option", { value: id }, id)));
  select.value = data.some(({ id }) => id === chosen) ? chosen : "";
  select.disabled = !data.length;
}

const mode = () => new FormData(byId("ask")).get("mode");

function showHint() {
  byId("mode-hint").textContent = MODES[mode()];
}

function showKnob() {
  const knob = byId("knob").value, input = byId("knob-value");
  input.disabled = !knob;
  input.required = Boolean(knob);
  const starts = { exit_threshold: [0.8, "λ, 0 to 1"], budget: [0.7, "Share of full, 0 to 1"], risk: [0.05, "Share of tokens, 0 to 1"] };
  const [start, label] = starts[knob] ?? [input.value, "Value"];
  input.value = start;
  byId("knob-label").textContent = label;
}

function request() {
  const compute = {}, knob = byId("knob").value, point = byId("point").value;
  if (mode() !== "default") compute.mode = mode();
  if (point) compute.operating_point = point;
  if (knob) compute[knob] = byId("knob-value").valueAsNumber;
  return {
    model: model?.id ?? "",
    messages: [{ role: "user", content: byId("prompt").value }],
    max_tokens: byId("max-tokens").valueAsNumber,
    temperature: byId("temperature").valueAsNumber,
    stream: true,
    stream_options: { include_usage: true },
    depths: true,
    logprobs: true, // brings each token's own text
    ...(Object.keys(compute).length ? { compute } : {}),
  };
}

async function stream() {
  const body = request();
  const text = new TokenText(byId("answer"), byId("legend"), model?.num_layers);
  const voice = new Voice(byId("spoken"));
  abort = new AbortController();
  busy(true);
  fail(null);
  byId("figures").replaceChildren();
  const start = performance.now();
  let first = null, usage = null, stopped = false;
  try {
    const answer = await ask("v1/chat/completions", {
      method: "POST", signal: abort.signal, body: JSON.stringify(body), headers: { "Content-Type": "application/json" },
    });
    for await (const chunk of events(answer)) {
      if (chunk.error) throw new Error(chunk.error.message);
      usage = chunk.usage ?? usage;
      for (const choice of chunk.choices) {
        if (choice.depths?.length) first ??= performance.now();
        voice.say(text.add(choice));
      }
      showFigures(text, start, first, null);
    }
    text.end();
  } catch (error) {
    stopped = error.name === "AbortError";
    if (!stopped) fail(error.message);
  }
  voice.end(stopped ? "Stopped." : "");
  abort = null;
  busy(false);
  if (!text.depths.length) return;
  const run = showFigures(text, start, first, usage?.compute);
  runs.unshift({ ...run, body, stopped, compute: usage?.compute });
  showRuns();
}

function busy(is) {
  byId("send").disabled = is;
  byId("stop").disabled = !is;
  byId("answer").setAttribute("aria-busy", String(is));
  if (is && document.activeElement === document.body) byId("stop").focus();
}

function fail(message) {
  byId("failure").hidden = message === null;
  byId("failure").textContent = message ?? "";
}

function showFigures(text, start, first, compute) {
  const seconds = (performance.now() - start) / 1000;
  const ttft = first === null ? null : (first - start) / 1000;
  const [wait, waitUnit] = duration(ttft);
  const count = text.depths.length;
  const early = text.depths.filter((depth) => depth < text.layers).length;
  const mean = count ? text.depths.reduce((a, b) => a + b, 0) / count : null;
  tiles(byId("figures"), [
    { label: "Tokens", value: num(count), note: `in ${num(seconds)} s` },
    { label: "TTFT", value: wait, unit: waitUnit },
    { label: "Rate", value: num(count / seconds), unit: "tok/s" },
    { label: "Exits", value: percent(compute ? compute.exit_rate : count ? early / count : null), note: `${early} tokens` },
    { label: "Mean depth", value: num(compute?.mean_depth ?? mean), unit: text.layers ? `of ${text.layers}` : "" },
    { label: "Layers/token", value: num(compute?.layers_per_token), note: compute ? "with drafts" : "at the end" },
    { label: "Accepted", value: percent(compute?.acceptance_rate), note: compute ? `${compute.drafted} drafts` : "at the end" },
  ]);
  return { count, seconds, ttft };
}

function showRuns() {
  const place = byId("runs");
  if (!runs.length) {
    place.replaceChildren(el("p", { class: "empty" }, "Each answer adds a line, so that modes can be compared."));
    return;
  }
  const columns = [
    { name: "Asked for" }, { name: "Ran as", left: true }, { name: "Tokens" }, { name: "TTFT" }, { name: "Tokens/s" },
    { name: "Layers/token" }, { name: "Mean depth" }, { name: "Exits" }, { name: "Accepted" },
  ];
  place.replaceChildren(table(columns, runs.map(({ body, compute, count, seconds, ttft, stopped }) => [
    Object.entries(body.compute ?? { default: "" }).map(([key, value]) => `${key} ${value}`.trim()).join(", "),
    (compute?.mode ?? "–") + (stopped ? ", stopped" : ""), num(count), duration(ttft).join(" "), num(count / seconds),
    num(compute?.layers_per_token), num(compute?.mean_depth), percent(compute?.exit_rate), percent(compute?.acceptance_rate),
  ])));
}

/** Tells an answer to a screen reader sentence by sentence: token by token nobody could follow. */
class Voice {
  #place;
  #rest = "";

  constructor(place) {
    this.#place = place;
    place.replaceChildren();
  }

  say(text) {
    this.#rest += text;
    const end = this.#rest.search(/[.!?\n]\s/);
    if (end < 0) return;
    this.#place.append(el("span", {}, this.#rest.slice(0, end + 2)));
    this.#rest = this.#rest.slice(end + 2);
  }

  end(last) {
    this.#place.append(el("span", {}, `${this.#rest} ${last}`));
    this.#rest = "";
  }
}
