// Puts the views together: which one is seen, and whether the server is there.

import { get } from "./api.js";
import { byId, el } from "./dom.js";
import { refreshLive, setLayers, startLive } from "./live.js";
import { readPoints, setModel, startPlayground } from "./playground.js";
import { refreshStudies, setMayPromote, startStudies } from "./studies.js";

const VIEWS = ["live", "playground", "studies"];
let known = false; // whether the model is

function showView() {
  const name = VIEWS.includes(location.hash.slice(1)) ? location.hash.slice(1) : VIEWS[0];
  for (const each of VIEWS) byId(`view-${each}`).hidden = each !== name;
  for (const link of document.querySelectorAll("nav a")) {
    if (link.hash === `#${name}`) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  if (name === "live") refreshLive();
  if (name === "studies") refreshStudies();
}

async function onState({ up, replicas, error }) {
  const status = byId("status");
  const text = up ? `${replicas} ${replicas === 1 ? "replica" : "replicas"} up` : "unreachable";
  const good = up && replicas > 0;
  if (status.textContent !== text) status.textContent = text;
  status.className = `pill ${good ? "good" : "bad"}`;
  if (!up) {
    byId("banner").textContent = `${error.message} Trying again every 2 seconds.`;
    byId("banner").hidden = false;
    byId("banner").dataset.about = "server";
  } else if (byId("banner").dataset.about === "server") {
    byId("banner").hidden = true;
    delete byId("banner").dataset.about;
    if (!byId("view-studies").hidden) refreshStudies();
  }
  if (good && !known) {
    known = true;
    try {
      await introduce();
    } catch {
      known = false; // the next reading tries again
    }
  }
}

async function introduce() {
  const card = (await get("v1/models")).data.find((each) => each.num_layers !== undefined);
  byId("model").textContent = card.id;
  byId("model").title = `${card.id}: ${card.num_layers} layers, exit after ${card.exit_layer}`;
  document.title = `Fathom: ${card.id}`;
  setLayers(card.num_layers);
  setModel(card);
  await readPoints();
}

async function showSite() {
  const site = await get("dashboard/data/site");
  byId("logout").hidden = !site.can_log_out;
  setMayPromote(site.can_promote);
  byId("links").append(...Object.entries(site.links).map(([name, url]) => el("a", { href: url, target: "_blank", rel: "noreferrer" }, name)));
}

startPlayground();
startStudies(readPoints);
addEventListener("hashchange", () => {
  showView();
  byId("main").focus({ preventScroll: true });
});
showView();
showSite();
startLive(onState);
