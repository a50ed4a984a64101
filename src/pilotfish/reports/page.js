// Reads the exchanges from the page's JSON block, sets one as text coloured by score, answers pointer and keyboard.
const state = {
  exchange: null,
  metric: "",
  moved: new Map(), // metric -> threshold set on this page
  stops: [], // what can be pointed at, in reading order: {node, token, round, isRejected}
  byPosition: new Map(), // position -> stop of the committed token
  tabStop: null, // the text is one tab stop; arrow keys move inside it
  active: null,
  pinned: null,
};
const NEAR = 8; // tokens; verdicts of one metric this close together are one note
const BARS = 600; // about one a pixel

const limitOf = (metric, exchange = state.exchange) => state.moved.get(metric) ?? exchange.thresholds?.[metric] ?? 0.5;
const scoreOf = (token, metric = state.metric) => token.scores?.[metric];
/** What is held against the threshold: the score of the text so far; the token's own where a page has no other. */
const runningOf = (token, metric = state.metric) => token.running?.[metric] ?? scoreOf(token, metric);

// ---- Setting an exchange ----

function addStop(block, token, round, isRejected) {
  const node = make(isRejected ? "s" : "span", { "data-stop": state.stops.length }, ...glyphs(token.text, !isRejected));
  node.className = isRejected ? "lookahead" : `token ${token.origin}`;
  node.classList.toggle("special", /^<\|.*\|>$/.test(token.text));
  const stop = { node, token, round, isRejected };
  state.stops.push(stop);
  block.append(node);
  return stop;
}

// Rejected drafts, by the position of the token that the target wrote in their place.
function rejectedDrafts({ rounds = [] }) {
  const groups = new Map();
  for (const { round, start, drafted } of rounds) {
    const first = drafted.findIndex((draft) => !draft.accepted);
    if (first < 0) continue;
    const tokens = drafted.slice(first).map((draft, offset) => ({ ...draft, position: start + first + offset }));
    groups.set(start + first, [...(groups.get(start + first) ?? []), { round, tokens }]);
  }
  return groups;
}

function setRejected(block, groups) {
  for (const { round, tokens } of groups) {
    const group = make("span", { class: "rejected" });
    for (const token of tokens) addStop(group, token, round, true);
    block.append(group);
  }
}

function setText(exchange, notes) {
  const blocks = { prompt: document.createDocumentFragment(), answer: document.createDocumentFragment() };
  const rejected = rejectedDrafts(exchange);
  for (const token of exchange.tokens) {
    const block = token.origin === "prompt" ? blocks.prompt : blocks.answer;
    setRejected(block, rejected.get(token.position) ?? []);
    rejected.delete(token.position);
    notes.forEach(({ first }, index) => {
      if (first === token.position) block.append(make("i", { class: "note", "data-note": index + 1, "aria-hidden": "true" }));
    });
    state.byPosition.set(token.position, addStop(block, token, token.round, false));
  }
  for (const groups of rejected.values()) setRejected(blocks.answer, groups);
  for (const name of ["prompt", "answer"]) {
    $(name).replaceChildren(blocks[name]);
    $(name).parentElement.hidden = $(name).childElementCount === 0;
  }
}

function groupVerdicts({ verdicts = [] }) {
  const notes = [];
  for (const verdict of verdicts) {
    const { position, metric, action, score } = verdict;
    const note = notes.findLast((one) => one.metric === metric && one.action === action && position - one.last <= NEAR);
    if (!note) {
      notes.push({ metric, action, first: position, last: position, count: 1, peak: verdict });
      continue;
    }
    Object.assign(note, { last: position, count: note.count + 1 });
    if ((score ?? 2) > (note.peak.score ?? 2)) note.peak = verdict; // no score outweighs every score
  }
  return notes;
}

