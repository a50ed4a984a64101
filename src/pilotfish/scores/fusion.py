"""Several streams of scores for each token in; one probability that a small logistic model fuses from them out.

The first stream is a head's. The others come from elsewhere: how sharply draft and target disagree, what a second head
says. Whether they add anything is a figure with an interval, held against the same model on the head's stream alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from scipy.optimize import minimize
from scipy.special import expit
from torch import Tensor

from pilotfish.errors import LeakError, SettingError, TextError
from pilotfish.scores.metrics import (
    Estimate,
    Statistic,
    auroc_of_draws,
    bootstrap_by_group,
    has_both_labels,
    tpr_at_fpr,
)

Level = Literal["token", "answer"]

WINDOW = 16
"""Tokens over which a stream is averaged beside its own value at a token."""
TOP = 8
"""How many of an answer's highest log-odds are averaged beside the mean of all."""
PENALTY = 1.0
"""Half of this, times the sum of squared weights of standardised features, is added to the summed loss."""
_CLIP = 1e-4
"""A probability nearer to 0 or 1 counts as this."""


class SignalText(NamedTuple):
    """A labelled answer and what each stream says of its tokens."""

    id: str
    group: str
    label: float
    """Of the whole answer; NaN where it has none."""
    token_labels: Float[Tensor, " token"]
    """NaN where unlabelled."""
    values: Float[Tensor, "token stream"]
    """Probabilities in [0, 1], NaN where unscored; the head's stream first."""


@dataclass(frozen=True, slots=True, eq=False)
class Fusion:
    """A logistic model over features of streams. A stream's gap counts as that stream's mean in training; a gap in the
    head's own stream is no score, NaN.
    """

    level: Level
    num_streams: int
    """It reads that many of a text's streams, from the first on."""
    centre: Float[np.ndarray, " feature"]
    spread: Float[np.ndarray, " feature"]
    weight: Float[np.ndarray, " feature"]
    bias: float
    groups: frozenset[str]
    """That it was fitted on."""

    def scores(self, texts: Sequence[SignalText]) -> list[Float[Tensor, " row"]]:
        """Probabilities: for each text one a token, or one in all at level `answer`.

        Raises:
            LeakError: a text's group was fitted on.
        """
        for text in texts:
            if text.group in self.groups:
                raise LeakError(
                    f"text {text.id!r} is of group {text.group!r}, which the fusion was fitted on; score other groups"
                )
        return [self._scores(text) for text in texts]

    def _scores(self, text: SignalText) -> Float[Tensor, " row"]:
        rows = _features(text, self.level, self.num_streams)
        filled = np.where(np.isnan(rows), 0.0, (rows - self.centre) / self.spread)
        probabilities = expit(filled @ self.weight + self.bias)
        return torch.from_numpy(np.where(np.isnan(rows[:, 0]), math.nan, probabilities))


def fit_fusion(texts: Sequence[SignalText], *, level: Level, num_streams: int) -> Fusion:
    """Fits the model on labelled answers, or on their labelled tokens.

    At level `token` its features are the log-odds of each stream at the token and, but for the head's, which looks back
    itself, their mean over the last 16; at level `answer` the mean of each and the mean of its 8 highest.

    Raises:
        SettingError: texts have fewer streams.
        TextError: positive or negative ones are missing.
    """
    if any(not 1 <= num_streams <= text.values.shape[1] for text in texts):
        raise SettingError(
            f"{num_streams} streams are asked of texts that have fewer; give 1 or more, as many as all have"
        )
    rows = np.concatenate([_features(text, level, num_streams) for text in texts])
    labels = np.concatenate([_labels(text, level) for text in texts])
    known = np.isfinite(labels) & ~np.isnan(rows[:, 0])
    rows, is_positive = rows[known], labels[known] >= 0.5
    if is_positive.all() or not is_positive.any():
        raise TextError(
            f"a fusion needs positive and negative {level}s; given were {int(is_positive.sum())} positive, "
            f"{int((~is_positive).sum())} negative"
        )
    counts = np.maximum((~np.isnan(rows)).sum(0), 1)
    centre = np.nansum(rows, 0) / counts
    spread = np.sqrt(np.nansum((rows - centre) ** 2, 0) / counts)
    spread[spread < 1e-9] = 1.0
    weight, bias = _logistic(np.where(np.isnan(rows), 0.0, (rows - centre) / spread), is_positive)
    return Fusion(level, num_streams, centre, spread, weight, bias, frozenset(text.group for text in texts))


def cross_fitted(
    texts: Sequence[SignalText], *, level: Level, num_streams: int, num_folds: int
) -> list[Float[Tensor, " row"]]:
    """Scores of each text from a model that was fitted on the other folds; a group is in one fold.

    Raises:
        SettingError: fewer groups than folds, or fewer than two folds; and as `fit_fusion`.
        TextError: as `fit_fusion`.
    """
    names = sorted({text.group for text in texts})
    if not 2 <= num_folds <= len(names):
        raise SettingError(f"{num_folds} folds of {len(names)} groups; give 2 or more, at most one a group")
    fold_of = {name: index % num_folds for index, name in enumerate(names)}
    found: dict[int, Tensor] = {}
    for fold in range(num_folds):
        held = [index for index, text in enumerate(texts) if fold_of[text.group] == fold]
        taught = [text for text in texts if fold_of[text.group] != fold]
        fusion = fit_fusion(taught, level=level, num_streams=num_streams)
        found |= dict(zip(held, fusion.scores([texts[index] for index in held]), strict=True))
    return [found[index] for index in range(len(texts))]


