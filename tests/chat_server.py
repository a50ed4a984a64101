"""A chat-completions server on this machine, for tests: each request is answered by a function of its body."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple

Respond = Callable[[dict[str, Any], dict[str, str]], tuple[int, dict[str, str], bytes]]


class Server(NamedTuple):
    url: str
    bodies: list[dict[str, Any]]
    """Requests so far."""


def said(content: str | None) -> tuple[int, dict[str, str], bytes]:
    """A well-formed completion."""
    return 200, {}, json.dumps({"choices": [{"message": {"role": "assistant", "content": content}}]}).encode()


def quoting(*quotes: str) -> tuple[int, dict[str, str], bytes]:
    return said(json.dumps({"quotes": quotes}))


@contextlib.contextmanager
def serving(respond: Respond) -> Iterator[Server]:
    bodies: list[dict[str, Any]] = []
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            body["path"] = self.path
            with lock:
                bodies.append(body)
            status, headers, content = respond(body, dict(self.headers))
            with contextlib.suppress(OSError):  # the client may have given up
                self.send_response(status)
                for name, value in {"Content-Length": str(len(content)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield Server(f"http://127.0.0.1:{server.server_address[1]}/v1", bodies)
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
