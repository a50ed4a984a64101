// One exchange on the page, set at once or as it is generated: what was asked, strips, the text, how it ended.
import { decimals, make, plural, words } from "./marks.js";
import { drawAcceptance, drawStrip, moveLimit, showHere, tokenAt } from "./strip.js";
import { runningOf, TokenText } from "./tokens.js";
import { groupVerdicts, numbersOf, statsLine, verdictItems } from "./verdicts.js";

const DIVERGENCE = "signal.divergence";

export class Pane {
  /** `exchange` may be empty still; `level` is that of its headings. */
  constructor(exchange, choice, reader, level = 2) {
    Object.assign(this, { exchange, choice, reader, counts: { prompt: 0, answer: 0, unscored: 0 } });
    const heading = (attributes, ...children) => make(`h${level + 1}`, attributes, ...children);
    this.title = make(`h${level}`, { class: "said" }, exchange.asked ?? exchange.id ?? "");
    this.caption = make("p", { class: "caption" });
    this.strips = new Map([["score", "Score"], ["acceptance", "Drafts"], ["divergence", "Divergence"]].map(([name, label]) => {
      const svg = make("svg", { class: name, role: "img", "aria-label": `${label} by token`, preserveAspectRatio: "none" });
      return [name, { svg, label: make("span", { class: "strip-label" }, label) }];
    }));
    const strip = make("figure", { class: "strip rows" }, ...[...this.strips.values()].flatMap(({ svg, label }) => [label, svg]));
    this.asked = make("summary", {}, "Prompt");
    this.prompt = make("div", { class: "tokens" });
    this.details = make("details", { class: "asked" }, this.asked, this.prompt);
    this.answer = make("div", { class: "tokens" });
    this.stats = make("p", { class: "caption stats" });
    this.remarks = make("ul", { class: "caption" });
    this.remarked = make("details", { class: "caption remarked", hidden: "" }, make("summary"), this.remarks);
    this.verdicts = make("ol", { class: "verdicts" });
    this.noted = make("section", { class: "noted", hidden: "" }, heading({}, "Verdicts"), this.verdicts);
    this.node = make("article", { class: "exchange pane" }, this.title, this.caption, strip, this.details,
      make("section", {}, heading({ class: "answer-label" }, "Answer"), this.answer), this.stats, this.remarked, this.noted);
    this.text = new TokenText(this.prompt, this.answer);
    this.text.exchange = exchange;
    this.listen(strip);
    if (exchange.tokens.length) this.set();
  }

  listen(strip) {
    this.reader.listen(this.prompt);
    this.reader.listen(this.answer);
    strip.addEventListener("click", ({ target, clientX }) => {
      const svg = target.closest("svg");
      if (svg && this.exchange.tokens.length) this.goTo(tokenAt(svg, this.exchange.tokens, clientX).position);
    });
    this.verdicts.addEventListener("click", ({ target: { dataset } }) => { if (dataset.position) this.goTo(Number(dataset.position)); });
  }

  goTo(position) {
    const stop = this.text.byPosition.get(position);
    if (stop) this.reader.goTo(stop, true);
  }

  /** The whole exchange at once. */
  set() {
    this.text.set(this.exchange);
    this.end();
  }

  /** A chunk's part of the exchange; colours what is new at once, the rest waits for `paint`. */
  take({ tokens = [], rounds = [], verdicts = [] }) {
    const { exchange, text } = this;
    for (const token of tokens) {
      const isNew = !text.byPosition.has(token.position);
      const { token: kept } = text.add(token);
      if (!isNew) continue;
      const last = exchange.tokens.at(-1);
      exchange.tokens.push(kept);
      if (last && last.position > kept.position) exchange.tokens.sort((one, other) => one.position - other.position);
    }
    for (const round of rounds) {
      exchange.rounds.push(round);
      text.addRound(round);
    }
    exchange.verdicts.push(...verdicts);
  }

  /** Nothing more comes: sets verdicts and their numbers in the text. */
  end() {
    this.text.flush();
    const notes = groupVerdicts(this.exchange);
    this.text.setNotes(numbersOf(notes));
    this.verdicts.replaceChildren(...verdictItems(notes, this.text.byPosition));
    this.noted.hidden = notes.length === 0;
    this.details.open ||= notes.some(({ peak }) => this.text.byPosition.get(peak.position)?.token.origin === "prompt");
    const ended = this.exchange.state && this.exchange.state !== "done" && this.exchange.state !== "running" ? this.exchange.state : "";
    const { error, notes: remarks = [] } = this.exchange.stats;
    this.stats.textContent = [statsLine(this.exchange), ended, error].filter(Boolean).join(" · ");
    this.remarked.hidden = remarks.length === 0;
    this.remarked.firstChild.textContent = plural(remarks.length, "remark") + " of the engine";
    this.remarks.replaceChildren(...remarks.map((remark) => make("li", {}, remark)));
  }

  /** Colours by what is chosen, and draws the strips. */
  paint() {
    this.text.paint(this.choice.metric, this.choice.also);
    this.draw();
  }

  /** The strips and counts alone: tokens are coloured already. */
  draw() {
    const { tokens, rounds } = this.exchange;
    const isJudged = tokens.some((token) => token.scores && DIVERGENCE in token.scores);
    drawStrip(this.strips.get("score").svg, tokens, this.choice.metric, this.limit);
    drawAcceptance(this.strips.get("acceptance").svg, tokens, rounds);
    if (isJudged) drawStrip(this.strips.get("divergence").svg, tokens, DIVERGENCE);
    const isDrafted = rounds.length > 0;
    for (const [name, isThere] of [["divergence", isJudged], ["acceptance", isDrafted]]) {
      const { svg, label } = this.strips.get(name);
      for (const node of [svg, label]) node.toggleAttribute("hidden", !isThere);
    }
    this.strips.get("score").label.textContent = words(this.choice.metric);
    this.mark();
  }

  get limit() {
    return this.choice.limitOf(this.choice.metric, this.exchange);
  }

  /** Underlines by the threshold; the counts are in `counts` then. */
  mark() {
    this.counts = this.text.mark(this.limit);
    moveLimit(this.strips.get("score").svg, this.limit);
    const prompt = this.exchange.tokens.filter(({ origin }) => origin === "prompt");
    const scores = prompt.map((token) => runningOf(token, this.choice.metric)).filter((score) => score !== undefined);
    const highest = scores.length ? `, ${words(this.choice.metric)} up to ${decimals(scores.reduce((most, score) => Math.max(most, score), 0))}` : "";
    this.asked.textContent = `Prompt, ${plural(prompt.length, "token")}${highest}`;
    this.details.hidden = prompt.length === 0;
  }

  /** Shows on the strips which token is looked at. */
  follow(stop) {
    const own = stop?.text === this.text ? stop : null;
    for (const { svg } of this.strips.values()) showHere(svg, this.exchange.tokens, own);
  }
}
