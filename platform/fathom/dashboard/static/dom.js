// Elements, and numbers as people read them. Nothing here takes HTML: text stays text.

export const byId = (id) => document.getElementById(id);

/** An element; attributes of null or false are left out, functions become listeners. */
export function el(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") made.addEventListener(name, value);
    else if (value !== null && value !== undefined && value !== false)
      made.setAttribute(name, value === true ? "" : value);
  }
  made.append(...children.filter((child) => child !== null));
  return made;
}

/** A number with so many significant digits, or a dash for none. */
export function num(value, digits = 3) {
  if (value === null || value === undefined || !Number.isFinite(value)) return "–";
  if (Number.isInteger(value)) return value.toLocaleString("en");
  const size = Math.floor(Math.log10(Math.abs(value))) + 1;
  const decimals = Math.min(6, Math.max(0, digits - size));
  return value.toLocaleString("en", { maximumFractionDigits: decimals, minimumFractionDigits: Math.min(decimals, 1) });
}

const known = (value) => value !== null && value !== undefined && Number.isFinite(value);

export const percent = (share, decimals = 1) => (known(share) ? `${(100 * share).toFixed(decimals)} %` : "–");

/** [value, unit] of seconds: milliseconds up to one second. */
export function duration(seconds) {
  if (!known(seconds)) return ["–", ""];
  return seconds < 1 ? [num(1000 * seconds), "ms"] : [num(seconds), "s"];
}

export function time(milliseconds) {
  return new Date(milliseconds).toLocaleString("en-GB", { dateStyle: "medium", timeStyle: "short" });
}

/** Replace a list of tiles; each is {label, value, unit, note}. */
export function tiles(list, entries) {
  // Texts are changed in place: a reader of the page must not lose the place every other second.
  while (list.children.length > entries.length) list.lastElementChild.remove();
  entries.forEach(({ label, value, unit = "", note = "" }, place) => {
    let tile = list.children[place];
    if (!tile) {
      tile = el("div", {}, el("dt"), el("dd", { class: "value" }), el("dd", { class: "note" }));
      list.append(tile);
    }
    const [name, shown, below] = tile.children;
    name.textContent = label;
    shown.replaceChildren(value, unit ? el("small", {}, ` ${unit}`) : "");
    below.textContent = note;
  });
}

/** A table; a column is {name, left, title}, a row a list of texts or elements. */
export function table(columns, rows, caption) {
  const head = columns.map((c) => el("th", { scope: "col", class: c.left ? "left" : null, title: c.title }, c.name));
  const body = rows.map((row) =>
    el("tr", {}, ...row.map((cell, i) => el("td", { class: columns[i].left ? "left" : null }, cell ?? "–"))),
  );
  return el(
    "table", {},
    caption ? el("caption", { class: "visually-hidden" }, caption) : null,
    el("thead", {}, el("tr", {}, ...head)),
    el("tbody", {}, ...body),
  );
}

/** Ask before something is done; the answer is true or false. */
export function confirmed(title, text, yes) {
  const dialog = byId("confirm");
  byId("confirm-title").textContent = title;
  byId("confirm-text").textContent = text;
  byId("confirm-yes").textContent = yes;
  dialog.returnValue = "no";
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => resolve(dialog.returnValue === "yes"), { once: true });
  });
}
