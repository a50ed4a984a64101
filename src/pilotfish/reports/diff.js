// Two texts, word by word: what they share, what only one has.

/** Runs of [kind, text] that read as the second text, with what was taken out between: "same", "gone" or "come". */
export function diffWords(before, after) {
  const [left, right] = [before, after].map((text) => text.match(/\s*[\p{L}\p{N}_]+|\s*[^\p{L}\p{N}_\s]|\s+/gu) ?? []);
  const shared = Array.from({ length: left.length + 1 }, () => new Uint16Array(right.length + 1)); // longest common part from here on
  for (let i = left.length - 1; i >= 0; i -= 1) {
    for (let j = right.length - 1; j >= 0; j -= 1) {
      shared[i][j] = left[i] === right[j] ? shared[i + 1][j + 1] + 1 : Math.max(shared[i + 1][j], shared[i][j + 1]);
    }
  }
  const runs = [];
  const put = (kind, text) => {
    if (runs.at(-1)?.[0] === kind) runs.at(-1)[1] += text;
    else runs.push([kind, text]);
  };
  let i = 0, j = 0;
  while (i < left.length || j < right.length) {
    if (i < left.length && left[i] === right[j]) { put("same", left[i]); i += 1; j += 1; }
    else if (i < left.length && (j === right.length || shared[i + 1][j] >= shared[i][j + 1])) { put("gone", left[i]); i += 1; }
    else { put("come", right[j]); j += 1; }
  }
  return runs;
}
