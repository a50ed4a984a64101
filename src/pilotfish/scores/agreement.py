"""Texts that two passes of a judge have read in; how far the passes agree out, with intervals by group."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch

from pilotfish.errors import SettingError
from pilotfish.scores.metrics import Estimate, bootstrap_by_group
from pilotfish.texts.labelling import Judged, intersection

Figure = Callable[[np.ndarray], float]


class Agreement(NamedTuple):
    """How far two passes agree. They share the judge's blind spots, so labels can be worse than this, hardly better."""

    num_rows: int
    """Rows that both passes could be read for."""
    kappa: Estimate
    """Cohen's kappa of the response labels: 0 is chance, 1 is full agreement; NaN where both passes always say one
    thing."""
    character_f1: Estimate
    """Twice the characters that both marked over the characters that each marked, summed over all rows; NaN where
    nothing was marked."""


def agreement(judged: Sequence[Judged], *, generator: torch.Generator) -> Agreement | None:
    """Compares the two passes; None where there are not two, or no row was read in both.

    The ends of an interval are NaN where there are too few groups to give one.
    """
    rows = [row for row in judged if len(row.passes) == 2 and None not in row.passes]
    if not rows:
        return None
    pairs = [(first or (), second or ()) for first, second in (row.passes for row in rows)]
    says_yes = np.array([[bool(first), bool(second)] for first, second in pairs])
    sizes = np.array([[_size(first), _size(second), _size(intersection(first, second))] for first, second in pairs])
    groups = [row.conversation.group for row in rows]

    def estimate(figure: Figure) -> Estimate:
        try:
            return bootstrap_by_group(lambda drawn: figure(drawn.numpy()), groups, generator=generator)
        except SettingError:
            return Estimate(figure(np.arange(len(rows))), math.nan, math.nan, len(set(groups)))

    def character_f1(drawn: np.ndarray) -> float:
        first, second, both = sizes[drawn].sum(0)
        return float(2 * both / (first + second)) if first + second else math.nan

    return Agreement(
        num_rows=len(rows),
        kappa=estimate(lambda drawn: kappa(says_yes[drawn, 0], says_yes[drawn, 1])),
        character_f1=estimate(character_f1),
    )


def kappa(first: np.ndarray, second: np.ndarray) -> float:
    """Cohen's kappa of two columns of yes and no; NaN where chance alone would agree always.

    Source: Cohen 1960, "A coefficient of agreement for nominal scales".
    """
    observed = float((first == second).mean())
    p, q = float(first.mean()), float(second.mean())
    by_chance = p * q + (1 - p) * (1 - q)
    return (observed - by_chance) / (1 - by_chance) if by_chance < 1 else math.nan


def _size(ranges: Sequence[tuple[int, int]]) -> int:
    return sum(end - start for start, end in ranges)
