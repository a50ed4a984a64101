"""Logits and labels in; calibrated probabilities and thresholds with what they promise out."""

from __future__ import annotations

import math
from bisect import bisect_right
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from scipy.special import expit
from scipy.stats import beta
from torch import Tensor

from pilotfish.errors import SettingError, TextError


class Platt(NamedTuple):
    """A calibrated log-odds is scale · logit + shift."""

    scale: float
    shift: float


class Interval(NamedTuple):
    low: float
    high: float


class Threshold(NamedTuple):
    threshold: float
    """Probability from which on a response is flagged."""
    budget: float
    num_benign: int
    num_flagged: int
    """Benign responses that this threshold flags."""
    fpr_upper: float
    """Upper bound on the share of benign responses flagged, at most the budget."""


def platt(logits: Float[Tensor, " token"], labels: Float[Tensor, " token"]) -> Platt:
    """Fits scale and shift so that sigmoid(scale · logit + shift) is a probability of the label.

    Source: Platt 1999, with his smoothed targets, which keep the scale finite on separable data; solved by Newton's
    method with step halving as in Lin, Lin and Weng 2007.

    Raises:
        TextError: there are no positive or no negative labels.
        SettingError: a logit or a label is not finite.
    """
    z, y = logits.double().cpu().numpy(), labels.double().cpu().numpy()
    if not np.isfinite(z).all() or not np.isfinite(y).all():
        raise SettingError("a logit or a label is not finite; leave unlabelled tokens out, or fit the head again")
    num_positive, num_negative = float(y.sum()), float((1 - y).sum())
    if not num_positive or not num_negative:
        raise TextError(
            f"calibration needs both labels; given were {num_positive:g} positive, {num_negative:g} negative"
        )
    target = y * (num_positive + 1) / (num_positive + 2) + (1 - y) / (num_negative + 2)
    spread = float(z.std()) or 1.0
    center = float(z.mean())
    design = np.stack([(z - center) / spread, np.ones_like(z)], axis=1)
    solution = _logistic_newton(
        design, target, start=np.array([0.0, math.log((num_positive + 1) / (num_negative + 1))])
    )
    scale = float(solution[0]) / spread
    return Platt(scale, float(solution[1]) - scale * center)


def clopper_pearson(k: int, n: int, level: float = 0.95) -> Interval:
    """The exact two-sided interval of a proportion, k of n; at least `level` of such intervals hold the true one.

    Raises:
        SettingError: not 0 <= k <= n with n >= 1, or a level outside (0, 1).
    """
    _check_counts(k, n, level)
    tail = (1 - level) / 2
    low = 0.0 if k == 0 else float(beta.ppf(tail, k, n - k + 1))
    return Interval(low, clopper_pearson_upper(k, n, 1 - tail))


def clopper_pearson_upper(k: int, n: int, level: float = 0.95) -> float:
    """The exact one-sided upper bound of a proportion, k of n.

    Raises:
        SettingError: not 0 <= k <= n with n >= 1, or a level outside (0, 1).
    """
    _check_counts(k, n, level)
    return 1.0 if k == n else float(beta.ppf(level, k + 1, n - k))


def num_benign_needed(budget: float, level: float = 0.95) -> int:
    """How many benign responses it takes to show a budget when none of them is flagged.

    Raises:
        SettingError: budget or level outside (0, 1).
    """
    if not 0.0 < budget < 1.0:
        raise SettingError(f"budget {budget} is outside (0, 1); 0.01 flags at most one benign response in a hundred")
    _check_counts(0, 1, level)
    count = max(1, math.ceil(math.log(1 - level) / math.log1p(-budget) - 1e-9))
    return count if clopper_pearson_upper(0, count, level) <= budget else count + 1


def threshold_at_budget(max_scores: Float[Tensor, " response"], budget: float, level: float = 0.95) -> Threshold:
    """The smallest threshold whose false-positive rate on benign responses is shown to be within the budget.

    Args:
        max_scores: The largest probability in each benign response, which is what flags it.

    Raises:
        SettingError: the sample is too small for the budget (says how many are needed), a score is no probability, or
            so many benign responses reach probability 1 that no threshold is left.
    """
    scores = max_scores.cpu().sort(descending=True).values
    needed = num_benign_needed(budget, level)
    if len(scores) < needed:
        raise SettingError(
            f"a budget of {budget:g} cannot be shown with {len(scores)} benign responses: even with none flagged the "
            f"{level:.0%} bound is higher. Give {needed} or more, or a larger budget"
        )
    if not bool(((scores >= 0) & (scores <= 1)).all()):
        raise SettingError("a benign response has a score that is no probability; score it again")
    allowed = bisect_right(range(len(scores)), budget, key=lambda k: clopper_pearson_upper(k, len(scores), level)) - 1
    # The first number that this score does not reach, in the scores' own precision, so that no rounding brings it back.
    threshold = float(torch.nextafter(scores[allowed], torch.tensor(2.0, dtype=scores.dtype)))
    if threshold > 1.0:
        raise SettingError(
            f"{int((scores == 1.0).sum())} of {len(scores)} benign responses reach probability 1, so no threshold "
            f"keeps the budget of {budget:g}; the head does not tell them apart: fit it on more data, or allow more"
        )
    num_flagged = int((scores >= threshold).sum())
    return Threshold(
        threshold, budget, len(scores), num_flagged, clopper_pearson_upper(num_flagged, len(scores), level)
    )


def _check_counts(k: int, n: int, level: float) -> None:
    if not 0 <= k <= n or n < 1:
        raise SettingError(f"{k} of {n} is no proportion; give 0 <= k <= n with n of 1 or more")
    if not 0.0 < level < 1.0:
        raise SettingError(f"level {level} is outside (0, 1); 0.95 is usual")


def _logistic_newton(
    design: Float[np.ndarray, "row column"], target: Float[np.ndarray, " row"], start: Float[np.ndarray, " column"]
) -> Float[np.ndarray, " column"]:
    """Minimises the logistic loss; a step that does not lower it is halved."""

    def loss(at: Float[np.ndarray, " column"]) -> float:
        z = design @ at
        return float((np.logaddexp(0, z) - target * z).sum())

    point, value = start, loss(start)
    for _ in range(100):
        p = expit(design @ point)
        gradient = design.T @ (p - target)
        if np.abs(gradient).max() < 1e-9 * len(target):
            break
        curvature = (design * (p * (1 - p))[:, None]).T @ design + 1e-12 * np.eye(len(point))
        step = np.linalg.solve(curvature, gradient)
        while loss(point - step) > value and np.abs(step).max() > 1e-12:
            step = step / 2
        point = point - step
        value = loss(point)
    return point