function setVerdicts(notes) {
  const past = { flag: "Flagged", stop: "Stopped" };
  $("verdicts").replaceChildren(...notes.map(({ metric, action, first, last, count, peak }, index) => {
    const place = count === 1 ? `token ${first}` : `${count} tokens from ${first} to ${last}`;
    const label = `${past[action] ?? words(action)} at ${place}`;
    const link = state.byPosition.has(peak.position)
      ? make("button", { type: "button", class: "link", "data-position": peak.position }, label) : label;
    const why = count === 1 ? peak.reason : `Token ${peak.position}: ${peak.reason}`;
    return make("li", {}, make("span", { class: "number" }, `${index + 1}`),
      make("span", {}, link, `, ${words(metric)}`, make("span", { class: "why" }, why)));
  }));
  if (!notes.length) $("verdicts").append(make("li", { class: "why" }, "None: the policy took no action."));
}

function statsLine({ stats = {}, finish_reason: finish }) {
  const endings = { length: "cut at the token limit", stop_string: "ended at a stop string", content_filter: "stopped by the policy" };
  const { tokens_per_s: speed, acceptance, num_scored: scored, num_committed: committed } = stats;
  return [
    speed != null && `${speed.toFixed(1)} tokens a second`,
    acceptance != null && `${(100 * acceptance).toFixed(0)} % of drafts accepted`,
    scored != null && committed != null && `${scored} of ${plural(committed, "committed token")} scored`,
    finish === "stop" ? "ended by itself" : endings[finish] ?? finish,
  ].filter(Boolean).join(" · ");
}

function showExchange(index) {
  const exchange = data.exchanges[index];
  Object.assign(state, { exchange, stops: [], byPosition: new Map(), active: null, pinned: null });
  if (!exchange.metrics.includes(state.metric)) state.metric = exchange.metrics[0];
  $("metric").replaceChildren(...exchange.metrics.map((name) => new Option(words(name), name, false, name === state.metric)));
  [...$("contents").children].forEach((item, at) => item.firstChild.setAttribute("aria-current", at === index));
  $("exchange-title").textContent = exchange.title;
  const { target, draft } = exchange;
  $("models").textContent = [target && `target ${target}`, draft && `draft ${draft}`].filter(Boolean).join(" · ");
  const notes = groupVerdicts(exchange);
  setText(exchange, notes);
  setVerdicts(notes);
  $("stats").textContent = statsLine(exchange);
  state.tabStop = state.stops[0];
  state.tabStop.node.tabIndex = 0;
  paint();
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
  const limit = limitOf(state.metric);
  const own = state.exchange.thresholds?.[state.metric];
  const counts = { prompt: 0, answer: 0, unscored: 0 };
  for (const { node, token, isRejected } of state.stops) {
    if (isRejected) continue;
    const score = runningOf(token);
    node.classList.toggle("over", score >= limit);
    if (score === undefined) counts.unscored += 1;
    else if (score >= limit) counts[token.origin === "prompt" ? "prompt" : "answer"] += 1;
  }
  $("threshold").value = limit;
  $("threshold").setAttribute("aria-valuetext", decimals(limit));
  $("calibrated").hidden = own === undefined;
  $("calibrated").style.setProperty("--at", own ?? 0);
  $("flaggable").textContent = `At ${decimals(limit)}, ${plural(counts.answer, "token")} of the answer and ${counts.prompt} of the prompt `
    + `would be flagged${counts.unscored ? `; ${plural(counts.unscored, "token")} not scored` : ""}.`;
  $("reset").hidden = !state.moved.has(state.metric);
  $("reset").textContent = own === undefined ? "Back to 0.50" : `Back to the calibrated ${decimals(own)}`;
  for (const end of ["y1", "y2"]) $("strip").querySelector(".limit").setAttribute(end, 100 * (1 - limit));
  markContents();
  inspect(state.active);
}

/** The answer's tokens: a prompt's own, the chat template's among them, say nothing of the model. All where there is no answer. */
function answerOf({ tokens }) {
  const answer = tokens.filter((token) => token.origin !== "prompt");
  return answer.length ? answer : tokens;
}

function markContents() {
  data.exchanges.forEach((exchange, index) => {
    const [, highest, over] = $("contents").children[index].firstChild.children;
    const scores = answerOf(exchange).map((token) => runningOf(token)).filter((score) => score !== undefined);
    const limit = limitOf(state.metric, exchange);
    const top = scores.reduce((most, score) => Math.max(most, score), 0);
    highest.replaceChildren(scores.length ? make("span", { class: "chip" }, decimals(top)) : "not scored");
    highest.style.setProperty("--score", top);
    over.textContent = scores.length ? scores.filter((score) => score >= limit).length : "";
  });
}

