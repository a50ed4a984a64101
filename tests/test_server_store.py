"""What the store promises, on both databases."""

from __future__ import annotations

import itertools
import stat
import threading
from dataclasses import replace

import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from server_kit import postgres
from sqlalchemy import create_engine, text

from pilotfish.actions import Verdict
from pilotfish.engines import Round, Token
from pilotfish.engines.records import Drafted, Scores
from pilotfish.errors import SettingError, StoreError
from pilotfish.server.exchanges import Exchange
from pilotfish.server.store import Store
from pilotfish.server.tables import Base

_NUMBER = itertools.count()


@pytest.fixture(scope="module")
def postgres_url():
    with postgres() as url:
        yield url


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request, tmp_path):
    """An empty database."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'store.db'}"
    base = request.getfixturevalue("postgres_url")
    name = f"test{next(_NUMBER)}"
    admin = create_engine(base.replace("postgresql:", "postgresql+psycopg:"))
    with admin.begin() as connection:
        connection.execute(text(f"CREATE SCHEMA {name}"))
    admin.dispose()
    return f"{base}&options=-csearch_path%3D{name}"


class Clock:
    def __init__(self) -> None:
        self.now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def store(url, clock):
    opened = Store(url, sinks=["hook", "file"], clock=clock)
    yield opened
    opened.close()


def exchange(name: str = "x-1", *, flagged: int | None = 2, **changes) -> Exchange:
    """Two tokens of a prompt and two of an answer; `flagged` is the position of a verdict."""
    scores = [Scores(("m",), [0.1 * i], "draft", running=[0.2 * i]) for i in range(3)]
    tokens = [Token(i, 7 + i, f"t{i}", "prompt" if i < 2 else "draft", 0, scores=scores[min(i, 2)]) for i in range(4)]
    for token in tokens:
        token.delta, token.is_emitted = token.text, token.position != 3
    tokens[3].scores = Scores(("m",), None, "draft", "head failed")
    verdicts = () if flagged is None else (Verdict(flagged, "m", "flag", 0.4, 0.3, "m reached it"),)
    rounds = (Round(1, 2, (Drafted(9, "secret", True, scores[2]), Drafted(10, "other", False, None))),)
    made = Exchange(
        id=name,
        created_s=1_000_000.0,
        endpoint="chat.completions",
        model="tiny",
        key_id=None,
        state="done",
        prompt="t0t1",
        tokens=tokens,
        num_prompt_tokens=2,
        verdicts=verdicts,
        rounds=rounds,
        finish_reason="length",
        finished_s=1_000_001.0,
        stats={"acceptance": 0.5},
    )
    return replace(made, **changes)


def test_an_exchange_comes_back_as_it_was_recorded(store):
    recorded = store.record(exchange())
    found = store.exchange("x-1")
    assert (found["prompt"], found["answer"], found["state"]) == ("t0t1", "t2", "done")
    assert [row["text"] for row in found["tokens"]] == ["t0", "t1", "t2", "t3"]
    assert found["tokens"][2]["scores"] == {"m": 0.2}
    assert found["tokens"][2]["running"] == {"m": 0.4}
    assert found["tokens"][3]["unscored"] == {"m": "head failed"}
    assert found["tokens"][3]["is_emitted"] is False
    assert found["verdicts"][0]["reason"] == "m reached it"
    assert found["rounds"][0]["drafted"][0] == {"text": "secret", "accepted": True, "scores": {"m": 0.2}}
    assert len(recorded.alert_ids) == 1
    assert store.exchange("none") is None


def test_an_alert_is_never_there_twice_however_often_its_exchange_is_recorded(store):
    first = store.record(exchange(state="running", finished_s=None))
    again = store.record(exchange())
    later = store.record(exchange(verdicts=(*exchange().verdicts, Verdict(3, "m", "stop", None, 0.3, "unscored"))))
    assert (len(first.alert_ids), len(again.alert_ids), len(later.alert_ids)) == (1, 0, 1)
    alerts = store.alerts(limit=10)
    assert sorted(alert["action"] for alert in alerts) == ["flag", "stop"]
    assert all([item["sink"] for item in alert["deliveries"]] == ["hook", "file"] for alert in alerts)
    assert store.outbox() == {("hook", "pending"): 2, ("file", "pending"): 2}


def test_an_alert_and_its_exchange_are_written_together_or_not_at_all(store):
    broken = exchange()
    broken.tokens[3].origin = "x" * 20 if store.takes_parallel_writes else None  # neither database takes its own
    with pytest.raises(StoreError, match="could not be written"):
        store.record(broken)
    assert store.exchange("x-1") is None
    assert store.alerts(limit=10) == []
    assert store.outbox() == {}


def test_redaction_keeps_scores_and_no_text(url):
    store = Store(url, sinks=["hook"], redact=True)
    store.record(exchange())
    found, alert = store.exchange("x-1"), store.claim("hook", owner="a", limit=1, lease_s=1.0)[0]
    assert found["is_redacted"]
    assert found["prompt"] is found["answer"] is found["tokens"][0]["text"] is found["tokens"][0]["token_id"] is None
    assert found["tokens"][2]["scores"] == {"m": 0.2}
    assert "excerpt" not in alert.payload["data"]
    whole = repr((found, store.alerts(limit=1), alert))
    assert not any(word in whole for word in ("t0t1", "'t2'", "secret"))
    store.close()


def test_an_alert_quotes_what_was_flagged(store):
    store.record(exchange())
    payload = store.claim("hook", owner="a", limit=1, lease_s=1.0)[0].payload
    assert payload["type"] == "monitor.alert"
    assert payload["data"]["excerpt"] == "t0t1t2"
    assert (payload["data"]["exchange"], payload["data"]["metric"], payload["data"]["in_prompt"]) == ("x-1", "m", False)


def test_a_character_that_postgresql_refuses_is_replaced(store):
    store.record(exchange(prompt="a\x00b"))
    assert store.exchange("x-1")["prompt"] == "a\ufffdb"


def test_a_delivery_is_leased_to_one_and_returns_when_the_lease_runs_out(store, clock):
    store.record(exchange())
    (mine,) = store.claim("hook", owner="a", limit=9, lease_s=60.0)
    assert store.claim("hook", owner="b", limit=9, lease_s=60.0) == []
    clock.now += 61
    (theirs,) = store.claim("hook", owner="b", limit=9, lease_s=60.0)
    assert theirs.id == mine.id
    store.settle(mine, owner="a", error=None, retry_in_s=None)  # too late: without effect
    assert store.outbox()[("hook", "pending")] == 1
    store.settle(theirs, owner="b", error=None, retry_in_s=None)
    assert store.outbox()[("hook", "delivered")] == 1


def test_a_failed_delivery_waits_and_then_dies_and_can_be_revived(store, clock):
    store.record(exchange())
    (due,) = store.claim("hook", owner="a", limit=1, lease_s=9.0)
    store.settle(due, owner="a", error="answered 500", retry_in_s=30.0)
    assert store.claim("hook", owner="a", limit=1, lease_s=9.0) == []
    clock.now += 30
    (due,) = store.claim("hook", owner="a", limit=1, lease_s=9.0)
    assert due.attempts == 1
    store.settle(due, owner="a", error="answered 500", retry_in_s=None)
    (alert,) = store.alerts(limit=1, state="dead")
    assert {item["sink"]: (item["state"], item["error"]) for item in alert["deliveries"]} == {
        "hook": ("dead", "answered 500"),
        "file": ("pending", None),
    }
    assert store.revive(alert["id"]) == 1
    assert len(store.claim("hook", owner="a", limit=1, lease_s=9.0)) == 1


def test_no_two_claim_the_same_delivery(store):
    for i in range(12):
        store.record(exchange(f"x-{i}"))
    taken: list[int] = []

    def claim(owner: str) -> None:
        while due := store.claim("hook", owner=owner, limit=2, lease_s=60.0):
            taken.extend(item.id for item in due)

    threads = [threading.Thread(target=claim, args=(f"o{i}",)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(taken) == len(set(taken)) == 12


def test_retention_deletes_what_is_old_but_no_alert_that_is_still_on_its_way(store, clock):
    store.record(exchange("quiet", flagged=None))
    store.record(exchange("loud"))
    clock.now += 100
    store.record(exchange("new", flagged=None, created_s=clock.now))
    assert store.sweep(keep_s=50.0, lost_after_s=10.0) == 1
    assert {row["id"] for row in store.exchanges(limit=9)} == {"loud", "new"}
    for sink in ("hook", "file"):
        (due,) = store.claim(sink, owner="a", limit=9, lease_s=9.0)
        store.settle(due, owner="a", error=None, retry_in_s=None)
    assert store.sweep(keep_s=50.0, lost_after_s=10.0) == 1
    assert [row["id"] for row in store.exchanges(limit=9)] == ["new"]
    assert store.alerts(limit=9) == []


def test_an_exchange_that_was_running_when_its_process_died_is_said_to_be_interrupted(store, clock):
    store.record(exchange(state="running", finished_s=None))
    store.sweep(keep_s=None, lost_after_s=10.0)
    assert store.exchange("x-1")["state"] == "running"
    clock.now += 11
    store.sweep(keep_s=None, lost_after_s=10.0)
    assert store.exchange("x-1")["state"] == "interrupted"


def test_lists_go_on_where_they_ended_and_can_be_of_flagged_ones_alone(store):
    for i in range(4):
        store.record(exchange(f"x-{i}", flagged=2 if i % 2 else None, created_s=1000.0 + i))
    assert [row["id"] for row in store.exchanges(limit=2)] == ["x-3", "x-2"]
    assert [row["id"] for row in store.exchanges(limit=9, before_s=1002.0)] == ["x-1", "x-0"]
    assert [row["id"] for row in store.exchanges(limit=9, flagged=True)] == ["x-3", "x-1"]


def test_a_list_can_be_searched_and_shows_how_each_exchange_began_and_what_it_raised(store):
    store.record(exchange("x-0", flagged=None, created_s=1000.0, prompt="what is 100%?" + "." * 500))
    other = Verdict(3, "n", "stop", None, None, "n was not scored")
    store.record(exchange("x-1", created_s=1001.0, verdicts=(other, *exchange().verdicts)))
    ids = {
        "metric m": [row["id"] for row in store.exchanges(limit=9, metric="m")],
        "metric k": store.exchanges(limit=9, metric="k"),
        "in a prompt": [row["id"] for row in store.exchanges(limit=9, text="100%?")],
        "in an answer, in another case": [row["id"] for row in store.exchanges(limit=9, text="T2")],
        "no wildcards": store.exchanges(limit=9, text="1_0%"),
    }
    assert ids == {
        "metric m": ["x-1"],
        "metric k": [],
        "in a prompt": ["x-0"],
        "in an answer, in another case": ["x-1", "x-0"],
        "no wildcards": [],
    }
    newest, oldest = store.exchanges(limit=9)
    assert (newest["asked"], newest["answer_start"], newest["alerts"]) == ("t0t1", "t2", ["m:flag", "n:stop"])
    assert oldest["asked"] == "what is 100%?" + "." * 387
    assert oldest["alerts"] == []


def test_the_newest_policy_is_the_one_in_force(store):
    assert store.policy() is None
    for margin in (1, 2):
        store.set_policy({"margin": margin}, key_id="k")
    assert store.policy() == {"margin": 2}


def test_migrations_make_the_tables_that_the_code_has(store):
    with store._engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), Base.metadata) == []


def test_the_check_of_migrations_can_fail(store):
    with store._writer.begin() as connection:
        connection.execute(text("ALTER TABLE alerts ADD COLUMN extra INTEGER"))
    with store._engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), Base.metadata) != []


def test_a_store_of_a_newer_pilotfish_is_refused(store, url):
    with store._writer.begin() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    with pytest.raises(StoreError, match="could not be opened"):
        Store(url)


def test_a_file_of_transcripts_is_for_its_owner_alone(tmp_path):
    Store(f"sqlite:///{tmp_path / 'deep' / 's.db'}").close()
    assert stat.S_IMODE((tmp_path / "deep" / "s.db").stat().st_mode) == 0o600


@pytest.mark.parametrize("wrong", ["nonsense", "mysql://x/y", "sqlite://", "sqlite:///:memory:"])
def test_another_url_is_refused(wrong):
    with pytest.raises(SettingError, match=r"use sqlite:///FILE or postgresql://"):
        Store(wrong)


def test_a_password_is_never_in_an_error():
    with pytest.raises(StoreError) as failed:
        Store("postgresql://me:hunter2@127.0.0.1:1/none?connect_timeout=2")
    assert "hunter2" not in str(failed.value)
