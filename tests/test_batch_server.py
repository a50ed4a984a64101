"""A server process that decodes many answers together: nothing of one reaches another."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest

MODEL = "tiny-llama-0"
SERVE = """
import sys
from conftest import seeded_bank
from pilotfish.actions import Policy
from pilotfish.engines import EmbeddedEngine
from pilotfish.models import tiny_pair
from pilotfish.server import EmbeddedBackend, ServerSettings, Service, Store, make_server

pair = tiny_pair(seed=0)
engine = EmbeddedEngine(pair, [seeded_bank(pair, reader="draft")])
service = Service(EmbeddedBackend(engine), Store(sys.argv[1]), ServerSettings(port=0), policy=Policy())
make_server(service, lambda url: print(url, flush=True)).run()
"""


def rule(action: str, threshold: float = 0.6, **options: Any) -> dict[str, Any]:
    return {"rules": [{"metric": "wide", "action": action, "threshold": threshold, "scope": "answer", **options}]}


POLICIES: list[dict[str, Any]] = [
    {},
    rule("redact"),
    {"hold": True, "margin": 3},
    rule("defer", release=0.4),
    rule("flag"),
    rule("resample", 0.8, tries=50),
    rule("stop", 0.97),
    {"hold": True},
]
"""Of stream i; those of the same index have prompts, seeds and temperatures of their own, too."""


class Answer(NamedTuple):
    id: str
    text: str
    finish: str
    scores: list[tuple[int, str, dict[str, float]]]
    heads: dict[str, Any]


@pytest.fixture
def server(tmp_path) -> Iterator[tuple[httpx.Client, subprocess.Popen[str]]]:
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
    command = [sys.executable, "-c", SERVE, f"sqlite:///{tmp_path / 'store.db'}"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        try:
            assert process.stdout is not None
            with httpx.Client(base_url=process.stdout.readline().strip(), timeout=60) as http:
                yield http, process
        finally:
            process.kill()


def chunks(http: httpx.Client, index: int, num_tokens: int) -> Iterator[dict[str, Any]]:
    body = {
        "model": MODEL,
        "messages": [{"role": "user", "content": f"stream {index} is " + "the user " * index}],
        "max_tokens": num_tokens,
        "temperature": 0.9 * (index % 2),
        "seed": index,
        "stop": ["\u2603"],
        "stream": True,
        "monitor": {"prompt": True},
    }
    with http.stream("POST", "/v1/chat/completions", json=body) as reply:
        for line in reply.iter_lines():
            if line.startswith("data: {"):
                yield json.loads(line.removeprefix("data: "))


def answer_of(found: list[dict[str, Any]]) -> Answer:
    choices = [chunk["choices"][0] for chunk in found]
    text = "".join(choice["delta"].get("content") or "" for choice in choices)
    said = [choice["monitor"] for choice in choices if "monitor" in choice]
    rows = {token["position"]: token for each in said for token in each.get("tokens", [])}
    scores = [(place, row["text"], row.get("running", {})) for place, row in sorted(rows.items())]
    return Answer(found[0]["id"], text, choices[-1]["finish_reason"], scores, said[-1]["heads"])


def put_policy(http: httpx.Client, index: int) -> None:
    assert http.put("/v1/monitor/policy", json={"policy": POLICIES[index]}).status_code == 200


@pytest.mark.slow
def test_eight_streams_under_eight_policies_are_each_what_they_are_alone(server):
    http, _ = server
    alone = []
    for index in range(8):
        put_policy(http, index)
        alone.append(answer_of(list(chunks(http, index, 120))))
    order: list[int] = []
    together: dict[int, list[dict[str, Any]]] = {index: [] for index in range(8)}

    def read(index: int, begun: threading.Event) -> None:
        for chunk in chunks(http, index, 120):
            together[index].append(chunk)
            order.append(index)
            begun.set()

    with ThreadPoolExecutor(8) as pool:
        for index in range(8):
            put_policy(http, index)
            begun = threading.Event()
            pool.submit(read, index, begun)
            assert begun.wait(30)
    assert sum(a != b for a, b in pairwise(order)) > 20, "they do come at the same time"
    for index, expected in enumerate(alone):
        found = answer_of(together[index])
        assert (found.text, found.finish) == (expected.text, expected.finish)
        assert [row[:2] for row in found.scores] == [row[:2] for row in expected.scores]
        for ours, theirs in zip(found.scores, expected.scores, strict=True):
            assert ours[2] == pytest.approx(theirs[2], abs=1e-4)
        stored = [http.get(f"/v1/monitor/exchanges/{each.id}").json() for each in (found, expected)]
        assert stored[0]["answer"] == found.text
        verdicts = [[(v["position"], v["action"]) for v in each["verdicts"]] for each in stored]
        assert verdicts[0] == verdicts[1]
    assert len({answer.text for answer in alone}) == 8


@pytest.mark.slow
def test_who_leaves_touches_nobody_and_on_sigterm_the_others_end_as_they_would(server):
    http, process = server
    expected = [answer_of(list(chunks(http, index, 300))) for index in range(3)]
    streams = [chunks(http, index, 300) for index in range(3)]
    found = [[next(stream)] for stream in streams]
    streams[1].close()
    process.send_signal(signal.SIGTERM)
    for index in (0, 2):
        found[index] += list(streams[index])
        ours, theirs = answer_of(found[index]), expected[index]
        assert (ours.text, ours.finish) == (theirs.text, theirs.finish)
    assert process.wait(30) is not None
    with pytest.raises(httpx.ConnectError):
        http.get("/healthz")
