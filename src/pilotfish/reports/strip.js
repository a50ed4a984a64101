// One row of bars along an exchange: a metric by token, or who wrote each token.
import { make } from "./marks.js";
import { runningOf } from "./tokens.js";

const BARS = 600; // about one a pixel

/** A metric's scores of the text so far, with the threshold where one is given. */
export function drawStrip(svg, tokens, metric, limit = null) {
  const bin = Math.max(1, Math.ceil(tokens.length / BARS));
  let bars = "", gaps = "";
  for (let at = 0; at < tokens.length; at += bin) {
    const scores = tokens.slice(at, at + bin).map((token) => runningOf(token, metric));
    bars += `M${at} 100V${100 * (1 - Math.max(...scores.map((score) => score ?? 0)))}h${bin}V100z`;
    if (scores.includes(undefined)) gaps += `M${at} 100V0h${bin}V100z`;
  }
  fill(svg, tokens, make("path", { class: "gaps", d: gaps }), make("path", { class: "bars", d: bars }));
  if (limit === null) return;
  svg.append(make("line", { class: "limit", x1: 0, x2: tokens.length }));
  moveLimit(svg, limit);
}

/** Upwards what the draft proposed and the target kept, a low bar where the target wrote itself; downwards what it rejected. */
export function drawAcceptance(svg, tokens, rounds) {
  const bin = Math.max(1, Math.ceil(tokens.length / BARS));
  const places = new Map(tokens.map(({ position }, index) => [position, index]));
  let kept = "", own = "", rejected = "";
  for (let at = 0; at < tokens.length; at += bin) {
    const written = tokens.slice(at, at + bin).filter(({ origin }) => origin !== "prompt");
    const share = written.filter(({ origin }) => origin === "draft").length / (written.length || 1);
    if (share > 0) kept += `M${at} 60V${60 - 60 * share}h${bin}V60z`;
    else if (written.length) own += `M${at} 60V44h${bin}V60z`;
  }
  for (const { start, drafted } of rounds) {
    const first = drafted.findIndex(({ accepted }) => !accepted);
    const at = first < 0 ? undefined : places.get(start + first);
    if (at !== undefined) rejected += `M${at} 66v${Math.min(34, 8 * (drafted.length - first))}h${bin}V66z`;
  }
  fill(svg, tokens, make("path", { class: "kept", d: kept }), make("path", { class: "own", d: own }), make("path", { class: "rejects", d: rejected }));
}

function fill(svg, tokens, ...paths) {
  const asked = tokens.filter((token) => token.origin === "prompt").length;
  svg.setAttribute("viewBox", `0 0 ${Math.max(1, tokens.length)} 100`);
  svg.replaceChildren(make("rect", { class: "asked", width: asked, height: 100 }), ...paths,
    make("line", { class: "here", y1: 0, y2: 100, visibility: "hidden" }));
}

export function moveLimit(svg, limit) {
  for (const end of ["y1", "y2"]) svg.querySelector(".limit")?.setAttribute(end, 100 * (1 - limit));
}

/** Marks a token's place, or none. */
export function showHere(svg, tokens, stop) {
  const here = svg.querySelector(".here");
  here?.setAttribute("visibility", stop ? "visible" : "hidden");
  if (!here || !stop) return;
  const at = tokens.findIndex(({ position }) => position >= stop.token.position);
  for (const end of ["x1", "x2"]) here.setAttribute(end, at < 0 ? tokens.length : at + 0.5);
}

/** The token at a place that was clicked. */
export function tokenAt(svg, tokens, clientX) {
  const { left, width } = svg.getBoundingClientRect();
  const at = Math.floor((clientX - left) / width * tokens.length);
  return tokens[Math.min(tokens.length - 1, Math.max(0, at))];
}
