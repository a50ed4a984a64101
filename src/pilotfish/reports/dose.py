"""Figures of a steering in, one page of dose curves out: effect against damage at each layer, beside the prompt."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pilotfish.reports.document import document
from pilotfish.reports.heads import Axis, Plot, Point, Series
from pilotfish.reports.scatter import round_scale, round_ticks
from pilotfish.runs import write_text

FARTHEST = 3.0
"""Curves go on to so many times the damage of the dose that was chosen at any site."""

Curve = Sequence[Mapping[str, Any]]


def render_dose_page(figures: Mapping[str, Any]) -> str:
    """Sets what `pilotfish steer` wrote to `steering.json` as one HTML page that needs no network."""
    best = _best_prompt(figures["prompts"], figures["damage"])
    curves = {one["site"]: one["curve"] for one in figures["sites"]} | {figures["site"]: figures["curve"]}
    data = {
        "title": f"Steering towards {figures['name']}",
        **{name: figures[name] for name in ("model", "site", "kind", "dose", "budget", "measure", "verdict", "damage")},
        "reason": figures["budget_not_spent_for"],
        "rows": [row for row in figures["rows"] if row["measure"] == figures["measure"]],
        "sites": [{name: one[name] for name in ("site", "kl_mean", "effect")} for one in figures["sites"]],
        "plots": [
            asdict(_trade(curves, figures, best)),
            asdict(_effect(curves, figures, best)),
            asdict(_damage(figures["curve"], figures["site"])),
        ],
    }
    scripts = ("marks.js", "plot.js", "dose_page.js")
    return document("dose_page.html", data, styles=("page.css", "heads_page.css", "dose_page.css"), scripts=scripts)


def write_dose_page(path: Path, figures: Mapping[str, Any]) -> Path:
    """Writes the page, atomically."""
    write_text(path, render_dose_page(figures))
    return path


def _best_prompt(prompts: Mapping[str, float], damage: Mapping[str, Mapping[str, float]]) -> tuple[str, float]:
    """What a legend says of the prompt with the largest effect, and that effect."""
    name = max(prompts, key=lambda one: prompts[one])
    cost = f", at a KL of {damage[name]['kl_mean']:.2f}" if name in damage else ""
    return f"{name}{cost}", prompts[name]


def _trade(curves: Mapping[str, Curve], figures: Mapping[str, Any], best: tuple[str, float]) -> Plot:
    farthest = FARTHEST * max(0.01, *(one["kl_mean"] for one in figures["sites"]))
    points = {
        site: sorted((one["kl_mean"], one["behaviour"]) for one in curve if one["kl_mean"] <= farthest)
        for site, curve in curves.items()
    }
    note = (
        "What a dose buys and what it costs, one curve a layer and one point a dose. The dotted line is a prompt. Both "
        f"on the pairs that chose dose and layer. Doses that cost over {farthest:.2g} nats a token are left out."
    )
    return _plot("Effect against damage", note, ("KL, mean nats a token", figures["measure"]), _by_site(points), best)


def _effect(curves: Mapping[str, Curve], figures: Mapping[str, Any], best: tuple[str, float]) -> Plot:
    points = {site: [(one["relative"], one["behaviour"]) for one in curve] for site, curve in curves.items()}
    note = "Relative dose: length of what is added, beside the median length of the activations there."
    return _plot("Effect against dose", note, ("relative dose", figures["measure"]), _by_site(points), best)


def _damage(curve: Curve, site: str) -> Plot:
    meters = {
        "KL, 95th percentile": [(one["relative"], one["kl_p95"]) for one in curve],
        "KL, mean": [(one["relative"], one["kl_mean"]) for one in curve],
        "1 - acceptance": [(one["relative"], 1 - one["acceptance"]) for one in curve],
    }
    series = tuple(
        Series(scorer=f"line-{index}", label=label, points=tuple(points))
        for index, (label, points) in enumerate(meters.items())
    )
    note = f"At {site}, along texts that the steered model writes: nats a token, and the share of drafts refused."
    return _plot("Damage against dose", note, ("relative dose", "damage"), series, None)


def _by_site(points: Mapping[str, Sequence[Point]]) -> tuple[Series, ...]:
    """Sites from the first block to the last."""
    return tuple(
        Series(scorer=f"line-{index}", label=site, points=tuple(points[site]))
        for index, site in enumerate(sorted(points, key=lambda one: int(one.split(".")[0])))
        if points[site]
    )


def _plot(
    title: str, note: str, labels: tuple[str, str], series: tuple[Series, ...], best: tuple[str, float] | None
) -> Plot:
    level = [] if best is None else [best[1]]
    x = _axis(labels[0], [0.0, *(point[0] for one in series for point in one.points)])
    y = _axis(labels[1], [*(point[1] for one in series for point in one.points), *level])
    return Plot(
        title=title,
        note=note,
        x=x,
        y=y,
        series=series,
        is_step=False,
        reference=() if best is None else ((x.low, best[1]), (x.high, best[1])),
        reference_label="" if best is None else best[0],
    )


def _axis(label: str, numbers: Iterable[float]) -> Axis:
    low, high, step = round_scale(list(numbers))
    return Axis(label=label, low=low, high=high, ticks=tuple(round_ticks(low, high, step)))
