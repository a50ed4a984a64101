"""A real server, started as vLLM's users start it, and OpenAI's own client."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from kit import Models, options, write_settings
from openai import BadRequestError, OpenAI
from served import wait_for

from pilotfish.server import Store
from pilotfish.server.schemas import MonitorOut
from pilotfish.taps import tapped

POLICY = """
[[rules]]
metric = "last"
action = "stop"
threshold = {threshold}
scope = "answer"

[[rules]]
metric = "linear-4"
action = "flag"
threshold = 0.8
"""
SETTINGS = """
banks = ["bank-draft"]
policy = "policy.toml"
store = "sqlite:///{folder}/alerts.db"
alerts_file = "alerts.jsonl"
"""
TEXTS = ("a b c", "def f", "x == 1", "the house", "return", "1 2 3")


class Server(NamedTuple):
    url: str
    client: OpenAI
    model: str
    folder: Path


@pytest.fixture(scope="module")
def server(models: Models) -> Iterator[Server]:
    folder = models.folder
    (folder / "policy.toml").write_text(POLICY.format(threshold=_between(models)))
    settings = write_settings(folder, SETTINGS.format(folder=folder), "served.toml")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    given = options(models, max_model_len=256, max_num_seqs=4)
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--host", "127.0.0.1", "--port", str(port)]
    for name, value in given.items():
        flag = f"--{name.replace('_', '-')}"
        if value is True:
            command += [flag]
        else:
            command += [flag, json.dumps(value) if isinstance(value, dict) else str(value)]
    command.remove("--disable-log-stats")
    environment = {**os.environ, "PILOTFISH_VLLM": str(settings), "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    log = (folder / "server.log").open("wb")
    process = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT, cwd=folder)
    url = f"http://127.0.0.1:{port}"
    try:
        wait_for(url, process, folder / "server.log")
        yield Server(url, OpenAI(base_url=f"{url}/v1", api_key="none"), given["model"], folder)
    finally:
        process.terminate()
        process.wait(120)
        log.close()


def _between(models: Models) -> float:
    """A threshold that some answers to the texts reach and others do not, from one pass of transformers each."""
    highest = []
    for text in TEXTS:
        turns = [{"role": "user", "content": text}]
        prompt = models.tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt")
        prompt = prompt if isinstance(prompt, torch.Tensor) else prompt["input_ids"]
        size = prompt.shape[1]
        with torch.inference_mode(), tapped(models.draft, models.bank.sites) as taps:
            ids = models.target.generate(prompt, max_new_tokens=40, do_sample=False)
            models.draft(ids)
            scores = models.bank.score_text(models.bank.features(taps), boundary=size)
        highest.append(float(scores.running[size:, 3].max()))
    low, high = sorted(highest)[2:4]
    assert high - low > 1e-3, "the middle two are too close"
    return (low + high) / 2


def chat(server: Server, text: str, **changes: Any) -> Any:
    given = {"max_tokens": 12, "temperature": 0.0, "extra_body": {"monitor": {"prompt": True}}} | changes
    return server.client.chat.completions.create(
        model=server.model, messages=[{"role": "user", "content": text}], **given
    )


def test_an_answer_in_one_piece_carries_the_monitor_object_of_our_own_server(server):
    (choice,) = chat(server, "def f").choices
    monitor = MonitorOut.model_validate(choice.model_extra["monitor"])
    assert set(monitor.heads) == {"linear-4", "linear-3", "linear-16", "last"}
    assert monitor.stats.committed == monitor.stats.scored == len(monitor.tokens)
    answer = [token for token in monitor.tokens if token.origin != "prompt"]
    assert "".join(token.text for token in answer) == choice.message.content
    assert all(token.scores.keys() == set(monitor.heads) and not token.unscored for token in monitor.tokens)


def test_a_stream_says_the_same_chunk_by_chunk(server):
    whole = chat(server, "import x", extra_body={"monitor": {}})
    chunks = [chunk.choices[0] for chunk in chat(server, "import x", stream=True, extra_body={"monitor": {}})]
    monitors = [
        MonitorOut.model_validate(choice.model_extra["monitor"]) for choice in chunks if "monitor" in choice.model_extra
    ]
    tokens = [token for monitor in monitors for token in monitor.tokens or ()]
    text = "".join(choice.delta.content or "" for choice in chunks)
    assert text == whole.choices[0].message.content == "".join(token.text for token in tokens)
    expected = MonitorOut.model_validate(whole.choices[0].model_extra["monitor"])
    assert [token.running for token in tokens] == [token.running for token in expected.tokens]
    assert monitors[-1].stats == expected.stats and monitors[-1].heads == expected.heads


def test_a_client_that_did_not_ask_gets_what_vllm_says(server):
    (choice,) = chat(server, "def f", extra_body={}).choices
    assert "monitor" not in choice.model_extra


def test_every_choice_of_every_prompt_has_its_own(server):
    reply = server.client.completions.create(
        model=server.model, prompt=["The cat", "def f(x):"], n=2, seed=3, max_tokens=6, extra_body={"monitor": {}}
    )
    assert [choice.index for choice in reply.choices] == [0, 1, 2, 3]
    for choice in reply.choices:
        tokens = MonitorOut.model_validate(choice.model_extra["monitor"]).tokens
        assert "".join(token.text for token in tokens) == choice.text


def test_the_responses_route_carries_it_too(server):
    given = {"model": server.model, "input": "def f", "max_output_tokens": 8, "temperature": 0.0}
    reply = server.client.responses.create(**given, extra_body={"monitor": {}})
    monitor = MonitorOut.model_validate(reply.model_extra["monitor"])
    assert "".join(token.text for token in monitor.tokens) == reply.output_text
    events = list(server.client.responses.create(**given, stream=True, extra_body={"monitor": {}}))
    deltas = [event for event in events if event.type == "response.output_text.delta"]
    assert any("monitor" in event.model_extra for event in deltas)
    assert events[-1].response.model_extra["monitor"]["stats"] == monitor.stats.model_dump()


def test_a_stop_reaches_the_client_as_a_content_filter_and_its_alert_the_store(server):
    replies = [chat(server, text, max_tokens=40) for text in TEXTS]
    ended = {reply.choices[0].finish_reason: reply for reply in replies}
    assert "content_filter" in ended, "no prompt reaches the threshold"
    assert len(ended) > 1, "every prompt does"
    stopped = ended["content_filter"]
    monitor = MonitorOut.model_validate(stopped.choices[0].model_extra["monitor"])
    assert monitor.verdicts[-1].action == "stop"
    assert all(token.position < monitor.verdicts[-1].position for token in monitor.tokens)
    store = Store(f"sqlite:///{server.folder}/alerts.db")
    kept = store.exchange(monitor.exchange)
    store.close()
    assert kept is not None and monitor.exchange == stopped.id
    lines = (server.folder / "alerts.jsonl").read_text().splitlines()
    assert any(json.loads(line)["data"]["exchange"] == stopped.id for line in lines)


def test_what_is_asked_wrongly_is_refused_in_words(server):
    with pytest.raises(BadRequestError, match=r"monitor\.token"):
        chat(server, "def f", extra_body={"monitor": {"token": True}})


def test_a_client_that_leaves_is_counted_and_nothing_goes_on(server):
    before = _metric(server, "pilotfish:monitor_tokens_scored_total")
    stream = chat(server, "the dog and the cat", stream=True, max_tokens=200)
    next(iter(stream))
    stream.close()
    end = time.monotonic() + 60
    while _metric(server, "vllm:num_requests_running") > 0 and time.monotonic() < end:
        time.sleep(0.2)
    chat(server, "def f", extra_body={})
    assert _metric(server, "pilotfish:monitor_tokens_scored_total") > before
    assert _metric(server, "vllm:num_requests_running") == 0


def test_vllm_s_own_registry_counts_heads_and_verdicts(server):
    text = urllib.request.urlopen(f"{server.url}/metrics").read().decode()
    assert 'pilotfish:monitor_flags_total{action="stop",head="last"}' in text
    assert 'pilotfish:monitor_score_bucket{head="linear-16",le="0.5"}' in text
    assert "vllm:generation_tokens_total" in text


def _metric(server: Server, name: str) -> float:
    text = urllib.request.urlopen(f"{server.url}/metrics").read().decode()
    return sum(
        float(line.rsplit(" ", 1)[1]) for line in text.splitlines() if line.startswith((f"{name} ", f"{name}{{"))
    )
