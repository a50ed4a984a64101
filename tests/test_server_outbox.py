"""Alerts arrive at least once, signed, and none is given up in silence."""

from __future__ import annotations

import base64
import json
import time

import pytest
from opentelemetry.sdk._logs.export import InMemoryLogRecordExporter
from server_kit import FAST, receiving
from standardwebhooks import Webhook
from standardwebhooks.webhooks import WebhookVerificationError
from test_server_store import Clock, exchange

from pilotfish.errors import DeliveryError, SettingError
from pilotfish.server.otel import EVENT, OtelSink
from pilotfish.server.outbox import Courier, Retrying
from pilotfish.server.sinks import JsonlSink, WebhookSink
from pilotfish.server.store import Store

SECRET = "whsec_" + base64.b64encode(b"0123456789abcdef0123456789abcdef").decode()


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def store(tmp_path, clock):
    opened = Store(f"sqlite:///{tmp_path / 's.db'}", sinks=["hook"], clock=clock)
    yield opened
    opened.close()


class Failing:
    """A sink whose first tries fail."""

    def __init__(self, failures: int) -> None:
        self.name, self.left, self.sent = "hook", failures, []

    def deliver(self, payload) -> None:
        if self.left:
            self.left -= 1
            raise DeliveryError("not now")
        self.sent.append(payload["data"]["id"])

    def close(self) -> None:
        pass


def courier(store, sink, **retrying) -> Courier:
    return Courier(store, sink, retrying=Retrying(**retrying), jitter=lambda: 1.0)


def test_the_signature_is_what_another_implementation_of_the_standard_expects(store):
    store.record(exchange())
    with receiving() as (url, received):
        sink = WebhookSink(url, SECRET)
        assert Courier(store, WebhookSink(url, SECRET, name="hook")).deliver_due() == 1
        sink.close()
    (got,) = received
    payload = Webhook(SECRET).verify(got.body, got.headers)
    assert payload["data"]["metric"] == "m"
    with pytest.raises(WebhookVerificationError):
        Webhook(SECRET).verify(got.body.replace(b"0.4", b"0.1"), got.headers)


def test_an_alert_is_tried_until_it_arrives_and_the_receiver_can_tell_repeats(store, clock):
    store.record(exchange())
    with receiving([500, 302]) as (url, received):
        post = courier(store, WebhookSink(url, SECRET, name="hook"), first_pause_s=10.0)
        assert [post.deliver_due(), post.deliver_due()] == [1, 0]
        clock.now += 10
        assert post.deliver_due() == 1  # a redirect is not followed
        clock.now += 20
        assert post.deliver_due() == 1
        clock.now += 9999
        assert post.deliver_due() == 0
    assert len({got.headers["webhook-id"] for got in received}) == 1
    (delivery,) = store.alerts(limit=1)[0]["deliveries"]
    assert (delivery["state"], delivery["attempts"], delivery["error"]) == ("delivered", 3, None)


def test_an_unreachable_receiver_is_said_so_without_its_address(store):
    store.record(exchange())
    courier(store, WebhookSink("http://127.0.0.1:1/secret-path", SECRET, name="hook")).deliver_due()
    (delivery,) = store.alerts(limit=1)[0]["deliveries"]
    assert "could not be reached" in delivery["error"]
    assert "secret-path" not in delivery["error"]


def test_pauses_double_to_a_limit_and_the_last_try_leaves_a_dead_letter(store, clock):
    store.record(exchange())
    outcomes = []
    post = Courier(
        store,
        Failing(9),
        retrying=Retrying(first_pause_s=1.0, longest_pause_s=3.0, max_attempts=4),
        jitter=lambda: 1.0,
        on_outcome=lambda sink, outcome: outcomes.append((sink, outcome)),
    )
    waits = []
    for _ in range(4):
        assert post.deliver_due() == 1
        (delivery,) = store.alerts(limit=1)[0]["deliveries"]
        waits.append(delivery["due_s"] - clock.now)
        clock.now = max(clock.now, delivery["due_s"])
    assert waits[:3] == [1.0, 2.0, 3.0]
    assert outcomes == [("hook", "failed")] * 3 + [("hook", "dead")]
    assert store.outbox() == {("hook", "dead"): 1}


