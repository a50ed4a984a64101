// Stands in the head: the theme is in force before the first paint. Stored choice first, else the system's, else light.
"use strict";

const THEMES = ["auto", "light", "dark"];
const THEME_KEY = "pilotfish-theme";
const systemDark = matchMedia("(prefers-color-scheme: dark)");
let theme = storedTheme();

function storedTheme() {
  try {
    const stored = localStorage.getItem(THEME_KEY);
    return THEMES.includes(stored) ? stored : "auto";
  } catch { // storage is switched off
    return "auto";
  }
}

function chooseTheme(choice) {
  theme = choice;
  try {
    localStorage.setItem(THEME_KEY, choice);
  } catch { /* storage is switched off: the choice holds for this visit */ }
  applyTheme();
}

function applyTheme() {
  const inForce = theme === "auto" ? (systemDark.matches ? "dark" : "light") : theme;
  document.documentElement.dataset.theme = inForce;
  for (const radio of document.querySelectorAll("input[name=theme]")) {
    radio.checked = radio.value === theme;
    if (radio.value === "auto") radio.nextElementSibling.textContent = theme === "auto" ? `Auto: ${inForce}` : "Auto";
  }
}

applyTheme();
systemDark.addEventListener("change", applyTheme);
document.addEventListener("DOMContentLoaded", applyTheme);
document.addEventListener("change", ({ target }) => { if (target.name === "theme") chooseTheme(target.value); });
