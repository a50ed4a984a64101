// Reads the sections from the page's JSON block; sets each as sentences, a table, curves and coloured examples.
import { $, make, pageData } from "./marks.js";
import { makePlot } from "./plot.js";

const data = pageData();

function row(tag, cells) {
  return make("tr", {}, ...cells.map((cell, at) => make(tag, { class: at > 2 ? "number" : "", ...(tag === "th" ? { scope: "col" } : {}) }, cell)));
}

function cellOf(cell, scorer) {
  if (!cell) return make("td", { class: "none" }, make("span", { "aria-label": "not measured" }, "·"));
  const value = make("span", { class: cell.is_best ? "best" : "" }, cell.value);
  if (cell.is_best) value.append(make("span", { class: "aside-only" }, " best"));
  const node = make("td", { "data-scorer": scorer }, value, make("small", {}, cell.interval));
  if (cell.difference) node.append(make("small", { class: "difference" }, `head ${cell.difference[0]}`), make("small", {}, cell.difference[1]));
  return node;
}

/** Figures that only the head has: a list, since a table of them would be empty columns. */
function ownFigures(figures) {
  return make("dl", { class: "own" }, ...figures.map(({ name, better, cells }) => make("div", {},
    make("dt", {}, name), make("dd", {}, cells[0].value, make("small", {}, `${cells[0].interval}${better && `; ${better} is better`}`)))));
}

function figureTable({ scorers, scorer_labels: labels }, figures, labelledBy) {
  const head = make("tr", {}, make("td"), ...labels.map((label) => make("th", { scope: "col" }, label)));
  const body = figures.map(({ name, better, cells }) => make("tr", {},
    make("th", { scope: "row" }, name, make("small", {}, better && `${better} is better`)),
    ...cells.map((cell, at) => cellOf(cell, scorers[at]))));
  const table = make("table", { class: "report-table" }, make("thead", {}, head), make("tbody", {}, ...body));
  return make("div", { class: "scroll", tabindex: 0, role: "region", "aria-labelledby": labelledBy }, table);
}

function dataTable({ data: rows }, labelledBy) {
  if (!rows.length) return make("p", { class: "caption" }, "The card names no data.");
  const table = make("table", { class: "report-table data-table" },
    make("thead", {}, row("th", ["role", "source", "licence", "rows", "tokens"])), make("tbody", {}, ...rows.map((cells) => row("td", cells))));
  return make("div", { class: "scroll", tabindex: 0, role: "region", "aria-labelledby": labelledBy }, table);
}

function tokenOf({ text, score, running, is_labelled: isLabelled, is_over: isOver }) {
  const spoken = [score === null ? "not scored" : `score ${score.toFixed(3)}`, running !== null && `text so far ${running.toFixed(3)}`,
    isLabelled && "labelled", isOver && "at or above the threshold"];
  const node = make("span", { class: "token", title: spoken.filter(Boolean).join(", ") }, ...glyphs(text, true));
  node.classList.toggle("special", /^<\|.*\|>$/.test(text));
  node.classList.toggle("unscored", score === null);
  node.classList.toggle("labelled", isLabelled);
  node.classList.toggle("over", isOver);
  node.style.setProperty("--score", score ?? 0);
  return node;
}

function exampleOf({ id, score, tokens, num_before: before, num_after: after, crossing }) {
  const text = make("div", { class: "tokens" });
  const cut = (count, where) => count && text.append(make("span", { class: "cut" }, `… ${plural(count, "token")} ${where} …`));
  cut(before, "before");
  if (before) text.append("\n");
  tokens.forEach((token, at) => {
    if (at === crossing) text.append(make("i", { class: "crossing" }, `▸ ${decimals(token.running ?? token.score)}`));
    text.append(tokenOf(token));
  });
  if (after) text.append("\n");
  cut(after, "after");
  return make("article", { class: "example" }, make("p", { class: "caption" }, `${id}, score ${score.toFixed(3)}`), text);
}

function exampleKey() {
  const item = (name, words) => make("li", {}, make("span", { class: name }, "token"), words);
  const hot = item("token hot", "coloured by its score");
  return make("ul", { class: "example-key example", "aria-label": "Key" }, hot, item("token labelled", "labelled"),
    item("token over", "text so far at or above the threshold"), make("li", {}, make("i", { class: "crossing" }, "▸ 0.80"), " where it is first reached"),
    item("token unscored", "not scored"));
}

function sectionOf(section, index) {
  const id = (part) => `${part}-${index}`;
  const { metric, verdict, reader, promise, caveats, missing, figures, plots, examples } = section;
  const isOwn = ({ cells }) => cells[0] && cells.slice(1).every((cell) => !cell);
  const [compared, own] = [figures.filter((figure) => !isOwn(figure)), figures.filter(isOwn)];
  const node = make("section", { class: "metric-section", id: id("metric"), "aria-labelledby": id("name"), tabindex: -1 },
    make("h2", { id: id("name") }, words(metric)), make("p", { class: "verdict" }, verdict), make("p", {}, promise), make("p", { class: "caption" }, reader));
  if (caveats) node.append(make("p", { class: "caveats" }, caveats));
  node.append(make("h3", { id: id("figures") }, "Figures"),
    make("p", { class: "caption" }, `On held-out texts, with 95 % intervals.${compared.length ? " ★ is the best of a line. Under a baseline: by how much the head is above it." : ""}`),
    ...(compared.length ? [figureTable(section, compared, id("figures"))] : []), ...(own.length ? [ownFigures(own)] : []));
  if (!figures.length) node.append(make("p", { class: "missing" }, "The card holds no figures."));
  if (missing) node.append(make("p", { class: "missing" }, missing));
  if (plots.some(({ series }) => series.length)) node.append(make("h3", {}, "Curves"), make("p", { class: "caption" }, "Point at a curve, or use the arrow keys on it, to read values."));
  if (plots.length) node.append(make("div", { class: "plots" }, ...plots.map((plot, at) => makePlot(plot, `plot-${index}-${at}`))));
  if (examples.some((group) => group.examples.length)) node.append(make("h3", {}, "Examples"), exampleKey());
  for (const group of examples) {
    node.append(make("h3", {}, group.title), make("p", { class: "caption" }, group.note), ...group.examples.map(exampleOf));
  }
  node.append(make("h3", { id: id("data") }, "Data"), dataTable(section, id("data")));
  return node;
}

$("sections").append(...data.sections.map(sectionOf));
$("contents").hidden = data.sections.length < 2;
$("contents").append(make("ul", {}, ...data.sections.map(({ metric, model, is_better: isBetter }, index) => {
  const link = make("button", { type: "button", class: "link" }, `${words(metric)}, ${model}`);
  link.addEventListener("click", () => { $(`metric-${index}`).scrollIntoView(); $(`metric-${index}`).focus({ preventScroll: true }); });
  const verdict = isBetter === null ? "not compared with words" : isBetter ? "better than words" : "not shown to be better than words";
  return make("li", {}, link, make("span", { class: "at" }, verdict));
})));
