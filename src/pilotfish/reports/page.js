// Reads the exchanges from the page's JSON block, sets one of them as text coloured by score, answers pointer and keyboard.
"use strict";

// ---- Theme. This script stands in the head, so the right one is in force before the first paint. ----

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

// ---- State ----

const $ = (id) => document.getElementById(id);
const state = {
  exchange: null,
  metric: "",
  moved: new Map(), // metric -> threshold that the reader of the page has set
  stops: [], // what can be pointed at, in reading order: {node, token, round, isRejected}
  byPosition: new Map(), // position -> stop of the committed token
  active: null,
  pinned: null,
};
let data;

const calibrated = () => state.exchange.thresholds?.[state.metric];
const threshold = () => state.moved.get(state.metric) ?? calibrated() ?? 0.5;
const scoreOf = (token, metric = state.metric) => token.scores?.[metric];
const reasonOf = (token, metric) => token.unscored?.[metric] ?? "no score was recorded";
const words = (name) => name.replaceAll("_", " ");
const decimals = (score) => score.toFixed(2);
const plural = (count, noun) => `${count} ${noun}${count === 1 ? "" : "s"}`;

function make(tag, attributes = {}, ...children) {
  const node = document.createElementNS(tag === "path" || tag === "line" || tag === "rect" ? "http://www.w3.org/2000/svg" : "http://www.w3.org/1999/xhtml", tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

// ---- Setting an exchange ----

// Line breaks, tabs, and the controls that hide or reorder text: each gets a visible mark.
const MARKED = /(\r\n|[\n\r\t\u0000-\u0008\u000b\u000c\u000e-\u001f\u007f\u061c\u200b\u200e\u200f\u202a-\u202e\u2060\u2066-\u2069\ufeff])/;

function glyphs(text, breaks) {
  if (text === "") return [make("i", { class: "glyph", "data-glyph": "◌" })];
  return text.split(MARKED).filter(Boolean).flatMap((part) => {
    if (part === "\t") return [make("i", { class: "glyph newline", "data-glyph": "→" }), "\t"];
    if (part.endsWith("\n")) return [make("i", { class: "glyph newline", "data-glyph": part.length > 1 ? "␍↵" : "↵" }), breaks ? "\n" : ""];
    if (!MARKED.test(part)) return [part];
    const code = part.codePointAt(0).toString(16).toUpperCase().padStart(4, "0");
    return [make("i", { class: "glyph control", "data-glyph": `U+${code}` })];
  });
}

function addStop(parent, token, round, isRejected) {
  const node = make(isRejected ? "s" : "span", { "data-stop": state.stops.length }, ...glyphs(token.text, !isRejected));
  node.className = isRejected ? "lookahead" : `token ${token.origin}`;
  if (/^<\|.*\|>$/.test(token.text)) node.classList.add("special");
  const stop = { node, token, round, isRejected };
  state.stops.push(stop);
  parent.append(node);
  return stop;
}

// Rejected drafts by the position of the token that the target wrote in their place.
function rejectedDrafts(exchange) {
  const groups = new Map();
  for (const { round, start, drafted } of exchange.rounds ?? []) {
    const first = drafted.findIndex((draft) => !draft.accepted);
    if (first < 0) continue;
    const tokens = drafted.slice(first).map((draft, offset) => ({ ...draft, position: start + first + offset, unread: "the draft never read it" }));
    groups.set(start + first, [...(groups.get(start + first) ?? []), { round, tokens }]);
  }
  return groups;
}

// Neighbouring verdicts of one metric and action are one note.
function verdictRuns(exchange) {
  const runs = [];
  for (const verdict of exchange.verdicts ?? []) {
    const run = runs.find((one) => one.metric === verdict.metric && one.action === verdict.action && one.last + 1 === verdict.position);
    if (!run) runs.push({ metric: verdict.metric, action: verdict.action, first: verdict.position, last: verdict.position, peak: verdict });
    else {
      run.last = verdict.position;
      if ((verdict.score ?? 2) > (run.peak.score ?? 2)) run.peak = verdict; // no score outweighs every score
    }
  }
  return runs;
}

function showExchange(index) {
  const exchange = data.exchanges[index];
  Object.assign(state, { exchange, stops: [], byPosition: new Map(), active: null, pinned: null });
  if (!exchange.metrics.includes(state.metric)) state.metric = exchange.metrics[0];
  $("metric").replaceChildren(...exchange.metrics.map((metric) => new Option(words(metric), metric, false, metric === state.metric)));
  [...$("contents").children].forEach((item, at) => item.firstChild.toggleAttribute("aria-current", at === index));
  $("exchange-title").textContent = exchange.title;
  $("models").textContent = [exchange.target && `Written by ${exchange.target}`, exchange.draft && `drafted and read by ${exchange.draft}`].filter(Boolean).join(", ");
  const runs = verdictRuns(exchange);
  setText(exchange, runs);
  setVerdicts(runs);
  $("stats").textContent = statsLine(exchange);
  inspect(null);
  paint();
}

function setText(exchange, runs) {
  const blocks = { prompt: document.createDocumentFragment(), answer: document.createDocumentFragment() };
  const rejected = rejectedDrafts(exchange);
  const notes = new Map(runs.map((run, index) => [run.first, index + 1]).reverse());
  const setRejected = (groups, block) => {
    for (const { round, tokens } of groups) {
      const group = make("span", { class: "rejected" });
      for (const token of tokens) addStop(group, token, round, true);
      block.append(group);
    }
  };
  for (const token of exchange.tokens) {
    const block = token.origin === "prompt" ? blocks.prompt : blocks.answer;
    if (rejected.has(token.position)) setRejected(rejected.get(token.position), block);
    rejected.delete(token.position);
    state.byPosition.set(token.position, addStop(block, token, token.round, false));
    if (notes.has(token.position)) block.append(make("i", { class: "note", "data-note": notes.get(token.position), "aria-hidden": "true" }));
  }
  for (const groups of rejected.values()) setRejected(groups, blocks.answer);
  for (const name of ["prompt", "answer"]) {
    $(name).replaceChildren(blocks[name]);
    $(name).parentElement.hidden = $(name).childElementCount === 0;
  }
  state.stops[0].node.tabIndex = 0; // the text is one tab stop; arrow keys move inside it
}

function setVerdicts(runs) {
  const past = { flag: "Flagged", stop: "Stopped" };
  $("verdicts").replaceChildren(...runs.map(({ metric, action, first, last, peak }, index) => {
    const place = `${past[action] ?? words(action)} at ${first === last ? `token ${first}` : `tokens ${first}–${last}`}`;
    const link = state.byPosition.has(first) ? make("button", { type: "button", class: "link", "data-position": peak.position }, place) : place;
    const score = peak.score == null ? "not scored" : `${first === last ? "" : "up to "}${decimals(peak.score)}`;
    return make("li", {}, make("span", { class: "number" }, String(index + 1)), make("span", {}, link, ` for ${words(metric)}, ${score}`, make("span", { class: "why" }, peak.reason)));
  }));
  if (runs.length === 0) $("verdicts").append(make("li", {}, "", make("span", { class: "why" }, "None: the policy took no action.")));
}

function statsLine({ stats = {}, finish_reason: finish }) {
  const endings = { stop: "ended by itself", length: "cut at the token limit", stop_string: "ended at a stop string", content_filter: "stopped by the policy" };
  const percent = (part) => `${(100 * part).toFixed(part === 1 ? 0 : 1)} %`;
  return [
    stats.tokens_per_s != null && `${stats.tokens_per_s.toFixed(1)} tokens a second`,
    stats.acceptance != null && `${percent(stats.acceptance)} of drafts accepted`,
    stats.num_committed != null && stats.num_scored != null && `${stats.num_scored} of ${plural(stats.num_committed, "committed token")} scored`,
    finish && (endings[finish] ?? finish),
  ].filter(Boolean).join(" · ");
}

// ---- Colouring by the chosen metric and threshold ----

function paint() {
  for (const { node, token } of state.stops) {
    const score = scoreOf(token);
    node.classList.toggle("unscored", score === undefined);
    node.style.setProperty("--score", score ?? 0);
  }
  drawStrip();
  mark();
}

function mark() {
  const limit = threshold();
  const counts = { prompt: 0, answer: 0, unscored: 0 };
  for (const { node, token, isRejected } of state.stops) {
    if (isRejected) continue;
    const score = scoreOf(token);
    const isOver = score >= limit;
    node.classList.toggle("over", isOver);
    if (score === undefined) counts.unscored += 1;
    if (isOver) counts[token.origin === "prompt" ? "prompt" : "answer"] += 1;
  }
  const slider = $("threshold");
  slider.value = limit;
  slider.setAttribute("aria-valuetext", decimals(limit));
  $("calibrated").hidden = calibrated() === undefined;
  $("calibrated").style.setProperty("--at", calibrated() ?? 0);
  const missing = counts.unscored ? `; ${plural(counts.unscored, "token")} not scored` : "";
  $("flaggable").textContent = `At ${decimals(limit)}, ${plural(counts.answer, "token")} of the answer and ${counts.prompt} of the prompt would be flagged${missing}.`;
  $("reset").hidden = !state.moved.has(state.metric);
  $("reset").textContent = calibrated() === undefined ? "Back to 0.50" : `Back to the calibrated ${decimals(calibrated())}`;
  for (const line of $("strip").querySelectorAll(".limit")) for (const end of ["y1", "y2"]) line.setAttribute(end, 100 * (1 - limit));
  markContents();
}

function markContents() {
  data.exchanges.forEach((exchange, index) => {
    const [, highest, over] = $("contents").children[index].firstChild.children;
    const scores = exchange.tokens.map((token) => scoreOf(token)).filter((score) => score !== undefined);
    const limit = state.moved.get(state.metric) ?? exchange.thresholds?.[state.metric] ?? 0.5;
    const top = scores.reduce((most, score) => Math.max(most, score), 0);
    highest.replaceChildren(scores.length ? make("span", { class: "chip" }, decimals(top)) : "–");
    highest.style.setProperty("--score", top);
    over.textContent = scores.length ? scores.filter((score) => score >= limit).length : "–";
  });
}

function drawStrip() {
  const tokens = state.exchange.tokens;
  const bin = Math.ceil(tokens.length / 600); // one bar for each pixel or so, showing the highest score under it
  let bars = "", gaps = "";
  for (let at = 0; at < tokens.length; at += bin) {
    const scores = tokens.slice(at, at + bin).map((token) => scoreOf(token));
    const top = Math.max(...scores.map((score) => score ?? 0));
    bars += `M${at} 100V${100 * (1 - top)}H${at + bin}V100Z`;
    if (scores.includes(undefined)) gaps += `M${at} 100V0H${at + bin}V100Z`;
  }
  const asked = tokens.filter((token) => token.origin === "prompt").length;
  $("strip").setAttribute("viewBox", `0 0 ${tokens.length} 100`);
  $("strip").replaceChildren(
    make("rect", { class: "asked", width: asked, height: 100 }),
    make("path", { class: "gaps", d: gaps }),
    make("path", { class: "bars", d: bars }),
    make("line", { class: "limit", x1: 0, x2: tokens.length }),
    make("line", { class: "here", y1: 0, y2: 100, visibility: "hidden" }),
  );
  $("strip-caption").textContent = `${words(state.metric)} by token: ${asked} of the prompt (shaded), ${tokens.length - asked} of the answer. The dashed line is the threshold.`;
}

// ---- One token in the margin ----

function inspect(stop) {
  state.active?.node.classList.remove("active");
  state.active = stop;
  $("panel").classList.toggle("idle", !stop);
  if (!stop) {
    $("panel").replaceChildren(make("p", { class: "caption" }, "Point at a token, or tab into the text and step with the arrow keys, to read its scores. A click pins it."));
    return;
  }
  stop.node.classList.add("active");
  const { token, isRejected } = stop;
  const here = $("strip").querySelector(".here");
  const at = state.exchange.tokens.findIndex((one) => one.position >= token.position) + 0.5;
  here?.setAttribute("visibility", at < 0 ? "hidden" : "visible");
  for (const end of ["x1", "x2"]) here?.setAttribute(end, at);
  $("panel").replaceChildren(
    make("p", { class: "quote" }, make("b", {}, ...glyphs(token.text, false))),
    make("p", { class: "caption" }, describe(stop)),
    make("div", { class: "scores" }, make("table", {}, make("tbody", {}, ...state.exchange.metrics.map((metric) => scoreRow(token, metric, isRejected))))),
    ...decisions(stop).map((text) => make("p", { class: "decision" }, text)),
  );
  if (stop === state.pinned) $("panel").append(make("p", { class: "caption pin" }, "Pinned. ", make("button", { type: "button", class: "link", "data-unpin": "" }, "Let go")));
}

function describe({ token, round, isRejected }) {
  const origins = { prompt: "in the prompt", draft: "drafted, accepted by the target", target: "written by the target" };
  const written = isRejected ? "drafted, rejected by the target" : origins[token.origin];
  const turn = round == null || token.origin === "prompt" ? "" : `, round ${round}`;
  return `Token ${token.position}${turn}: ${written}${token.reader ? `; read by the ${token.reader}` : ""}.`;
}

function scoreRow(token, metric, isRejected) {
  const score = scoreOf(token, metric);
  const bar = make("span", { class: score === undefined ? "bar unscored" : "bar" });
  bar.style.setProperty("--score", score ?? 0);
  const name = make("th", { scope: "row" }, words(metric), bar);
  if (score === undefined) name.append(make("span", { class: "reason" }, isRejected ? token.unread : reasonOf(token, metric)));
  return make("tr", { class: metric === state.metric ? "chosen" : "" }, name, make("td", {}, score === undefined ? "not scored" : score.toFixed(3)));
}

function decisions({ token, isRejected }) {
  if (isRejected) return ["Look-ahead only: this token was never part of the answer, and no policy acts on it."];
  const verdicts = (state.exchange.verdicts ?? []).filter((verdict) => verdict.position === token.position);
  if (verdicts.length) return verdicts.map(({ action, reason }) => `Verdict: ${action}. ${reason}.`.replace("..", "."));
  return [scoreOf(token) >= threshold() ? `No verdict; at ${decimals(threshold())} it would be flagged.` : "No verdict."];
}

function goTo(stop, { pin = false } = {}) {
  const previous = $("text").querySelector("[tabindex='0']");
  previous?.setAttribute("tabindex", "-1");
  const score = scoreOf(stop.token);
  stop.node.tabIndex = 0;
  stop.node.setAttribute("role", "button");
  stop.node.setAttribute("aria-label", `${JSON.stringify(stop.token.text)}. ${words(state.metric)}: ${score === undefined ? "not scored" : decimals(score)}. ${describe(stop)} ${decisions(stop).join(" ")}`);
  if (pin) setPin(stop);
  stop.node.focus({ preventScroll: true });
  const { top, bottom } = stop.node.getBoundingClientRect();
  if (top < 200 || bottom > innerHeight * 0.7) stop.node.scrollIntoView({ block: "center" });
  if (!state.pinned || pin) inspect(stop);
}

function setPin(stop) {
  state.pinned?.node.classList.remove("pinned");
  state.pinned?.node.removeAttribute("aria-pressed");
  state.pinned = stop;
  stop?.node.classList.add("pinned");
  stop?.node.setAttribute("aria-pressed", "true");
  if (stop) inspect(stop);
}

function jumpToMaximum() {
  const scored = state.stops.filter(({ token, isRejected }) => !isRejected && scoreOf(token) !== undefined);
  if (scored.length) goTo(scored.reduce((most, stop) => (scoreOf(stop.token) > scoreOf(most.token) ? stop : most)), { pin: true });
}

// ---- Events: one listener each, on the text and the page, however many tokens there are ----

const stopAt = (target) => state.stops[target.closest?.("[data-stop]")?.dataset.stop];

function onTextKey(event) {
  const visible = document.body.classList.contains("drafts") ? state.stops : state.stops.filter((stop) => !stop.isRejected);
  const current = visible.indexOf(stopAt(event.target));
  if (current < 0 || event.ctrlKey || event.metaKey || event.altKey) return;
  const next = { ArrowRight: current + 1, ArrowLeft: current - 1, Home: 0, End: visible.length - 1 }[event.key];
  if (next !== undefined && visible[next]) goTo(visible[next], { pin: state.pinned !== null });
  else if (event.key === "Enter" || event.key === " ") setPin(state.pinned === visible[current] ? null : visible[current]);
  else return;
  event.preventDefault();
}

function onPageKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey || event.target.matches("select, input[type=text]")) return;
  if (event.key === "m") jumpToMaximum();
  else if (event.key === "d") $("drafts").click();
  else if (event.key === "Escape") release();
}

