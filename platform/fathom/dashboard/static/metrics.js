// Prometheus text (version 0.0.4) and what follows from two readings of it.

const LINE = /^([a-zA-Z_:][\w:]*)(?:\{(.*)\})?\s+(\S+)/;
const LABEL = /(\w+)="((?:[^"\\]|\\.)*)"/g;
const ESCAPED = { "\\n": "\n", "\\\\": "\\", '\\"': '"' };

/** Samples by metric: name -> Map(labels as written -> {labels, value}). */
export function parse(text) {
  const found = new Map();
  for (const line of text.split("\n")) {
    const [, name, written = "", value] = LINE.exec(line) ?? [];
    if (!name) continue;
    const labels = {};
    for (const [, key, raw] of written.matchAll(LABEL))
      labels[key] = raw.replace(/\\[n\\"]/g, (mark) => ESCAPED[mark]);
    if (!found.has(name)) found.set(name, new Map());
    found.get(name).set(written, { labels, value: number(value) });
  }
  return found;
}

const number = (text) => (text === "+Inf" ? Infinity : text === "-Inf" ? -Infinity : Number(text));

export const samples = (reading, name) => [...(reading?.get(name)?.values() ?? [])];

export const total = (reading, name) => samples(reading, name).reduce((sum, each) => sum + each.value, 0);

/**
 * How much each series of a counter grew between two readings, as Prometheus reckons it: a counter
 * that fell was started anew, and a series that was not there before tells nothing yet.
 */
export function increases(before, after, name) {
  const found = [];
  for (const [written, { labels, value }] of after.get(name) ?? []) {
    const last = before.get(name)?.get(written)?.value;
    if (last === undefined) continue;
    found.push({ labels, value: value >= last ? value - last : value });
  }
  return found;
}

export const increase = (before, after, name) => increases(before, after, name).reduce((sum, each) => sum + each.value, 0);

/**
 * A quantile of what a histogram has counted between two readings, straight within its bucket, as
 * Prometheus' histogram_quantile; null where nothing was counted.
 */
export function quantile(before, after, name, q) {
  const counts = new Map();
  for (const { labels, value } of increases(before, after, `${name}_bucket`)) {
    const limit = number(labels.le);
    counts.set(limit, (counts.get(limit) ?? 0) + value);
  }
  const limits = [...counts.keys()].sort((a, b) => a - b);
  const all = counts.get(Infinity) ?? 0;
  if (!all) return null;
  const place = limits.findIndex((limit) => counts.get(limit) >= q * all);
  if (limits[place] === Infinity) return limits[place - 1] ?? null;
  const [low, below] = place ? [limits[place - 1], counts.get(limits[place - 1])] : [0, 0];
  const inside = counts.get(limits[place]) - below;
  return low + (limits[place] - low) * (inside ? (q * all - below) / inside : 1);
}

/** A ratio of two counters' growth; null where the lower one did not grow. */
export function ratio(before, after, upper, lower) {
  const below = increase(before, after, lower);
  return below > 0 ? increase(before, after, upper) / below : null;
}
