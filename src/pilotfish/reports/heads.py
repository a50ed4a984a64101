"""Sections on measured heads in, one page of curves, tables and examples out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from pilotfish.errors import SettingError
from pilotfish.reports.document import document
from pilotfish.runs import write_text

TITLE = "Heads, measured"
Point = tuple[float, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """A figure of one scorer, as it is printed."""

    value: str
    interval: str
    """Ends of the 95 % interval."""
    difference: tuple[str, str] | None = None
    """By how much the head is above this scorer, and the interval of that; None where it was not measured."""
    is_best: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    name: str
    better: Literal["higher", "lower", ""]
    """Which way is better; empty where nobody said."""
    cells: tuple[Cell | None, ...]
    """One a scorer; None where it has no such figure."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Axis:
    label: str
    low: float
    high: float
    ticks: tuple[tuple[float, str], ...]
    is_log: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    scorer: str
    label: str
    points: tuple[Point, ...]
    """From left to right."""
    notes: tuple[str, ...] = ()
    """One a point, or none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plot:
    title: str
    note: str
    """What is drawn, and from how much."""
    x: Axis
    y: Axis
    series: tuple[Series, ...]
    """None where there is nothing to draw; the note says why."""
    is_step: bool
    """Whether a value holds until the next point; else points are joined."""
    reference: tuple[Point, ...] = ()
    reference_label: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Token:
    text: str
    score: float | None
    """None where it was not scored."""
    running: float | None
    """Score of the text up to here, which the threshold is held against; None where that is the token's own."""
    is_labelled: bool
    is_over: bool
    """Whether the text up to here reaches the threshold."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    id: str
    score: float
    tokens: tuple[Token, ...]
    num_before: int
    """Tokens cut off before the first one shown."""
    num_after: int
    crossing: int | None
    """Where among the tokens shown the threshold is first reached; None where it is not, or on one that was cut."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExampleGroup:
    title: str
    note: str
    examples: tuple[Example, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """All that is shown of one metric of one bank."""

    metric: str
    model: str
    reader: str
    promise: str
    verdict: str
    is_better: bool | None
    """Better than words; None where that was not measured."""
    caveats: str
    data: tuple[tuple[str, str, str, str, str], ...]
    """Role, source, licence, rows and tokens."""
    scorers: tuple[str, ...]
    scorer_labels: tuple[str, ...]
    figures: tuple[Figure, ...]
    plots: tuple[Plot, ...]
    examples: tuple[ExampleGroup, ...]
    missing: str
    """Why there are no curves and examples; empty where there are."""


def render_heads_page(sections: Sequence[Section], *, title: str = TITLE) -> str:
    """Sets sections as one HTML page that needs no network; what a text holds stays text.

    Raises:
        SettingError: there is no section.
    """
    if not sections:
        raise SettingError("there is no head to report; give the folder of at least one bank")
    data = {"title": title, "sections": [asdict(section) for section in sections]}
    return document(
        "heads_page.html", data, styles=("page.css", "heads_page.css"), scripts=("marks.js", "plot.js", "heads_page.js")
    )


def write_heads_page(path: Path, sections: Sequence[Section], *, title: str = TITLE) -> Path:
    """Writes the page, atomically; arguments and errors as for `render_heads_page`."""
    write_text(path, render_heads_page(sections, title=title))
    return path
