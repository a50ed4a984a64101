// What the server says of its heads and policy: metrics, thresholds in force, what a threshold costs.
import { decimals, plural } from "./marks.js";
import { getJson } from "./api.js";

const SIGNALS = ["divergence", "rejection", "distance", "target_surprise", "draft_surprise"].map((name) => `signal.${name}`);

const WITHHELD = "▒"; // a text that the store does not keep

const share = (part) => `${Number((100 * part).toPrecision(2))} %`;

export class Monitor {
  static async read() {
    const [{ model, draft, taxed, heads }, { policy }] = await Promise.all([getJson("v1/monitor/heads"), getJson("v1/monitor/policy")]);
    return new Monitor({ model, draft, isTaxed: taxed }, heads, policy.rules ?? []);
  }

  constructor(models, heads, rules) {
    Object.assign(this, models, { rules, recent: [] });
    this.isDrafting = !models.isTaxed && models.draft != null; // else there are no second signals
    this.cards = new Map(heads.map(({ metric, card }) => [metric, card.thresholds?.[metric]]));
    this.heads = [...this.cards.keys()];
    this.metrics = [...this.heads, ...(this.isDrafting ? SIGNALS : [])];
    const calibrated = heads.filter(({ threshold }) => threshold != null).map(({ metric, threshold }) => [metric, threshold]);
    const own = rules.filter(({ threshold }) => threshold != null).map(({ metric, threshold }) => [metric, threshold]);
    this.thresholds = Object.fromEntries([...calibrated, ...own.reverse()]); // the first rule of a metric wins
  }

  /** A stored exchange as panes show it. */
  shown(stored) {
    const { stats } = stored;
    const tokens = stored.tokens.map((token) => ({ ...token, text: token.text ?? WITHHELD }));
    const written = tokens.filter(({ origin }) => origin !== "prompt").length;
    const scored = tokens.filter(({ running }) => this.heads.every((metric) => metric in running)).length;
    const known = { num_committed: tokens.length, num_scored: scored, tokens_per_s: stats.seconds ? written / stats.seconds : null };
    return { ...stored, tokens, metrics: this.metrics, thresholds: this.thresholds, stats: { ...stats, ...known } };
  }

  /** The side of an exchange that is held against a metric's threshold. */
  sideOf(metric) {
    const scope = this.rules.find((rule) => rule.metric === metric)?.scope ?? this.cards.get(metric)?.scope;
    return scope === "prompt" ? "prompt" : "answer";
  }

  /** Highest score of the text so far that a listed exchange reached on that side. */
  highestOf({ stats }, metric) {
    return (this.sideOf(metric) === "prompt" ? stats.highest_prompt : stats.highest)?.[metric];
  }

  /** What a threshold costs: the card's promise, and what it would have done to the exchanges that are listed. */
  budget(metric, limit) {
    return [this.promise(metric, limit), this.here(metric, limit)].filter(Boolean).join(" ");
  }

  promise(metric, limit) {
    if (!this.cards.has(metric)) return "A second signal: it has no calibration.";
    const card = this.cards.get(metric);
    if (!card) return "The bank’s card promises nothing about false positives of this metric.";
    const side = card.scope === "prompt" ? "prompts" : "answers";
    const known = Object.entries(card.by_source ?? {});
    const sources = known.length > 1 ? known : [[card.benign_source, card]];
    const sample = sources.map(([source, { num_flagged, num_benign }]) => `${num_flagged} of ${num_benign} in ${source}`).join(", ");
    const promised = `at most ${share(card.fpr_upper)} of benign ${side} (95 % bound; ${sample})`;
    if (limit < card.threshold) return `False positives: the card promises nothing below ${decimals(card.threshold)}, where it is ${promised}.`;
    return `False positives: ${promised}.`;
  }

  here(metric, limit) {
    const scores = this.recent.map((row) => this.highestOf(row, metric)).filter((score) => score !== undefined);
    if (!scores.length) return "";
    const over = scores.filter((score) => score >= limit).length;
    return `Of the last ${plural(scores.length, "exchange")} here it would flag ${over}, ${share(over / scores.length)}.`;
  }
}
