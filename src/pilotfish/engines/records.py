"""What a generation leaves behind: tokens with scores, rounds of speculation, verdicts, counts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pilotfish.actions import Verdict
from pilotfish.core import PENDING, Reader, TokenScore
from pilotfish.engines.signals import Signals
from pilotfish.runs import write_json

Origin = Literal["prompt", "draft", "target"]
FinishReason = Literal["eos", "length", "stop_string", "content_filter"]


class Scores(Mapping[str, TokenScore]):
    """One token's score for each metric of a bank; `TokenScore`s are made when asked for, so a row of 64 costs one
    list.
    """

    __slots__ = ("_metrics", "_reason", "_running", "_values", "reader")

    def __init__(
        self,
        metrics: Sequence[str],
        values: Sequence[float] | None,
        reader: Reader,
        reason: str = "",
        *,
        running: Sequence[float] | None = None,
    ) -> None:
        """`values` and `running` in the order of `metrics`; None when the whole token is unscored for `reason`."""
        assert (values is None) == (reason != ""), "either values or a reason"
        self._metrics, self._values, self.reader, self._reason = metrics, values, reader, reason
        self._running = values if running is None else running

    def __getitem__(self, metric: str) -> TokenScore:
        try:
            index = self._metrics.index(metric)
        except ValueError:
            raise KeyError(metric) from None
        if self._values is None or self._running is None:
            return TokenScore.unscored(self._reason, self.reader)
        return TokenScore.scored(self._values[index], self.reader, running=self._running[index])

    def __iter__(self) -> Iterator[str]:
        return iter(self._metrics)

    def __len__(self) -> int:
        return len(self._metrics)


class Pending(Mapping[str, TokenScore]):
    """The scores of a token that its reader has not consumed yet."""

    __slots__ = ("_metrics",)

    def __init__(self, metrics: Sequence[str]) -> None:
        self._metrics = metrics

    def __getitem__(self, metric: str) -> TokenScore:
        if metric not in self._metrics:
            raise KeyError(metric)
        return PENDING

    def __iter__(self) -> Iterator[str]:
        return iter(self._metrics)

    def __len__(self) -> int:
        return len(self._metrics)


@dataclass(slots=True)
class Token:
    """A committed token. `scores` is filled in once, when its reader has consumed it."""

    position: int
    """0-based, prompt included."""
    id: int
    text: str
    """The token's own characters; an incomplete multi-byte character shows as a replacement sign."""
    origin: Origin
    """Who proposed it: the prompt, the draft (then accepted), or the target (correction or bonus)."""
    round: int
    """Round of speculation that committed it, from 1; 0 for the prompt."""
    delta: str = ""
    """Text that becomes safe to show with this token; the answer is the concatenation."""
    scores: Mapping[str, TokenScore] | None = None
    """None while pending."""
    is_emitted: bool = False
    """False for a token that a gate withheld."""
    is_redacted: bool = False
    """Whether a mark took the place of its characters in `delta`; `text` and the model's context keep them."""
    is_deferred: bool = False
    """Whether it was drawn from the draft alone, the target not being asked."""
    edits: tuple[str, ...] = ()
    """Edits that were on in the target's pass that verified or chose it."""
    signals: Signals | None = None
    """None where they were not asked for, or are still pending."""


class Attempt(NamedTuple):
    """Committed tokens that were taken back before any of them was emitted."""

    start: int
    """Position of the first; its id is excluded there from then on when it was a rule to resample that asked."""
    ids: tuple[int, ...]
    texts: tuple[str, ...]
    action: str


@dataclass(frozen=True, slots=True)
class Drafted:
    """A drafted token of one round; its scores are look-ahead unless it was accepted."""

    id: int
    text: str
    is_accepted: bool
    scores: Mapping[str, TokenScore] | None
    """None for the last one of a round, which the draft proposes but does not consume."""


@dataclass(frozen=True, slots=True)
class Round:
    number: int
    start: int
    """Position that the first drafted token would take."""
    drafted: tuple[Drafted, ...]

    @property
    def num_accepted(self) -> int:
        return sum(token.is_accepted for token in self.drafted)


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """A token leaves the engine."""

    token: Token
    scores: Mapping[str, TokenScore]
    """As of now: `pending` where the score is due with the next draft step."""


@dataclass(frozen=True, slots=True)
class ScoreEvent:
    """The score of a token that left as pending."""

    token: Token


@dataclass(frozen=True, slots=True)
class RoundEvent:
    round: Round


@dataclass(frozen=True, slots=True)
class VerdictEvent:
    verdict: Verdict


Event = TokenEvent | ScoreEvent | RoundEvent | VerdictEvent


