// What the shadow sees of each operating point, and whether traffic has drifted from its study.

import { byId, el, num, percent, table } from "./dom.js";
import { samples } from "./metrics.js";

const FIGURES = {
  agreement: "shadow_agreement", least: "shadow_least_agreement", exits: "shadow_exit_rate",
  layers: "shadow_layers_per_token", psi: "shadow_psi", completions: "shadow_completions_total", alert: "drift_alert",
};
const COLUMNS = [
  { name: "Operating point" }, { name: "Agreement" }, { name: "At least", title: "below this the alarm is raised" },
  { name: "Exits" }, { name: "Layers/token" }, { name: "PSI", title: "of confidences; above 0.1 they have changed" },
  { name: "Completions" }, { name: "Drift", left: true },
];

/** The shadow's figures by operating point; none where the server has no shadow. */
export function shadowFigures(reading) {
  const found = new Map();
  for (const [key, name] of Object.entries(FIGURES)) {
    for (const { labels, value } of samples(reading, `fathom_${name}`)) {
      const point = labels.operating_point;
      if (!found.has(point)) found.set(point, { point });
      found.get(point)[key] = value;
    }
  }
  return [...found.values()];
}

/** Show them below the replicas. */
export function showShadow(reading) {
  const found = shadowFigures(reading);
  byId("shadow-card").hidden = !found.length;
  if (!found.length) return;
  byId("shadow").replaceChildren(table(COLUMNS, found.map((each) => [
    each.point || "server's default", percent(each.agreement, 2), percent(each.least, 2), percent(each.exits), num(each.layers),
    num(each.psi), num(each.completions), each.alert ? el("strong", { class: "bad" }, "drifted: run the study again") : "none",
  ])));
}
