"""Tokens with scores in, coloured terminal text out."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TextIO

from pilotfish.core import TokenScore

RAMP = ((0.15, None), (0.35, 223), (0.55, 216), (0.75, 209), (1.01, 202))
"""Upper end of a score and its background in the 256-colour palette: pale to orange, told apart without red and
green.
"""
RESET = "\x1b[0m"


def uses_colour(stream: TextIO | None = None) -> bool:
    """Whether to colour: the stream is a terminal and NO_COLOR is not set."""
    return (stream or sys.stdout).isatty() and "NO_COLOR" not in os.environ


def quieten_transformers() -> None:
    """Keeps the library's warnings out of the answers, and its progress bars out of what is no terminal."""
    from transformers.utils import logging as theirs

    theirs.set_verbosity_error()  # type: ignore[no-untyped-call]
    if not sys.stderr.isatty():
        theirs.disable_progress_bar()  # type: ignore[no-untyped-call]


@contextmanager
def said_once() -> Iterator[None]:
    """Inside, a warning that was shown is not shown again."""
    filters = [(handler, _SaidOnce()) for handler in logging.getLogger().handlers]
    for handler, once in filters:
        handler.addFilter(once)
    try:
        yield
    finally:
        for handler, once in filters:
            handler.removeFilter(once)


class _SaidOnce(logging.Filter):
    def __init__(self) -> None:
        super().__init__()
        self._said: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        message = record.getMessage()
        is_new = message not in self._said
        self._said.add(message)
        return is_new


def paint(text: str, score: TokenScore | None, threshold: float | None, *, colour: bool) -> str:
    """One token's text in the colour of its own score; bold, or without colour in brackets, where the text so far
    reaches the threshold. An unscored one is underlined, or gets a `?`.
    """
    value = score.value if score is not None else None
    if score is not None and value is None:
        return f"\x1b[4m{text}{RESET}" if colour else f"{text}?"
    running = score.running if score is not None else None
    is_over = running is not None and threshold is not None and running >= threshold
    if not colour:
        return f"⟦{text}⟧" if is_over and text.strip() else text
    background = next((shade for top, shade in RAMP if value is not None and value < top), None)
    if background is None or not text:
        return text
    style = f"\x1b[48;5;{background};38;5;16m" + ("\x1b[1m" if is_over else "")
    return "\n".join(f"{style}{line}{RESET}" if line else "" for line in text.split("\n"))


def number(value: float) -> str:
    """Three decimals; a small one in powers of ten."""
    return f"{value:.3f}" if value == 0 or abs(value) >= 0.001 else f"{value:.0e}"


def legend(metric: str, threshold: float | None, *, colour: bool) -> str:
    """What the colours mean, in one line."""
    limit = f", flagged from {threshold:.2f} on" if threshold is not None else ""
    if not colour:
        return f"{metric}{limit}: ⟦flagged⟧, unscored?"
    swatches = " ".join(f"\x1b[48;5;{shade};38;5;16m <{min(top, 1.0):.2f} {RESET}" for top, shade in RAMP if shade)
    return f"{metric}{limit}: {swatches}"


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A plain text table, first column left, the others right."""
    widths = [max(len(row[i]) for row in [columns, *rows]) for i in range(len(columns))]
    lines = [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in [columns, *rows]
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def summary(stats: Mapping[str, object], *, finish: str) -> str:
    """The counts of one exchange, in one line."""
    acceptance = stats["acceptance"]
    accepted = f"{acceptance:.0%} of drafts accepted" if isinstance(acceptance, float) else "no speculation"
    return (
        f"{stats['num_scored']} of {stats['num_committed']} tokens scored, {stats['tokens_per_s']:.1f} tokens/s, "
        f"{accepted}, "
        f"{stats['num_taxed_reads']} extra passes for monitoring, ended by {finish}"
    )
