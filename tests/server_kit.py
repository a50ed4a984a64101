"""A server on a free port of this machine, and a place to receive its webhooks; for tests, with real sockets."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import uvicorn

from pilotfish.actions import Policy, Rule
from pilotfish.engines import EmbeddedEngine
from pilotfish.errors import PilotfishError
from pilotfish.server import EmbeddedBackend, Retrying, ServerSettings, Service, Sink, Store, make_server
from pilotfish.server.tracing import Tracer

FAST = Retrying(first_pause_s=0.05, longest_pause_s=0.2, poll_s=0.05, lease_s=2.0)
FLAG_ALL = Policy(rules=(Rule(metric="wide", action="flag", threshold=0.0),), hold=True)
"""Breaks at the first token."""
OBSERVE = Policy()


class Running(NamedTuple):
    url: str
    service: Service
    store: Store
    backend: Any
    server: uvicorn.Server


@contextlib.contextmanager
def running(
    engine: EmbeddedEngine,
    folder: Path,
    *,
    policy: Policy = OBSERVE,
    sinks: Sequence[Sink] = (),
    store: Store | None = None,
    tracer: Tracer | None = None,
    **settings: Any,
) -> Iterator[Running]:
    """Serves a pair until the block ends, then drains as after SIGTERM."""
    chosen = ServerSettings(port=0, retrying=FAST, **settings)
    backend = EmbeddedBackend(engine, max_streams=chosen.max_streams, max_queue=chosen.max_queue)
    with serving(backend, folder, chosen, policy=policy, sinks=sinks, store=store, tracer=tracer) as found:
        yield found


@contextlib.contextmanager
def serving(
    backend: Any,
    folder: Path,
    settings: ServerSettings,
    *,
    policy: Policy = OBSERVE,
    sinks: Sequence[Sink] = (),
    store: Store | None = None,
    tracer: Tracer | None = None,
) -> Iterator[Running]:
    """Serves any engine until the block ends."""
    store = store or Store(f"sqlite:///{folder / 'store.db'}", sinks=[sink.name for sink in sinks])
    service = Service(backend, store, settings, policy=policy, sinks=sinks, tracer=tracer)
    started, urls = threading.Event(), []

    def on_start(url: str) -> None:
        urls.append(url)
        started.set()

    server = make_server(service, on_start)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        assert started.wait(20), "the server starts"
        yield Running(urls[0], service, store, backend, server)
    finally:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive(), "the server drains"


class Holding:
    """Work that keeps the engine's thread until it is released."""

    def __init__(self) -> None:
        self.cancelled = False
        self.begun, self.release = threading.Event(), threading.Event()

    def turn(self) -> bool:
        self.begun.set()
        assert self.release.wait(30), "the test releases the engine"
        return False

    def end(self, error: PilotfishError | None) -> None:
        self.begun.set()


@contextlib.contextmanager
def held(backend: EmbeddedBackend) -> Iterator[None]:
    """The engine does nothing within the block."""
    job = Holding()
    backend._enqueue(job)
    try:
        assert job.begun.wait(30), "the engine takes the job"
        yield
    finally:
        job.release.set()


@contextlib.contextmanager
def pausing(backend: EmbeddedBackend, *, passes: int) -> Iterator[None]:
    """The engine makes so many passes, and goes on at the end of the block."""
    release, step, made = threading.Event(), backend._step, count(1)

    def paused() -> None:
        if next(made) > passes:
            assert release.wait(60), "the test releases the engine"
        step()

    backend._step = paused
    try:
        yield
    finally:
        del backend._step
        release.set()


def until(what: Callable[[], object], seconds: float = 20.0) -> None:
    """Waits for something that happens on another thread."""
    for _ in range(int(seconds / 0.01)):
        if what():
            return
        time.sleep(0.01)
    raise AssertionError("it did not happen")


class Received(NamedTuple):
    headers: dict[str, str]
    body: bytes


@contextlib.contextmanager
def receiving(statuses: Sequence[int] = ()) -> Iterator[tuple[str, list[Received]]]:
    """A webhook's other end: its URL and what has arrived. Answers with `statuses` first, then 200."""
    received: list[Received] = []
    left = list(statuses)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            received.append(Received({name.lower(): value for name, value in self.headers.items()}, body))
            self.send_response(left.pop(0) if left else 200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/hook", received
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextlib.contextmanager
def postgres() -> Iterator[str]:
    """The URL of a PostgreSQL of its own, reached over a socket file; skips where the package is not installed."""
    folders = sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    initdb = shutil.which("initdb", path=os.pathsep.join([*map(str, folders), os.environ["PATH"]]))
    if initdb is None:
        pytest.skip("no PostgreSQL server here: install the package `postgresql`")
    with tempfile.TemporaryDirectory(prefix="pg-") as name:
        folder, binaries = Path(name), Path(initdb).parent
        user: dict[str, Any] = {}
        if os.geteuid() == 0:  # which PostgreSQL refuses to run as
            user = {"user": "nobody"}
            shutil.chown(folder, "nobody")
        data, quiet = str(folder / "data"), {"check": True, "capture_output": True, **user}
        subprocess.run([initdb, "-D", data, "-U", "pilotfish", "--auth=trust", "--no-sync"], **quiet)
        server = [str(binaries / "postgres"), "-D", data, "-k", name, "-h", "", "-c", "fsync=off"]
        process = subprocess.Popen(server, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, **user)
        try:
            ready = [str(binaries / "pg_isready"), "-h", name, "-U", "pilotfish"]
            for _ in range(300):
                if subprocess.run(ready, capture_output=True, check=False).returncode == 0:
                    break
                time.sleep(0.1)
            else:
                pytest.fail("PostgreSQL did not start within 30 s")
            yield f"postgresql://pilotfish@/postgres?host={name}"
        finally:
            process.send_signal(signal.SIGQUIT)  # at once: its data are thrown away
            process.wait(30)
