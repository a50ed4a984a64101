"""Checked exchanges in, one HTML file out that holds its own style, script and data and asks nothing of the network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pilotfish.errors import SettingError
from pilotfish.reports.document import document
from pilotfish.reports.exchange import check_exchange, check_table
from pilotfish.runs import write_text

TITLE = "Every token, scored"
SCRIPTS = ("marks.js", "tokens.js", "strip.js", "verdicts.js", "reader.js", "page.js")


def write_page(
    path: Path, exchanges: Sequence[Mapping[str, Any]], *, title: str = TITLE, tax: Mapping[str, Any] | None = None
) -> Path:
    """Writes the token page, atomically; arguments and errors as for `render_page`."""
    write_text(path, render_page(exchanges, title=title, tax=tax))
    return path


def render_page(
    exchanges: Sequence[Mapping[str, Any]], *, title: str = TITLE, tax: Mapping[str, Any] | None = None
) -> str:
    """Sets exchanges as a page of text coloured by score.

    Args:
        exchanges: one for each prompt and its answer, as JSON: `title`, `metrics` and `tokens` (each with `position`,
            `text`, `origin`, and `scores` or the reasons why it is `unscored`); where there are any, also `thresholds`,
            `rounds` of drafted tokens, `verdicts` and `stats`.
        tax: the tax table, `{"columns": [...], "rows": [[...]], "note": "..."}`, shown below the text.

    Raises:
        SettingError: there is no exchange, or one holds something that the page could not show truthfully.
    """
    if not exchanges:
        raise SettingError("there is no exchange to show; give at least one")
    for index, exchange in enumerate(exchanges):
        check_exchange(exchange, f"exchange {index + 1}")
    if tax is not None:
        check_table(tax, "tax table")
    data = {"title": title, "exchanges": exchanges, "tax": tax}
    return document("page.html", data, styles=("page.css",), scripts=SCRIPTS)
