"""Sections on measured heads in, Markdown out."""

from __future__ import annotations

import re
from collections.abc import Sequence

from pilotfish.reports.heads import TITLE, Example, Figure, Plot, Section, Series, Token

NUM_ROWS = 9
"""Lines of a curve's table."""


def heads_markdown(sections: Sequence[Section], *, title: str = TITLE) -> str:
    """The report without colours: curves as short tables, examples as quoted text with marks."""
    return "\n\n".join([f"# {_plain(title)}", *map(_section, sections)]) + "\n"


def _section(section: Section) -> str:
    parts = [
        f"## {_plain(section.metric.replace('_', ' '))}",
        f"**{_plain(section.verdict)}** {_plain(section.reader)}",
        _plain(section.promise),
        f"> {_plain(section.caveats)}" if section.caveats else "",
        "### Figures\n\nWith 95 % intervals; the best one is bold. Below a baseline: by how much the head is above it.",
        _table(["", *section.scorer_labels], [_figure(figure) for figure in section.figures])
        if section.figures
        else "The card holds no figures.",
        "### Data",
        _table(["role", "source", "licence", "rows", "tokens"], [list(map(_plain, row)) for row in section.data])
        if section.data
        else "The card names no data.",
        _plain(section.missing),
        *map(_plot, section.plots),
        *(part for group in section.examples for part in _group(group.title, group.note, group.examples)),
    ]
    return "\n\n".join(part for part in parts if part)


def _figure(figure: Figure) -> list[str]:
    way = f" ({figure.better} is better)" if figure.better else ""
    cells = []
    for cell in figure.cells:
        if cell is None:
            cells.append("")
            continue
        value = f"**{cell.value}**" if cell.is_best else cell.value
        difference = "<br>head {} ({})".format(*cell.difference) if cell.difference else ""
        cells.append(f"{value} ({cell.interval}){difference}")
    return [_plain(figure.name) + way, *cells]


def _plot(plot: Plot) -> str:
    parts = [f"### {_plain(plot.title)}", _plain(plot.note)]
    if plot.series and plot.is_step:
        last = len(plot.series[0].points) - 1
        chosen = sorted({round(step * last / (NUM_ROWS - 1)) for step in range(NUM_ROWS)})
        rows = [
            [f"{plot.series[0].points[at][0]:.2g}", *(f"{series.points[at][1]:.2f}" for series in plot.series)]
            for at in chosen
        ]
        parts.append(_table([plot.x.label, *(series.label for series in plot.series)], rows))
    elif plot.series:
        parts += [_joined(plot, series) for series in plot.series]
    return "\n\n".join(parts)


def _joined(plot: Plot, series: Series) -> str:
    rows = [[f"{x:.3f}", f"{y:.3f}", note] for (x, y), note in zip(series.points, series.notes, strict=True)]
    return _table([f"{series.label}: {plot.x.label}", plot.y.label, ""], rows)


def _group(title: str, note: str, examples: Sequence[Example]) -> list[str]:
    marks = " ⟦labelled⟧, ▼ where the threshold is first reached." if examples else ""
    return [f"### {_plain(title)}\n\n{_plain(note)}{marks}", *map(_example, examples)]


def _example(example: Example) -> str:
    text = "".join(_quoted(example))
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    before = f"… {example.num_before:,} tokens before\n" if example.num_before else ""
    after = f"\n… {example.num_after:,} tokens after" if example.num_after else ""
    return f"{_plain(example.id)}, score {example.score:.3f}:\n\n{fence}text\n{before}{text}{after}\n{fence}"


def _quoted(example: Example) -> list[str]:
    tokens: list[Token | None] = [*example.tokens, None]
    parts, is_open = [], False
    for index, token in enumerate(tokens):
        is_labelled = token is not None and token.is_labelled
        if is_open and not is_labelled:
            parts.append("⟧")
        if index == example.crossing:
            parts.append("▼")
        if is_labelled and not is_open:
            parts.append("⟦")
        is_open = is_labelled
        if token is not None:
            parts.append(_visible(token.text))
    return parts


def _visible(text: str) -> str:
    """Text without lone surrogates, and with every control but tab and line feed shown by its number."""
    text = text.replace("\r\n", "\n").encode("utf-8", "backslashreplace").decode()
    return re.sub(
        "[\\x00-\\x08\\x0b-\\x1f\\x7f-\\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060\u2066-\u2069\ufeff]",
        lambda found: f"U+{ord(found[0]):04X}",
        text,
    )


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [list(map(_plain, columns)), ["---"] + ["---:"] * (len(columns) - 1), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _plain(text: str) -> str:
    """Text that Markdown prints as it stands, in one line."""
    return re.sub(r"([\\`*_{}\[\]<>|#~&])", r"\\\1", " ".join(_visible(text).split()))
