// What all pages share: their data, elements, and text in which nothing is invisible.

export const $ = (id) => document.getElementById(id);
export const pageData = () => JSON.parse($("data").textContent);
export const words = (name) => name.replaceAll("_", " ").replace(/^signal\./, "");
export const decimals = (score) => score.toFixed(2);
export const plural = (count, noun) => `${count} ${noun}${count === 1 ? "" : "s"}`;

const DRAWN = ["svg", "path", "line", "rect", "circle", "text", "title", "desc"];

export function make(tag, attributes = {}, ...children) {
  const space = DRAWN.includes(tag) ? "http://www.w3.org/2000/svg" : "http://www.w3.org/1999/xhtml";
  const node = document.createElementNS(space, tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

// Line breaks, tabs, and the controls that hide or reorder text: each gets a visible mark.
const MARKED = /(\r\n|[\u0000-\u001f\u007f\u061c\u200b\u200e\u200f\u202a-\u202e\u2060\u2066-\u2069\ufeff])/;

export function glyphs(text, keepsBreaks) {
  const glyph = (kind, sign) => make("i", { class: `glyph ${kind}`, "data-glyph": sign });
  if (text === "") return [glyph("", "◌")];
  return text.split(MARKED).filter(Boolean).flatMap((part) => {
    if (!MARKED.test(part)) return [part];
    if (part === "\t") return [glyph("faint", "→"), part];
    if (part.endsWith("\n")) return [glyph("faint", "↵"), keepsBreaks ? part : ""];
    return [glyph("control", `U+${part.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}`)];
  });
}
