"""Scored texts and a threshold in; the hits, misses and false alarms most worth reading, cut to fit, out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from pilotfish.reports.heads import Example, ExampleGroup, Token
from pilotfish.scores import ScoredText

NUM_BEFORE, NUM_AFTER = 60, 100
"""Tokens shown around the place of interest."""


class _Kind(NamedTuple):
    title: str
    is_positive: bool
    is_flagged: bool


_KINDS = (
    _Kind("Top hits", is_positive=True, is_flagged=True),
    _Kind("Worst misses", is_positive=True, is_flagged=False),
    _Kind("Worst false alarms", is_positive=False, is_flagged=True),
)


def examples_of(texts: Sequence[ScoredText], threshold: float | None, count: int = 3) -> tuple[ExampleGroup, ...]:
    """Top hits, worst misses and worst false alarms. Without a threshold, the ends of each kind.

    Texts without a label, without token scores or whose words were not kept are left out.
    """
    shown = [text for text in texts if text.pieces and text.token_scores is not None and not math.isnan(text.score)]
    return tuple(_group(kind, shown, threshold, count) for kind in _KINDS)


def _group(kind: _Kind, texts: Sequence[ScoredText], threshold: float | None, count: int) -> ExampleGroup:
    among = [text for text in texts if _is_positive(text) is kind.is_positive]
    found = [text for text in among if threshold is None or (text.score >= threshold) is kind.is_flagged]
    found.sort(key=lambda text: text.score, reverse=kind.is_flagged)
    return ExampleGroup(
        title=kind.title,
        note=_note(kind, len(found), len(among), threshold),
        examples=tuple(_example(text, threshold, at_label=not kind.is_flagged) for text in found[:count]),
    )


def _note(kind: _Kind, count: int, among: int, threshold: float | None) -> str:
    sign = "positive" if kind.is_positive else "negative"
    if not among:
        return f"No {sign} text is here with its words and token scores."
    shown = f"shown are those with the {'highest' if kind.is_flagged else 'lowest'} scores."
    if threshold is None:
        return f"There is no threshold; of {among:,} {sign} texts {shown}"
    what = "Flagged" if kind.is_flagged else "Not flagged"
    return (
        f"{what}: {count:,} of {among:,} {sign} texts; {shown}" if count else f"{what}: none of {among:,} {sign} texts."
    )


def _is_positive(text: ScoredText) -> bool | None:
    """None where nobody said; labelled tokens tell of a positive text, but not of a negative one, which may be cut."""
    if not math.isnan(text.label):
        return text.label >= 0.5
    return True if bool((text.token_labels >= 0.5).any()) else None


def _example(text: ScoredText, threshold: float | None, *, at_label: bool) -> Example:
    assert text.token_scores is not None and text.judged is not None
    over, labelled = _over(text, threshold), text.token_labels >= 0.5
    crossing = _first(over)
    highest = int(text.judged.nan_to_num(nan=-math.inf).argmax())
    places = (_first(labelled), crossing) if at_label else (crossing, _first(labelled))
    centre = next((place for place in places if place is not None), highest)
    start, end = max(0, centre - NUM_BEFORE), min(len(text.pieces), centre + NUM_AFTER)
    running = _values(text.running) if text.running is not None else [None] * len(text.pieces)
    rows = zip(text.pieces, _values(text.token_scores), running, labelled.tolist(), over.tolist(), strict=True)
    tokens = [
        Token(text=piece, score=score, running=so_far, is_labelled=label, is_over=is_over)
        for piece, score, so_far, label, is_over in rows
    ]
    return Example(
        id=text.id,
        score=text.score,
        tokens=tuple(tokens[start:end]),
        num_before=start,
        num_after=len(tokens) - end,
        crossing=crossing - start if crossing is not None and start <= crossing < end else None,
    )


def _values(scores: Float[Tensor, " token"]) -> list[float | None]:
    return [None if math.isnan(score) else score for score in scores.tolist()]


def _over(text: ScoredText, threshold: float | None) -> Bool[Tensor, " token"]:
    """Labelled tokens that reach the threshold; any token where only the response is labelled, and is flagged."""
    assert text.judged is not None
    if threshold is None:
        return torch.zeros(len(text.judged), dtype=torch.bool)
    is_known = text.token_labels.isfinite()
    if not bool(is_known.any()) and text.score >= threshold:
        is_known = torch.ones_like(is_known)
    return is_known & (text.judged >= threshold)


def _first(chosen: Bool[Tensor, " token"]) -> int | None:
    places = chosen.nonzero()[:, 0].tolist()
    return places[0] if places else None
