// The page's entry: asks the server what it monitors, shows the room that the address names, saves what is shown.
import { $, make } from "./marks.js";
import { getBlob, getJson, keepKey, keyOf, Refusal } from "./api.js";
import { Chat } from "./chat.js";
import { heights, parting } from "./compare.js";
import { List } from "./list.js";
import { Monitor } from "./monitor.js";
import { Pane } from "./pane.js";
import { Reader } from "./reader.js";
import { Tools } from "./tools.js";

const PARTS = ["lock", "opening", "chat-title", "list", "view-head", "tools", "exports", "composer", "margin"];
let room = null; // monitor, tools, reader, chat and list, once the server has let us in

const show = (...parts) => PARTS.forEach((part) => { $(part).hidden = !parts.includes(part); });
const name = () => location.hash.slice(1).split("=");

async function enter() {
  try {
    const monitor = await Monitor.read();
    $("forget").hidden = !keyOf();
    const tools = new Tools(monitor);
    const reader = new Reader($("panel"), tools, (stop) => { for (const pane of tools.panes) pane.follow(stop); });
    reader.inspect(null);
    const list = new List(monitor, tools);
    const chat = new Chat(monitor, tools, reader, () => readRecent(list));
    room = { monitor, tools, reader, list, chat };
    document.body.classList.toggle("undrafted", !monitor.isDrafting);
    $("models").textContent = introduction(monitor);
    readRecent(list);
    go();
  } catch (error) {
    if (!(error instanceof Refusal)) throw error;
    lock(error);
  }
}

function introduction({ model, draft, heads, isTaxed }) {
  const named = heads.map((head) => head.replaceAll("_", " "));
  const read = named.length > 1 ? `${named.slice(0, -1).join(", ")} and ${named.at(-1)}` : named[0];
  const reader = isTaxed ? `${draft} reads along, at a cost of its own: every token` : `${draft ? `${draft} drafts, and` : "It"} reads every token on the way`;
  return `${model} answers${isTaxed ? ", elsewhere" : ""}. ${reader}${read ? ` for ${read}` : ""}.`;
}

function lock({ status, message }) {
  show("lock");
  $("stage").replaceChildren();
  if (status !== 401) $("lock-title").textContent = status === 403 ? "This key may not be used here" : "The server did not let us in";
  $("key-note").textContent = status === 401 && !keyOf() ? "It is kept in this tab alone, until the tab is closed." : message;
  $("key").focus();
}

/** What the threshold is held against beside the card; a key without that right goes without. */
async function readRecent(list) {
  try {
    await list.readRecent();
    room.tools.tell();
  } catch (error) {
    if (!(error instanceof Refusal)) throw error;
  }
}

// ---- Rooms ----

async function go() {
  const { reader } = room;
  const [kind, value = ""] = name();
  $("to-chat").toggleAttribute("aria-current", !["exchanges", "exchange", "compare"].includes(kind));
  $("to-exchanges").toggleAttribute("aria-current", ["exchanges", "exchange", "compare"].includes(kind));
  document.body.classList.toggle("comparing", kind === "compare");
  reader.pin(null);
  $("save-note").textContent = "";
  try {
    if (kind === "exchanges") await showList();
    else if (kind === "exchange") await showExchanges([value]);
    else if (kind === "compare") await showExchanges(value.split(",").slice(0, 2));
    else {
      showChat();
      $("question").focus({ preventScroll: true });
    }
  } catch (error) {
    if (!(error instanceof Refusal)) throw error;
    refuse(error);
  }
}

function refuse({ message, status }) {
  show("view-head");
  $("stage").replaceChildren();
  $("view-title").textContent = status === 403 ? "This key may not read exchanges" : "That could not be shown";
  $("view-note").textContent = message;
}

function showChat() {
  const { chat, tools } = room;
  const isNew = chat.turns.length === 0;
  show("composer", ...(isNew ? ["opening"] : ["chat-title", "tools", "margin", ...(chat.leaving ? [] : ["exports"])]));
  document.title = "Pilotfish";
  if ($("stage").firstChild !== chat.node) $("stage").replaceChildren(chat.node);
  tools.show(chat.panes);
}

async function showList() {
  show("list");
  document.title = "Exchanges · Pilotfish";
  $("stage").replaceChildren();
  room.tools.show([]);
  await room.list.load();
}

