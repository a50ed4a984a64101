"""A request's scores as steps bring them in; how many of its new tokens may leave, and what its client is told, out.

Each committed token is accounted for once: scored, or missed for a reason. The same position may come again (the first
token of a drafter's pass, a prompt that is read anew after pre-emption): the first delivery holds. After a hole nothing
counts until the drafter has read the hole's tokens too, since its later states stand on what it never read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from jaxtyping import Float32

from pilotfish.actions import Policy, Verdict, Watch
from pilotfish.actions.watch import PROMPT, REPLY
from pilotfish.core import Reader
from pilotfish.engines.records import Scores
from pilotfish.errors import SettingError
from pilotfish.vllm.wire import NUM_KEYS, Miss, News

POSITION: Final = 1
TOKEN: Final = 2
ALLOWED = frozenset({"observe", "flag", "hold", "stop"})

NOT_READ = "the reader did not read it"
AFTER_HOLE = "the reader had not read a token before it"
FIRST = "the drafter never reads a text's first token"
LAST = "the target does not read the last token"


@dataclass(frozen=True, slots=True, kw_only=True)
class Charge:
    """What every request is watched with."""

    policy: Policy
    metrics: tuple[str, ...]
    thresholds: Mapping[str, float]
    reader: Reader
    shift: int = 0
    """Tokens at a text's beginning that the reader never consumes."""
    lags: bool = False
    """Whether a token's score comes a step after the token, as where the target itself is read."""

    def __post_init__(self) -> None:
        self.policy.check(self.metrics, frozenset(self.metrics) - self.thresholds.keys())
        for rule in self.policy.rules:
            if rule.action not in ALLOWED or rule.look_ahead or rule.scope in {"reasoning", "reply"}:
                raise SettingError(
                    f"the rule for {rule.metric!r} (action {rule.action}, scope {rule.scope}) cannot be carried out "
                    f"inside vLLM; there are {', '.join(sorted(ALLOWED))} on the scopes all, prompt and answer, "
                    "without look_ahead"
                )
        if self.policy.margin:
            raise SettingError(f"margin {self.policy.margin} cannot be kept inside vLLM; set it to 0")
        if self.lags and self.policy.holds:
            raise SettingError(
                "the policy holds tokens back until they are scored, but without a drafter a token's score comes one "
                "step after it and the last token's never; give vLLM a speculative_config, or only observe and flag"
            )


