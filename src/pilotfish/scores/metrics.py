"""Scores and labels in; figures with their intervals out, in float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from pilotfish.errors import SettingError

Scores = Float[Tensor, " item"]
Statistic = Callable[[Int[Tensor, " drawn"]], float]
"""Rows (some several times) to a figure; NaN where it is not defined for them."""


class Estimate(NamedTuple):
    value: float
    low: float
    """Ends of the 95 % interval."""
    high: float
    n: int
    """Independent groups."""


def has_both_labels(labels: Float[Tensor, " item"]) -> bool:
    """Whether there are positive and negative ones; NaN is unlabelled."""
    return bool((labels >= 0.5).any()) and bool((labels < 0.5).any())


def auroc(scores: Scores, labels: Scores) -> float:
    """Probability that a positive outscores a negative, ties counting half; NaN when either is absent.

    Labels of 0.5 and more are positive.
    """
    return auroc_of_draws(scores, labels)(torch.arange(len(scores)))


def auroc_of_draws(scores: Scores, labels: Scores) -> Statistic:
    """`auroc` of any rows of these, repeated ones included: scores are ranked once, then each draw only counts."""
    z, is_positive = _arrays(scores, labels)
    levels, level = np.unique(z, return_inverse=True)
    cell = 2 * level + is_positive  # one for the negatives of each level, one for its positives
    return partial(_auroc_of_cells, cell, len(levels))


def tpr_at_fpr(scores: Scores, labels: Scores, fpr: float) -> float:
    """The largest share of positives over a threshold that at most `fpr` of the negatives exceed.

    Only thresholds that exist are used: items of one score are flagged together or not at all. NaN when there are no
    positives or no negatives.

    Raises:
        SettingError: `fpr` is outside [0, 1].
    """
    return tpr_at_fprs(scores, labels, [fpr])[0]


def tpr_at_fprs(scores: Scores, labels: Scores, fprs: Sequence[float]) -> list[float]:
    """`tpr_at_fpr` at several rates, for one sorting.

    Raises:
        SettingError: a rate is outside [0, 1].
    """
    for fpr in fprs:
        if not 0.0 <= fpr <= 1.0:
            raise SettingError(f"false-positive rate {fpr} is outside [0, 1]")
    z, is_positive = _arrays(scores, labels)
    positives, negatives = np.sort(z[is_positive]), np.sort(z[~is_positive])
    if not len(positives) or not len(negatives):
        return [math.nan] * len(fprs)
    found = []
    for fpr in fprs:
        allowed = math.floor(fpr * len(negatives) + 1e-9)
        below = np.searchsorted(positives, negatives[-1 - allowed], "right") if allowed < len(negatives) else 0
        found.append(float((len(positives) - below) / len(positives)))
    return found


def pairwise_accuracy(positive: Scores, negative: Scores) -> float:
    """Share of pairs whose positive member outscores its negative one, ties counting half; NaN without pairs."""
    assert len(positive) == len(negative), "pairs have two members"
    _check_no_nan(positive)
    _check_no_nan(negative)
    return float((positive > negative).double().add(0.5 * (positive == negative).double()).mean())


def mean_of(values: Sequence[float | int]) -> Statistic:
    """The mean of any rows of these; NaN of none."""
    column = torch.tensor(values, dtype=torch.float64)
    return lambda rows: float(column[rows].mean())


def bootstrap_by_group(
    statistic: Statistic,
    groups: Sequence[str],
    *,
    generator: torch.Generator,
    num_resamples: int = 1000,
    level: float = 0.95,
) -> Estimate:
    """A figure with its percentile interval over resampled groups, since rows of one document are not independent.

    `level` is the share of the draws between its ends; 0.9 makes each end a one-sided bound at 95 %.

    Draws in which the figure is not defined are left out.

    Raises:
        SettingError: fewer than two groups; or the figure is not defined for the rows, or for half of the draws.
    """
    names = sorted(set(groups))
    if len(names) < 2:
        raise SettingError(f"an interval needs two groups or more, given were {len(names)}; give more documents")
    index = {name: position for position, name in enumerate(names)}
    owner = np.array([index[group] for group in groups], dtype=np.int64)
    order = np.argsort(owner, kind="stable")
    members = np.split(order, np.cumsum(np.bincount(owner, minlength=len(names)))[:-1])
    value = statistic(torch.arange(len(groups)))
    drawn = []
    for _ in range(num_resamples):
        chosen = torch.randint(len(names), (len(names),), generator=generator).tolist()
        drawn.append(statistic(torch.from_numpy(np.concatenate([members[position] for position in chosen]))))
    defined = [figure for figure in drawn if not math.isnan(figure)]
    if math.isnan(value) or len(defined) < num_resamples / 2:
        raise SettingError(
            f"the figure is not defined for these {len(groups)} rows of {len(names)} groups, or for too few resamples "
            "of them; give more documents with both labels"
        )
    low, high = np.quantile(defined, [(1 - level) / 2, (1 + level) / 2])
    return Estimate(value, float(low), float(high), len(names))


def _auroc_of_cells(cell: Int[np.ndarray, " item"], num_levels: int, rows: Int[Tensor, " drawn"]) -> float:
    counts = np.bincount(cell[rows.numpy()], minlength=2 * num_levels).reshape(-1, 2)
    negatives, positives = counts[:, 0], counts[:, 1]
    num_pairs = int(negatives.sum()) * int(positives.sum())
    doubled_wins = positives @ (2 * negatives.cumsum() - negatives)
    return float(doubled_wins / (2 * num_pairs)) if num_pairs else math.nan


def _arrays(scores: Scores, labels: Scores) -> tuple[Float[np.ndarray, " item"], np.ndarray]:
    _check_no_nan(scores)
    return scores.double().cpu().numpy(), labels.double().cpu().numpy() >= 0.5


def _check_no_nan(scores: Scores) -> None:
    if bool(scores.isnan().any()):
        raise SettingError("a score is NaN; leave unscored items out, and count them")