def fusion_gain(
    texts: Sequence[SignalText],
    *,
    level: Level,
    num_folds: int,
    generator: torch.Generator,
    fpr: float = 0.1,
    num_resamples: int = 1000,
) -> dict[str, Estimate]:
    """What all streams together say of held-out texts, and by how much that is more than the head's stream alone says.

    Returns:
        `auroc` and `recall` (at a false-positive rate of `fpr`), each of the fusion, with `_alone` of the head's
        stream, with `_gain` their difference; intervals by group, for the models as they were fitted. Rows without a
        label or without a score are left out.

    Raises:
        SettingError, TextError: as `cross_fitted`; a figure is not defined.
    """
    num_streams = min(text.values.shape[1] for text in texts)
    both = [
        torch.cat(cross_fitted(texts, level=level, num_streams=count, num_folds=num_folds))
        for count in (num_streams, 1)
    ]
    labels = torch.from_numpy(np.concatenate([_labels(text, level) for text in texts]))
    groups = np.repeat([text.group for text in texts], [len(_labels(text, level)) for text in texts])
    known = labels.isfinite() & both[0].isfinite()
    fused, alone = (scores[known] for scores in both)
    labels, groups = labels[known], groups[known.numpy()].tolist()
    if not has_both_labels(labels):
        raise TextError(f"the {level}s that are left have one label alone; give more labelled answers")
    state = generator.get_state()
    figures: dict[str, Callable[[Tensor], Statistic]] = {
        "auroc": lambda scores: auroc_of_draws(scores, labels),
        "recall": lambda scores: lambda rows: tpr_at_fpr(scores[rows], labels[rows], fpr),
    }
    found = {}
    for name, figure in figures.items():
        ours, theirs = figure(fused), figure(alone)
        for suffix, statistic in (("", ours), ("_alone", theirs), ("_gain", _difference(ours, theirs))):
            generator.set_state(state)  # the same draws for each
            found[name + suffix] = bootstrap_by_group(
                statistic, groups, generator=generator, num_resamples=num_resamples
            )
    return found


def _difference(ours: Statistic, theirs: Statistic) -> Statistic:
    return lambda rows: ours(rows) - theirs(rows)


def _labels(text: SignalText, level: Level) -> Float[np.ndarray, " row"]:
    return text.token_labels.double().numpy() if level == "token" else np.array([text.label])


def _features(text: SignalText, level: Level, num_streams: int) -> Float[np.ndarray, "row feature"]:
    """NaN where a stream says nothing; the head's come first."""
    values = text.values[:, :num_streams].double().numpy().clip(_CLIP, 1 - _CLIP)
    odds = np.log(values / (1 - values))
    if level == "token":
        return np.concatenate([odds, _trailing_mean(odds[:, 1:])], axis=1)
    columns = [column[~np.isnan(column)] for column in odds.T]
    means = [column.mean() if len(column) else math.nan for column in columns]
    tops = [np.sort(column)[-TOP:].mean() if len(column) else math.nan for column in columns]
    return np.array([[*means, *tops]])


def _trailing_mean(odds: Float[np.ndarray, "token stream"]) -> Float[np.ndarray, "token stream"]:
    """Over the last tokens that say something, this one included."""
    is_known = ~np.isnan(odds)
    sums = np.cumsum(np.concatenate([np.zeros_like(odds[:1]), np.where(is_known, odds, 0.0)]), 0)
    counts = np.cumsum(np.concatenate([np.zeros_like(odds[:1]), is_known]), 0)
    ends = np.arange(1, len(odds) + 1)
    starts = np.maximum(ends - WINDOW, 0)
    num = counts[ends] - counts[starts]
    return np.where(num > 0, (sums[ends] - sums[starts]) / np.maximum(num, 1), math.nan)


def _logistic(
    rows: Float[np.ndarray, "row feature"], is_positive: np.ndarray
) -> tuple[Float[np.ndarray, " feature"], float]:
    """Weights and bias of the penalised logistic regression."""
    design = np.concatenate([rows, np.ones((len(rows), 1))], axis=1)
    penalty = np.array([PENALTY] * rows.shape[1] + [0.0])

    def loss(at: np.ndarray) -> tuple[float, np.ndarray]:
        z = design @ at
        value = (np.logaddexp(0, z) - is_positive * z).sum() + 0.5 * (penalty * at**2).sum()
        return float(value), design.T @ (expit(z) - is_positive) + penalty * at

    found = minimize(loss, np.zeros(design.shape[1]), jac=True, method="L-BFGS-B").x
    return found[:-1], float(found[-1])
