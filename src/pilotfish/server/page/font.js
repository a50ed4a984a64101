// Stands in the head: the reading font is in force before the first paint.
"use strict";

const FONTS = ["mono", "serif", "system", "dyslexic"];
const FONT_KEY = "pilotfish-font";

function storedFont() {
  try {
    const stored = localStorage.getItem(FONT_KEY);
    return FONTS.includes(stored) ? stored : "mono";
  } catch { // storage is switched off
    return "mono";
  }
}

document.documentElement.dataset.font = storedFont();
document.addEventListener("DOMContentLoaded", () => { document.getElementById("font").value = document.documentElement.dataset.font; });
document.addEventListener("change", ({ target }) => {
  if (target.id !== "font") return;
  document.documentElement.dataset.font = target.value;
  try {
    localStorage.setItem(FONT_KEY, target.value);
  } catch { /* storage is switched off: the choice holds for this visit */ }
});
