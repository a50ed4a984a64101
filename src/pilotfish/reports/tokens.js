// Sets an exchange's tokens as text: coloured by score, rejected drafts between them, each a place to point at.
import { glyphs, make } from "./marks.js";

const BLOCK = 120; // tokens; the next end of a line closes a block, and what is off screen the browser need not lay out
const places = new WeakMap();

export const scoreOf = (token, metric) => token.scores?.[metric];
/** What is held against the threshold: the score of the text so far; the token's own where there is no other. */
export const runningOf = (token, metric) => token.running?.[metric] ?? scoreOf(token, metric);
/** What stands at a node: {node, token, round, isRejected, text}. */
export const stopAt = (node) => places.get(node.closest("[data-stop]"));

/** The answer's tokens: a prompt's own, the chat template's among them, say nothing of the model. All where there is no answer. */
export function answerOf({ tokens }) {
  const answer = tokens.filter((token) => token.origin !== "prompt");
  return answer.length ? answer : tokens;
}

/** Of a round: its drafts from the first rejected one on, with the positions that they would have taken. */
function rejectedOf({ round, start, drafted }) {
  const first = drafted.findIndex((draft) => !draft.accepted);
  if (first < 0) return null;
  return { round, at: start + first, tokens: drafted.slice(first).map((draft, offset) => ({ ...draft, position: start + first + offset })) };
}

export class TokenText {
  /** `prompt` and `answer` are the two elements that the text is set into. */
  constructor(prompt, answer) {
    this.sides = { prompt: { node: prompt }, answer: { node: answer } };
    this.colours = { metric: "", also: [], limit: 0.5 };
    this.clear();
  }

  clear() {
    Object.assign(this, { stops: [], byPosition: new Map(), waiting: new Map() });
    for (const side of Object.values(this.sides)) {
      side.node.replaceChildren();
      side.block = side.tabStop = null;
    }
  }

  /** Sets a whole exchange, uncoloured; `notes` are numbers to put before tokens: position to text. */
  set(exchange, notes = new Map()) {
    this.clear();
    for (const round of exchange.rounds ?? []) this.addRound(round);
    for (const token of exchange.tokens) this.add(token);
    this.flush();
    this.setNotes(notes);
  }

  setNotes(notes) {
    for (const { node } of Object.values(this.sides)) for (const note of node.querySelectorAll(".note")) note.remove();
    for (const [position, label] of notes) {
      this.byPosition.get(position)?.node.before(make("i", { class: "note", "data-note": label, "aria-hidden": "true" }));
    }
  }

  /** A new token at the end, or what has become known of one that is there. */
  add(token) {
    const known = this.byPosition.get(token.position);
    if (known) {
      Object.assign(known.token, token, { text: known.token.text, pending: token.pending ?? false });
      this.paintStop(known);
      return known;
    }
    const side = this.sides[token.origin === "prompt" ? "prompt" : "answer"];
    this.setRejected(side, token.position);
    const stop = this.makeStop(token, token.round, false);
    this.stops.push(stop);
    this.byPosition.set(token.position, stop);
    this.blockOf(side).append(stop.node);
    side.block.count += 1;
    side.block.ends = token.text.endsWith("\n");
    if (!side.tabStop) this.moveTabStop(stop);
    return stop;
  }

  /** Rejected drafts stand before the token that the target wrote in their place, whichever comes first. */
  addRound(round) {
    const group = rejectedOf(round);
    if (!group) return;
    const after = this.byPosition.get(group.at);
    if (after) this.insertRejected(group, this.stops.lastIndexOf(after), (node) => after.node.before(node));
    else this.waiting.set(group.at, [...(this.waiting.get(group.at) ?? []), group]);
  }

  /** Nothing more comes: drafts that no token followed go to the end. */
  flush() {
    for (const position of [...this.waiting.keys()]) this.setRejected(this.sides.answer, position);
  }

  setRejected(side, position) {
    for (const group of this.waiting.get(position) ?? []) this.insertRejected(group, this.stops.length, (node) => this.blockOf(side).append(node));
    this.waiting.delete(position);
  }

  insertRejected({ round, tokens }, index, place) {
    const stops = tokens.map((token) => this.makeStop(token, round, true));
    place(make("span", { class: "rejected" }, ...stops.map(({ node }) => node)));
    this.stops.splice(index, 0, ...stops);
    stops.forEach((stop) => this.paintStop(stop));
  }

  blockOf(side) {
    if (!side.block || (side.block.count >= BLOCK && side.block.ends)) {
      side.block = { node: make("div", { class: "lines" }), count: 0, ends: false };
      side.node.append(side.block.node);
    }
    return side.block.node;
  }

  makeStop(token, round, isRejected) {
    const node = make(isRejected ? "s" : "span", { "data-stop": "" }, ...glyphs(token.text ?? "…", !isRejected));
    node.className = isRejected ? "lookahead" : `token ${token.origin}`;
    if (/^<\|.*\|>$/.test(token.text)) node.classList.add("special");
    if (token.is_emitted === false && token.origin !== "prompt") node.classList.add("withheld");
    const stop = { node, token, round, isRejected, isOver: false, text: this };
    places.set(node, stop);
    return stop;
  }

  /** Each side is one tab stop; arrow keys move it. */
  moveTabStop(stop) {
    const side = this.sides[stop.token.origin === "prompt" ? "prompt" : "answer"];
    if (side.tabStop) side.tabStop.node.tabIndex = -1;
    side.tabStop = stop;
    stop.node.tabIndex = 0;
  }

  /** Colours by a metric, with up to three further ones as lanes below the text. */
  paint(metric, also = []) {
    Object.assign(this.colours, { metric, also });
    for (const { node } of Object.values(this.sides)) node.dataset.lanes = also.length;
    for (const stop of this.stops) this.paintStop(stop);
  }

  paintStop(stop) {
    const { metric, also, limit } = this.colours;
    const { node, token } = stop;
    const score = scoreOf(token, metric);
    node.classList.toggle("unscored", score === undefined && !token.pending);
    if (token.pending || node.classList.contains("pending")) node.classList.toggle("pending", Boolean(token.pending) && score === undefined);
    node.style.setProperty("--score", score ?? 0);
    also.forEach((name, lane) => node.style.setProperty(`--lane-${lane}`, scoreOf(token, name) ?? 0));
    this.markStop(stop, limit);
  }

  markStop(stop, limit) {
    const isOver = !stop.isRejected && runningOf(stop.token, this.colours.metric) >= limit;
    if (isOver !== stop.isOver) stop.node.classList.toggle("over", isOver);
    stop.isOver = isOver;
  }

  /** Underlines what reaches a threshold; returns how many tokens of each side do, and how many have no score. */
  mark(limit) {
    this.colours.limit = limit;
    const counts = { prompt: 0, answer: 0, unscored: 0 };
    for (const stop of this.byPosition.values()) {
      this.markStop(stop, limit);
      if (stop.isOver) counts[stop.token.origin === "prompt" ? "prompt" : "answer"] += 1;
      else if (runningOf(stop.token, this.colours.metric) === undefined) counts.unscored += 1;
    }
    return counts;
  }

  /** Where a metric is highest in the answer. */
  highest(exchange, metric) {
    const answer = new Set(answerOf(exchange).map(({ position }) => position));
    const scored = [...this.byPosition.values()].filter(({ token }) => answer.has(token.position) && scoreOf(token, metric) !== undefined);
    return scored.reduce((most, stop) => (most && scoreOf(most.token, metric) >= scoreOf(stop.token, metric) ? most : stop), null);
  }
}
