"""A server that is killed outright loses no alert that a client could know of."""

from __future__ import annotations

import multiprocessing
import threading
import time
from functools import partial
from pathlib import Path

import httpx
import openai
import pytest
from conftest import seeded_bank
from server_kit import FAST, postgres, receiving, until
from test_server_outbox import SECRET

from pilotfish.actions import Policy, Rule
from pilotfish.engines import EmbeddedEngine
from pilotfish.models import tiny_pair
from pilotfish.server import EmbeddedBackend, ServerSettings, Service, Store, WebhookSink, make_server

FLAG = Policy(rules=(Rule(metric="wide", threshold=0.0, scope="answer"),), hold=True)


def serve(store_url: str, hook: str, note: Path) -> None:
    """What a process of its own does; writes its URL into `note`."""
    pair = tiny_pair(seed=0)
    engine = EmbeddedEngine(pair, [seeded_bank(pair, reader="draft")])
    store = Store(store_url, sinks=["webhook"])
    settings = ServerSettings(port=0, retrying=FAST)
    service = Service(EmbeddedBackend(engine), store, settings, policy=FLAG, sinks=[WebhookSink(hook, SECRET)])

    def on_start(url: str) -> None:
        note.with_suffix(".part").write_text(url)
        note.with_suffix(".part").rename(note)

    make_server(service, on_start).run()


@pytest.fixture(params=["sqlite", "postgresql"])
def store_url(request, tmp_path):
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path / 'store.db'}"
        return
    with postgres() as url:
        yield url


@pytest.mark.slow
def test_after_a_kill_every_alert_that_a_client_saw_a_token_of_is_there_once_and_arrives(store_url, tmp_path):
    seen: set[str] = set()
    with receiving() as (hook, received):
        for number in range(3):
            note = tmp_path / f"url{number}"
            child = multiprocessing.get_context("spawn").Process(target=serve, args=(store_url, hook, note))
            child.start()  # not forked: a lock that another thread holds would stay locked in the child
            try:
                until(note.exists, 60)
                url = note.read_text()
                if number == 2:  # the last one lives: what was left is delivered
                    until(lambda: {got.headers["webhook-id"] for got in received} >= _ids(store_url, seen))
                    break
                threads = [threading.Thread(target=_read, args=(url, i, seen)) for i in range(4)]
                for thread in threads:
                    thread.start()
                until(partial(_has_more, seen, len(seen)))
                child.kill()
                for thread in threads:
                    thread.join(30)
            finally:
                child.kill()
                child.join()
    assert len(seen) >= 2
    store = Store(store_url)
    stored = [alert["exchange_id"] for alert in store.alerts(limit=100)]
    store.close()
    assert seen <= set(stored)
    assert len(stored) == len(set(stored))


def _has_more(seen: set[str], before: int) -> bool:
    return len(seen) > before


def _ids(store_url: str, seen: set[str]) -> set[str]:
    """Message ids of the alerts of exchanges that a client has seen a flagged token of."""
    store = Store(store_url)
    alerts = [alert["id"] for alert in store.alerts(limit=100) if alert["exchange_id"] in seen]
    store.close()
    assert len(alerts) == len(seen)
    return set(alerts)


def _read(url: str, number: int, seen: set[str]) -> None:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=30) as client:
        try:
            for _ in range(20):
                model = client.models.list().data[0].id
                turns = [{"role": "user", "content": f"prompt {number}"}]
                for chunk in client.chat.completions.create(
                    model=model, messages=turns, max_tokens=200, temperature=0, stream=True
                ):
                    if chunk.choices[0].delta.content:
                        seen.add(chunk.id)
                time.sleep(0.01)
        except (openai.APIError, httpx.HTTPError):  # the server is gone
            return
