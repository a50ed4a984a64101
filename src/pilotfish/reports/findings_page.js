// Lists findings, narrowed and sorted as asked, and shows the chosen one beside them.
import { $, decimals, glyphs, make, pageData, plural, words } from "./marks.js";
import { diffWords } from "./diff.js";

const data = pageData();
const { plain, findings } = data;
const metrics = Object.keys(plain.monitors);
const KINDS = {
  changed: "readable and other than before", broken: "repeats itself or is word salad", same: "the plain model's own answers", random: "a random vector, for comparison",
};
const raised = (metric) => ({ monitors }) => monitors[metric] - plain.monitors[metric];
/** Name to what is sorted by, the largest first, and how it is written. */
const orders = new Map([
  ["promise, readable first", { of: (one) => -findings.indexOf(one), shown: null }],
  ["effect on words (KL)", { of: ({ kl }) => kl, shown: (value) => `KL ${decimals(value)}` }],
  ["strength at the target", { of: ({ reach }) => reach, shown: (value) => `× ${decimals(value)}` }],
  ["ordinary wording (low surprise)", { of: ({ surprise }) => -surprise, shown: (value) => `${decimals(-value)} nats` }],
  ...(data.logit ? [[`logit, ${data.logit}`, { of: ({ logit }) => logit, shown: signed }]] : []),
  ...metrics.map((metric) => [`monitor: ${words(metric)}`, { of: raised(metric), shown: signed }]),
]);
const shown = { kinds: new Set(["changed"]), order: "promise, readable first", listed: [], chosen: null };
const haystacks = new Map(findings.map((one) => [one, [one.id, ...one.answers, ...one.rising.map(({ text }) => text)].join("\n").toLowerCase()]));

function signed(value) {
  return `${value < 0 ? "−" : "+"}${decimals(Math.abs(value))}`;
}

// ---- The list ----

/** The first stretch of an answer that the plain model did not write, from the prompt where most is new. */
function excerpt({ answers }) {
  const at = answers.findIndex((answer, index) => answer !== plain.answers[index]);
  if (at < 0) return ["The same answers."];
  let start = 0;
  while (start < answers[at].length && answers[at][start] === plain.answers[at][start]) start += 1;
  start = Math.max(0, answers[at].lastIndexOf(" ", start));
  return [start ? "… " : "", ...glyphs(answers[at].slice(start), false)];
}

function figureOf(one) {
  const { of, shown: write } = orders.get(shown.order);
  return write ? write(of(one)) : `KL ${decimals(one.kl)}`;
}

function rowOf(one) {
  const note = one.kind === "changed" ? `group ${one.group}` : words(one.kind);
  const row = make("li", { id: `finding-${one.id}`, role: "option", "aria-selected": one === shown.chosen },
    make("span", { class: "id" }, one.id, make("small", {}, note)), make("span", { class: "figure" }, figureOf(one)),
    make("span", { class: "says" }, ...excerpt(one)));
  if (one.rising.length) row.append(make("span", { class: "next" }, "begins ", ...one.rising.slice(0, 4).flatMap(({ text }) => [...glyphs(text, false), " · "]).slice(0, -1)));
  return row;
}

function list() {
  const asked = $("search").value.trim().toLowerCase();
  const { of } = orders.get(shown.order);
  shown.listed = findings
    .filter((one) => shown.kinds.has(one.kind) && (!$("one").checked || one.is_first || one.kind === "random") && haystacks.get(one).includes(asked))
    .sort((a, b) => of(b) - of(a));
  $("list").replaceChildren(...shown.listed.map(rowOf));
  if (!shown.listed.length) $("list").append(make("li", { class: "nothing" }, "Nothing is left. Clear the word, or list more kinds."));
  $("count").textContent = `${plural(shown.listed.length, "finding")} of ${findings.length} listed.`;
  choose(shown.listed.includes(shown.chosen) ? shown.chosen : shown.listed[0] ?? null);
}

function choose(one, follows = false) {
  shown.chosen = one;
  for (const row of $("list").querySelectorAll("[aria-selected=true]")) row.setAttribute("aria-selected", "false");
  const row = one && $(`finding-${one.id}`);
  row?.setAttribute("aria-selected", "true");
  if (one) $("list").setAttribute("aria-activedescendant", `finding-${one.id}`);
  else $("list").removeAttribute("aria-activedescendant");
  if (follows) row?.scrollIntoView({ block: "nearest" });
  $("detail").replaceChildren(...(one ? detail(one) : []));
  $("detail").scrollTop = 0;
}

// ---- One finding ----

function figures(one) {
  const pairs = [
    ["reach, × random", decimals(one.reach)], ["KL, nats a token", decimals(one.kl)], ["surprise, nats", decimals(one.surprise)],
    ["length looked at", `${decimals(one.share * data.radius.value)}${one.share < 1 ? ` (${100 * one.share} % of the radius)` : ""}`],
    ...(data.logit ? [[data.logit, signed(one.logit)]] : []),
    ["prompts that already stand there", `${one.num_flagged} of ${data.num_searched}`],
  ];
  return make("dl", { class: "figures" }, ...pairs.map(([name, value]) => make("div", {}, make("dt", {}, name), make("dd", {}, value))));
}

function compared(answer, index) {
  const kinds = { same: "span", gone: "del", come: "ins" };
  const text = make("p", { class: "answer" }, ...diffWords(plain.answers[index], answer).map(([kind, part]) => make(kinds[kind], {}, ...glyphs(part, true))));
  return [make("p", { class: "asked" }, ...glyphs(data.prompts[index], false)), text];
}

function share(value) {
  return make("td", {}, value < 0.0005 ? "0 %" : `${(100 * value).toFixed(1)} %`);
}

