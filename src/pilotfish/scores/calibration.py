"""Logits and labels in; calibrated probabilities and thresholds with what they promise out."""

from __future__ import annotations

import hashlib
import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.optimize import isotonic_regression
from scipy.special import expit
from scipy.stats import beta
from torch import Tensor

from pilotfish.errors import SettingError, TextError
from pilotfish.scores.reliability import expected_calibration_error

_MIN_TOKENS = 1000
"""Isotonic regression overfits smaller samples (Niculescu-Mizil and Caruana 2005)."""
_MIN_GROUPS = 20
_Z_95 = 1.645
"""One-sided 95 % point of the normal distribution."""


class Platt(NamedTuple):
    """A calibrated log-odds is scale · logit + shift."""

    scale: float
    shift: float

    def probability(self, logits: Float[Tensor, "*any"]) -> Float[Tensor, "*any"]:
        return (self.scale * logits + self.shift).sigmoid()


@dataclass(frozen=True, slots=True, eq=False)
class Isotonic:
    """A rising line through knots, level beyond the ends. Where it is level, scores that differed become equal."""

    logits: Float[Tensor, " knot"]
    """Where the knots stand, rising; float64."""
    probabilities: Float[Tensor, " knot"]
    """Never falling; float64."""

    def probability(self, logits: Float[Tensor, "*any"]) -> Float[Tensor, "*any"]:
        """Interpolates; a larger logit never gets a smaller probability, and NaN stays NaN."""
        at, value = self.logits.to(logits.device), self.probabilities.to(logits.device)
        z = logits.double().clamp(at[0], at[-1]).contiguous()
        if len(at) == 1:
            return torch.where(z.isnan(), z, value[0]).to(logits.dtype)
        right = torch.searchsorted(at, z).clamp(1, len(at) - 1)
        share = (z - at[right - 1]) / (at[right] - at[right - 1])
        rise = value[right] - value[right - 1]
        return (value[right - 1] + share * rise).clamp(max=value[right]).to(logits.dtype)


class HeldOut(NamedTuple):
    """How good probabilities are on groups that their map was not fitted on."""

    log_loss: float
    """Mean, in nats a token."""
    calibration_error: float
    """`expected_calibration_error`, in [0, 1]."""


class Calibration(NamedTuple):
    """What `choose_calibration` chose, and by what."""

    found: Platt | Isotonic
    reason: str
    platt: HeldOut | None = None
    """None where the sample was too small to compare."""
    isotonic: HeldOut | None = None


class Interval(NamedTuple):
    low: float
    high: float


class Threshold(NamedTuple):
    threshold: float
    """Probability from which on a response is flagged."""
    budget: float
    num_benign: int
    """Documents: responses, where each stands alone."""
    num_flagged: int
    """Of them, those with a response that this threshold flags."""
    fpr_upper: float
    """Upper bound on the share of benign documents flagged, at most the budget."""


def platt(logits: Float[Tensor, " token"], labels: Float[Tensor, " token"]) -> Platt:
    """Fits scale and shift so that sigmoid(scale · logit + shift) is a probability of the label.

    Source: Platt 1999, with his smoothed targets, which keep the scale finite on separable data; solved by Newton's
    method with step halving as in Lin, Lin and Weng 2007.

    Raises:
        TextError: there are no positive or no negative labels.
        SettingError: a logit or a label is not finite.
    """
    z, y = _checked(logits, labels)
    num_positive, num_negative = float(y.sum()), float((1 - y).sum())
    target = y * (num_positive + 1) / (num_positive + 2) + (1 - y) / (num_negative + 2)
    spread = float(z.std()) or 1.0
    center = float(z.mean())
    design = np.stack([(z - center) / spread, np.ones_like(z)], axis=1)
    solution = _logistic_newton(
        design, target, start=np.array([0.0, math.log((num_positive + 1) / (num_negative + 1))])
    )
    scale = float(solution[0]) / spread
    return Platt(scale, float(solution[1]) - scale * center)


