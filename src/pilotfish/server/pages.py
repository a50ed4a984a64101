"""Names of the page's files in; HTML, style, modules and fonts out, the same for everybody."""

from __future__ import annotations

import hashlib
from functools import cache
from importlib import resources
from typing import NamedTuple

from fastapi import APIRouter, Request
from fastapi.responses import Response

from pilotfish.reports.document import asset
from pilotfish.server.access import ApiError

router = APIRouter(include_in_schema=False)

_SHARED = ("theme.js", "marks.js", "tokens.js", "strip.js", "verdicts.js", "reader.js")
"""Scripts of the report's page."""
_MEDIA = {
    "html": "text/html; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "json": "application/json",
    "svg": "image/svg+xml",
    "woff2": "font/woff2",
    "txt": "text/plain; charset=utf-8",
}


class _File(NamedTuple):
    content: bytes
    media: str
    tag: str


@router.get("/")
async def page(request: Request) -> Response:
    return _sent(request, "index.html")


@router.get("/grafana.json")
async def dashboard(request: Request) -> Response:
    """A dashboard of `/metrics` for Grafana to import."""
    return _sent(request, "grafana.json")


@router.get("/page/{name:path}")
async def file(request: Request, name: str) -> Response:
    return _sent(request, name)


def _sent(request: Request, name: str) -> Response:
    found = _files().get(name)
    if found is None:
        raise ApiError(404, "the page has no such file", code="not_found")
    headers = {"etag": found.tag, "cache-control": "no-cache"}
    if request.headers.get("if-none-match") == found.tag:
        return Response(status_code=304, headers=headers)
    return Response(found.content, media_type=found.media, headers=headers)


@cache
def _files() -> dict[str, _File]:
    """All there is: a name that is not in it leads nowhere."""
    room = resources.files("pilotfish.server")
    folder = room.joinpath("page")
    contents = {name: asset(name).encode() for name in _SHARED}
    contents |= {item.name: item.read_bytes() for item in folder.iterdir() if item.is_file()}
    contents |= {f"fonts/{item.name}": item.read_bytes() for item in folder.joinpath("fonts").iterdir()}
    contents["grafana.json"] = room.joinpath("grafana.json").read_bytes()
    contents["style.css"] = asset("page.css").encode() + contents.pop("live.css")
    return {name: _file(name, content) for name, content in contents.items()}


def _file(name: str, content: bytes) -> _File:
    return _File(content, _MEDIA[name.rsplit(".", 1)[1]], f'"{hashlib.sha256(content).hexdigest()[:32]}"')
