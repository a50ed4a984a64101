"""Figures with their intervals, targets and tables, for the parts of `benchmarks/discovery.py`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from pilotfish.cli.terminal import table
from pilotfish.scores.metrics import auroc_of_draws

NUM_DRAWS = 2000


def over_seeds(values: Sequence[float]) -> dict[str, float]:
    """Mean with a t interval over seeds."""
    mean, error = float(np.mean(values)), float(stats.sem(values)) if len(values) > 1 else 0.0
    half = error * float(stats.t.ppf(0.975, max(1, len(values) - 1)))
    return {"value": mean, "low": mean - half, "high": mean + half}


def over_vectors(slices: Sequence[Tensor], of: Callable[[Any], Any]) -> dict[str, float]:
    """Bootstrap over vectors within each slice."""
    draw = np.random.default_rng(0)
    arrays = [item.double().numpy() for item in slices]
    drawn = [of(np.concatenate([draw.choice(array, len(array)) for array in arrays])) for _ in range(NUM_DRAWS)]
    low, high = np.quantile(drawn, (0.025, 0.975))
    return {"value": float(of(np.concatenate(arrays))), "low": float(low), "high": float(high)}


def ratio(mine: Sequence[Tensor], other: Sequence[Tensor], of: Callable[[Any], Any]) -> dict[str, float]:
    """Paired by slice: both sides are drawn within the same slices."""
    draw = np.random.default_rng(0)
    sides = [[item.double().numpy() for item in side] for side in (mine, other)]

    def one(resampled: bool) -> float:
        top, bottom = (
            of(np.concatenate([draw.choice(array, len(array)) if resampled else array for array in side]))
            for side in sides
        )
        return float(top / bottom)

    low, high = np.quantile([one(True) for _ in range(NUM_DRAWS)], (0.025, 0.975))
    return {"value": one(False), "low": float(low), "high": float(high)}


def over_items(items: Sequence[Sequence[float]], *, over: Sequence[Sequence[float]] | None = None) -> dict[str, float]:
    """The mean over seeds of the mean over a seed's items, bootstrapped over seeds and, within each, over items.

    Args:
        over: Of the same items of the same seeds; the figure is then the ratio of the two means.
    """
    draw = np.random.default_rng(0)
    tops = [np.asarray(each, dtype=float) for each in items]
    bottoms = [np.asarray(each, dtype=float) for each in over] if over is not None else [np.ones_like(t) for t in tops]
    drawn = []
    for _ in range(NUM_DRAWS):
        seeds = draw.integers(len(tops), size=len(tops))
        rows = [(seed, draw.integers(len(tops[seed]), size=len(tops[seed]))) for seed in seeds]
        top = np.mean([tops[seed][chosen].mean() for seed, chosen in rows])
        bottom = np.mean([bottoms[seed][chosen].mean() for seed, chosen in rows])
        drawn.append(top / bottom if bottom else 0.0)
    low, high = np.quantile(drawn, (0.025, 0.975))
    bottom = np.mean([each.mean() for each in bottoms])
    value = np.mean([each.mean() for each in tops]) / bottom if bottom else 0.0
    return {"value": float(value), "low": float(low), "high": float(high)}


def lock_figures(
    part: str, subject: str, rights: Mapping[str, Sequence[Sequence[float]]]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows and targets of a lock.

    Args:
        rights: Right or not on each test problem of each seed, by what was done to the model.
    """
    rows = [{"part": part, "name": name, **over_items(values)} for name, values in rights.items()]
    targets = []
    for name, asked, is_met in (
        ("exponential", ">= 0.5", lambda value: value >= 0.5),
        ("melbo", ">= 0.5", lambda value: value >= 0.5),
        ("random", "<= 0.05", lambda value: value <= 0.05),
    ):
        row = over_items(rights[name], over=rights["password"])
        title = f"{subject}: best of {name}, share of the password's accuracy"
        targets.append(target(title, row, is_met(row["value"]), asked))
    return rows, targets


def over_aurocs(pairs: Sequence[tuple[Tensor, Tensor]]) -> dict[str, float]:
    """The mean over seeds of the AUROC of (scores, labels), bootstrapped over seeds and, within each, over items."""
    draw = np.random.default_rng(0)
    curves = [auroc_of_draws(scores, labels) for scores, labels in pairs]
    sizes = [len(scores) for scores, _ in pairs]
    drawn = []
    for _ in range(NUM_DRAWS // 4):
        seeds = draw.integers(len(pairs), size=len(pairs))
        rows = [(seed, torch.from_numpy(draw.integers(sizes[seed], size=sizes[seed]))) for seed in seeds]
        drawn.append(np.mean([curves[seed](chosen) for seed, chosen in rows]))
    low, high = np.nanquantile(drawn, (0.025, 0.975))
    value = np.mean([curve(torch.arange(size)) for curve, size in zip(curves, sizes, strict=True)])
    return {"value": float(value), "low": float(low), "high": float(high)}


def target(name: str, row: dict[str, Any], met: bool, asked: str) -> dict[str, Any]:
    return {"name": name, **{key: row[key] for key in ("value", "low", "high")}, "target": asked, "met": bool(met)}


def cell(row: dict[str, Any]) -> str:
    return f"{row['value']:.3f} [{row['low']:.3f}, {row['high']:.3f}]"


def show(title: str, rows: list[dict[str, Any]]) -> None:
    print(f"\n{title}\n" + table(["", "found, 95 % interval"], [[row["name"], cell(row)] for row in rows]), flush=True)
