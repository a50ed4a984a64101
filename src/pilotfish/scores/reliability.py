"""Probabilities and labels in; calibration error, and the points of reliability and ROC curves, out."""

from __future__ import annotations

import math
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from pilotfish.errors import SettingError
from pilotfish.scores.metrics import Scores, Statistic, tpr_at_fprs

NUM_BINS = 15


class ReliabilityPoint(NamedTuple):
    """One bin of a reliability curve; calibrated probabilities lie on the diagonal."""

    mean_probability: float
    share_positive: float
    num_items: int


class RocPoint(NamedTuple):
    fpr: float
    tpr: float


def reliability_curve(probabilities: Scores, labels: Scores, num_bins: int = NUM_BINS) -> list[ReliabilityPoint]:
    """What is said against what happens, in bins of about equal counts, from low probabilities to high.

    Equal probabilities share a bin, so there may be fewer bins. A label between 0 and 1 counts as that share.

    Raises:
        SettingError: a probability is outside [0, 1], or `num_bins` is below 1.
    """
    p, y = _checked(probabilities, labels)
    bins = _equal_mass_bins(p, num_bins)
    return [
        ReliabilityPoint(float(p[bins == b].mean()), float(y[bins == b].mean()), int((bins == b).sum()))
        for b in np.unique(bins)
    ]


def expected_calibration_error(probabilities: Scores, labels: Scores, num_bins: int = NUM_BINS) -> float:
    """Mean gap between what is said and what happens over the bins of `reliability_curve`, weighted by their counts.

    In [0, 1]; NaN without items. Within a bin chance makes a gap of its own, so the figure is above 0 for perfect
    probabilities too, by about `sqrt(share · (1 - share) · num_bins / count)`; no correction is made for it.

    Source: Naeini et al. 2015, with bins of equal counts as in Nguyen and O'Connor 2015.

    Raises:
        SettingError: a probability is outside [0, 1], or `num_bins` is below 1.
    """
    return calibration_error_of_draws(probabilities, labels, num_bins)(torch.arange(len(probabilities)))


def calibration_error_of_draws(probabilities: Scores, labels: Scores, num_bins: int = NUM_BINS) -> Statistic:
    """`expected_calibration_error` of any rows of these, in the bins of all rows.

    A draw repeats rows, which adds to the bias: the interval of a bootstrap lies higher than the figure should.

    Raises:
        SettingError: a probability is outside [0, 1], or `num_bins` is below 1.
    """
    p, y = _checked(probabilities, labels)
    return partial(_calibration_error_of_bins, _equal_mass_bins(p, num_bins), p - y)


def squared_errors(probabilities: Scores, labels: Scores) -> Float[Tensor, " item"]:
    """What each item adds to the Brier score.

    Raises:
        SettingError: a probability is outside [0, 1].
    """
    p, y = _checked(probabilities, labels)
    return torch.from_numpy((p - y) ** 2)


def brier_score(probabilities: Scores, labels: Scores) -> float:
    """Mean squared distance of probabilities from labels, in [0, 1]; NaN without items.

    Saying the share of positives, p, everywhere scores p · (1 - p).

    Source: Brier 1950, in the form for two outcomes.

    Raises:
        SettingError: a probability is outside [0, 1].
    """
    return float(squared_errors(probabilities, labels).mean())


def roc_points(scores: Scores, labels: Scores, *, lowest: float = 1e-4, num_points: int = 81) -> list[RocPoint]:
    """The ROC curve at false-positive rates evenly spaced in log space, from `lowest` to 1, both included.

    A point tells the largest share of positives over a threshold that at most this share of negatives exceed. Below
    one in the number of negatives that is the share above them all. Empty when there are no positives or no negatives.

    Raises:
        SettingError: `lowest` is outside (0, 1), or `num_points` is below 2.
    """
    if not 0.0 < lowest < 1.0 or num_points < 2:
        raise SettingError(f"{num_points} points from {lowest:g} make no curve; give 2 or more, from a rate in (0, 1)")
    fprs = np.geomspace(lowest, 1.0, num_points).tolist()
    return [RocPoint(*pair) for pair in zip(fprs, tpr_at_fprs(scores, labels, fprs), strict=True) if pair[1] == pair[1]]


def _calibration_error_of_bins(
    bins: Int[np.ndarray, " item"], excess: Float[np.ndarray, " item"], rows: Int[Tensor, " drawn"]
) -> float:
    chosen = rows.numpy()
    gaps = np.bincount(bins[chosen], weights=excess[chosen])
    return float(np.abs(gaps).sum() / len(chosen)) if len(chosen) else math.nan


def _equal_mass_bins(p: Float[np.ndarray, " item"], num_bins: int) -> Int[np.ndarray, " item"]:
    """The bin of each item, at most `num_bins` of them; a bin ends with the last item of its last value."""
    if num_bins < 1:
        raise SettingError(f"{num_bins} bins hold nothing; give 1 or more")
    last = -(-np.arange(1, num_bins) * len(p) // num_bins) - 1
    ends = np.sort(p)[last] if len(p) else p
    return np.searchsorted(ends, p, "left")


def _checked(probabilities: Scores, labels: Scores) -> tuple[Float[np.ndarray, " item"], Float[np.ndarray, " item"]]:
    p, y = probabilities.double().cpu().numpy(), labels.double().cpu().numpy()
    if not ((p >= 0) & (p <= 1)).all():  # NaN too
        raise SettingError("a score is no probability in [0, 1]; calibrate it, and leave unscored items out")
    return p, y
