// An answer's text, token by token, each with the number of layers that decided it.

import { el } from "./dom.js";

const STEPS = 5;

/** The step of the colours for a depth; the same five as `fathom generate` has. */
export const step = (depth, layers) => Math.min(STEPS, Math.max(1, 1 + Math.floor(((depth - 1) * STEPS) / layers)));

export class TokenText {
  depths = [];
  #place;
  #legend;
  #due = []; // tokens whose text has not come: {size, depth}
  #known;

  /** layers: of the model; without it, the most that a token needed. */
  constructor(place, legend, layers) {
    this.#place = place;
    this.#legend = legend;
    this.#known = layers;
    place.replaceChildren();
    legend.replaceChildren();
  }

  get layers() {
    return this.#known ?? Math.max(1, ...this.depths);
  }

  /**
   * Take a chunk's choice; returns its text. Text may lag behind its tokens (stop strings, characters
   * that span tokens), so each token notes how much it is going to bring.
   */
  add(choice) {
    const tokens = choice.logprobs?.content ?? [];
    (choice.depths ?? []).forEach((depth, i) => {
      this.depths.push(depth);
      const text = tokens[i]?.token ?? "";
      // Half a character has no text of its own: what it is part of goes to its neighbours.
      this.#due.push({ size: text.includes("\ufffd") ? 0 : text.length, depth });
    });
    const content = choice.delta?.content ?? "";
    this.#show(content);
    if (choice.depths?.length) this.#explain();
    return content;
  }

  /** Say that nothing more will come. */
  end() {
    this.#explain();
  }

  #show(content) {
    let rest = content;
    while (rest) {
      while (this.#due.length > 1 && !this.#due[0].size) this.#due.shift();
      const next = this.#due[0];
      const size = next?.size ? Math.min(next.size, rest.length) : rest.length;
      this.#append(rest.slice(0, size), next?.depth ?? this.depths.at(-1));
      rest = rest.slice(size);
      if (next && (next.size -= size) <= 0) this.#due.shift();
    }
  }

  #append(text, depth) {
    if (!depth) {
      this.#place.append(text);
      return;
    }
    const early = depth < this.layers;
    this.#place.append(el("span", {
      class: `tok d${step(depth, this.layers)}${early ? " early" : ""}`,
      title: `${depth} of ${this.layers} layers${early ? ", left early" : ""}`,
      "data-depth": depth,
    }, text));
  }

  #explain() {
    const counts = new Map();
    for (const depth of this.depths) counts.set(depth, (counts.get(depth) ?? 0) + 1);
    const sorted = [...counts].sort(([a], [b]) => a - b);
    this.#legend.replaceChildren(...sorted.map(([depth, count]) => {
      const early = depth < this.layers;
      return el("span", {},
        el("i", { class: `tok d${step(depth, this.layers)}${early ? " early" : ""}` }, String(depth)),
        `layers${early ? " (exit)" : ""}: ${count}`);
    }));
  }
}
