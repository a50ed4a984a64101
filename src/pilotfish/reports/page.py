"""Checked exchanges in, one HTML file out that holds its own style, script and data and asks nothing of the network."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from pilotfish.errors import SettingError
from pilotfish.reports.exchange import check_exchange, check_table
from pilotfish.runs import write_text

TITLE = "Every token, scored"


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
    parts = {
        "title": html.escape(title).encode("ascii", "xmlcharrefreplace").decode(),
        "data": _json_for_html({"title": title, "exchanges": exchanges, "tax": tax}),
    }
    for name, asset in (("style", "page.css"), ("theme", "theme.js"), ("script", "page.js")):
        parts[name] = resources.files("pilotfish.reports").joinpath(asset).read_text(encoding="utf-8")
        parts[f"{name}_hash"] = _hash(parts[name])
    template = resources.files("pilotfish.reports").joinpath("page.html").read_text(encoding="utf-8")
    # One pass over the template alone: a placeholder inside a model's text stays text.
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], template)


def _hash(source: str) -> str:
    """The name by which the page's Content-Security-Policy lets exactly this inline source through."""
    return "sha256-" + base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()


def _json_for_html(value: object) -> str:
    """JSON that stays inside its script element: pure ASCII, and no character that HTML reads as markup."""
    try:
        text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    except (TypeError, ValueError) as error:
        raise SettingError(
            f"the page's data is not JSON ({error}); give text, finite numbers, lists and objects only"
        ) from error
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")
