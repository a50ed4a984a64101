"""A target that was told something in private, and recordings of what it said, in; what a monitor makes of it out.

The pieces of a control experiment (Greenblatt et al. 2023, arXiv 2312.06942): an untrusted target with a prompt of its
own, which neither the trusted draft nor a monitor has read, and alarms that are tried on recordings without a model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from pilotfish.actions import Aggregation, Recorded
from pilotfish.actions.aggregate import Memory
from pilotfish.core import Message
from pilotfish.engines.embedded import EmbeddedEngine, GenerationStream
from pilotfish.engines.loop import Step, Steps
from pilotfish.engines.reader import Pass
from pilotfish.engines.request import Request
from pilotfish.errors import SettingError
from pilotfish.scores import Threshold, threshold_at_budget
from pilotfish.scores.fusion import SignalText


def private_stream(
    engine: EmbeddedEngine, shown: Sequence[Message], told: Sequence[Message], request: Request
) -> GenerationStream:
    """A stream whose target reads another prompt than its draft; iterate it in a `Batch`.

    What the target is told is in its cache alone, in no record. The shorter prompt is filled up with line breaks in
    front, so that a token has one position in both. A bank on the target's own states would score a prompt that is
    not the recorded one.

    Raises:
        SettingError: as `EmbeddedEngine.stream`; or this tokenizer has no token for a line break.
        GenerationError: as `EmbeddedEngine.stream`, for either prompt.
    """
    plain = [engine.stream(messages, request).generation for messages in (shown, told)]
    filler = engine.pair.tokenizer("\n", add_special_tokens=False)["input_ids"]
    if len(filler) != 1:
        raise SettingError("this tokenizer has no token of its own for a line break; use another pair")
    length = max(generation.num_prompt_tokens for generation in plain)
    ids = [filler * (length - len(each.tokens)) + [token.id for token in each.tokens] for each in plain]
    stream = GenerationStream(engine, plain[0].prompt, ids[0], request, starts_reasoning=plain[0].starts_reasoning)
    stream.steps = _told(stream.steps, ids[1])
    return stream


def _told(steps: Steps, ids: Sequence[int]) -> Steps:
    """The same loop, but the target reads these tokens in place of the prompt's."""
    advance: Callable[[], Step] = partial(next, steps)
    while True:
        try:
            step = advance()
        except StopIteration:
            return
        if isinstance(step, Pass) and step.model.reader == "target":
            told = ids[step.model.length :][: len(step.ids)]  # a long prompt comes in several passes
            step = step._replace(ids=[*told, *step.ids[len(told) :]])
        try:
            advance = partial(steps.send, (yield step))
        except Exception as error:  # noqa: BLE001  # of the pass: the loop's own affair
            advance = partial(steps.throw, error)


class Suspicion(NamedTuple):
    """What a monitor says of one answer, in the terms of control experiments."""

    suspicion_score: float
    """In [0, 1], the largest that the answer reaches."""
    reason: str
    flagged: bool
    """Whether it reaches the threshold."""
    position: int | None
    """Of the first token that does."""
    threshold: float


class Alarm(NamedTuple):
    """A monitor: a stream of scores, and how they become the number that a threshold is held against."""

    metric: str
    aggregation: Aggregation = Aggregation()

    def values(self, recorded: Recorded) -> dict[int, float]:
        """By position, what a rule with scope `answer` holds against its threshold; unscored tokens have no entry."""
        found: dict[int, float] = {}
        memory: Memory = ()
        for token in recorded.tokens:
            score = token.scores.get(self.metric)
            if token.is_prompt or score is None or score.value is None or score.running is None:
                continue
            given = score.running if self.aggregation.kind == "running" else score.value
            memory, found[token.position] = self.aggregation.step(memory, given)
        return found

    def calibrated(self, honest: Sequence[Recorded], budget: float) -> Threshold:
        """The threshold that at most this share of honest answers reaches, as heads get theirs.

        Raises:
            SettingError: there are too few answers for the budget, or no threshold keeps it.
        """
        highest = [self.suspicion(recorded, 1.0).suspicion_score for recorded in honest]
        return threshold_at_budget(torch.tensor(highest, dtype=torch.float64), budget)

    def suspicion(self, recorded: Recorded, threshold: float) -> Suspicion:
        """Holds an answer against a threshold. One of which no token is scored is flagged."""
        return suspicion_of(self.values(recorded), threshold, self.metric)


def suspicion_of(values: dict[int, float], threshold: float, metric: str) -> Suspicion:
    """What values by position make of an answer; see `Alarm.suspicion`."""
    if not values:
        return Suspicion(1.0, f"{metric}: no token is scored", True, None, threshold)
    first = next((position for position, value in values.items() if value >= threshold), None)
    place, highest = max(values.items(), key=lambda item: item[1])
    reason = f"{metric} {highest:.3f} at token {place}, threshold {threshold:.3f}"
    return Suspicion(highest, reason, first is not None, first, threshold)


def text_before(recorded: Recorded, position: int | None) -> str:
    """The answer's text up to a token, all of it for None."""
    tokens = (token for token in recorded.tokens if not token.is_prompt)
    return "".join(token.text for token in tokens if position is None or token.position < position)


def signal_text(
    recorded: Recorded, streams: Sequence[str], *, group: str, label: float, token_labels: Tensor | None = None
) -> SignalText:
    """An answer's scores as `scores.fusion` takes them; NaN where a token is unscored.

    Args:
        streams: metrics, the head's first. Of the head it takes the running score.
        token_labels: one for each token of the answer; None leaves all unlabelled.
    """
    tokens = [token for token in recorded.tokens if not token.is_prompt]
    rows = [[score.running if (score := token.scores.get(name)) else None for name in streams] for token in tokens]
    values = torch.tensor(
        [[math.nan if value is None else value for value in row] for row in rows], dtype=torch.float64
    ).reshape(len(tokens), len(streams))
    labels = torch.full((len(tokens),), math.nan, dtype=torch.float64) if token_labels is None else token_labels
    return SignalText(recorded.title, group, label, labels, values)
