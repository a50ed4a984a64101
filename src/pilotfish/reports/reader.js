// Answers pointer and keyboard in texts of tokens, and tells of one token in the margin.
import { decimals, make, words } from "./marks.js";
import { runningOf, scoreOf, stopAt } from "./tokens.js";

const HINT = "Point at a token, or tab into the text and step with the arrow keys, to read its scores. A click pins it.";

export class Reader {
  /** `choice` says what is shown now: `metric`, `limitOf(metric, exchange)`, `showsDrafts`; `onMove(stop)` follows along. */
  constructor(panel, choice, onMove) {
    Object.assign(this, { panel, choice, onMove, active: null, pinned: null });
    panel.addEventListener("click", ({ target }) => { if (target.matches("button")) this.pin(null); });
  }

  /** Follows what happens in a root element; there is no listener on a token. */
  listen(root) {
    root.addEventListener("click", ({ target }) => {
      const stop = stopAt(target);
      if (!stop || !getSelection().isCollapsed) return; // text is being selected
      if (stop === this.pinned) this.pin(null);
      else this.goTo(stop, true);
    });
    root.addEventListener("keydown", (event) => this.onKey(event));
    root.addEventListener("focusin", ({ target }) => {
      const stop = stopAt(target);
      if (stop && !this.pinned && stop !== this.active) this.goTo(stop, false);
    });
    root.addEventListener("pointerover", ({ target, pointerType }) => {
      const stop = stopAt(target);
      if (stop && !this.pinned && pointerType !== "touch") this.inspect(stop);
    });
  }

  onKey(event) {
    const here = stopAt(event.target);
    if (!here || event.ctrlKey || event.metaKey || event.altKey) return;
    const stops = this.choice.showsDrafts ? here.text.stops : here.text.stops.filter((stop) => !stop.isRejected);
    const at = stops.indexOf(here);
    const next = stops[{ ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: stops.length - 1 }[event.key]];
    if (next) this.goTo(next, this.pinned !== null);
    else if (event.key === "Enter" || event.key === " ") this.pin(this.pinned === here ? null : here);
    else return;
    event.preventDefault();
  }

  goTo(stop, pins) {
    const score = scoreOf(stop.token, this.choice.metric);
    const spoken = `${words(this.choice.metric)} ${score === undefined ? "not scored" : decimals(score)}`;
    stop.text.moveTabStop(stop);
    stop.node.setAttribute("role", "button");
    stop.node.setAttribute("aria-label", [JSON.stringify(stop.token.text), spoken, describe(stop), ...this.decisions(stop)].join(" "));
    if (pins) this.pin(stop);
    else if (!this.pinned) this.inspect(stop);
    stop.node.closest("details")?.setAttribute("open", "");
    stop.node.focus({ preventScroll: true });
    const { top, bottom } = stop.node.getBoundingClientRect();
    if (top < 200 || bottom > innerHeight * 0.7) stop.node.scrollIntoView({ block: "center" });
  }

  pin(stop) {
    this.pinned?.node.classList.remove("pinned");
    this.pinned?.node.removeAttribute("aria-pressed");
    this.pinned = stop;
    stop?.node.classList.add("pinned");
    stop?.node.setAttribute("aria-pressed", "true");
    this.inspect(stop);
  }

  inspect(stop) {
    this.active?.node.classList.remove("active");
    this.active = stop;
    this.panel.classList.toggle("idle", !stop);
    stop?.node.classList.add("active");
    this.onMove(stop);
    if (!stop) {
      this.panel.replaceChildren(make("p", { class: "caption" }, HINT));
      return;
    }
    this.panel.replaceChildren(
      make("p", { class: "quote" }, make("b", {}, ...stop.node.cloneNode(true).childNodes)),
      make("p", { class: "caption" }, describe(stop)),
      ...this.scoreLists(stop),
      ...this.decisions(stop).map((text) => make("p", { class: "decision" }, text)),
    );
    if (stop !== this.pinned) return;
    this.panel.append(make("p", { class: "caption pin" }, "Pinned. ", make("button", { type: "button", class: "link" }, "Let go")));
  }

  /** Heads, then the second signals, which open on demand. */
  scoreLists(stop) {
    const { metrics } = stop.text.exchange;
    const list = (names) => make("ul", { class: "scores" }, ...names.map((metric) => this.scoreLine(stop, metric)));
    const signals = metrics.filter((metric) => metric.startsWith("signal."));
    if (!signals.length) return [list(metrics)];
    const more = make("details", { class: "caption" }, make("summary", {}, "How draft and target disagree"), list(signals));
    more.open = this.showsSignals ?? this.choice.metric.startsWith("signal.");
    more.addEventListener("toggle", () => { this.showsSignals = more.open; });
    const heads = metrics.filter((metric) => !signals.includes(metric));
    return [...(heads.length ? [list(heads)] : []), more];
  }

  scoreLine({ token, isRejected, text }, metric) {
    const score = scoreOf(token, metric);
    const bar = make("span", { class: score === undefined ? "bar unscored" : "bar" }, make("i"));
    bar.style.setProperty("--score", score ?? 0);
    bar.style.setProperty("--limit", this.choice.limitOf(metric, text.exchange));
    const line = make("li", { class: metric === this.choice.metric ? "chosen" : "" }, make("span", {}, words(metric)),
      make("span", { class: "value" }, score === undefined ? "not scored" : score.toFixed(3)), bar);
    const running = token.running?.[metric];
    if (running !== undefined) line.append(make("span", { class: "reason" }, `text so far ${running.toFixed(3)}`));
    const missing = token.pending ? "the draft has yet to read it" : isRejected ? "the draft never read it" : "no score was recorded";
    if (score === undefined) line.append(make("span", { class: "reason" }, token.unscored?.[metric] ?? missing));
    return line;
  }

  decisions({ token, isRejected, text }) {
    if (isRejected) return ["Look-ahead only: never part of the answer, and no policy acts on it."];
    const verdicts = (text.exchange.verdicts ?? []).filter(({ position }) => position === token.position);
    if (verdicts.length) return verdicts.map(({ action, reason }) => `Verdict: ${action}, because ${reason}.`);
    const limit = this.choice.limitOf(this.choice.metric, text.exchange);
    return [runningOf(token, this.choice.metric) >= limit ? `No verdict; at ${decimals(limit)} it would be flagged.` : "No verdict."];
  }
}

function describe({ token, round, isRejected }) {
  const origins = { prompt: "in the prompt", draft: "drafted, and accepted by the target", target: "written by the target" };
  const origin = isRejected ? "drafted, and rejected by the target" : origins[token.origin];
  const turn = round == null || token.origin === "prompt" ? "" : `, round ${round}`;
  const sent = token.is_emitted === false && token.origin !== "prompt" ? "; held back, never sent" : "";
  return `Token ${token.position}${turn}: ${origin}${token.reader ? `; read by the ${token.reader}` : ""}${sent}.`;
}
