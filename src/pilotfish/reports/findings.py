"""The findings of a discovery in, one page to browse them out: what each vector changes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pilotfish.errors import SettingError
from pilotfish.reports.document import document
from pilotfish.runs import write_text

TITLE = "What was found"


def render_findings_page(
    found: Mapping[str, Any], *, method: str, folder: str, logit: str = "", title: str = TITLE
) -> str:
    """Sets findings as one HTML page that needs no network; what a text holds stays text.

    Args:
        found: As `discovery.described` gives them.
        folder: Where they are saved, for the command that promotes one.
        logit: What the logit score is of, such as "Sure over Sorry"; empty where there is none.

    Raises:
        SettingError: there is no finding.
    """
    if not found["findings"]:
        raise SettingError("there is no finding to show; search for at least one vector")
    data = {
        "title": title,
        "model": found["identity"]["name"],
        "method": method,
        "folder": folder,
        "logit": logit,
        "prompts": found["prompts"][: len(found["plain"]["answers"])],
        "num_searched": len(found["prompts"]),
        **{key: found[key] for key in ("source", "target", "radius", "plain", "findings")},
    }
    return document(
        "findings_page.html",
        data,
        styles=("page.css", "findings_page.css"),
        scripts=("marks.js", "diff.js", "findings_page.js"),
    )


def write_findings_page(
    path: Path, found: Mapping[str, Any], *, method: str, folder: str, logit: str = "", title: str = TITLE
) -> Path:
    """Writes the page, atomically; arguments and errors as for `render_findings_page`."""
    write_text(path, render_findings_page(found, method=method, folder=folder, logit=logit, title=title))
    return path