function movedTable(title, tokens) {
  return make("table", { class: "moved" },
    make("thead", {}, make("tr", {}, ...[title, "before", "after"].map((name) => make("th", { scope: "col" }, name)))),
    make("tbody", {}, ...tokens.map(({ text, before, after }) => make("tr", {},
      make("th", { scope: "row", class: "word" }, ...glyphs(text, false)), share(before), share(after)))));
}

function chip(score) {
  const node = make("span", { class: "chip" }, score.toFixed(3));
  node.style.setProperty("--score", score);
  return node;
}

function monitorTable({ monitors }) {
  return make("table", { class: "moved" },
    make("thead", {}, make("tr", {}, ...["monitor", "plain", "with the vector", ""].map((name) => make("th", { scope: "col" }, name)))),
    make("tbody", {}, ...metrics.map((metric) => make("tr", {}, make("th", { scope: "row" }, words(metric)),
      make("td", {}, chip(plain.monitors[metric])), make("td", {}, chip(monitors[metric])), make("td", {}, signed(raised(metric)({ monitors })))))));
}

function likes(one) {
  const others = findings.filter((other) => other !== one && other.group === one.group);
  if (!others.length) return [];
  const links = others.map(({ id, kind }) => make("button", { type: "button", class: "link", "data-id": id }, kind === "random" ? `${id} (random)` : id));
  return [make("h3", {}, "Does the same at the target"), make("p", { class: "likes" }, ...links)];
}

function detail(one) {
  const nodes = [make("h2", {}, one.id), make("p", { class: "caption" }, `${words(one.kind)}: ${KINDS[one.kind]}`), figures(one),
    make("h3", {}, "Answers, against the plain model's"), ...one.answers.flatMap(compared)];
  const moves = [["likelier to begin", one.rising], ["less likely", one.falling]].filter(([, tokens]) => tokens.length);
  if (moves.length) nodes.push(make("h3", {}, "First token"), make("div", { class: "moves" }, ...moves.map((move) => movedTable(...move))));
  if (metrics.length) nodes.push(make("h3", {}, "Monitors, on the answers"), monitorTable(one));
  nodes.push(...likes(one));
  if (one.kind === "random") return nodes;
  return [...nodes, make("h3", {}, "To use it"), make("p", { class: "command" }, `pilotfish discover promote ${data.folder} ${one.id} --form edit`),
    make("p", { class: "caption" }, "Or --form head, to watch for it, or gate, to take it back where it is seen.")];
}

// ---- The page ----

function counted(kind) {
  return findings.filter((one) => one.kind === kind).length;
}

function setPage() {
  const { radius } = data;
  const dose = radius.dose === null ? "" : `, ${decimals(radius.dose)} of the stream's length there`;
  $("where").textContent = `${data.model}: ${data.method}, added at ${data.source}, change read at ${data.target}; radius ${decimals(radius.value)}${dose}; searched on ${plural(data.num_searched, "prompt")}.`;
  const ways = new Set(findings.filter(({ kind }) => kind === "changed").map(({ group }) => group)).size;
  $("summary").textContent = `${plural(findings.length - counted("random"), "vector")}. ${counted("changed")} change what the model says and leave it readable, in ${plural(ways, "way")}; ${counted("broken")} break its answers, ${counted("same")} change none. ${counted("random")} random vectors of the same length stand beside them.`;
  $("warnings").append(...radius.warnings.map((warning) => make("li", {}, warning)));
  for (const kind of Object.keys(KINDS)) {
    const box = make("input", { type: "checkbox", "data-kind": kind, ...(shown.kinds.has(kind) ? { checked: "" } : {}) });
    $("kinds").append(make("label", { class: "toggle" }, box, make("span", {}, ` ${kind} ${counted(kind)}`)));
  }
  $("kinds").append(make("label", { class: "toggle" }, make("input", { type: "checkbox", id: "one", checked: "", "aria-keyshortcuts": "o" }), " one of each group ", make("kbd", {}, "o")));
  $("sort").append(...[...orders.keys()].map((name) => new Option(name, name)));
}

function step(by) {
  const at = shown.listed.indexOf(shown.chosen) + by;
  if (shown.listed[at]) choose(shown.listed[at], true);
}

function onKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const isTyping = event.target.matches("input[type=search], select");
  if (event.key === "Escape") {
    $("search").value = "";
    event.target.blur();
    list();
  } else if (isTyping) return;
  else if (event.key === "j" || (event.key === "ArrowDown" && event.target === $("list"))) step(1);
  else if (event.key === "k" || (event.key === "ArrowUp" && event.target === $("list"))) step(-1);
  else if (event.key === "o") $("one").click();
  else if (event.key === "s") $("sort").focus();
  else if (event.key === "/") $("search").focus();
  else return;
  event.preventDefault();
}

setPage();
if (!counted("changed")) {
  shown.kinds = new Set(Object.keys(KINDS));
  for (const box of $("kinds").querySelectorAll("[data-kind]")) box.checked = true;
}
list();
$("search").addEventListener("input", list);
$("sort").addEventListener("change", ({ target }) => { shown.order = target.value; list(); });
$("kinds").addEventListener("change", () => {
  shown.kinds = new Set([...$("kinds").querySelectorAll("[data-kind]:checked")].map(({ dataset }) => dataset.kind));
  list();
});
$("list").addEventListener("click", ({ target }) => {
  const row = target.closest("[role=option]");
  if (row) choose(findings.find(({ id }) => row.id === `finding-${id}`));
});
$("detail").addEventListener("click", ({ target: { dataset } }) => {
  const other = findings.find(({ id }) => id === dataset.id);
  if (other) choose(other, true);
});
document.addEventListener("keydown", onKey);
