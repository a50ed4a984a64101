"""Splits and ordinary texts in; the same with half of the ordinary ones as negatives to learn from out."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from pilotfish.core import Conversation
from pilotfish.scores.calibration import num_benign_needed
from pilotfish.texts import num_documents, split

logger = logging.getLogger(__name__)

FRACTIONS = {"train": 0.4, "validation": 0.1, "benign": 0.5}


class Taught(NamedTuple):
    splits: dict[str, list[Conversation]]
    benign: list[Conversation]
    """What is left to set the threshold on."""


def teach_ordinary(
    splits: Mapping[str, Sequence[Conversation]],
    benign: Sequence[Conversation],
    *,
    metric: str,
    budget: float,
    seed: int,
) -> Taught:
    """Lets a head learn what is ordinary, if the other half is enough to show the budget; else leaves all as it is.

    A head that has seen nothing but the metric's own texts may score any other text high: then no threshold keeps its
    budget and finds anything (experiments/2026-11-24-where-and-whether). The test split stays as it is.
    """
    needed = num_benign_needed(budget)
    parts = split(benign, FRACTIONS, seed=seed) if num_documents(benign) >= 2 * needed else {}
    if num_documents(parts.get("benign", ())) < needed:
        logger.warning(
            "%d benign documents are too few to learn from and to show a budget of %g as well, which takes about %d; "
            "the head learns from its own negatives alone",
            num_documents(benign),
            budget,
            2 * needed,
        )
        return Taught({name: list(rows) for name, rows in splits.items()}, list(benign))
    taught = {
        name: [*rows, *(replace(row, labels={metric: 0.0} | dict(row.labels)) for row in parts.get(name, ()))]
        for name, rows in splits.items()
    }
    return Taught(taught, parts["benign"])
