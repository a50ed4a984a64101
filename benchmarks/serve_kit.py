"""A server with a tiny pair in a process of its own, and a webhook's other end; for what the server has to hold.

    python benchmarks/serve_kit.py FOLDER HOOK SEED

is that process: it writes its URL into FOLDER/url and its log into FOLDER/log.
"""

from __future__ import annotations

import json
import logging
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch

from pilotfish.actions import Policy, Rule
from pilotfish.core import Site
from pilotfish.engines import EmbeddedEngine
from pilotfish.engines.tax import random_bank
from pilotfish.models import Pair, tiny_pair
from pilotfish.runs import generator
from pilotfish.server import EmbeddedBackend, Limits, Retrying, ServerSettings, Service, Store, WebhookSink, make_server
from pilotfish.steering import Direction, DirectionCard

SECRET = "whsec_" + "QUJDREVGR0hJSktMTU5PUFFSU1RVVldYWVo="
FLAG = Policy(rules=(Rule(metric="random_0", threshold=0.0, scope="answer"),), hold=True)
"""Every answer's first token is flagged, and held until its alert is stored."""
START_S = 120.0


def tiny_engine(seed: int) -> EmbeddedEngine:
    pair = tiny_pair(seed=seed)
    return EmbeddedEngine(pair, [random_bank(pair, num_heads=2, num_sites=2, generator=generator(seed, "bank"))])


def tiny_directions(pair: Pair) -> list[Direction]:
    """Two random ones with a dose, of which one is negative."""
    random, size = torch.Generator().manual_seed(0), pair.target_identity.hidden_size
    return [
        Direction(
            site=Site(1, "resid_post"),
            vector=torch.randn(size, generator=random),
            card=DirectionCard(name=name, identity=pair.target_identity, method="imported", notes="random"),
        ).with_dose(dose, "add")
        for name, dose in (("up", 2.0), ("down", -2.0))
    ]


def serve_tiny(engine: EmbeddedEngine, store_url: str, hook: str, note: Path) -> None:
    """Serves until it is told to end; `note` holds the URL from when it answers."""
    store = Store(store_url, sinks=["webhook"])
    retrying = Retrying(poll_s=0.1, lease_s=5.0)
    settings = ServerSettings(
        port=0, retrying=retrying, requests_per_minute=1_000_000, limits=Limits(new_tokens=64), send_timeout_s=5.0
    )
    backend = EmbeddedBackend(engine, directions=tiny_directions(engine.pair))
    service = Service(backend, store, settings, policy=FLAG, sinks=[WebhookSink(hook, SECRET)])

    def tell(url: str) -> None:
        note.with_suffix(".part").write_text(url)
        note.with_suffix(".part").rename(note)

    make_server(service, tell).run()


@contextmanager
def tiny_server(folder: Path, hook: str, seed: int) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """Its URL and process; ended as by SIGTERM, and killed when it has not ended within a minute."""
    note = folder / "url"
    with subprocess.Popen([sys.executable, __file__, str(folder), hook, str(seed)]) as process:
        try:
            deadline = time.monotonic() + START_S
            while not note.exists() and time.monotonic() < deadline and process.poll() is None:
                time.sleep(0.05)
            yield note.read_text(), process
            process.send_signal(signal.SIGTERM)
            process.wait(60)
        finally:
            process.kill()


@contextmanager
def hook_server() -> Iterator[tuple[str, dict[str, Counter[str]]]]:
    """Its URL, and per exchange how often each of its alerts has arrived."""
    arrived: dict[str, Counter[str]] = {}

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            alert = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["data"]
            self.send_response(204)
            self.end_headers()
            arrived.setdefault(alert["exchange"], Counter())[alert["id"]] += 1

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/", arrived
    finally:
        server.shutdown()
        server.server_close()


def none_wanted(name: str, count: int) -> dict[str, Any]:
    """A target of a benchmark: a count that has to be 0."""
    return {
        "name": name,
        "value": float(count),
        "low": float(count),
        "high": float(count),
        "target": "0",
        "met": count == 0,
    }


if __name__ == "__main__":
    place, hook_url, given_seed = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    logging.basicConfig(filename=place / "log", level=logging.WARNING)
    serve_tiny(tiny_engine(given_seed), f"sqlite:///{place / 'store.db'}", hook_url, place / "url")