function drawStrip() {
  const { tokens } = state.exchange;
  const bin = Math.ceil(tokens.length / BARS);
  let bars = "", gaps = "";
  for (let at = 0; at < tokens.length; at += bin) {
    const scores = tokens.slice(at, at + bin).map((token) => runningOf(token));
    bars += `M${at} 100V${100 * (1 - Math.max(...scores.map((score) => score ?? 0)))}h${bin}V100z`;
    if (scores.includes(undefined)) gaps += `M${at} 100V0h${bin}V100z`;
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
  $("strip-caption").textContent = `${words(state.metric)}, of the text up to each token: ${asked} of the prompt (shaded), `
    + `${tokens.length - asked} of the answer. The dashed line is the threshold.`;
}

// ---- One token in the margin ----

function inspect(stop) {
  state.active?.node.classList.remove("active");
  state.active = stop;
  $("panel").classList.toggle("idle", !stop);
  const here = $("strip").querySelector(".here");
  here.setAttribute("visibility", stop ? "visible" : "hidden");
  if (!stop) {
    const hint = "Point at a token, or tab into the text and step with the arrow keys, to read its scores. A click pins it.";
    $("panel").replaceChildren(make("p", { class: "caption" }, hint));
    return;
  }
  stop.node.classList.add("active");
  const at = state.exchange.tokens.findIndex(({ position }) => position >= stop.token.position);
  for (const end of ["x1", "x2"]) here.setAttribute(end, at < 0 ? state.exchange.tokens.length : at + 0.5);
  $("panel").replaceChildren(
    make("p", { class: "quote" }, make("b", {}, ...glyphs(stop.token.text, false))),
    make("p", { class: "caption" }, describe(stop)),
    make("ul", { class: "scores" }, ...state.exchange.metrics.map((metric) => scoreLine(stop, metric))),
    ...decisions(stop).map((text) => make("p", { class: "decision" }, text)),
  );
  if (stop !== state.pinned) return;
  $("panel").append(make("p", { class: "caption pin" }, "Pinned. ", make("button", { type: "button", class: "link" }, "Let go")));
}

function describe({ token, round, isRejected }) {
  const origins = { prompt: "in the prompt", draft: "drafted, and accepted by the target", target: "written by the target" };
  const origin = isRejected ? "drafted, and rejected by the target" : origins[token.origin];
  const turn = round == null || token.origin === "prompt" ? "" : `, round ${round}`;
  return `Token ${token.position}${turn}: ${origin}${token.reader ? `; read by the ${token.reader}` : ""}.`;
}

function scoreLine({ token, isRejected }, metric) {
  const score = scoreOf(token, metric);
  const bar = make("span", { class: score === undefined ? "bar unscored" : "bar" }, make("i"));
  bar.style.setProperty("--score", score ?? 0);
  bar.style.setProperty("--limit", limitOf(metric));
  const line = make("li", { class: metric === state.metric ? "chosen" : "" }, make("span", {}, words(metric)),
    make("span", { class: "value" }, score === undefined ? "not scored" : score.toFixed(3)), bar);
  const running = token.running?.[metric];
  if (running !== undefined) line.append(make("span", { class: "reason" }, `text so far ${running.toFixed(3)}`));
  const missing = isRejected ? "the draft never read it" : "no score was recorded";
  if (score === undefined) line.append(make("span", { class: "reason" }, token.unscored?.[metric] ?? missing));
  return line;
}

function decisions({ token, isRejected }) {
  if (isRejected) return ["Look-ahead only: never part of the answer, and no policy acts on it."];
  const verdicts = (state.exchange.verdicts ?? []).filter(({ position }) => position === token.position);
  if (verdicts.length) return verdicts.map(({ action, reason }) => `Verdict: ${action}, because ${reason}.`);
  const limit = limitOf(state.metric);
  return [runningOf(token) >= limit ? `No verdict; at ${decimals(limit)} it would be flagged.` : "No verdict."];
}

function goTo(stop, pins) {
  const score = scoreOf(stop.token);
  const spoken = `${words(state.metric)} ${score === undefined ? "not scored" : decimals(score)}`;
  state.tabStop.node.tabIndex = -1;
  state.tabStop = stop;
  stop.node.tabIndex = 0;
  stop.node.setAttribute("role", "button");
  stop.node.setAttribute("aria-label", [JSON.stringify(stop.token.text), spoken, describe(stop), ...decisions(stop)].join(" "));
  if (pins) pin(stop);
  else if (!state.pinned) inspect(stop);
  stop.node.focus({ preventScroll: true });
  const { top, bottom } = stop.node.getBoundingClientRect();
  if (top < 200 || bottom > innerHeight * 0.7) stop.node.scrollIntoView({ block: "center" });
}

function pin(stop) {
  state.pinned?.node.classList.remove("pinned");
  state.pinned?.node.removeAttribute("aria-pressed");
  state.pinned = stop;
  stop?.node.classList.add("pinned");
  stop?.node.setAttribute("aria-pressed", "true");
  inspect(stop);
}

function jumpToMaximum() {
  const answer = new Set(answerOf(state.exchange));
  const scored = state.stops.filter(({ token }) => answer.has(token) && scoreOf(token) !== undefined);
  if (scored.length) goTo(scored.reduce((most, stop) => (scoreOf(stop.token) > scoreOf(most.token) ? stop : most)), true);
}

// ---- Events: listeners on the text and the page, none on a token ----

const stopAt = (target) => state.stops[target.closest("[data-stop]")?.dataset.stop];
const on = (id, type, handle) => $(id).addEventListener(type, handle);

function onTextKey(event) {
  const stops = $("drafts").checked ? state.stops : state.stops.filter((stop) => !stop.isRejected);
  const at = stops.indexOf(stopAt(event.target));
  if (at < 0 || event.ctrlKey || event.metaKey || event.altKey) return;
  const next = stops[{ ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: stops.length - 1 }[event.key]];
  if (next) goTo(next, state.pinned !== null);
  else if (event.key === "Enter" || event.key === " ") pin(state.pinned === stops[at] ? null : stops[at]);
  else return;
  event.preventDefault();
}

function onPageKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey || event.target.matches("select")) return;
  if (event.key === "m") jumpToMaximum();
  else if (event.key === "d") $("drafts").click();
  else if (event.key === "Escape") pin(null);
}