@dataclass(slots=True)
class Generation:
    """One exchange, complete once the stream has ended."""

    prompt: str
    tokens: list[Token]
    num_prompt_tokens: int
    rounds: list[Round] = field(default_factory=list)
    verdicts: list[Verdict] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    seconds: float = 0.0
    notes: list[str] = field(default_factory=list)
    """What the engine decided on its own: speculation paused, heads moved to the target, reads that cost extra."""
    num_taxed_reads: int = 0
    """Draft passes that were made for the scores alone; 0 when monitoring was free."""
    attempts: list[Attempt] = field(default_factory=list)
    """What was taken back, to be sampled again or left to the draft; never part of `tokens`."""
    num_asked: int = 0
    """Calls of a slower judge."""
    num_unanswered: int = 0
    """Of these, calls that failed; each stopped the answer."""
    starts_reasoning: bool = False
    """Whether the chat template had opened the reasoning."""

    @property
    def answer(self) -> str:
        """The text that was emitted."""
        return "".join(token.delta for token in self.tokens[self.num_prompt_tokens :] if token.is_emitted)

    @property
    def committed(self) -> list[Token]:
        """The generated tokens, withheld ones included, the prompt not."""
        return self.tokens[self.num_prompt_tokens :]

    @property
    def acceptance(self) -> float | None:
        """Accepted over drafted tokens; None when nothing was drafted."""
        drafted = sum(len(item.drafted) for item in self.rounds)
        return sum(item.num_accepted for item in self.rounds) / drafted if drafted else None

    @property
    def metrics(self) -> tuple[str, ...]:
        """Of the heads, and of the second signals where they were asked for."""
        rows = [row for token in self.tokens for row in (token.scores, token.signals and token.signals.scores()) if row]
        return tuple(dict.fromkeys(metric for row in rows for metric in row))

    def misses(self) -> Counter[str]:
        """Reasons of tokens (prompt included) that no head scored; committed = scored + the sum of these."""
        return Counter(reason for token in self.tokens if (reason := _missing(token)))

    def to_dict(self, title: str, **labels: Any) -> dict[str, Any]:
        """The exchange as the JSON that a report takes; `labels` are its further keys (target, draft, thresholds,
        policy …).
        """
        misses = self.misses()
        return {
            "title": title,
            "metrics": list(self.metrics),
            "prompt": self.prompt,
            "starts_reasoning": self.starts_reasoning,
            "finish_reason": self.finish_reason,
            "tokens": [_token_dict(token) for token in self.tokens],
            "rounds": [
                {
                    "round": item.number,
                    "start": item.start,
                    "drafted": [
                        {"id": token.id, "text": token.text, "accepted": token.is_accepted, **_score_dict(token.scores)}
                        for token in item.drafted
                    ],
                }
                for item in self.rounds
            ],
            "verdicts": [asdict(verdict) for verdict in self.verdicts],
            "attempts": [attempt._asdict() for attempt in self.attempts],
            "stats": {
                "seconds": self.seconds,
                "tokens_per_s": len(self.committed) / self.seconds if self.seconds else None,
                "acceptance": self.acceptance,
                "coverage": 1 - sum(misses.values()) / len(self.tokens),
                "num_committed": len(self.tokens),
                "num_scored": len(self.tokens) - sum(misses.values()),
                "misses": dict(misses),
                "num_taxed_reads": self.num_taxed_reads,
                "num_asked": self.num_asked,
                "num_unanswered": self.num_unanswered,
                "notes": self.notes,
            },
            **labels,
        }

    def to_json(self, path: Path, title: str = "", **labels: Any) -> Path:
        """Writes `to_dict` as JSON, atomically: the recording that `actions.read_recorded` takes. It holds the text."""
        write_json(path, self.to_dict(title, **labels))
        return path


def _missing(token: Token) -> str | None:
    """Why a token has no complete set of scores; None when it has."""
    if not token.scores:
        return "no head reads this model"
    return next((score.reason for score in token.scores.values() if score.state != "scored"), None)


def _score_dict(scores: Mapping[str, TokenScore] | None) -> dict[str, Any]:
    if scores is None:
        return {}
    found = dict(scores.items())
    return {
        "scores": {metric: score.value for metric, score in found.items() if score.value is not None},
        "running": {metric: score.running for metric, score in found.items() if score.running is not None},
        "unscored": {metric: score.reason for metric, score in found.items() if score.value is None},
        "reader": next((score.reader for score in found.values()), "draft"),
    }


def _token_dict(token: Token) -> dict[str, Any]:
    row = {
        "position": token.position,
        "id": token.id,
        "text": token.text,
        "origin": token.origin,
        "round": token.round,
        "emitted": token.is_emitted,
        **_score_dict(token.scores),
    }
    said = {"redacted": token.is_redacted, "deferred": token.is_deferred, "edits": list(token.edits)}
    row |= {name: value for name, value in said.items() if value}
    if token.signals is not None:
        known = _score_dict(token.signals.scores())
        for name in ("scores", "running", "unscored"):
            row[name] = row.get(name, {}) | known[name]
        row["signals"] = token.signals._asdict()
    return row
