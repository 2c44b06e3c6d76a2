// Runs before the page is drawn, so that it never flashes in the other scheme.
"use strict";
(() => {
  const system = matchMedia("(prefers-color-scheme: dark)");
  const chosen = () => localStorage.getItem("fathom-scheme") ?? "auto";
  const apply = () => {
    const scheme = chosen() === "auto" ? (system.matches ? "dark" : "light") : chosen();
    document.documentElement.dataset.scheme = scheme;
    document.dispatchEvent(new CustomEvent("scheme"));
  };
  apply();
  system.addEventListener("change", apply);
  document.addEventListener("DOMContentLoaded", () => {
    const select = document.getElementById("scheme");
    if (!select) return;
    select.value = chosen();
    select.addEventListener("change", () => {
      localStorage.setItem("fathom-scheme", select.value);
      apply();
    });
  });
})();
