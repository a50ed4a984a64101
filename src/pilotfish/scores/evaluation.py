"""Scored held-out texts in; figures with intervals, and differences between two scorers, out."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from pilotfish.errors import SettingError
from pilotfish.scores.metrics import Estimate, Statistic, auroc, bootstrap_by_group, pairwise_accuracy, tpr_at_fpr

logger = logging.getLogger(__name__)

FPR = 0.01
"""Where `tpr_response_at_1pct_fpr` is read off."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ScoredText:
    """A labelled text and what a scorer, a head or a baseline, says of it."""

    id: str
    group: str
    prompt: str
    """Positive and negative responses to one prompt of one group make pairs."""
    label: float
    """Of the whole response; NaN when it has none."""
    score: float
    """Of the whole response."""
    token_labels: Float[Tensor, " token"]
    """NaN where unlabelled."""
    token_scores: Float[Tensor, " token"] | None
    """None for a scorer of whole responses."""


class _Figures:
    """The figures of one scorer as statistics of rows, so that a bootstrap can draw the rows."""

    def __init__(self, texts: Sequence[ScoredText]) -> None:
        self._tokens = [_labelled_tokens(text) for text in texts if text.token_scores is not None]
        self._responses = [text for text in texts if text.label == text.label]
        self._pairs = _pairs(self._responses)

    def auroc_token(self) -> tuple[Statistic, list[str]]:
        scores, labels = (_joined([pair[i] for _, pair in self._tokens]) for i in (0, 1))
        groups = [text.group for text, (values, _) in self._tokens for _ in range(len(values))]
        return lambda rows: auroc(scores[rows], labels[rows]), groups

    def auroc_response(self) -> tuple[Statistic, list[str]]:
        return self._of_responses(auroc)

    def tpr_response_at_1pct_fpr(self) -> tuple[Statistic, list[str]]:
        return self._of_responses(lambda scores, labels: tpr_at_fpr(scores, labels, FPR))

    def pairwise_accuracy(self) -> tuple[Statistic, list[str]]:
        positive, negative = (torch.tensor([p[i].score for p in self._pairs], dtype=torch.float64) for i in (0, 1))
        return lambda rows: pairwise_accuracy(positive[rows], negative[rows]), [p[0].group for p in self._pairs]

    def share_flagged(self, threshold: float, *, positive: bool) -> tuple[Statistic, list[str]]:
        chosen = [text for text in self._responses if (text.label >= 0.5) == positive]
        flagged = torch.tensor([text.score >= threshold for text in chosen], dtype=torch.float64)
        return lambda rows: float(flagged[rows].mean()), [text.group for text in chosen]

    def _of_responses(self, figure: Callable[[Tensor, Tensor], float]) -> tuple[Statistic, list[str]]:
        scores, labels = (
            torch.tensor([getattr(text, name) for text in self._responses], dtype=torch.float64)
            for name in ("score", "label")
        )
        return lambda rows: figure(scores[rows], labels[rows]), [text.group for text in self._responses]


def evaluate(
    texts: Sequence[ScoredText],
    *,
    threshold: float | None = None,
    generator: torch.Generator,
    num_resamples: int = 1000,
) -> dict[str, Estimate]:
    """The figures of one scorer; those that the texts do not define, for lack of a label, are left out and logged."""
    figures = _Figures(texts)
    statistics = {
        "auroc_token": figures.auroc_token(),
        "auroc_response": figures.auroc_response(),
        "tpr_response_at_1pct_fpr": figures.tpr_response_at_1pct_fpr(),
        "pairwise_accuracy": figures.pairwise_accuracy(),
    }
    if threshold is not None:
        statistics["recall_at_threshold"] = figures.share_flagged(threshold, positive=True)
        statistics["fpr_at_threshold"] = figures.share_flagged(threshold, positive=False)
    return _with_intervals(statistics, generator, num_resamples)


def compare(
    texts: Sequence[ScoredText],
    baseline: Sequence[ScoredText],
    *,
    generator: torch.Generator,
    num_resamples: int = 1000,
) -> dict[str, Estimate]:
    """By how much a scorer's AUROC is above a baseline's on the same texts, both drawn together."""
    assert [text.id for text in texts] == [text.id for text in baseline], "the same texts in the same order"
    ours, theirs = _Figures(texts), _Figures(baseline)
    statistics = {
        name: _difference(getattr(ours, name)(), getattr(theirs, name)()) for name in ("auroc_token", "auroc_response")
    }
    return _with_intervals(statistics, generator, num_resamples)


def _difference(ours: tuple[Statistic, list[str]], theirs: tuple[Statistic, list[str]]) -> tuple[Statistic, list[str]]:
    (a, groups), (b, other_groups) = ours, theirs
    if groups != other_groups:  # one of them does not score tokens
        return a, []
    return lambda rows: a(rows) - b(rows), groups


def _with_intervals(
    statistics: dict[str, tuple[Statistic, list[str]]], generator: torch.Generator, num_resamples: int
) -> dict[str, Estimate]:
    estimates = {}
    for name, (statistic, groups) in statistics.items():
        if not groups:
            logger.info("%s is left out: no text has what it needs", name)
            continue
        try:
            estimates[name] = bootstrap_by_group(statistic, groups, generator=generator, num_resamples=num_resamples)
        except SettingError as error:
            logger.warning("%s is left out: %s", name, error)
    return estimates


def _labelled_tokens(text: ScoredText) -> tuple[ScoredText, tuple[Tensor, Tensor]]:
    assert text.token_scores is not None
    labelled = text.token_labels.isfinite()
    return text, (text.token_scores[labelled], text.token_labels[labelled])


def _joined(parts: Sequence[Tensor]) -> Float[Tensor, " token"]:
    return torch.cat([part.double() for part in parts]) if parts else torch.zeros(0, dtype=torch.float64)


def _pairs(responses: Sequence[ScoredText]) -> list[tuple[ScoredText, ScoredText]]:
    by_prompt: dict[tuple[str, str], tuple[list[ScoredText], list[ScoredText]]] = {}
    for text in responses:
        by_prompt.setdefault((text.group, text.prompt), ([], []))[text.label < 0.5].append(text)
    return [pair for positives, negatives in by_prompt.values() for pair in itertools.product(positives, negatives)]
