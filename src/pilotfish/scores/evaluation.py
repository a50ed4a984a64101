"""Scored held-out texts in; figures with intervals, and differences between two scorers, out."""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from pilotfish.errors import SettingError
from pilotfish.scores import detection
from pilotfish.scores.metrics import (
    Estimate,
    Statistic,
    auroc,
    auroc_of_draws,
    bootstrap_by_group,
    has_both_labels,
    mean_of,
    pairwise_accuracy,
    tpr_at_fpr,
)
from pilotfish.scores.reliability import calibration_error_of_draws, squared_errors
from pilotfish.scores.scored import ScoredText

logger = logging.getLogger(__name__)

COMPARED = ("auroc_token", "auroc_response", "pairwise_accuracy", "auroc_within")
AT_THRESHOLD = ("recall_at_threshold", "fpr_at_threshold", *detection.FIGURES)
"""Figures that hang on the threshold."""


class _Figure(NamedTuple):
    """A figure of rows, so that a bootstrap can draw them, and the group of each row; no rows where it has no sense."""

    statistic: Statistic
    groups: list[str]


class _Figures:
    """The figures of one scorer, each made when it is asked for."""

    def __init__(self, texts: Sequence[ScoredText]) -> None:
        self._tokens = [_labelled_tokens(text) for text in texts if text.token_scores is not None]
        self._responses = [text for text in texts if not math.isnan(text.label)]
        self._pairs = _pairs(self._responses)

    def table(self, threshold: float | None) -> dict[str, Callable[[], _Figure]]:
        table: dict[str, Callable[[], _Figure]] = {
            "auroc_token": partial(self._of_tokens, auroc_of_draws),
            "auroc_response": partial(self._of_responses, auroc_of_draws),
            "tpr_response_at_1pct_fpr": partial(self._of_responses, partial(_tpr_of_draws, fpr=0.01)),
            "pairwise_accuracy": self._pairwise_accuracy,
        }
        if threshold is not None:
            table["recall_at_threshold"] = partial(self._share_flagged, threshold, positive=True)
            table["fpr_at_threshold"] = partial(self._share_flagged, threshold, positive=False)
        table["tpr_response_at_0.1pct_fpr"] = partial(self._of_responses, partial(_tpr_of_draws, fpr=0.001))
        table["auroc_within"] = self._auroc_within
        table["ece_token"] = partial(self._of_probabilities, calibration_error_of_draws)
        table["brier_token"] = partial(self._of_probabilities, lambda p, y: mean_of(squared_errors(p, y).tolist()))
        if threshold is not None:
            table |= {name: partial(self._detected, threshold, make) for name, make in detection.FIGURES.items()}
        return table

    def _of_tokens(self, make: Callable[[Tensor, Tensor], Statistic]) -> _Figure:
        scores, labels = (_joined([pair[i] for _, pair in self._tokens]) for i in (0, 1))
        groups = [text.group for text, (values, _) in self._tokens for _ in range(len(values))]
        return _Figure(make(scores, labels), groups)

    def _of_probabilities(self, make: Callable[[Tensor, Tensor], Statistic]) -> _Figure:
        if any(bool(((scores < 0) | (scores > 1)).any()) for _, (scores, _) in self._tokens):
            return _Figure(mean_of([]), [])  # a scorer that ranks, as TF-IDF does
        if not has_both_labels(_joined([labels for _, (_, labels) in self._tokens])):
            return _Figure(mean_of([]), [])  # no probability is right or wrong where nothing is known to be positive
        return self._of_tokens(make)

    def _of_responses(self, make: Callable[[Tensor, Tensor], Statistic]) -> _Figure:
        scores, labels = (
            torch.tensor([getattr(text, name) for text in self._responses], dtype=torch.float64)
            for name in ("score", "label")
        )
        return _Figure(make(scores, labels), [text.group for text in self._responses])

    def _auroc_within(self) -> _Figure:
        within = [(text.group, auroc(*pair)) for text, pair in self._tokens]
        defined = [(group, value) for group, value in within if not math.isnan(value)]
        return _Figure(mean_of([value for _, value in defined]), [group for group, _ in defined])

    def _pairwise_accuracy(self) -> _Figure:
        positive, negative = (torch.tensor([p[i].score for p in self._pairs], dtype=torch.float64) for i in (0, 1))
        groups = [p[0].group for p in self._pairs]
        return _Figure(lambda rows: pairwise_accuracy(positive[rows], negative[rows]), groups)

    def _share_flagged(self, threshold: float, *, positive: bool) -> _Figure:
        chosen = [text for text in self._responses if (text.label >= 0.5) == positive]
        return _Figure(mean_of([text.score >= threshold for text in chosen]), [text.group for text in chosen])

    def _detected(self, threshold: float, make: Callable[[Sequence[detection.Detection]], Statistic]) -> _Figure:
        chosen = [text for text, (_, labels) in self._tokens if bool((labels >= 0.5).any())]
        found = [detection.detect(text, threshold) for text in chosen]
        return _Figure(make(found), [text.group for text in chosen])


