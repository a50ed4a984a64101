"""What the plugin keeps in a store is seen through our own server on the same store: its lists and its report."""

from __future__ import annotations

import time

import httpx
import numpy as np
from server_kit import running

from pilotfish.actions import Policy, Verdict
from pilotfish.engines import EmbeddedEngine
from pilotfish.models import tiny_tokenizer
from pilotfish.server import EngineInfo, Store
from pilotfish.vllm.archive import exchange_of
from pilotfish.vllm.record import About, Record
from pilotfish.vllm.wire import News


def a_flagged_answer() -> Record:
    tokenizer = tiny_tokenizer()
    prompt, answer = tokenizer.encode("def f"), tokenizer.encode("(x)")
    info = EngineInfo(model="behind-vllm", draft="draft", max_tokens=99, heads=())
    record = Record(
        About(metrics=("m",), reader="draft", tokenizer=tokenizer, policy=Policy(), info=info), None, prompt
    )
    size = len(prompt) + len(answer)
    flag = Verdict(len(prompt), "m", "flag", 0.9, 0.5, "m")
    record.add(News(0, np.full((size, 2), 0.9, dtype=np.float32), verdicts=[flag]), answer)
    record.finish("length")
    return record


def test_our_server_shows_what_vllm_kept(pair, bank, tmp_path):
    store = Store(f"sqlite:///{tmp_path / 'both.db'}")
    store.record(exchange_of(a_flagged_answer(), "chatcmpl-1", time.time(), "done"))
    with (
        running(EmbeddedEngine(pair, [bank]), tmp_path, store=store) as server,
        httpx.Client(base_url=f"{server.url}/v1/monitor", timeout=60) as http,
    ):
        (listed,) = http.get("/exchanges").json()["exchanges"]
        (alert,) = http.get("/alerts").json()["alerts"]
        whole = http.get("/exchanges/chatcmpl-1").json()
        page = http.get("/report", params={"exchange": "chatcmpl-1"}).text
    assert listed["id"] == alert["exchange_id"] == "chatcmpl-1" and listed["model"] == "behind-vllm"
    assert "".join(token["text"] for token in whole["tokens"]) == "def f(x)"
    assert "chatcmpl-1" in page
