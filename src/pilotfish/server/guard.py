"""Raw HTTP in; requests of bounded size from pages of our own out, and every answer with its security headers."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pilotfish.server.settings import LOOPBACK_NAMES

BODY_TIMEOUT_S = 30.0
"""A body that takes longer to arrive is given up on."""
HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; font-src 'self'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "cache-control": "no-store",
}


class Guard:
    """ASGI middleware. No answer ever has a CORS header; a browser's request from another site is refused."""

    def __init__(self, app: ASGIApp, *, body_bytes: int, is_loopback: bool) -> None:
        self._app, self._body_bytes = app, body_bytes
        self._hosts: Sequence[str] | None = [name.strip("[]") for name in LOOPBACK_NAMES] if is_loopback else None
        """Names by which a server on a loopback address may be called: a page that rebinds its own name is refused."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        refusal = self._refusal(Headers(scope=scope))
        body: bytes | None = b""
        if refusal is None:
            try:
                async with asyncio.timeout(BODY_TIMEOUT_S):
                    body = await self._read(Headers(scope=scope), receive)
            except TimeoutError:
                refusal = (408, f"the body took longer than {BODY_TIMEOUT_S:.0f} s to arrive")
            except _TooLarge:
                refusal = (413, f"the body is larger than {self._body_bytes:,} bytes; send less")
        if refusal is not None:
            await _refuse(guarded, *refusal)
        elif body is not None:
            await self._app(scope, _replayed(body, receive), guarded)

    def _refusal(self, headers: Headers) -> tuple[int, str] | None:
        host = headers.get("host", "")
        try:
            name, origin = urlsplit(f"//{host}").hostname, urlsplit(headers.get("origin", f"//{host}")).netloc
        except ValueError:
            return 400, "the Host or Origin header cannot be read"
        if self._hosts is not None and name not in self._hosts:
            return 421, "this server answers to localhost alone; start it with another --host to use another name"
        if origin != host:
            return 403, "requests from pages of other sites are refused"
        return None

    async def _read(self, headers: Headers, receive: Receive) -> bytes | None:
        """The whole body; None when the client has gone."""
        if headers.get("content-length", "0").isdigit() and int(headers.get("content-length", "0")) > self._body_bytes:
            raise _TooLarge
        parts, size = [], 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            if size > self._body_bytes:
                raise _TooLarge
            if not message.get("more_body", False):
                return b"".join(parts)


class _TooLarge(Exception):
    pass


def _replayed(body: bytes, receive: Receive) -> Receive:
    """The body once, then whatever else comes: the client's leaving."""
    pending: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return pending.pop() if pending else await receive()

    return replay


async def _refuse(send: Send, status: int, message: str) -> None:
    body = json.dumps({"error": {"message": message, "type": "invalid_request_error", "param": None, "code": None}})
    headers = [(b"content-type", b"application/json"), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body.encode()})
