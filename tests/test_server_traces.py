"""A span for each answer: what it says, what it never says, and that no receiver of spans can harm an answer."""

from __future__ import annotations

import threading

import httpx
import pytest
from opentelemetry.sdk._logs.export import InMemoryLogRecordExporter
from opentelemetry.sdk.trace.export import SpanExporter
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode
from server_kit import FLAG_ALL, receiving, running, until

from pilotfish.engines import EmbeddedEngine
from pilotfish.server import Limits
from pilotfish.server.otel import OtelSink, OtelTracer

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
SECRET = "zyzzyva"


@pytest.fixture(scope="module")
def engine(pair, bank):
    return EmbeddedEngine(pair, [bank])


def ask(server, *, flags: str = "01", trace: str = TRACE, question: str = SECRET, **more) -> httpx.Response:
    body = {"model": server.backend.info.model, "max_tokens": 6, "temperature": 0} | more
    body["messages"] = [{"role": "user", "content": question}]
    headers = {"traceparent": f"00-{trace}-{PARENT}-{flags}"}
    return httpx.post(f"{server.url}/v1/chat/completions", json=body, headers=headers, timeout=60)


def test_a_span_says_how_an_answer_went_within_the_callers_trace(engine, tmp_path):
    spans = InMemorySpanExporter()
    with running(engine, tmp_path, policy=FLAG_ALL, tracer=OtelTracer(spans)) as server:
        answer = ask(server, top_p=0.5).json()
        stored = server.store.exchange(answer["id"])
    (span,) = spans.get_finished_spans()
    assert (span.name, span.kind) == (f"chat {answer['model']}", SpanKind.SERVER)
    assert f"{span.context.trace_id:032x}" == TRACE
    assert f"{span.parent.span_id:016x}" == PARENT
    assert span.status.status_code is StatusCode.UNSET
    assert dict(span.attributes) == {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "pilotfish",
        "gen_ai.request.model": answer["model"],
        "gen_ai.request.max_tokens": 6,
        "gen_ai.request.temperature": 0.0,
        "gen_ai.request.top_p": 0.5,
        "gen_ai.response.id": answer["id"],
        "gen_ai.response.model": answer["model"],
        "gen_ai.response.finish_reasons": (answer["choices"][0]["finish_reason"],),
        "gen_ai.usage.input_tokens": answer["usage"]["prompt_tokens"],
        "gen_ai.usage.output_tokens": answer["usage"]["completion_tokens"],
        "pilotfish.tokens.scored": len(stored["tokens"]),
        "pilotfish.tokens.unscored": 0,
        "pilotfish.verdicts": len(stored["verdicts"]),
        "pilotfish.taxed_reads": stored["stats"]["num_taxed_reads"],
        "pilotfish.acceptance": stored["stats"]["acceptance"],
    }
    assert stored["verdicts"]


def test_an_alert_is_an_event_of_its_answers_span(engine, tmp_path):
    spans, events = InMemorySpanExporter(), InMemoryLogRecordExporter()
    sink = OtelSink(events)
    with running(engine, tmp_path, policy=FLAG_ALL, sinks=[sink], tracer=OtelTracer(spans)) as server:
        answer = ask(server).json()
        until(events.get_finished_logs)
    (span,), (event,) = spans.get_finished_spans(), events.get_finished_logs()
    found = event.log_record
    assert found.attributes["gen_ai.response.id"] == answer["id"]
    assert (found.trace_id, found.span_id) == (span.context.trace_id, span.context.span_id)


def test_no_attribute_of_a_span_holds_a_text(engine, tmp_path):
    spans = InMemorySpanExporter()
    with running(engine, tmp_path, policy=FLAG_ALL, tracer=OtelTracer(spans), limits=Limits()) as server:
        answer = ask(server, stop=[f"{SECRET}!"], user=SECRET).json()
        assert ask(server, question=f"{SECRET} " * 5000).status_code == 400
    said = [span.to_json() for span in spans.get_finished_spans()]
    assert len(said) == 2
    for each in said:
        assert SECRET not in each
        assert answer["choices"][0]["message"]["content"] not in each


def test_an_answer_that_cannot_begin_is_a_failed_span(engine, tmp_path):
    spans = InMemorySpanExporter()
    with running(engine, tmp_path, tracer=OtelTracer(spans)) as server:
        assert ask(server, question="long " * 5000).status_code == 400
    (span,) = spans.get_finished_spans()
    assert span.status.status_code is StatusCode.ERROR
    assert span.attributes["error.type"] == "GenerationError"
    assert "gen_ai.response.id" not in span.attributes


def test_what_the_caller_does_not_sample_is_not_sent_and_a_trace_that_cannot_be_read_begins_anew(engine, tmp_path):
    spans = InMemorySpanExporter()
    with running(engine, tmp_path, tracer=OtelTracer(spans)) as server:
        assert ask(server, flags="00").status_code == 200
        assert ask(server, trace="rubbish").status_code == 200
    (span,) = spans.get_finished_spans()
    assert span.parent is None


class Broken(SpanExporter):
    def export(self, spans):
        raise RuntimeError("the receiver is gone")


class Hanging(SpanExporter):
    def __init__(self) -> None:
        self.begun, self.release = threading.Event(), threading.Event()

    def export(self, spans):
        self.begun.set()
        self.release.wait(30)


def test_a_receiver_that_breaks_or_hangs_touches_no_answer(engine, tmp_path):
    with running(engine, tmp_path) as server:
        expected = ask(server).json()["choices"]
    with running(engine, tmp_path, tracer=OtelTracer(Broken())) as server:
        assert ask(server).json()["choices"] == expected
    hanging = Hanging()
    tracer = OtelTracer(hanging, batch_delay_s=0.001)
    with running(engine, tmp_path, tracer=tracer) as server:
        assert ask(server).json()["choices"] == expected
        assert hanging.begun.wait(30)
        assert ask(server).json()["choices"] == expected
        hanging.release.set()


def test_without_a_tracer_an_alert_names_no_trace(engine, tmp_path):
    events = InMemoryLogRecordExporter()
    with running(engine, tmp_path, policy=FLAG_ALL, sinks=[OtelSink(events)]) as server:
        ask(server)
        until(events.get_finished_logs)
    (event,) = events.get_finished_logs()
    assert event.log_record.trace_id == 0


def test_spans_go_over_http(engine, tmp_path):
    with receiving() as (url, received):
        with running(engine, tmp_path, tracer=OtelTracer.over_http(url)) as server:
            ask(server)
        assert len(received) == 1
        assert b"gen_ai.usage.input_tokens" in received[0].body
