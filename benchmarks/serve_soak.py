"""Minutes of eight streams in; whether the server grew, lost an alert or mixed up its streams, out."""

from __future__ import annotations

import json
import random
import resource
import signal
import socket
import sqlite3
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import numpy as np
from scipy.stats import theilslopes
from serve_fuzz import malformed, send, status_of, well_formed
from serve_kit import hook_server, none_wanted, tiny_server

STREAMS = 8
KINDS = {"finish": 0.5, "leave": 0.2, "stall": 0.1, "rubbish": 0.2}
"""What a client does next, with its share."""
PROMPTS = 24
TOKENS = 48
NUM_BLOCKS = 20
"""Of the second half: within one, samples depend on one another; the means of blocks hardly do."""
MB = 1e6
ENDED = (0, -signal.SIGTERM)
"""A server that was told to end and did: its loop raises the signal again once it has drained."""
SETTLE_S, IDLE_S = 120.0, 5.0
"""What is left to deliver has so long; then the server idles."""


@dataclass
class Seen:
    """What the clients have seen; each adds its own under the lock."""

    flagged: set[str] = field(default_factory=set)
    """Exchanges of which a token has arrived: the flag stands on the first."""
    did: Counter[str] = field(default_factory=Counter)
    statuses: Counter[int] = field(default_factory=Counter)
    crossed: list[str] = field(default_factory=list)
    """What a stream said where another text stood alone."""
    failures: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)


class Sample(NamedTuple):
    """The server's process at a moment."""

    at_s: float
    rss_mb: float
    num_files: int
    num_threads: int
    num_exchanges: int


class Slope(NamedTuple):
    """Growth an hour, with its 95 % interval."""

    value: float
    low: float
    high: float


def body_of(model: str, number: int) -> dict[str, Any]:
    """One of the prompts, half of them sampled: what is said follows from it alone."""
    turns = [{"role": "user", "content": f"question {number}: " + "why? " * (number % 7)}]
    sampling = {"temperature": 0.0} if number % 2 else {"temperature": 1.0, "seed": number}
    return {"model": model, "messages": turns, "max_tokens": TOKENS, "stream": True, **sampling}


def _tokens(line: str) -> tuple[str, str]:
    """The exchange's id and the text of a line of a stream; empty where it has none."""
    if not line.startswith("data: {"):
        return "", ""
    said = json.loads(line.removeprefix("data: "))
    if "error" in said:
        raise RuntimeError(said["error"]["message"])
    text = "".join(choice["delta"].get("content") or "" for choice in said["choices"])
    return said["id"], text


def _alone(http: httpx.Client, model: str) -> list[str]:
    """The text of each prompt while nobody else asks."""
    texts = []
    for number in range(PROMPTS):
        with http.stream("POST", "/v1/chat/completions", json=body_of(model, number)) as reply:
            texts.append("".join(_tokens(line)[1] for line in reply.iter_lines()))
    return texts


class _Client(threading.Thread):
    """One of the streams: asks again and again, in whatever way is drawn."""

    def __init__(self, url: str, number: int, seed: int, alone: Sequence[str], seen: Seen, stop: threading.Event):
        super().__init__(name=f"client {number}")
        self._url, self._alone, self._seen, self._ending = url, alone, seen, stop
        self._draw = random.Random(f"{seed} {number}")
        # Policies stay as they are: the flag on the first token is what lost alerts are counted by.
        requests = [r for r in well_formed(url) if r.path != "/v1/monitor/policy"]
        self._rubbish = malformed(url, requests, 10**9, seed=self._draw.randrange(2**31))

    def run(self) -> None:
        small = httpx.HTTPTransport(socket_options=[(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)])
        with (
            httpx.Client(base_url=self._url, timeout=120) as http,
            httpx.Client(base_url=self._url, timeout=120, transport=small) as slow,
        ):
            model = http.get("/v1/models").json()["data"][0]["id"]
            while not self._ending.is_set():
                (kind,) = self._draw.choices(list(KINDS), list(KINDS.values()))
                try:
                    if kind == "rubbish":
                        status = status_of(send(self._url, next(self._rubbish)))
                    else:
                        status = self._ask(slow if kind == "stall" else http, model, kind)
                except (httpx.HTTPError, OSError, RuntimeError, LookupError, ValueError) as error:
                    with self._seen.lock:
                        self._seen.failures.append(f"{kind}: {type(error).__name__} {error}")
                    continue
                with self._seen.lock:
                    self._seen.did[kind] += 1
                    self._seen.statuses[status] += 1

    def _ask(self, http: httpx.Client, model: str, kind: str) -> int:
        number, text, exchange = self._draw.randrange(PROMPTS), "", ""
        leaves_after = self._draw.randint(1, TOKENS) if kind == "leave" else 10**9
        body = body_of(model, number)
        if kind == "stall":
            body |= {"monitor": {"prompt": True, "lookahead": True, "signals": True}}
        with http.stream("POST", "/v1/chat/completions", json=body) as reply:
            if reply.status_code != 200:
                return reply.status_code
            if kind == "leave" and self._draw.random() < 0.2:  # before the first token
                return 200
            for line in reply.iter_lines():
                found, more = _tokens(line)
                text, exchange = text + more, found or exchange
                if kind == "stall":
                    time.sleep(self._draw.choice([0.0, 0.05, 0.2, 1.0]))
                if len(text) >= leaves_after:
                    break
        expected = self._alone[number]
        is_right = expected.startswith(text) if kind == "leave" else text == expected
        with self._seen.lock:
            if text:
                self._seen.flagged.add(exchange)
            if not is_right:
                self._seen.crossed.append(f"{kind} prompt {number}: {text!r} instead of {expected!r}")
        return 200