def test_jitter_takes_up_to_half_of_a_pause(store):
    for drawn, expected in ((0.0, 0.5), (1.0, 1.0)):
        assert Courier(store, Failing(1), jitter=lambda drawn=drawn: drawn)._pause_s(1) == expected


def test_what_a_process_took_and_died_with_is_delivered_by_another(store, clock):
    store.record(exchange())
    store.claim("hook", owner="died", limit=1, lease_s=60.0)
    sink = Failing(0)
    assert courier(store, sink).deliver_due() == 0
    clock.now += 60
    assert courier(store, sink).deliver_due() == 1
    assert len(sink.sent) == 1


def test_a_sink_that_breaks_in_an_unforeseen_way_does_not_end_its_courier(tmp_path):
    class Breaking(Failing):
        def deliver(self, payload) -> None:
            if self.left:
                self.left -= 1
                raise RuntimeError("a fault in the sink")
            super().deliver(payload)

    store = Store(f"sqlite:///{tmp_path / 't.db'}", sinks=["hook"])
    store.record(exchange())
    sink = Breaking(1)
    post = Courier(store, sink, retrying=Retrying(lease_s=0.1, poll_s=0.02))
    post.start()
    for _ in range(500):
        if sink.sent:
            break
        time.sleep(0.01)
    post.stop(5.0)
    assert len(sink.sent) == 1
    store.close()


def test_the_thread_delivers_what_comes_while_it_runs(tmp_path):
    store = Store(f"sqlite:///{tmp_path / 't.db'}", sinks=["file"])
    path = tmp_path / "alerts" / "all.jsonl"
    post = Courier(store, JsonlSink(path, name="file"), retrying=FAST)
    post.start()
    for i in range(3):
        store.record(exchange(f"x-{i}"))
        post.wake()
    for _ in range(500):
        if store.outbox().get(("file", "delivered")) == 3:
            break
        time.sleep(0.01)
    post.stop(5.0)
    store.close()
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert sorted(row["data"]["exchange"] for row in rows) == ["x-0", "x-1", "x-2"]


def test_a_file_that_cannot_be_written_is_a_failed_delivery(tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(DeliveryError, match="cannot be written"):
        JsonlSink(tmp_path / "folder").deliver({"data": {}})


def test_opentelemetry_gets_an_evaluation_event(store):
    store.record(exchange())
    (due,) = store.claim("hook", owner="a", limit=1, lease_s=9.0)
    exporter = InMemoryLogRecordExporter()
    OtelSink(exporter).deliver(due.payload)
    (event,) = exporter.get_finished_logs()
    assert event.log_record.event_name == EVENT
    attributes = dict(event.log_record.attributes)
    assert attributes["gen_ai.evaluation.name"] == "m"
    assert attributes["gen_ai.evaluation.score.value"] == 0.4
    assert attributes["gen_ai.response.id"] == "x-1"


def test_opentelemetry_over_http_is_confirmed_or_failed(store):
    store.record(exchange())
    (due,) = store.claim("hook", owner="a", limit=1, lease_s=9.0)
    with receiving([400]) as (url, received):
        sink = OtelSink.over_http(url)
        with pytest.raises(DeliveryError, match="did not confirm"):
            sink.deliver(due.payload)
        sink.deliver(due.payload)
        sink.close()
    assert len(received) == 2
    assert b"gen_ai.evaluation.result" in received[1].body


@pytest.mark.parametrize("secret", ["", "hunter2", "whsec_", "whsec_c2hvcnQ=", SECRET.removeprefix("whsec_")])
def test_a_weak_secret_is_refused_and_not_repeated(secret):
    with pytest.raises(SettingError) as refused:
        WebhookSink("https://example.org/x", secret)
    assert "pilotfish keys secret" in str(refused.value)
    assert "hunter2" not in str(refused.value)


@pytest.mark.parametrize("url", ["example.org/x", "ftp://example.org", "https://"])
def test_a_webhook_needs_a_web_address(url):
    with pytest.raises(SettingError, match="give https://HOST/PATH"):
        WebhookSink(url, SECRET)