def evaluate(
    texts: Sequence[ScoredText],
    *,
    threshold: float | None = None,
    generator: torch.Generator,
    num_resamples: int = 1000,
    only: Collection[str] | None = None,
) -> dict[str, Estimate]:
    """The figures of one scorer; those that the texts do not define, for lack of a label, are left out and logged.

    Of tokens: `auroc_token`; `auroc_within`, among the tokens of one text, averaged over texts with both labels;
    `ece_token` and `brier_token` of a scorer that gives probabilities. Of responses: `auroc_response`,
    `tpr_response_at_1pct_fpr` and `…_0.1pct_fpr` (with fewer than 1,000 negatives, the share above all of them),
    `pairwise_accuracy`. With a threshold: `recall_at_threshold` and `fpr_at_threshold` of responses, and the figures
    of `pilotfish.scores.detection` over the texts with a positive token. `only` names those that are wanted.
    """
    table = _Figures(texts).table(threshold)
    return _with_intervals({n: table[n] for n in table if only is None or n in only}, generator, num_resamples)


def compare(
    texts: Sequence[ScoredText],
    baseline: Sequence[ScoredText],
    *,
    generator: torch.Generator,
    num_resamples: int = 1000,
) -> dict[str, Estimate]:
    """By how much a scorer's AUROC and pairwise accuracy are above a baseline's on the same texts, both drawn together.

    Figures that one of the two does not have are left out.
    """
    assert [text.id for text in texts] == [text.id for text in baseline], "the same texts in the same order"
    ours, theirs = (_Figures(given).table(None) for given in (texts, baseline))
    figures = {name: partial(_difference, ours[name], theirs[name]) for name in COMPARED}
    return _with_intervals(figures, generator, num_resamples)


def _difference(ours: Callable[[], _Figure], theirs: Callable[[], _Figure]) -> _Figure:
    (a, groups), (b, other_groups) = ours(), theirs()
    if groups != other_groups:  # one of them does not score tokens
        return _Figure(a, [])
    return _Figure(lambda rows: a(rows) - b(rows), groups)


def _with_intervals(
    figures: Mapping[str, Callable[[], _Figure]], generator: torch.Generator, num_resamples: int
) -> dict[str, Estimate]:
    estimates = {}
    for name, make in figures.items():
        try:
            statistic, groups = make()
            if groups:
                estimates[name] = bootstrap_by_group(
                    statistic, groups, generator=generator, num_resamples=num_resamples
                )
            else:
                logger.info("%s is left out: no text has what it needs", name)
        except SettingError as error:
            logger.warning("%s is left out: %s", name, error)
    return estimates


def _tpr_of_draws(scores: Tensor, labels: Tensor, *, fpr: float) -> Statistic:
    return lambda rows: tpr_at_fpr(scores[rows], labels[rows], fpr)


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