async function showExchanges(ids) {
  const { monitor, tools, reader } = room;
  const found = await Promise.all(ids.map((id) => getJson(`v1/monitor/exchanges/${encodeURIComponent(id)}`)));
  if (name()[1] !== ids.join(",")) return; // somebody went on meanwhile
  const panes = found.map((stored) => new Pane(monitor.shown(stored), tools, reader, found.length > 1 ? 2 : 1));
  panes.forEach((pane, at) => { pane.caption.textContent = described(found[at]); });
  document.title = `${found.length > 1 ? "Two exchanges" : found[0].asked ?? found[0].id} · Pilotfish`;
  const isTwo = panes.length > 1;
  show("view-head", "tools", "margin", "exports");
  $("stage").replaceChildren(make("div", { class: isTwo ? "beside" : "alone" }, ...panes.map(({ node }) => node)));
  if (isTwo) {
    $("view-title").textContent = "Two exchanges";
    $("view-note").textContent = parting(panes);
    $("stage").prepend(heights(panes, monitor));
  } else {
    $("view-title").textContent = panes[0].title.textContent;
    $("view-note").textContent = panes[0].caption.textContent;
    for (const part of [panes[0].title, panes[0].caption]) part.hidden = true;
  }
  tools.show(panes);
  $("view-title").focus();
  scrollTo(0, 0);
}

const described = ({ created_s: created, model, state }) => [
  new Date(created * 1000).toLocaleString([], { dateStyle: "medium", timeStyle: "medium" }), model, state === "done" ? "" : state,
].filter(Boolean).join(" · ");

// ---- Saving ----

function save(blob, file) {
  const url = URL.createObjectURL(blob);
  make("a", { href: url, download: file }).click();
  setTimeout(() => URL.revokeObjectURL(url), 1000);
}

const shownIds = () => room.tools.panes.map(({ exchange }) => exchange.id).filter(Boolean);

async function saveHtml() {
  const ids = shownIds();
  if (!ids.length) {
    $("save-note").textContent = "The server has begun none of these answers, so it has nothing to save.";
    return;
  }
  try {
    save(await getBlob(`v1/monitor/report?exchange=${ids.join(",")}`), "pilotfish.html");
    $("save-note").textContent = "Saved.";
  } catch (error) {
    if (!(error instanceof Refusal)) throw error;
    $("save-note").textContent = error.message;
  }
}

function saveJson() {
  const exchanges = room.tools.panes.map(({ exchange }) => exchange);
  save(new Blob([JSON.stringify({ exchanges }, null, 2)], { type: "application/json" }), "pilotfish.json");
  $("save-note").textContent = "Saved.";
}

// ---- Keys and events ----

function jumpToMaximum() {
  const { tools, reader } = room;
  const found = tools.panes.map(({ text, exchange }) => text.highest(exchange, tools.metric)).filter(Boolean);
  const score = (stop) => stop.token.scores[tools.metric];
  const highest = found.reduce((most, stop) => (most && score(most) >= score(stop) ? most : stop), null);
  if (highest) reader.goTo(highest, true);
}

function onKey(event) {
  if (!room || event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key === "Escape") {
    if (room.chat.leaving && !room.reader.pinned) room.chat.stop();
    room.reader.pin(null);
    $("also").open = false;
    return;
  }
  if (event.target.matches("textarea, select, input:not([type=range], [type=checkbox], [type=radio])")) return;
  if (event.key === "m") jumpToMaximum();
  else if (event.key === "d") $("drafts").click();
  else if (event.key === "/" && !$("composer").hidden) $("question").focus();
  else return;
  event.preventDefault();
}

const on = (id, type, handle) => $(id).addEventListener(type, handle);
on("jump", "click", jumpToMaximum);
on("save-html", "click", saveHtml);
on("save-json", "click", saveJson);
on("key-form", "submit", (event) => { event.preventDefault(); keepKey($("key").value.trim()); location.reload(); });
on("forget", "click", () => { keepKey(null); location.reload(); });
document.addEventListener("keydown", onKey);
document.addEventListener("turned", () => { if (!["exchanges", "exchange", "compare"].includes(name()[0])) showChat(); });
document.addEventListener("chosen", () => room?.reader.inspect(room.reader.active));
document.addEventListener("click", ({ target }) => { if (!target.closest("#also")) $("also").open = false; });
addEventListener("hashchange", () => { if (room) go(); });
enter();