def isotonic(
    logits: Float[Tensor, " token"], labels: Float[Tensor, " token"], weights: Float[Tensor, " token"] | None = None
) -> Isotonic:
    """The never-falling map from logits to labels of least squared error; tokens of one logit count as one.

    Source: Zadrozny and Elkan 2002; solved exactly by pooling adjacent violators.

    Args:
        weights: What each token counts, over 0; 1 by default.

    Raises:
        TextError: there are no positive or no negative labels.
        SettingError: a logit or a label is not finite, or a weight is not a positive number.
    """
    z, y = _checked(logits, labels)
    w = np.ones_like(y) if weights is None else weights.double().cpu().numpy()
    if not (np.isfinite(w).all() and (w > 0).all()):
        raise SettingError("a weight is not a positive number; leave out what shall not count")
    at, owner = np.unique(z, return_inverse=True)
    weight = np.bincount(owner, weights=w)
    level = isotonic_regression(np.bincount(owner, weights=w * y) / weight, weights=weight)
    # Only the first and the last logit of a level stretch bend the line.
    ends = np.unique(np.concatenate([level.blocks[:-1], level.blocks[1:] - 1]))
    return Isotonic(torch.from_numpy(at[ends]), torch.from_numpy(level.x[ends].clip(0.0, 1.0)))


def choose_calibration(
    logits: Float[Tensor, " token"], labels: Float[Tensor, " token"], groups: Sequence[str], *, num_folds: int = 5
) -> Calibration:
    """Platt's map, or the isotonic one where it is shown to be better on groups that neither was fitted on.

    Shown means: its log loss is lower by more than chance would have it, one-sided 95 % over groups. A sample of fewer
    than 1,000 tokens, or fewer than 20 groups, falls to Platt. The isotonic map is kept off 0 and 1 by as much
    as Platt's own targets are, so that one surprise does not cost without bound. The folds depend on the groups' names
    alone, not on the order of rows.

    Args:
        groups: Each token's source document; one document's tokens stay in one fold.

    Raises:
        TextError: there are no positive or no negative labels.
        SettingError: a logit or a label is not finite, the groups are not one a token, or fewer than two folds.
    """
    z, y = _checked(logits, labels)
    if len(groups) != len(y):
        raise SettingError(f"{len(groups)} groups were given for {len(y)} tokens; give one a token")
    if num_folds < 2:
        raise SettingError(f"{num_folds} folds leave nothing to fit on; give 2 or more")
    names, owner = np.unique(np.array(groups), return_inverse=True)
    few = f"Platt: {len(y)} tokens of {len(names)} groups are too few to choose by"
    if len(y) < _MIN_TOKENS or len(names) < max(_MIN_GROUPS, num_folds):
        return Calibration(platt(logits, labels), few)
    fold = _folds(names.tolist(), np.bincount(owner, weights=y), num_folds)[owner]
    if any(len(np.unique(y[fold != number] >= 0.5)) < 2 for number in range(num_folds)):
        return Calibration(platt(logits, labels), f"{few}: one fold alone holds a label")
    said = [_held_out(fit, torch.from_numpy(z), labels, fold) for fit in (platt, _bounded_isotonic)]
    ours, theirs = (_log_losses(p, torch.from_numpy(y)) for p in said)
    saved = np.bincount(owner, weights=ours - theirs)  # by the isotonic map, on each group
    is_better = bool(saved.sum() > _Z_95 * math.sqrt(len(saved)) * saved.std(ddof=1))
    found = _bounded_isotonic(logits, labels) if is_better else platt(logits, labels)
    reason = "isotonic: lower loss on held-out groups" if is_better else "Platt: isotonic is not shown to be better"
    errors = [expected_calibration_error(p, torch.from_numpy(y)) for p in said]
    return Calibration(found, reason, HeldOut(float(ours.mean()), errors[0]), HeldOut(float(theirs.mean()), errors[1]))


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


