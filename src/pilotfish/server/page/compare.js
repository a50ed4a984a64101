// Two exchanges beside one another: how high each metric got, and where their answers part.
import { decimals, make, plural, words } from "./marks.js";
import { runningOf } from "./tokens.js";

const answer = ({ exchange }) => exchange.tokens.filter(({ origin }) => origin !== "prompt");

function highest(pane, metric, origin) {
  const side = pane.exchange.tokens.filter((token) => (token.origin === "prompt") === (origin === "prompt"));
  const scores = side.map((token) => runningOf(token, metric)).filter((score) => score !== undefined);
  return scores.length ? scores.reduce((most, score) => Math.max(most, score), 0) : null;
}

/** A table of highest scores, on the side that each metric judges. */
export function heights(panes, monitor) {
  const cell = (score) => {
    const chip = make("span", { class: "chip" }, score === null ? "–" : decimals(score));
    chip.style.setProperty("--score", score ?? 0);
    return make("td", { class: "number" }, chip);
  };
  const rows = monitor.heads.map((metric) => make("tr", {}, make("th", { scope: "row" }, words(metric)),
    ...panes.map((pane) => cell(highest(pane, metric, monitor.sideOf(metric)))),
    make("td", { class: "number" }, monitor.thresholds[metric] === undefined ? "–" : decimals(monitor.thresholds[metric]))));
  const head = make("tr", {}, ...["highest score", "left", "right", "threshold"].map((name) => make("th", { scope: "col" }, name)));
  return make("table", { class: "heights" }, make("thead", {}, head), make("tbody", {}, ...rows));
}

/** In words, and as a mark in both texts. */
export function parting(panes) {
  if (panes.some(({ exchange }) => exchange.is_redacted)) return "The store keeps no texts, so where they part is not known.";
  const [one, other] = panes.map(answer);
  const at = one.findIndex(({ text }, index) => text !== other[index]?.text);
  if (at < 0) return one.length === other.length ? "Both answers are the same." : `The right answer goes on where the left one ends, after ${plural(one.length, "token")}.`;
  for (const [pane, tokens] of [[panes[0], one], [panes[1], other]]) {
    const stop = tokens[at] && pane.text.byPosition.get(tokens[at].position);
    stop?.node.before(make("i", { class: "parting", "aria-hidden": "true" }));
  }
  return at === 0 ? "The answers differ from their first token on." : `The answers are the same for ${plural(at, "token")}, then they part.`;
}
