"""Meters at several doses in; a drawing of effect against damage out, as one SVG that needs no script."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from pilotfish.steering import Meters

PANEL = (320, 200)
"""Width and height of the inside of a panel, in pixels."""
MARGIN = (60, 30, 50, 24)
"""Left, top, bottom and between panels."""
COLOURS = ("#0b6e99", "#c2410c", "#4d7c0f", "#7e22ce", "#b45309", "#475569")

Points = Sequence[tuple[float, float]]


class Panel(NamedTuple):
    title: str
    x: str
    series: Mapping[str, Points]


def dose_curves(curve: Sequence[Meters], by_site: Mapping[str, Points], *, title: str, effect: str) -> str:
    """Three panels side by side: damage against the dose, effect against the dose, effect against damage at each site.

    Args:
        curve: The calibration of the chosen site, with `behaviour` as its effect.
        by_site: Of each site, its mean KL and its effect at the dose that spends the common budget.
        effect: What the effect is, with its unit.
    """
    panels = [
        Panel(
            "damage",
            "relative dose",
            {
                "KL, 95th percentile (nats)": [(one.relative, one.kl_p95) for one in curve],
                "KL, mean (nats)": [(one.relative, one.kl_mean) for one in curve],
                "1 - acceptance": [(one.relative, 1 - one.acceptance) for one in curve],
            },
        ),
        Panel(
            effect,
            "relative dose",
            {"chosen site": [(one.relative, one.behaviour) for one in curve if one.behaviour is not None]},
        ),
        Panel(f"{effect}, at the budget", "KL, mean (nats)", by_site),
    ]
    step = MARGIN[0] + PANEL[0] + MARGIN[3]
    width, height = step * len(panels), MARGIN[1] + PANEL[1] + MARGIN[2] + 16 * max(len(p.series) for p in panels)
    drawn = "".join(
        f'<g transform="translate({index * step + MARGIN[0]} {MARGIN[1]})">{_panel(panel)}</g>'
        for index, panel in enumerate(panels)
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'role="img" font-family="system-ui, sans-serif" font-size="11"><title>{html.escape(title)}</title>'
        f'<rect width="100%" height="100%" fill="#fff"/>{drawn}</svg>\n'
    )


def _panel(panel: Panel) -> str:
    points = [point for series in panel.series.values() for point in series]
    (low_x, high_x), (low_y, high_y) = (_range([point[axis] for point in points]) for axis in (0, 1))
    width, height = PANEL

    def place(point: tuple[float, float]) -> str:
        x = (point[0] - low_x) / (high_x - low_x) * width
        y = height - (point[1] - low_y) / (high_y - low_y) * height
        return f"{x:.1f},{y:.1f}"

    parts = [
        f'<rect width="{width}" height="{height}" fill="none" stroke="#94a3b8"/>',
        f'<text y="-10" font-weight="600">{html.escape(panel.title)}</text>',
        f'<text x="{width / 2}" y="{height + 32}" text-anchor="middle">{html.escape(panel.x)}</text>',
    ]
    for share in (0.0, 0.5, 1.0):
        x, y = low_x + share * (high_x - low_x), low_y + share * (high_y - low_y)
        parts.append(f'<text x="{share * width}" y="{height + 16}" text-anchor="middle">{x:.3g}</text>')
        parts.append(f'<text x="-6" y="{height - share * height + 4}" text-anchor="end">{y:.3g}</text>')
    for index, (name, series) in enumerate(panel.series.items()):
        colour, line = COLOURS[index % len(COLOURS)], height + 50 + 16 * index
        if len(series) > 1:
            path = " ".join(map(place, series))
            parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
        for point in series:
            across, down = place(point).split(",")
            parts.append(f'<circle cx="{across}" cy="{down}" r="2.5" fill="{colour}"/>')
        parts.append(f'<text y="{line}" fill="{colour}">{html.escape(name)}</text>')
    return "".join(parts)


def _range(values: Sequence[float]) -> tuple[float, float]:
    low, high = min([0.0, *values]), max([0.0, *values])
    return (low, high) if high > low else (low, low + 1)