function onTextClick({ target }) {
  const stop = stopAt(target);
  if (!stop || !getSelection().isCollapsed) return; // text is being selected
  if (stop === state.pinned) pin(null);
  else goTo(stop, true);
}

function onStripClick({ clientX }) {
  const { left, width } = $("strip").getBoundingClientRect();
  const { tokens } = state.exchange;
  const at = Math.floor((clientX - left) / width * tokens.length);
  goTo(state.byPosition.get(tokens[Math.min(tokens.length - 1, Math.max(0, at))].position), true);
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
showExchange(0);
document.body.classList.toggle("drafts", $("drafts").checked); // browsers restore it on reload

on("contents", "click", ({ target }) => {
  const item = target.closest("li");
  if (item) showExchange([...$("contents").children].indexOf(item));
});
on("metric", "change", ({ target }) => { state.metric = target.value; paint(); });
on("threshold", "input", ({ target }) => { state.moved.set(state.metric, Number(target.value)); mark(); });
on("reset", "click", () => { state.moved.delete(state.metric); mark(); });
on("drafts", "change", ({ target }) => document.body.classList.toggle("drafts", target.checked));
on("jump", "click", jumpToMaximum);
on("verdicts", "click", ({ target: { dataset } }) => { if (dataset.position) goTo(state.byPosition.get(Number(dataset.position)), true); });
on("panel", "click", ({ target }) => { if (target.matches("button")) pin(null); });
on("strip", "click", onStripClick);
on("export", "click", exportJson);
on("text", "click", onTextClick);
on("text", "keydown", onTextKey);
on("text", "focusin", ({ target }) => { if (!state.pinned && stopAt(target) !== state.active) goTo(stopAt(target), false); });
on("text", "pointerover", ({ target, pointerType }) => {
  if (stopAt(target) && !state.pinned && pointerType !== "touch") inspect(stopAt(target));
});
document.addEventListener("keydown", onPageKey);
