// Talks to the server that the page came from. The key lives in the tab's own storage and nowhere else.
const KEY = "pilotfish-key";
let kept = null; // where the tab's storage is switched off

export function keyOf() {
  try {
    return sessionStorage.getItem(KEY);
  } catch {
    return kept;
  }
}

export function keepKey(key) {
  kept = key;
  try {
    if (key) sessionStorage.setItem(KEY, key);
    else sessionStorage.removeItem(KEY);
  } catch { /* it holds until the page is left */ }
}

/** A refusal of the server: its status, and its own words. */
export class Refusal extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

async function asked(path, options = {}) {
  const key = keyOf();
  const headers = { ...(options.body ? { "content-type": "application/json" } : {}), ...(key ? { authorization: `Bearer ${key}` } : {}) };
  let reply;
  try {
    reply = await fetch(path, { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refusal(0, "The server does not answer.");
  }
  if (reply.ok) return reply;
  const said = await reply.json().catch(() => null);
  throw new Refusal(reply.status, said?.error?.message ?? `The server answered ${reply.status}.`);
}

export const getJson = async (path) => (await asked(path)).json();
export const getBlob = async (path) => (await asked(path)).blob();

/** Posts a request for a stream; gives each of its events as it comes. */
export async function* streamed(path, body, signal) {
  const reply = await asked(path, { method: "POST", body: JSON.stringify({ ...body, stream: true }), signal });
  const reader = reply.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) throw new Refusal(0, "The connection ended before the answer did.");
    const events = (rest + value).split("\n\n");
    rest = events.pop();
    for (const event of events) {
      const data = event.replace(/^data: /, "");
      if (data === "[DONE]") return;
      const said = JSON.parse(data);
      if (said.error) throw new Refusal(0, said.error.message);
      yield said;
    }
  }
}