function release() {
  setPin(null);
  inspect(null);
}

function exportJson() {
  const link = make("a", { href: URL.createObjectURL(new Blob([JSON.stringify(data, null, 2)], { type: "application/json" })), download: "pilotfish.json" });
  link.click();
  URL.revokeObjectURL(link.href);
}

function listen() {
  $("theme").addEventListener("change", (event) => chooseTheme(event.target.value));
  $("contents").addEventListener("click", (event) => {
    const item = event.target.closest("li");
    if (item) showExchange([...$("contents").children].indexOf(item));
  });
  $("metric").addEventListener("change", (event) => { state.metric = event.target.value; paint(); inspect(state.active); });
  $("drafts").addEventListener("change", (event) => document.body.classList.toggle("drafts", event.target.checked));
  $("threshold").addEventListener("input", (event) => { state.moved.set(state.metric, Number(event.target.value)); mark(); inspect(state.active); });
  $("reset").addEventListener("click", () => { state.moved.delete(state.metric); mark(); inspect(state.active); });
  $("jump").addEventListener("click", jumpToMaximum);
  $("export").addEventListener("click", exportJson);
  $("verdicts").addEventListener("click", (event) => {
    const position = event.target.dataset.position;
    if (position) goTo(state.byPosition.get(Number(position)), { pin: true });
  });
  $("panel").addEventListener("click", (event) => { if ("unpin" in event.target.dataset) release(); });
  $("strip").addEventListener("click", (event) => {
    const box = $("strip").getBoundingClientRect();
    const tokens = state.exchange.tokens;
    const at = Math.min(tokens.length - 1, Math.max(0, Math.floor((event.clientX - box.left) / box.width * tokens.length)));
    goTo(state.byPosition.get(tokens[at].position), { pin: true });
  });
  $("text").addEventListener("pointerover", (event) => {
    const stop = stopAt(event.target);
    if (stop && !state.pinned && event.pointerType !== "touch") inspect(stop);
  });
  $("text").addEventListener("focusin", (event) => { if (!state.pinned && stopAt(event.target) !== state.active) goTo(stopAt(event.target)); });
  $("text").addEventListener("click", (event) => {
    const stop = stopAt(event.target);
    if (!stop) return;
    if (stop === state.pinned) release();
    else goTo(stop, { pin: true });
  });
  $("text").addEventListener("keydown", onTextKey);
  document.addEventListener("keydown", onPageKey);
}

function setTax({ columns, rows, note }) {
  const isNumber = columns.map((_, column) => rows.length > 0 && rows.every((row) => /^[-+−±<>≤≥]?\s*[\d.–-]/.test(String(row[column]))));
  const cells = (tag, row) => row.map((cell, column) => make(tag, { class: isNumber[column] ? "number" : "", ...(tag === "th" && { scope: "col" }) }, String(cell)));
  $("tax-table").replaceChildren(make("thead", {}, make("tr", {}, ...cells("th", columns))), make("tbody", {}, ...rows.map((row) => make("tr", {}, ...cells("td", row)))));
  $("tax-note").textContent = note ?? "";
  $("tax").hidden = false;
}

document.addEventListener("DOMContentLoaded", () => {
  data = JSON.parse($("data").textContent);
  $("contents").append(...data.exchanges.map((exchange, index) => make("li", {}, make("button", { type: "button" },
    make("span", { class: "entry" }, `${index + 1}`, make("span", { class: "name" }, exchange.title)), make("span"), make("span")))));
  listen();
  applyTheme();
  if (data.tax) setTax(data.tax);
  showExchange(0);
});
