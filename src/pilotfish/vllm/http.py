"""HTTP requests with a `monitor` object in, vLLM's responses with one out: an ASGI middleware that knows no vLLM."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from pydantic import ValidationError

from pilotfish.server.schemas import MonitorOptions
from pilotfish.vllm.asked import Asked, current

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]

NAME = b'"monitor"'


class MonitorMiddleware:
    """Takes `monitor` out of a request's body before vLLM sees it, and puts one into the answer."""

    def __init__(self, app: App) -> None:
        self._app = app

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST" or not scope["path"].startswith("/v1/"):
            await self._app(scope, receive, send)
            return
        body = await _read(receive)
        try:
            body, options = _parted(body)
        except ValidationError as error:
            await _refuse(send, error)
            return
        headers = [(name, value) for name, value in scope["headers"] if name.lower() != b"content-length"]
        scope = {**scope, "headers": [*headers, (b"content-length", str(len(body)).encode())]}
        asked = Asked(options)
        token = current.set(asked)
        try:
            await self._app(scope, _replay(body, receive), _Sender(asked, send))
        finally:
            current.reset(token)


class _Sender:
    """What the response goes through on its way out."""

    def __init__(self, asked: Asked, send: Send) -> None:
        self._asked, self._send = asked, send
        self._start: Message = {}
        self._is_stream = False
        self._held = b""

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            kind = dict(message["headers"]).get(b"content-type", b"")
            self._is_stream = kind.startswith(b"text/event-stream")
            self._start = message
            if self._is_stream:
                await self._send(message)
        elif message["type"] != "http.response.body":
            await self._send(message)
        elif self._is_stream:
            await self._send_events(message)
        else:
            await self._send_body(message)

    async def _send_events(self, message: Message) -> None:
        *events, self._held = (self._held + message.get("body", b"")).split(b"\n\n")
        is_more = message.get("more_body", False)
        body = b"".join(self._asked.edited_event(event) + b"\n\n" for event in events)
        if not is_more:
            body, self._held = body + self._held, b""
        await self._send({**message, "body": body})

    async def _send_body(self, message: Message) -> None:
        self._held += message.get("body", b"")
        if message.get("more_body", False):
            return
        body = self._asked.edited_body(self._held)
        headers = [(name, value) for name, value in self._start["headers"] if name.lower() != b"content-length"]
        headers.append((b"content-length", str(len(body)).encode()))
        await self._send({**self._start, "headers": headers})
        await self._send({**message, "body": body})


async def _read(receive: Receive) -> bytes:
    body, is_more = b"", True
    while is_more:
        message = await receive()
        body += message.get("body", b"")
        is_more = message.get("more_body", False)
    return body


def _parted(body: bytes) -> tuple[bytes, MonitorOptions | None]:
    """The body for vLLM, and what is asked of the monitor; raises ValidationError when that is not well formed."""
    if NAME not in body:
        return body, None
    try:
        raw = json.loads(body)
    except ValueError:
        return body, None  # vLLM refuses it
    if not isinstance(raw, dict) or raw.get("monitor") is None:
        return body, None
    options = MonitorOptions.model_validate(raw.pop("monitor"))
    return json.dumps(raw, ensure_ascii=False).encode(), options


def _replay(body: bytes, receive: Receive) -> Receive:
    is_read = False

    async def replay() -> Message:
        nonlocal is_read
        if is_read:
            return await receive()
        is_read = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay


async def _refuse(send: Send, error: ValidationError) -> None:
    first = error.errors()[0]
    said = {
        "message": f"monitor.{'.'.join(map(str, first['loc']))}: {first['msg']}",
        "type": "invalid_request_error",
        "param": "monitor",
        "code": 400,
    }
    body = json.dumps({"error": said}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 400, "headers": headers})
    await send({"type": "http.response.body", "body": body})
