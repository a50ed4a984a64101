// Reads the exchanges from the page's JSON block and shows one at a time as text coloured by score.
import { $, decimals, make, pageData, plural, words } from "./marks.js";
import { drawStrip, moveLimit, showHere, tokenAt } from "./strip.js";
import { answerOf, runningOf, TokenText } from "./tokens.js";
import { groupVerdicts, numbersOf, statsLine, verdictItems } from "./verdicts.js";
import { Reader } from "./reader.js";

const data = pageData();
const moved = new Map(); // metric -> threshold set on this page
const choice = {
  metric: "",
  limitOf: (metric, exchange) => moved.get(metric) ?? exchange.thresholds?.[metric] ?? 0.5,
  get showsDrafts() { return $("drafts").checked; },
};
const text = new TokenText($("prompt"), $("answer"));
const reader = new Reader($("panel"), choice, (stop) => showHere($("strip"), text.exchange.tokens, stop));

function showExchange(index) {
  const exchange = data.exchanges[index];
  const notes = groupVerdicts(exchange);
  reader.pinned = null;
  text.exchange = exchange;
  text.set(exchange, numbersOf(notes));
  for (const name of ["prompt", "answer"]) $(name).parentElement.hidden = $(name).childElementCount === 0;
  if (!exchange.metrics.includes(choice.metric)) choice.metric = exchange.metrics[0];
  $("metric").replaceChildren(...exchange.metrics.map((name) => new Option(words(name), name, false, name === choice.metric)));
  [...$("contents").children].forEach((item, at) => item.firstChild.setAttribute("aria-current", at === index));
  $("exchange-title").textContent = exchange.title;
  const { target, draft } = exchange;
  $("models").textContent = [target && `target ${target}`, draft && `draft ${draft}`].filter(Boolean).join(" · ");
  $("verdicts").replaceChildren(...verdictItems(notes, text.byPosition));
  $("stats").textContent = statsLine(exchange);
  reader.active = null;
  paint();
}

function paint() {
  const { tokens } = text.exchange;
  text.paint(choice.metric);
  drawStrip($("strip"), tokens, choice.metric, choice.limitOf(choice.metric, text.exchange));
  const asked = tokens.filter((token) => token.origin === "prompt").length;
  $("strip-caption").textContent = `${words(choice.metric)}, of the text up to each token: ${asked} of the prompt (shaded), `
    + `${tokens.length - asked} of the answer. The dashed line is the threshold.`;
  mark();
}

function mark() {
  const limit = choice.limitOf(choice.metric, text.exchange);
  const own = text.exchange.thresholds?.[choice.metric];
  const counts = text.mark(limit);
  $("threshold").value = limit;
  $("threshold").setAttribute("aria-valuetext", decimals(limit));
  $("calibrated").hidden = own === undefined;
  $("calibrated").style.setProperty("--at", own ?? 0);
  $("flaggable").textContent = `At ${decimals(limit)}, ${plural(counts.answer, "token")} of the answer and ${counts.prompt} of the prompt `
    + `would be flagged${counts.unscored ? `; ${plural(counts.unscored, "token")} not scored` : ""}.`;
  $("reset").hidden = !moved.has(choice.metric);
  $("reset").textContent = own === undefined ? "Back to 0.50" : `Back to the calibrated ${decimals(own)}`;
  moveLimit($("strip"), limit);
  markContents();
  reader.inspect(reader.active);
}

function markContents() {
  data.exchanges.forEach((exchange, index) => {
    const [, highest, over] = $("contents").children[index].firstChild.children;
    const scores = answerOf(exchange).map((token) => runningOf(token, choice.metric)).filter((score) => score !== undefined);
    const limit = choice.limitOf(choice.metric, exchange);
    const top = scores.reduce((most, score) => Math.max(most, score), 0);
    highest.replaceChildren(scores.length ? make("span", { class: "chip" }, decimals(top)) : "not scored");
    highest.style.setProperty("--score", top);
    over.textContent = scores.length ? scores.filter((score) => score >= limit).length : "";
  });
}

function jumpToMaximum() {
  const stop = text.highest(text.exchange, choice.metric);
  if (stop) reader.goTo(stop, true);
}

const goToPosition = (position) => reader.goTo(text.byPosition.get(position), true);
const on = (id, type, handle) => $(id).addEventListener(type, handle);

function onPageKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey || event.target.matches("select")) return;
  if (event.key === "m") jumpToMaximum();
  else if (event.key === "d") $("drafts").click();
  else if (event.key === "Escape") reader.pin(null);
}

function exportJson() {
  const url = URL.createObjectURL(new Blob([JSON.stringify(data, null, 2)], { type: "application/json" }));
  make("a", { href: url, download: "pilotfish.json" }).click();
  setTimeout(() => URL.revokeObjectURL(url), 1000);
}

function setTax({ columns, rows, note }) {
  const isNumber = columns.map((_, at) => rows.every((row) => /^[-+−±<>≤≥\d.,\s–%×[\]]*$/.test(row[at])));
  const places = columns.map((_, at) => Math.max(...rows.map((row) => (`${row[at]}`.split(".")[1] ?? "").length)));
  const show = (cell, at) => (typeof cell === "number" ? cell.toFixed(places[at]) : cell);
  const line = (tag, row) => make("tr", {}, ...row.map((cell, at) => make(tag, { class: isNumber[at] ? "number" : "" }, show(cell, at))));
  $("tax-table").replaceChildren(make("thead", {}, line("th", columns)), make("tbody", {}, ...rows.map((row) => line("td", row))));
  $("tax-note").textContent = note ?? "";
  $("tax").hidden = false;
}

$("contents").append(...data.exchanges.map(({ title }, index) => make("li", {}, make("button", { type: "button" },
  make("span", { class: "entry" }, `${index + 1}`, make("span", { class: "name" }, title)), make("span"), make("span")))));
if (data.tax) setTax(data.tax);
reader.listen($("text"));
if (data.exchanges.length) showExchange(0);
document.body.classList.toggle("drafts", $("drafts").checked); // browsers restore it on reload

on("contents", "click", ({ target }) => {
  const item = target.closest("li");
  if (item) showExchange([...$("contents").children].indexOf(item));
});
on("metric", "change", ({ target }) => { choice.metric = target.value; paint(); });
on("threshold", "input", ({ target }) => { moved.set(choice.metric, Number(target.value)); mark(); });
on("reset", "click", () => { moved.delete(choice.metric); mark(); });
on("drafts", "change", ({ target }) => document.body.classList.toggle("drafts", target.checked));
on("jump", "click", jumpToMaximum);
on("verdicts", "click", ({ target: { dataset } }) => { if (dataset.position) goToPosition(Number(dataset.position)); });
on("strip", "click", ({ clientX }) => goToPosition(tokenAt($("strip"), text.exchange.tokens, clientX).position));
on("export", "click", exportJson);
document.addEventListener("keydown", onPageKey);