class Track:
    """One request."""

    def __init__(self, charge: Charge, num_prompt_tokens: int) -> None:
        self._charge = charge
        self._num_prompt_tokens = num_prompt_tokens
        self._watch = Watch(charge.policy)
        self._news = News(0, self._empty())
        self._parts: list[Float32[np.ndarray, "token value"]] = []
        """Rows that the client's side has not been told of."""
        self.num_settled = 0
        """Tokens that are scored or missed for good."""
        self._hole: int | None = None
        """First position that the reader has not read."""
        self.stop: Verdict | None = None
        """What ends the answer before its token."""

    def take(self, rows: Float32[np.ndarray, "row column"], tokens: Sequence[int], failure: str = "") -> None:
        """Takes a step's rows, in order of position, up to one that has read another token than stands there: a draft
        that the target has rejected, the guess at the end of a prompt's chunk, a slot whose score is not its own.

        Args:
            tokens: the request's ids from position `num_settled` on, this step's included.
            failure: why tokens of this step have no scores, where they have none.
        """
        first = self.num_settled
        if len(rows) and self._hole is not None and rows[0, POSITION] <= self._hole:
            self._hole = None  # read anew from before the hole
        rows = rows[(rows[:, POSITION] >= first) & (rows[:, POSITION] < first + len(tokens))]
        positions = rows[:, POSITION].astype(np.int64)
        is_first = np.ones(len(rows), dtype=bool)
        is_first[1:] = positions[1:] > positions[:-1]
        rows, positions = rows[is_first], positions[is_first]
        is_own = rows[:, TOKEN] == np.asarray(tokens, dtype=np.int64)[positions - first]  # an empty slot holds NaN
        size = len(rows) if is_own.all() else int(is_own.argmin())
        parts = [np.arange(size)]
        if size and positions[size - 1] - positions[0] >= size:  # positions are missing in between
            parts = np.split(parts[0], np.flatnonzero(np.diff(positions[:size]) > 1) + 1)
        for part in parts:
            if len(part) and self.stop is None:
                self.settle(int(positions[part[0]]), failure)
                self._settle_scored(rows[part, NUM_KEYS:])

    def settle(self, end: int, failure: str = "") -> None:
        """Declares a miss whatever before position `end` has not come: it will not come any more."""
        if self.num_settled < min(end, self._charge.shift) and self.stop is None:
            self._add_missed(min(end, self._charge.shift), FIRST)
        self._missed(end, failure or NOT_READ, is_hole=not failure)

    def finish(self, num_tokens: int) -> None:
        """The request has ended with so many tokens: surplus ones are dropped, and no score comes any more."""
        if self.stop is not None and self.stop.position >= num_tokens and not self._news.withheld:
            self.stop = None
        end = max(num_tokens + len(self._news.withheld), self._news.start)
        if end < self.num_settled:
            self._parts = [np.concatenate([self._empty(), *self._parts])[: end - self._news.start]]
            self._clip(end)
        elif self._charge.lags:
            self._missed(num_tokens, LAST, is_hole=False)

    def withheld(self, token_ids: list[int]) -> None:
        """The id of the token that the stop is about, if it is one of the answer's: recorded, and it does not leave."""
        self._news.withheld = token_ids

    def told(self, num_drafted: int) -> News:
        """All that is new, once."""
        news, self._news = self._news, News(self.num_settled, self._empty())
        news.scores = np.concatenate([news.scores, *self._parts])
        news.num_drafted = num_drafted
        self._parts = []
        return news

    def _missed(self, end: int, reason: str, *, is_hole: bool) -> None:
        if self.num_settled < end and self.stop is None:
            if is_hole and self._hole is None:
                self._hole = self.num_settled
            self._add_missed(end, reason)

    def _add_missed(self, end: int, reason: str) -> None:
        start = self.num_settled
        size = end - start
        self._news.misses.append(Miss(start, end, reason))
        scores = Scores(self._charge.metrics, None, self._charge.reader, reason)
        self._settle(np.full((size, self._news.scores.shape[1]), np.nan, dtype=np.float32), [scores] * size)

    def _settle_scored(self, values: Float32[np.ndarray, "token value"]) -> None:
        if self._hole is not None:
            self._add_missed(self.num_settled + len(values), AFTER_HOLE)
            return
        charge = self._charge
        num = len(charge.metrics)
        scores = (
            [Scores(charge.metrics, row[:num], charge.reader, running=row[num:]) for row in values.tolist()]
            if self._judges
            else []
        )
        self._settle(values, scores)

    def _settle(self, values: Float32[np.ndarray, "token value"], scores: Sequence[Scores]) -> None:
        start = self.num_settled
        self._parts.append(values)
        self.num_settled += len(values)
        if not self._judges:
            return
        for position, row in enumerate(scores, start):
            parts = PROMPT if position < self._num_prompt_tokens else REPLY
            verdicts = self._watch.judge(position, row, self._charge.thresholds, parts=parts)
            self._news.verdicts += verdicts
            if verdicts and verdicts[0].action == "stop":
                self.stop = verdicts[0]
                self._parts[-1] = values[: position - start + 1]
                self._clip(position + 1)
                return

    def _clip(self, end: int) -> None:
        """Takes back what was said of tokens from `end` on."""
        news = self._news
        news.misses = [miss._replace(end=min(miss.end, end)) for miss in news.misses if miss.start < end]
        news.verdicts = [verdict for verdict in news.verdicts if verdict.position < end]
        self.num_settled = end

    @property
    def _judges(self) -> bool:
        policy = self._charge.policy
        return self.stop is None and bool(policy.rules or policy.hold)

    def _empty(self) -> Float32[np.ndarray, "token value"]:
        return np.zeros((0, 2 * len(self._charge.metrics)), dtype=np.float32)
