"""Points with intervals both ways in, one self-contained SVG that follows the reader's light or dark scheme out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

from pilotfish.errors import SettingError

WIDTH, HEIGHT = 640, 440
LEFT, RIGHT, TOP, BOTTOM = 76, 24, 56, 56
"""Margins in pixels, for the title and the scales."""

_LETTER = 7
"""Width of a letter in pixels, about."""

_STYLE = """
svg { --ink: #1d2327; --faint: #c9d0d4; --paper: #ffffff; --mark: #b3471d; --base: #4a6572; color-scheme: light dark }
@media (prefers-color-scheme: dark) {
  svg { --ink: #e8ecee; --faint: #3d474d; --paper: #14191c; --mark: #ff9d66; --base: #9fb8c4 }
}
text { fill: var(--ink); font: 12px system-ui, sans-serif }
.title { font-weight: 600; font-size: 15px }
.paper { fill: var(--paper) }
.grid { stroke: var(--faint); stroke-width: 1 }
.limit { stroke: var(--ink); stroke-width: 1; stroke-dasharray: 5 4 }
.bar { stroke: var(--mark); stroke-width: 1.5; opacity: 0.55 }
.path { fill: none; stroke: var(--mark); stroke-width: 1; opacity: 0.4 }
.dot { fill: var(--mark) }
.bar.first { stroke: var(--base) }
.dot.first { fill: var(--base) }
"""


class Reading(NamedTuple):
    """A value with the ends of its interval."""

    value: float
    low: float
    high: float


class Point(NamedTuple):
    label: str
    x: Reading
    y: Reading


class Axis(NamedTuple):
    title: str
    limit: float | None = None
    """Where a dashed line is drawn: a target."""


def scatter_svg(points: Sequence[Point], title: str, *, x: Axis, y: Axis, joined: bool = True) -> str:
    """Draws points with error bars, the first as the one from which all others start.

    Where they are `joined`, a line leads through the others in the order given.

    Scales hold every interval and limit. The file needs nothing else, and says its numbers in words to screen readers.

    Raises:
        SettingError: there are no points, or a number is not finite.
    """
    if not points:
        raise SettingError("there are no points to draw; give at least one")
    if not all(math.isfinite(number) for point in points for number in (*point.x, *point.y)):
        raise SettingError("a point has a value or an interval that is not finite; leave it out, and say so")
    across = _Scale.over([number for point in points for number in point.x], x.limit, LEFT, WIDTH - RIGHT)
    up = _Scale.over([number for point in points for number in point.y], y.limit, HEIGHT - BOTTOM, TOP)
    spoken = "; ".join(f"{p.label}: {x.title} {p.x.value:.3f}, {y.title} {p.y.value:.3f}" for p in points)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img">',
        f"<title>{escape(title)}</title><desc>{escape(spoken)}</desc><style>{_STYLE}</style>",
        f'<rect class="paper" width="{WIDTH}" height="{HEIGHT}"/>',
        f'<text class="title" x="{LEFT}" y="28">{escape(title)}</text>',
        *_grid(across, up),
        *_limits(across, up, x.limit, y.limit),
        f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 12}" text-anchor="middle">{escape(x.title)}</text>',
        f'<text transform="translate(18 {(TOP + HEIGHT - BOTTOM) / 2}) rotate(-90)" text-anchor="middle">'
        f"{escape(y.title)}</text>",
        *([_line([(across.at(point.x.value), up.at(point.y.value)) for point in points[1:]])] if joined else []),
        *(part for index, point in enumerate(points) for part in _point(point, across, up, is_first=index == 0)),
        *_labels([(point.label, across.at(point.x.value), up.at(point.y.value)) for point in points]),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


class _Scale(NamedTuple):
    low: float
    high: float
    start: int
    end: int
    """Pixels of `low` and `high`."""
    step: float
    """Between two ticks: 1, 2 or 5 times a power of ten."""

    @classmethod
    def over(cls, numbers: Sequence[float], limit: float | None, start: int, end: int) -> _Scale:
        low, high, step = round_scale([*numbers, *([] if limit is None else [limit])])
        return cls(low, high, start, end, step)

    def at(self, number: float) -> float:
        return round(self.start + (number - self.low) / (self.high - self.low) * (self.end - self.start), 1)

    def ticks(self) -> list[tuple[float, str]]:
        """Pixels and words."""
        return [(self.at(value), words) for value, words in round_ticks(self.low, self.high, self.step)]


def round_scale(numbers: Sequence[float]) -> tuple[float, float, float]:
    """Ends that hold all numbers, and the step of about five ticks between them: 1, 2 or 5 times a power of ten."""
    rough = max(max(numbers) - min(numbers), 1e-3) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(times * power for times in (1, 2, 5, 10) if times * power >= rough * 0.999)
    low, high = math.floor(min(numbers) / step) * step, math.ceil(max(numbers) / step) * step
    return low, high if high > low else low + step, step


def round_ticks(low: float, high: float, step: float) -> list[tuple[float, str]]:
    """Values of a scale, and their words."""
    decimals = max(0, -math.floor(math.log10(step)))
    values = [low + index * step for index in range(round((high - low) / step) + 1)]
    return [(value, f"{value + 0.0:.{decimals}f}".replace("-", "\N{MINUS SIGN}")) for value in values]


def _grid(across: _Scale, up: _Scale) -> list[str]:
    parts = []
    for position, words in across.ticks():
        parts.append(f'<line class="grid" x1="{position}" x2="{position}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
        parts.append(f'<text x="{position}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{words}</text>')
    for position, words in up.ticks():
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{position}" y2="{position}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{position + 4}" text-anchor="end">{words}</text>')
    return parts


def _limits(across: _Scale, up: _Scale, x: float | None, y: float | None) -> list[str]:
    parts = []
    if x is not None:
        at = across.at(x)
        parts.append(f'<line class="limit" x1="{at}" x2="{at}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
    if y is not None:
        at = up.at(y)
        parts.append(f'<line class="limit" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at}" y2="{at}"/>')
    return parts


def _line(places: Sequence[tuple[float, float]]) -> str:
    return f'<polyline class="path" points="{" ".join(f"{x},{y}" for x, y in places)}"/>'


def _point(point: Point, across: _Scale, up: _Scale, *, is_first: bool) -> list[str]:
    kind = " first" if is_first else ""
    x, y = across.at(point.x.value), up.at(point.y.value)
    ends = (across.at(point.x.low), across.at(point.x.high), up.at(point.y.low), up.at(point.y.high))
    return [
        f'<line class="bar{kind}" x1="{ends[0]}" x2="{ends[1]}" y1="{y}" y2="{y}"/>',
        f'<line class="bar{kind}" x1="{x}" x2="{x}" y1="{ends[2]}" y2="{ends[3]}"/>',
        f'<circle class="dot{kind}" cx="{x}" cy="{y}" r="5"/>',
    ]


def _labels(places: Sequence[tuple[str, float, float]]) -> list[str]:
    """Each above its point or, where that would cover a label, below it; on the inner side near the right edge."""
    parts: list[str] = []
    taken: list[tuple[float, float, float]] = []
    for label, x, y in places:
        anchor, shift = ("end", -9) if x > WIDTH - 120 else ("start", 9)
        left = x + shift - (_LETTER * len(label) if anchor == "end" else 0)
        right = left + _LETTER * len(label)
        is_free = all(abs(y - 9 - other) > 12 or right < start or left > end for start, end, other in taken)
        line = y - 9 if is_free else y + 18
        taken.append((left, right, line))
        parts.append(f'<text x="{x + shift}" y="{line}" text-anchor="{anchor}">{escape(label)}</text>')
    return parts
