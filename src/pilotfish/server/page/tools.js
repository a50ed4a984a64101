// The choices that colour every text on the page: metric, further metrics, threshold, drafts.
import { $, decimals, make, plural, words } from "./marks.js";

const LANES = 3;

export class Tools {
  constructor(monitor) {
    Object.assign(this, { monitor, panes: [], metric: monitor.metrics[0], also: [], moved: new Map() });
    this.fill($("metric"), monitor.metrics);
    $("lanes").append(...monitor.metrics.map((metric) => make("label", {}, make("input", { type: "checkbox", value: metric }), words(metric))));
    $("metric").addEventListener("change", ({ target }) => this.choose(target.value));
    $("lanes").addEventListener("change", () => this.chooseLanes());
    $("threshold").addEventListener("input", ({ target }) => { this.moved.set(this.metric, Number(target.value)); this.mark(); });
    $("reset").addEventListener("click", () => { this.moved.delete(this.metric); this.mark(); });
    $("drafts").addEventListener("change", () => this.showDrafts());
    this.showDrafts(); // browsers restore the box on reload
  }

  /** Options for a list of metrics: heads first, second signals in a group of their own. */
  fill(select, metrics) {
    const options = (names) => names.map((name) => new Option(words(name), name, false, name === this.metric));
    const signals = metrics.filter((name) => name.startsWith("signal."));
    const group = make("optgroup", { label: "how draft and target disagree" }, ...options(signals));
    select.replaceChildren(...options(metrics.filter((name) => !name.startsWith("signal."))), ...(signals.length ? [group] : []));
  }

  // What Reader and Pane ask for.

  limitOf(metric, exchange) {
    return this.moved.get(metric) ?? exchange.thresholds?.[metric] ?? 0.5;
  }

  get limit() {
    return this.limitOf(this.metric, this.monitor);
  }

  get showsDrafts() {
    return $("drafts").checked;
  }

  // Changes.

  show(panes) {
    this.panes = panes;
    this.paint();
  }

  choose(metric) {
    this.metric = metric;
    $("metric").value = metric;
    this.also = this.also.filter((name) => name !== metric);
    this.paint();
  }

  chooseLanes() {
    this.also = [...$("lanes").querySelectorAll("input:checked")].map(({ value }) => value).slice(0, LANES);
    this.paint();
  }

  showDrafts() {
    document.body.classList.toggle("drafts", this.showsDrafts);
  }

  paint() {
    for (const box of $("lanes").querySelectorAll("input")) {
      box.checked = this.also.includes(box.value);
      box.disabled = box.value === this.metric || (this.also.length >= LANES && !box.checked);
    }
    $("key-lanes").hidden = !this.also.length;
    $("key-lanes").replaceChildren(...this.also.map((name, lane) => make("span", {}, make("i", { class: "lane", "data-lane": lane }), words(name))));
    $("also").querySelector("summary").textContent = `More metrics${this.also.length ? `: ${this.also.length}` : ""}`;
    for (const pane of this.panes) pane.paint();
    this.tell();
  }

  mark() {
    for (const pane of this.panes) pane.mark();
    this.tell();
  }

  /** What the threshold would flag and cost. */
  tell() {
    const { metric, limit } = this;
    const own = this.monitor.thresholds[metric];
    const total = (side) => this.panes.reduce((sum, pane) => sum + pane.counts[side], 0);
    const missing = total("unscored");
    $("threshold").value = limit;
    $("threshold").setAttribute("aria-valuetext", decimals(limit));
    $("calibrated").hidden = own === undefined;
    $("calibrated").style.setProperty("--at", own ?? 0);
    $("flaggable").textContent = `At ${decimals(limit)}, ${plural(total("answer"), "token")} of the answer and ${total("prompt")} of the prompt `
      + `would be flagged${missing ? `; ${plural(missing, "token")} not scored` : ""}.`;
    $("budget").textContent = this.monitor.budget(metric, limit);
    $("reset").hidden = !this.moved.has(metric);
    $("reset").textContent = own === undefined ? "Back to 0.50" : `Back to ${decimals(own)}, in force`;
    document.dispatchEvent(new CustomEvent("chosen"));
  }
}
