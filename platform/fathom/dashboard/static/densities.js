// Confidences as exit policies count them, and the beta mixture that λ is read off.

export const KINDS = ["disagrees", "agrees", "unlabelled"]; // rows of a histogram's counts

const GROUPS = 64;
const STEPS = 512;

/** The confidence at a place of the counts' scale, u = (2 / pi) arcsin(sqrt(c)). */
export const confidenceAt = (u) => Math.sin((Math.PI * u) / 2) ** 2;

/** The inverse of confidenceAt. */
export const placeOf = (c) => (2 / Math.PI) * Math.asin(Math.sqrt(Math.min(1, Math.max(0, c))));

/** Densities over u by kind: {u: [64], agrees, disagrees, unlabelled}; together they have area 1. */
export function counted(histogram) {
  const size = histogram.bins / GROUPS;
  const all = histogram.counts.flat().reduce((a, b) => a + b, 0) || 1;
  const found = { u: Array.from({ length: GROUPS }, (_, i) => (i + 0.5) / GROUPS) };
  KINDS.forEach((kind, row) => {
    found[kind] = found.u.map((_, i) => {
      const inside = histogram.counts[row].slice(i * size, (i + 1) * size).reduce((a, b) => a + b, 0);
      return (inside / all) * GROUPS;
    });
  });
  return found;
}

/** A component of the mixture over u: its beta density times dc/du, with this area. */
export function component({ alpha, beta }, area) {
  const u = Array.from({ length: STEPS }, (_, i) => (i + 0.5) / STEPS);
  const logs = u.map((at) => {
    const c = confidenceAt(at);
    return (alpha - 1) * Math.log(c) + (beta - 1) * Math.log1p(-c) + Math.log(Math.sin(Math.PI * at));
  });
  const top = Math.max(...logs);
  const raw = logs.map((value) => Math.exp(value - top));
  const sum = raw.reduce((a, b) => a + b, 0);
  return { u, density: raw.map((value) => (area * STEPS * value) / sum) };
}
