"""A template with its style, scripts and data in, one HTML document out that asks nothing of the network."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
from collections.abc import Mapping, Sequence
from importlib import resources

from pilotfish.errors import SettingError


def document(template: str, data: Mapping[str, object], *, styles: Sequence[str], scripts: Sequence[str]) -> str:
    """Fills a template of this package, set in the frame of all; only its own style and scripts may run in it.

    Args:
        scripts: modules, each after those that it imports; their top-level names all differ.
        data: what the scripts read, `title` among it; text in it stays text.

    Raises:
        SettingError: the data is not JSON.
    """
    parts = {
        "title": html.escape(str(data["title"])).encode("ascii", "xmlcharrefreplace").decode(),
        "data": _json_for_html(data),
    }
    for name, assets in (("style", styles), ("theme", ("theme.js",)), ("script", scripts)):
        parts[name] = "\n".join(map(_inlined, assets))
        parts[f"{name}_hash"] = _hash(parts[name])
    page = asset("frame.html").replace("{{body}}\n", asset(template))
    # One pass over the template alone: a placeholder inside a model's text stays text.
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], page)


def _inlined(name: str) -> str:
    """An asset as part of one script: its imports are there already, above it."""
    return re.sub(r"^(?:import .*;\n|export )", "", asset(name), flags=re.M)


def asset(name: str) -> str:
    """The text of a file of this package: a style, a template, a script as a module of its own."""
    return resources.files("pilotfish.reports").joinpath(name).read_text(encoding="utf-8")


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
