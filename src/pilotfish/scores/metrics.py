"""Scores and labels in; figures with their intervals out, in float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.stats import rankdata
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


def auroc(scores: Scores, labels: Scores) -> float:
    """Probability that a positive outscores a negative, ties counting half; NaN when either is absent.

    Labels of 0.5 and more are positive.
    """
    z, is_positive = _arrays(scores, labels)
    num_positive, num_negative = int(is_positive.sum()), int((~is_positive).sum())
    if not num_positive or not num_negative:
        return math.nan
    wins = rankdata(z)[is_positive].sum() - num_positive * (num_positive + 1) / 2
    return float(wins / (num_positive * num_negative))


def tpr_at_fpr(scores: Scores, labels: Scores, fpr: float) -> float:
    """The largest share of positives over a threshold that at most `fpr` of the negatives exceed.

    Only thresholds that exist are used: items of one score are flagged together or not at all. NaN when there are no
    positives or no negatives.

    Raises:
        SettingError: `fpr` is outside [0, 1].
    """
    if not 0.0 <= fpr <= 1.0:
        raise SettingError(f"false-positive rate {fpr} is outside [0, 1]")
    z, is_positive = _arrays(scores, labels)
    positives, negatives = z[is_positive], np.sort(z[~is_positive])[::-1]
    if not len(positives) or not len(negatives):
        return math.nan
    allowed = math.floor(fpr * len(negatives) + 1e-9)
    if allowed >= len(negatives):
        return 1.0
    return float((positives > negatives[allowed]).mean())


def pairwise_accuracy(positive: Scores, negative: Scores) -> float:
    """Share of pairs whose positive member outscores its negative one, ties counting half; NaN without pairs."""
    assert len(positive) == len(negative), "pairs have two members"
    _check_no_nan(positive)
    _check_no_nan(negative)
    return float((positive > negative).double().add(0.5 * (positive == negative).double()).mean())


def bootstrap_by_group(
    statistic: Statistic, groups: Sequence[str], *, generator: torch.Generator, num_resamples: int = 1000
) -> Estimate:
    """A figure with its 95 % percentile interval over resampled groups, since rows of one document are not independent.

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
    low, high = np.quantile(defined, [0.025, 0.975])
    return Estimate(value, float(low), float(high), len(names))


def _arrays(scores: Scores, labels: Scores) -> tuple[Float[np.ndarray, " item"], np.ndarray]:
    _check_no_nan(scores)
    return scores.double().cpu().numpy(), labels.double().cpu().numpy() >= 0.5


def _check_no_nan(scores: Scores) -> None:
    if bool(scores.isnan().any()):
        raise SettingError("a score is NaN; leave unscored items out, and count them")