def _sample(pid: int, rows: sqlite3.Connection, started: float) -> Sample:
    place = Path(f"/proc/{pid}")
    pages = int((place / "statm").read_text().split()[1])
    num_files, num_threads = (len(list((place / name).iterdir())) for name in ("fd", "task"))
    count = rows.execute("select count(*) from exchanges").fetchone()[0]
    return Sample(time.monotonic() - started, pages * resource.getpagesize() / MB, num_files, num_threads, count)


def slope(samples: Sequence[Sample], name: str) -> Slope:
    """Theil and Sen's slope over the second half of the samples, from means of blocks (Sen 1968)."""
    half = samples[len(samples) // 2 :]
    blocks = np.array_split(np.array([(sample.at_s, getattr(sample, name)) for sample in half]), NUM_BLOCKS)
    means = np.array([block.mean(axis=0) for block in blocks if len(block)])
    found = theilslopes(means[:, 1], means[:, 0], alpha=0.95)
    return Slope(*(3600 * float(value) for value in (found.slope, found.low_slope, found.high_slope)))


def soak(minutes: float, seed: int, *, every_s: float = 3.0) -> dict[str, Any]:
    """Clients that finish, leave, stall and send rubbish, for so long; what the server was like meanwhile and after.

    Returns:
        `targets` as they are shown, `samples` (the last one idle, after the load), and whatever else was counted.

    Raises:
        RuntimeError: a client broke, or the prompts' texts are too alike to tell streams apart.
    """
    with tempfile.TemporaryDirectory() as name, hook_server() as (hook, arrived):
        folder, seen, stop = Path(name), Seen(), threading.Event()
        with tiny_server(folder, hook, seed) as (url, process):
            with httpx.Client(base_url=url, timeout=120) as http:
                alone = _alone(http, http.get("/v1/models").json()["data"][0]["id"])
            if len(set(alone)) < PROMPTS // 2:
                raise RuntimeError(f"{PROMPTS} prompts give {len(set(alone))} texts: mixed-up streams would not show")
            clients = [_Client(url, number, seed, alone, seen, stop) for number in range(STREAMS)]
            rows = sqlite3.connect(f"file:{folder / 'store.db'}?mode=ro", uri=True, isolation_level=None)
            started = time.monotonic()
            samples = [_sample(process.pid, rows, started)]
            for client in clients:
                client.start()
            while time.monotonic() - started < 60 * minutes and process.poll() is None:
                time.sleep(every_s)
                samples.append(_sample(process.pid, rows, started))
            if not all(client.is_alive() for client in clients):
                raise RuntimeError("a client ended before its time: its error stands above")
            stop.set()
            for client in clients:
                client.join()
            waits = "select count(*) from deliveries where state = 'pending'"
            deadline = time.monotonic() + SETTLE_S
            while rows.execute(waits).fetchone()[0] and time.monotonic() < deadline:
                time.sleep(0.2)
            time.sleep(IDLE_S)
            after = _sample(process.pid, rows, started)
            states = dict(rows.execute("select state, count(*) from exchanges group by state").fetchall())
            stored = Counter(row[0] for row in rows.execute("select exchange_id from alerts"))
            rows.close()
        num_tracebacks = (folder / "log").read_text().count("Traceback")
        found = judged(samples, after, seen, arrived, stored)
        left = states.get("running", 0) + num_tracebacks + (process.returncode not in ENDED)
        found["targets"].append(none_wanted("after it: open exchanges, tracebacks, a bad exit", left))
        return {**found, "states": states, "exit": process.returncode, "num_tracebacks": num_tracebacks}


def judged(
    samples: Sequence[Sample], after: Sample, seen: Seen, arrived: Mapping[str, Counter[str]], stored: Counter[str]
) -> dict[str, Any]:
    grown = slope(samples, "rss_mb")
    lost, doubled = sorted(seen.flagged - set(arrived)), [each for each, count in stored.items() if count > 1]
    errors = sum(count for status, count in seen.statuses.items() if status >= 500)
    minutes = samples[-1].at_s / 60
    load = f"{minutes:.2g} min at {STREAMS} streams"
    counts = {
        f"{load}: alerts lost or doubled, of {len(seen.flagged)}": len(lost) + len(doubled),
        f"{load}: streams with another's text": len(seen.crossed),
        f"{load}: 5xx and broken answers": errors + len(seen.failures),
    }
    targets = [none_wanted(name, count) for name, count in counts.items()]
    memory = {"name": f"{load}: growth in the second half, MB/h", **grown._asdict()}
    targets.append({**memory, "target": "interval has 0", "met": grown.low <= 0})
    return {
        "targets": targets,
        "did": seen.did,
        "statuses": {str(status): count for status, count in seen.statuses.items()},
        "num_delivered_again": sum(sum(each.values()) - len(each) for each in arrived.values()),
        "slopes": {name: slope(samples, name)._asdict() for name in ("rss_mb", "num_files", "num_threads")},
        "crossed": seen.crossed[:10],
        "failures": seen.failures[:10],
        "samples": [sample._asdict() for sample in (*samples, after)],
    }
