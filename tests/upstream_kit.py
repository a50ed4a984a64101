"""An OpenAI-compatible server that says what a test tells it to, well or badly; with real sockets."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import uvicorn

DONE = b"data: [DONE]\n\n"


def chunk(text: str | None = None, finish: str | None = None, **more: Any) -> bytes:
    """One server-sent event of a streamed chat answer."""
    said = {} if text is None else {"content": text}
    choice = {"index": 0, "delta": said | more, "finish_reason": finish}
    return event({"id": "c", "object": "chat.completion.chunk", "created": 0, "model": "m", "choices": [choice]})


def event(value: Any) -> bytes:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n".encode()


def told(pieces: Sequence[str], finish: str = "stop") -> list[bytes]:
    """A whole well-formed answer."""
    return [*map(chunk, pieces), chunk(finish=finish), DONE]


class Hang:
    """In a script: nothing more comes until the client leaves."""


class Scripted:
    """An ASGI application that follows a script, and what has reached it."""

    def __init__(self) -> None:
        self.script: Sequence[bytes | Hang] = ()
        self.write: Callable[[dict[str, Any]], Sequence[bytes | Hang]] = lambda body: self.script
        """What is said to a request's body."""
        self.status, self.kind, self.headers = 200, "text/event-stream", dict[str, str]()
        self.bodies: list[dict[str, Any]] = []
        self.asked: list[dict[str, str]] = []
        self.paths: list[str] = []
        self.was_left = threading.Event()
        """A client left before its answer was complete."""

    def say(self, *script: bytes | Hang, status: int = 200, kind: str = "text/event-stream", **headers: str) -> None:
        self.script, self.status, self.kind, self.headers = script, status, kind, headers
        self.bodies, self.asked, self.paths = [], [], []
        self.write = lambda body: self.script
        self.was_left.clear()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        body, more = b"", True
        while more:
            message = await receive()
            body, more = body + message.get("body", b""), message.get("more_body", False)
        asked = json.loads(body)
        self.bodies.append(asked)
        self.asked.append({name.decode(): value.decode() for name, value in scope["headers"]})
        self.paths.append(scope["path"])
        told = {"content-type": self.kind} | {name.replace("_", "-"): value for name, value in self.headers.items()}
        headers = [(name.encode(), value.encode()) for name, value in told.items()]
        await send({"type": "http.response.start", "status": self.status, "headers": headers})
        gone = asyncio.create_task(receive())
        for part in self.write(asked):
            if isinstance(part, Hang):
                await gone
            if gone.done():
                self.was_left.set()
                return
            await send({"type": "http.response.body", "body": part, "more_body": True})
            await asyncio.sleep(0.002)  # so that pieces arrive apart from each other
        gone.cancel()
        await send({"type": "http.response.body", "body": b""})


@contextlib.contextmanager
def scripted() -> Iterator[tuple[str, Scripted]]:
    """Its base URL, and the application to tell what to say."""
    app, started = Scripted(), threading.Event()

    class Server(uvicorn.Server):
        async def startup(self, sockets: Any = None) -> None:
            await super().startup(sockets)
            started.set()

    server = Server(uvicorn.Config(app, port=0, log_config=None, lifespan="off", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        assert started.wait(20), "the upstream starts"
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/v1", app
    finally:
        server.should_exit = True
        thread.join(20)