def threshold_at_budget(
    max_scores: Float[Tensor, " response"], budget: float, level: float = 0.95, *, groups: Sequence[str] | None = None
) -> Threshold:
    """The smallest threshold whose false-positive rate on benign responses is shown to be within the budget.

    Args:
        max_scores: The largest probability in each benign response, which is what flags it.
        groups: Document of each response. The bound is exact for independent draws, and responses of one document are
            not: a document then counts once, with its highest score. By default every response stands alone.

    Raises:
        SettingError: the sample is too small for the budget (says how many are needed), a score is no probability, or
            so many benign responses reach probability 1 that no threshold is left.
    """
    scores = max_scores.cpu() if groups is None else _by_document(max_scores.cpu(), groups)
    scores = scores.sort(descending=True).values
    needed = num_benign_needed(budget, level)
    if len(scores) < needed:
        raise SettingError(
            f"a budget of {budget:g} cannot be shown with {len(scores)} benign "
            f"{'responses' if groups is None else 'documents'}: even with none flagged the "
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


def _by_document(scores: Tensor, groups: Sequence[str]) -> Float[Tensor, " document"]:
    """The highest of each; NaN where one is."""
    index = {group: row for row, group in enumerate(dict.fromkeys(groups))}
    rows = torch.tensor([index[group] for group in groups])
    return torch.full((len(index),), -math.inf, dtype=scores.dtype).scatter_reduce(0, rows, scores, "amax")


def _checked(logits: Tensor, labels: Tensor) -> tuple[Float[np.ndarray, " token"], Float[np.ndarray, " token"]]:
    z, y = logits.double().cpu().numpy(), labels.double().cpu().numpy()
    if not np.isfinite(z).all() or not np.isfinite(y).all():
        raise SettingError("a logit or a label is not finite; leave unlabelled tokens out, or fit the head again")
    num_positive, num_negative = float(y.sum()), float((1 - y).sum())
    if not num_positive or not num_negative:
        raise TextError(
            f"calibration needs both labels; given were {num_positive:g} positive, {num_negative:g} negative"
        )
    return z, y


def _folds(
    names: Sequence[str], num_positive: Float[np.ndarray, " group"], num_folds: int
) -> Int[np.ndarray, " group"]:
    """Each group's fold, dealt out by the hashes of names; groups with positives first, so that every fold has some."""
    order = sorted(
        range(len(names)), key=lambda i: (num_positive[i] == 0, hashlib.sha256(names[i].encode()).hexdigest())
    )
    folds = np.empty(len(names), dtype=np.int64)
    folds[order] = np.arange(len(names)) % num_folds
    return folds


def _bounded_isotonic(logits: Tensor, labels: Tensor) -> Isotonic:
    """Keeps off 0 and 1 by as much as Platt's targets do."""
    found, num_positive = isotonic(logits, labels), float(labels.double().sum())
    num_negative = len(labels) - num_positive
    return Isotonic(
        found.logits, found.probabilities.clamp(1 / (num_negative + 2), (num_positive + 1) / (num_positive + 2))
    )


def _held_out(
    fit: Callable[[Tensor, Tensor], Platt | Isotonic], logits: Tensor, labels: Tensor, fold: Int[np.ndarray, " token"]
) -> Float[Tensor, " token"]:
    """The probability of each token under the map that was fitted on the other folds."""
    said = torch.empty(len(fold), dtype=torch.float64)
    for number in np.unique(fold):
        others, these = torch.from_numpy(fold != number), torch.from_numpy(fold == number)
        said[these] = fit(logits[others], labels[others]).probability(logits[these])
    return said


def _log_losses(p: Float[Tensor, " token"], y: Float[Tensor, " token"]) -> Float[np.ndarray, " token"]:
    """In nats."""
    losses: Float[np.ndarray, " token"] = -(torch.xlogy(y, p) + torch.xlogy(1 - y, 1 - p)).numpy()
    return losses


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
