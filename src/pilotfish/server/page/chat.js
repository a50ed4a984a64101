// Asks, and sets each answer while it is generated.
import { $, make, plural, words } from "./marks.js";
import { Refusal, streamed } from "./api.js";
import { Pane } from "./pane.js";

const NEAR_END = 160; // px; whoever reads further up is left there

export class Chat {
  /** `onEnd(exchange)` is told of each answer that has ended. */
  constructor(monitor, tools, reader, onEnd) {
    Object.assign(this, { monitor, tools, reader, onEnd, turns: [], leaving: null });
    this.node = make("div", { class: "turns" });
    $("composer").addEventListener("submit", (event) => { event.preventDefault(); this.ask(); });
    $("stop").addEventListener("click", () => this.stop());
    $("anew").addEventListener("click", () => this.clear());
    $("question").addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
      event.preventDefault();
      $("composer").requestSubmit();
    });
  }

  get panes() {
    return this.turns.map(({ pane }) => pane);
  }

  clear() {
    this.stop();
    this.turns = [];
    this.node.replaceChildren();
    this.reader.pin(null);
    this.tell();
    $("question").focus();
  }

  stop() {
    this.leaving?.abort();
  }

  tell() {
    $("send").hidden = this.leaving !== null;
    $("stop").hidden = this.leaving === null;
    $("anew").hidden = this.turns.length === 0;
    $("flaggable").setAttribute("aria-live", this.leaving ? "off" : "polite");
    document.dispatchEvent(new CustomEvent("turned"));
  }

  messages(question) {
    const system = $("system").value.trim();
    const answered = this.turns.filter(({ pane }) => pane.exchange.answer);
    const before = answered.flatMap(({ said, pane }) => [{ role: "user", content: said }, { role: "assistant", content: pane.exchange.answer }]);
    return [...(system ? [{ role: "system", content: system }] : []), ...before, { role: "user", content: question }];
  }

  async ask() {
    const question = $("question").value.trim();
    if (!question || this.leaving) return;
    const body = {
      model: this.monitor.model, messages: this.messages(question), max_tokens: Number($("max-tokens").value),
      temperature: Number($("temperature").value), ...($("seed").value ? { seed: Number($("seed").value) } : {}),
    };
    body.monitor = { prompt: true, lookahead: this.monitor.isDrafting, signals: this.monitor.isDrafting };
    const exchange = {
      asked: question, answer: "", metrics: this.monitor.metrics, thresholds: this.monitor.thresholds, target: this.monitor.model,
      draft: this.monitor.draft, tokens: [], rounds: [], verdicts: [], stats: {},
    };
    const turn = { said: question, pane: new Pane(exchange, this.tools, this.reader) };
    this.turns.push(turn);
    this.node.append(turn.pane.node);
    $("question").value = "";
    this.leaving = new AbortController();
    this.tell();
    turn.pane.node.scrollIntoView({ block: "start" });
    await this.follow(turn.pane, body);
    this.leaving = null;
    turn.pane.end();
    this.tell();
    this.say(turn.pane);
    this.onEnd(exchange);
  }

  async follow(pane, body) {
    const { exchange } = pane;
    pane.node.setAttribute("aria-busy", "true");
    pane.stats.textContent = "waiting for its turn";
    const started = performance.now();
    try {
      for await (const chunk of streamed("v1/chat/completions", body, this.leaving.signal)) {
        exchange.id = chunk.id;
        const [choice] = chunk.choices;
        if (!choice) continue;
        exchange.answer += choice.delta.content ?? "";
        exchange.finish_reason = choice.finish_reason ?? undefined;
        pane.take(choice.monitor ?? {});
        if (choice.monitor?.stats) exchange.stats = summary(choice.monitor.stats, exchange, performance.now() - started);
        this.redraw(pane);
      }
    } catch (error) {
      if (!(error instanceof Refusal) && error.name !== "AbortError") throw error;
      exchange.stats = { ...exchange.stats, error: error.name === "AbortError" ? "stopped by you" : error.message };
    } finally {
      pane.node.removeAttribute("aria-busy");
    }
  }

  /** Once a frame at most, however fast chunks come. */
  redraw(pane) {
    if (this.frame) return;
    this.frame = requestAnimationFrame(() => {
      this.frame = null;
      const isAtEnd = document.documentElement.scrollHeight - innerHeight - scrollY < NEAR_END;
      pane.draw();
      if (this.leaving) pane.stats.textContent = plural(pane.exchange.tokens.filter(({ origin }) => origin !== "prompt").length, "token");
      this.tools.tell();
      if (isAtEnd && !this.reader.pinned) scrollTo(0, document.documentElement.scrollHeight);
    });
  }

  say({ exchange, counts }) {
    const flagged = [...new Set(exchange.verdicts.map(({ metric }) => words(metric)))].join(", ");
    const num = exchange.tokens.filter(({ origin }) => origin !== "prompt").length;
    $("spoken").textContent = `The answer has ended: ${plural(num, "token")}, ${counts.answer} at or above the threshold.`
      + (flagged ? ` Verdicts on ${flagged}.` : "") + (exchange.stats.error ? ` ${exchange.stats.error}` : "");
  }
}

function summary({ committed, scored, acceptance, notes }, { tokens }, elapsed) {
  const written = tokens.filter(({ origin }) => origin !== "prompt").length;
  return { num_committed: committed, num_scored: scored, acceptance, notes, tokens_per_s: 1000 * written / elapsed };
}
