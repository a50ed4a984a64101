"""Alerts in; OpenTelemetry log events `gen_ai.evaluation.result` out, each confirmed by its receiver."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any

from opentelemetry._logs import LogRecord, SeverityNumber
from opentelemetry.exporter.otlp.proto.http._log_exporter import OTLPLogExporter
from opentelemetry.sdk._logs import ReadableLogRecord
from opentelemetry.sdk._logs.export import LogRecordExporter, LogRecordExportResult
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.util.instrumentation import InstrumentationScope

from pilotfish.errors import DeliveryError

EVENT = "gen_ai.evaluation.result"
"""Its attributes are those of the GenAI semantic conventions (open-telemetry/semantic-conventions-genai, in
development); what they have no word for stands under `pilotfish.`"""


class OtelSink:
    """Sends each alert as one log event. It exports by itself: the SDK's pipeline does not say whether one arrived."""

    def __init__(self, exporter: LogRecordExporter, *, name: str = "otel") -> None:
        self.name = name
        self._exporter = exporter
        self._resource = Resource.create({"service.name": "pilotfish"})

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
            attributes={name: value for name, value in attributes.items() if value is not None},
        )
        event = ReadableLogRecord(record, self._resource, InstrumentationScope("pilotfish"))
        if self._exporter.export([event]) is not LogRecordExportResult.SUCCESS:
            raise DeliveryError("the OpenTelemetry receiver did not confirm the event")

    def close(self) -> None:
        self._exporter.shutdown()  # type: ignore[no-untyped-call]  # the SDK leaves it unannotated
