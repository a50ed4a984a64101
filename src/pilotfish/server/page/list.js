// The list of exchanges: filters, the highest score of each, two of them to compare.
import { $, decimals, make, plural, words } from "./marks.js";
import { getJson, Refusal } from "./api.js";

const ROWS = 50;
const RECENT = 200;
const NEAR = 250; // ms between the last key and the search

export class List {
  constructor(monitor, tools) {
    Object.assign(this, { monitor, tools, rows: [], picked: new Set(), asking: 0 });
    const kinds = [["", "all"], ["any", "any alert"], ...monitor.heads.map((metric) => [metric, words(metric)])];
    $("alerts").append(...kinds.map(([value, label]) => new Option(label, value)));
    let timer = 0;
    $("search").addEventListener("input", () => { clearTimeout(timer); timer = setTimeout(() => this.search(), NEAR); });
    $("filters").addEventListener("submit", (event) => { event.preventDefault(); this.search(); });
    $("alerts").addEventListener("change", () => this.search());
    $("order").addEventListener("change", () => this.draw());
    $("ranked").addEventListener("change", ({ target }) => { tools.choose(target.value); this.draw(); });
    $("older").addEventListener("click", () => this.search(this.rows.at(-1).created_s));
    $("compare").addEventListener("click", () => { location.hash = `compare=${[...this.picked].join(",")}`; });
    $("rows").addEventListener("change", ({ target }) => this.pick(target));
  }

  /** The newest exchanges of all: what a threshold is held against beside the card. */
  async readRecent() {
    this.monitor.recent = (await getJson(`v1/monitor/exchanges?limit=${RECENT}`)).exchanges;
  }

  /** Loads, and says in place of the count what the server refused. */
  async search(before = null) {
    try {
      await this.load(before);
    } catch (error) {
      if (!(error instanceof Refusal)) throw error;
      $("list-count").textContent = error.message;
    }
  }

  /** The first rows that the filters let through, or those before a time. */
  async load(before = null) {
    const asked = new URLSearchParams({ limit: ROWS, text: $("search").value });
    const kind = $("alerts").value;
    if (kind === "any") asked.set("flagged", "true");
    else if (kind) asked.set("metric", kind);
    if (before !== null) asked.set("before_s", before);
    const turn = ++this.asking;
    const { exchanges } = await getJson(`v1/monitor/exchanges?${asked}`);
    if (turn !== this.asking) return; // a later question has been asked
    this.rows = before === null ? exchanges : [...this.rows, ...exchanges];
    this.hasMore = exchanges.length === ROWS;
    this.draw();
  }

  draw() {
    const { monitor, tools: { metric } } = this;
    this.tools.fill($("ranked"), monitor.heads);
    const height = (row) => monitor.highestOf(row, metric) ?? -1;
    const rows = $("order").value === "highest" ? [...this.rows].sort((one, other) => height(other) - height(one)) : this.rows;
    $("rows").replaceChildren(...rows.map((row) => this.row(row)));
    $("older").hidden = !this.hasMore;
    $("list-count").textContent = this.rows.length ? `${plural(this.rows.length, "exchange")}${this.hasMore ? ", and older ones" : ""}` : "No exchange is like that.";
    this.tellPicked();
  }

  row(row) {
    const { id, created_s: created, asked, answer_start: answer, alerts, state } = row;
    const score = this.monitor.highestOf(row, this.tools.metric);
    const title = asked ?? "not kept: the store redacts";
    const box = make("input", { type: "checkbox", value: id, "aria-label": `Compare: ${title.slice(0, 80)}` });
    box.checked = this.picked.has(id);
    const chip = make("span", { class: "chip" }, score === undefined ? "–" : decimals(score));
    chip.style.setProperty("--score", score ?? 0);
    const when = new Date(created * 1000);
    const tags = [...alerts.map((alert) => words(alert).replace(":", ": ")), ...(state === "done" ? [] : [state])];
    return make("li", {}, box,
      make("a", { href: `#exchange=${id}` }, make("span", { class: "name" }, title), make("span", { class: "why" }, answer ?? "")),
      chip,
      make("p", { class: "caption" }, make("time", { datetime: when.toISOString() }, when.toLocaleString([], { dateStyle: "medium", timeStyle: "short" })),
        ...tags.map((tag) => make("span", { class: "tag" }, tag))));
  }

  pick({ value, checked }) {
    if (checked) this.picked.add(value);
    else this.picked.delete(value);
    if (this.picked.size > 2) {
      const [oldest] = this.picked;
      this.picked.delete(oldest);
      for (const box of $("rows").querySelectorAll("input")) box.checked = this.picked.has(box.value);
    }
    this.tellPicked();
  }

  tellPicked() {
    $("compare").disabled = this.picked.size !== 2;
  }
}
