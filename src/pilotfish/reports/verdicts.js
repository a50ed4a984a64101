// Verdicts as numbered notes, and how an answer went in one line.
import { make, plural, words } from "./marks.js";

const NEAR = 8; // tokens; verdicts of one metric this close together are one note
const PAST = { flag: "Flagged", stop: "Stopped" };
const ENDINGS = {
  length: "cut at the token limit", stop: "ended by itself", eos: "ended by itself", stop_string: "ended at a stop string",
  content_filter: "stopped by the policy",
};

export function groupVerdicts({ verdicts = [] }) {
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

/** Position of each note's first token to the numbers that stand before it. */
export function numbersOf(notes) {
  const numbers = new Map();
  notes.forEach(({ first }, index) => numbers.set(first, [numbers.get(first), index + 1].filter(Boolean).join(" ")));
  return numbers;
}

/** List items; one that stands at a token has a button with its position. */
export function verdictItems(notes, byPosition) {
  if (!notes.length) return [make("li", { class: "why" }, "None: the policy took no action.")];
  return notes.map(({ metric, action, first, last, count, peak }, index) => {
    const place = count === 1 ? `token ${first}` : `${count} tokens from ${first} to ${last}`;
    const label = `${PAST[action] ?? words(action)} at ${place}`;
    const link = byPosition.has(peak.position)
      ? make("button", { type: "button", class: "link", "data-position": peak.position }, label) : label;
    const why = count === 1 ? peak.reason : `Token ${peak.position}: ${peak.reason}`;
    return make("li", {}, make("span", { class: "number" }, `${index + 1}`),
      make("span", {}, link, `, ${words(metric)}`, make("span", { class: "why" }, why)));
  });
}

export function statsLine({ stats = {}, finish_reason: finish }) {
  const { tokens_per_s: speed, acceptance, num_scored: scored, num_committed: committed } = stats;
  return [
    speed != null && `${speed.toFixed(1)} tokens a second`,
    acceptance != null && `${(100 * acceptance).toFixed(0)} % of drafts accepted`,
    scored != null && committed != null && `${scored} of ${plural(committed, "committed token")} scored`,
    ENDINGS[finish] ?? finish,
  ].filter(Boolean).join(" · ");
}
