// Reads a steering from the page's JSON block; sets its verdict, its curves and the tables behind them.
import { $, make, pageData } from "./marks.js";
import { makePlot } from "./plot.js";

const data = pageData();
const signed = (value) => `${value < 0 ? "−" : "+"}${Math.abs(value).toFixed(3)}`;
const interval = ({ low, high }) => make("small", {}, `[${signed(low)}, ${signed(high)}]`);
const estimate = (found) => found ? make("td", { class: "number" }, signed(found.value), interval(found)) : make("td");
const number = (value) => make("td", { class: "number" }, value === undefined ? "" : value.toFixed(3));

function tableOf(columns, rows, labelledBy) {
  const head = make("tr", {}, make("td"), ...columns.map((name) => make("th", { scope: "col" }, name)));
  const table = make("table", { class: "report-table" }, make("thead", {}, head), make("tbody", {}, ...rows));
  return make("div", { class: "scroll", tabindex: 0, role: "region", "aria-labelledby": labelledBy }, table);
}

function armRow({ arm, value, change }) {
  const { kl_mean: mean, kl_p95: tail, acceptance } = data.damage[arm] ?? {};
  return make("tr", {}, make("th", { scope: "row" }, arm), estimate(value), estimate(change), number(mean), number(tail), number(acceptance));
}

const siteRow = ({ site, kl_mean: mean, effect }) => make("tr", {}, make("th", { scope: "row" }, site),
  make("td", { class: "number" }, signed(effect)), number(mean));

$("where").textContent = `${data.model}, ${data.site}: ${data.kind.replaceAll("_", " ")} with dose ${data.dose.toPrecision(4)}; budget: ${data.budget}.`;
$("dose").append(
  make("p", { class: "verdict" }, data.verdict),
  ...(data.reason ? [make("p", { class: "caveats" }, `The budget is not spent: ${data.reason}.`)] : []),
  make("h2", {}, "Curves"),
  make("p", { class: "caption" }, "Point at a curve, or use the arrow keys on it, to read values."),
  make("div", { class: "plots" }, ...data.plots.map((plot, at) => makePlot(plot, `plot-${at}`))),
  make("h2", { id: "arms" }, "Beside a prompt and nulls"),
  make("p", { class: "caption" }, `On pairs put aside: ${data.measure}. Every vector has the dose that spends the budget; damage is along each one's own answers.`),
  tableOf(["effect", "change", "KL, mean", "KL, 95th percentile", "acceptance"], data.rows.map(armRow), "arms"),
  make("h2", { id: "layers" }, "Layers"),
  make("p", { class: "caption" }, "At the dose that spends the budget, best first, on the pairs that chose: the first is a little lucky."),
  tableOf([data.measure, "KL, mean"], data.sites.map(siteRow), "layers"),
);
