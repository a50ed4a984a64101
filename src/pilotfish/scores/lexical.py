"""A head's scores and those of a word baseline in; how far the head goes by words alone out.

TF-IDF says which negatives use the words of positives, and which positives do not. A head that reads words alone flags
the first and misses the second.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from pilotfish.errors import SettingError
from pilotfish.scores.metrics import Estimate, Statistic, bootstrap_by_group
from pilotfish.scores.scored import ScoredText

logger = logging.getLogger(__name__)

FIGURES = ("fpr_wordy_negatives", "recall_wordless_positives", "lexical_gap")


def wordy_negatives(
    word_scores: Float[Tensor, " text"], labels: Float[Tensor, " text"], share: float = 0.1
) -> Int[Tensor, " chosen"]:
    """The share of the negatives that the word baseline finds most positive, most positive first, as rows.

    A share is rounded up, to one at least where there is a negative. Labels of 0.5 and more are positive, NaN is
    unlabelled.

    Raises:
        SettingError: the share is outside (0, 1], or a labelled text has no word score.
    """
    return _top(word_scores, labels < 0.5, share)


def wordless_positives(
    word_scores: Float[Tensor, " text"], labels: Float[Tensor, " text"], share: float = 0.1
) -> Int[Tensor, " chosen"]:
    """The share of the positives that the word baseline finds least positive; otherwise as `wordy_negatives`."""
    return _top(-word_scores, labels >= 0.5, share)


def lexical_control(
    texts: Sequence[ScoredText],
    words: Sequence[ScoredText],
    *,
    threshold: float,
    generator: torch.Generator,
    share: float = 0.1,
    num_resamples: int = 1000,
) -> dict[str, Estimate]:
    """What a head does at its threshold where words mislead, with intervals by group.

    * `fpr_wordy_negatives`: share of the wordy negatives that it flags.
    * `recall_wordless_positives`: share of the wordless positives that it flags.
    * `lexical_gap`: by how much the first is above the share it flags of all other negatives; 0 when words do not sway
      it.

    Which texts are wordy is settled once, on all texts, and not again in each resample. A figure that the texts do not
    define, for lack of groups or labels, is left out and logged.

    Args:
        texts: As the head scored them.
        words: The same texts in the same order, as TF-IDF scored them.
        threshold: A response with this score or more is flagged.

    Raises:
        SettingError: see `wordy_negatives`.
    """
    assert [text.id for text in texts] == [text.id for text in words], "the same texts in the same order"
    labels, scores, word_scores = (
        torch.tensor(values, dtype=torch.float64)
        for values in ([t.label for t in texts], [t.score for t in texts], [t.score for t in words])
    )
    flagged = (scores >= threshold).double()
    wordy = wordy_negatives(word_scores, labels, share)
    wordless = wordless_positives(word_scores, labels, share)
    negatives = (labels < 0.5).nonzero()[:, 0]
    is_wordy = torch.isin(negatives, wordy)
    figures: tuple[tuple[Statistic, Int[Tensor, " _"]], ...] = (
        (_share(flagged[wordy]), wordy),
        (_share(flagged[wordless]), wordless),
        (_gap(flagged[negatives], is_wordy), negatives),
    )
    estimates = {}
    for name, (statistic, chosen) in zip(FIGURES, figures, strict=True):
        groups = [texts[row].group for row in chosen.tolist()]
        try:
            estimates[name] = bootstrap_by_group(statistic, groups, generator=generator, num_resamples=num_resamples)
        except SettingError as error:
            logger.warning("%s is left out: %s", name, error)
    return estimates


def _top(scores: Float[Tensor, " text"], is_wanted: Bool[Tensor, " text"], share: float) -> Int[Tensor, " chosen"]:
    if not 0.0 < share <= 1.0:
        raise SettingError(f"share {share} is outside (0, 1]; 0.1 takes one text in ten")
    if bool(scores[is_wanted].isnan().any()):
        raise SettingError(
            "a labelled text has a word score of NaN; score every text with the baseline, or leave it out"
        )
    rows = is_wanted.nonzero()[:, 0]
    order = scores[rows].argsort(descending=True, stable=True)
    return rows[order[: math.ceil(share * len(rows) - 1e-9)]]


def _share(flagged: Float[Tensor, " chosen"]) -> Statistic:
    return lambda rows: float(flagged[rows].mean())


def _gap(flagged: Float[Tensor, " negative"], is_wordy: Bool[Tensor, " negative"]) -> Statistic:
    """NaN for rows that are all wordy or all not."""

    def statistic(rows: Int[Tensor, " drawn"]) -> float:
        drawn, wordy = flagged[rows], is_wordy[rows]
        return float(drawn[wordy].mean() - drawn[~wordy].mean())

    return statistic
