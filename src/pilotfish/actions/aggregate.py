"""Token scores in, one number that a threshold is held against out: streaming, O(window) state, plain floats.

A step takes what it remembers and returns it renewed, so that going back in a text is to keep an older value.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from heapq import nlargest
from typing import Literal, NamedTuple

Kind = Literal["running", "last", "mean", "max", "ema", "swim", "topk", "softmax", "attention"]
Memory = tuple[float, ...]

WINDOWS = {"swim": 16, "topk": 16, "attention": 10}
"""Aggregators that look back on a window, and how far where nothing is said."""
_CLIP = 1e-7
"""A probability nearer to 0 or 1 counts as this, or one token would outweigh all others for ever."""


class Step(NamedTuple):
    memory: Memory
    value: float
    """Probability in [0, 1]."""


@dataclass(frozen=True, slots=True)
class Aggregation:
    """How scores of tokens become one of the text so far. All but last and max work on log-odds.

    * `running`: the head's own, from its last channels; nothing is aggregated.
    * `last`, `max`, `mean`: the newest token's, the largest and the mean since the scope began.
    * `ema`: exponential moving average, `rate` for the newest token; begins with the first token's value.
    * `swim`: mean over the window (sliding-window mean of Constitutional Classifiers++, arXiv 2601.04603, window 16).
    * `topk`: mean of the `top` highest in the window (arXiv 2604.14865, 8 of a window).
    * `softmax`: mean since the scope began, each token weighted by the exponential of its log-odds
      (arXiv 2506.10805, with temperature 1).
    * `attention`: the same over the window. Rolling attention (arXiv 2601.11516, window 10) has queries of its own;
      here a token's log-odds serve as both, and the maximum over the text is left to the threshold.
    """

    kind: Kind = "running"
    window: int = 1
    top: int = 8
    rate: float = 0.1

    def step(self, memory: Memory, score: float) -> Step:
        """Takes the next token's probability; an empty memory is the beginning."""
        match self.kind:
            case "running" | "last":
                return Step((), score)
            case "max":
                highest = max((score, *memory))
                return Step((highest,), highest)
        new = log_odds(score)
        match self.kind:
            case "mean":
                count, total = (memory[0] + 1, memory[1] + new) if memory else (1.0, new)
                return Step((count, total), probability(total / count))
            case "ema":
                average = memory[0] + self.rate * (new - memory[0]) if memory else new
                return Step((average,), probability(average))
            case "softmax":
                weight = math.exp(new)
                sums = (memory[0] + weight, memory[1] + weight * new) if memory else (weight, weight * new)
                return Step(sums, probability(sums[1] / sums[0]))
        recent = (*memory[max(0, len(memory) - self.window + 1) :], new) if self.window > 1 else (new,)
        return Step(recent, probability(self._over(recent)))

    def _over(self, recent: Memory) -> float:
        match self.kind:
            case "topk":
                chosen = nlargest(self.top, recent)
                return math.fsum(chosen) / len(chosen)
            case "attention":
                weights = [math.exp(value) for value in recent]
                return math.fsum(w * value for w, value in zip(weights, recent, strict=True)) / math.fsum(weights)
        return math.fsum(recent) / len(recent)


def log_odds(probability: float) -> float:
    clipped = min(max(probability, _CLIP), 1.0 - _CLIP)
    return math.log(clipped / (1.0 - clipped))


def probability(log_odds: float) -> float:
    return 1.0 / (1.0 + math.exp(-log_odds))
