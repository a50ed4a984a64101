"""Alerts in, OpenTelemetry log events `gen_ai.evaluation.result` out, each confirmed by its receiver; answers in, a
span each out.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any

from opentelemetry._logs import LogRecord, SeverityNumber
from opentelemetry.exporter.otlp.proto.http._log_exporter import OTLPLogExporter
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk._logs import ReadableLogRecord
from opentelemetry.sdk._logs.export import LogRecordExporter, LogRecordExportResult
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import Span, SpanKind, StatusCode, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from pilotfish.engines import Generation
from pilotfish.errors import DeliveryError, PilotfishError
from pilotfish.server.backend import Call
from pilotfish.server.exchanges import Tally
from pilotfish.server.report import finish_of, usage_of
from pilotfish.server.tracing import AnswerSpan, Tracer

EVENT = "gen_ai.evaluation.result"
"""Its attributes are those of the GenAI semantic conventions (open-telemetry/semantic-conventions-genai, in
development); what they have no word for stands under `pilotfish.`"""
OPERATIONS = {"chat.completions": "chat", "completions": "text_completion"}
_TRACE = TraceContextTextMapPropagator()


class OtelSink:
    """Sends each alert as one log event. It exports by itself: the SDK's pipeline does not say whether one arrived."""

    def __init__(self, exporter: LogRecordExporter, *, name: str = "otel") -> None:
        self.name = name
        self._exporter = exporter
        self._resource = _resource()

    @classmethod
    def over_http(cls, endpoint: str, *, timeout_s: float = 10.0) -> OtelSink:
        """To an OTLP receiver, for example http://localhost:4318/v1/logs."""
        return cls(OTLPLogExporter(endpoint=endpoint, timeout=timeout_s))

    def deliver(self, payload: Mapping[str, Any]) -> None:
        data = payload["data"]
        attributes = {
            "gen_ai.evaluation.name": data["metric"],
            "gen_ai.evaluation.score.value": data["score"],
            "gen_ai.evaluation.score.label": data["action"],
            "gen_ai.evaluation.explanation": data["reason"],
            "gen_ai.response.id": data["exchange"],
            "gen_ai.response.model": data["model"],
            "pilotfish.alert.id": data["id"],
            "pilotfish.token.position": data["position"],
            "pilotfish.threshold": data["threshold"],
        }
        time_ns = int(datetime.fromisoformat(payload["timestamp"]).timestamp() * 1e9)
        record = LogRecord(
            timestamp=time_ns,
            observed_timestamp=time_ns,
            severity_number=SeverityNumber.WARN,
            event_name=EVENT,
            attributes=_given(attributes),
            context=_TRACE.extract({"traceparent": data.get("traceparent", "")}),
        )
        event = ReadableLogRecord(record, self._resource, InstrumentationScope("pilotfish"))
        if self._exporter.export([event]) is not LogRecordExportResult.SUCCESS:
            raise DeliveryError("the OpenTelemetry receiver did not confirm the event")

    def close(self) -> None:
        self._exporter.shutdown()  # type: ignore[no-untyped-call]  # the SDK leaves it unannotated


class OtelTracer(Tracer):
    """One server span an answer. A thread of its own sends them: a receiver that is slow or gone costs spans alone."""

    def __init__(self, exporter: SpanExporter, *, batch_delay_s: float = 5.0) -> None:
        """`batch_delay_s` is how long spans wait for others to be sent with."""
        self._provider = TracerProvider(resource=_resource(), shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(exporter, schedule_delay_millis=1000 * batch_delay_s))
        self._tracer = self._provider.get_tracer("pilotfish")

    @classmethod
    def over_http(cls, endpoint: str, *, timeout_s: float = 10.0) -> OtelTracer:
        """To an OTLP receiver, for example http://localhost:4318/v1/traces."""
        return cls(OTLPSpanExporter(endpoint=endpoint, timeout=timeout_s))

    def start(self, call: Call, endpoint: str, model: str, headers: Mapping[str, str]) -> AnswerSpan:
        operation, sampling = OPERATIONS[endpoint], call.request.sampling
        attributes = {
            "gen_ai.operation.name": operation,
            "gen_ai.provider.name": "pilotfish",
            "gen_ai.request.model": model,
            "gen_ai.request.max_tokens": call.request.max_new_tokens,
            "gen_ai.request.temperature": sampling.temperature,
            "gen_ai.request.top_p": sampling.top_p,
        }
        parent = _TRACE.extract({name: headers[name] for name in _TRACE.fields if name in headers})
        kind = SpanKind.SERVER
        return _OtelSpan(self._tracer.start_span(f"{operation} {model}", parent, kind, _given(attributes)), model)

    def close(self) -> None:
        self._provider.shutdown()


class _OtelSpan(AnswerSpan):
    def __init__(self, span: Span, model: str) -> None:
        self._span, self._model = span, model
        carrier: dict[str, str] = {}
        _TRACE.inject(carrier, set_span_in_context(span))
        self.traceparent = carrier.get("traceparent")  # there is none where the SDK is switched off

    def end(self, exchange_id: str, generation: Generation, found: Tally, error: PilotfishError | None) -> None:
        usage, is_over = usage_of(generation), generation.finish_reason is not None
        attributes = {
            "gen_ai.response.id": exchange_id,
            "gen_ai.response.model": self._model,
            "gen_ai.response.finish_reasons": [finish_of(generation)] if is_over else None,
            "gen_ai.usage.input_tokens": usage["prompt_tokens"],
            "gen_ai.usage.output_tokens": usage["completion_tokens"],
            "pilotfish.tokens.scored": found.num_scored,
            "pilotfish.tokens.unscored": len(generation.tokens) - found.num_scored,
            "pilotfish.verdicts": len(generation.verdicts),
            "pilotfish.taxed_reads": generation.num_taxed_reads,
            "pilotfish.acceptance": generation.acceptance,
        }
        self._span.set_attributes(_given(attributes))
        if error is not None:
            self._fail(error)
        self._span.end()

    def fail(self, error: BaseException) -> None:
        self._fail(error)
        self._span.end()

    def _fail(self, error: BaseException) -> None:
        """By its kind alone: an error's words may quote a text."""
        self._span.set_attribute("error.type", type(error).__name__)
        self._span.set_status(StatusCode.ERROR)


def _resource() -> Resource:
    return Resource.create({"service.name": "pilotfish"})


def _given(attributes: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in attributes.items() if value is not None}
