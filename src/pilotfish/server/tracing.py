"""An answer under way in; a trace of it out, where somebody is told."""

from __future__ import annotations

from collections.abc import Mapping

from pilotfish.engines import Generation
from pilotfish.errors import PilotfishError
from pilotfish.server.backend import Call
from pilotfish.server.exchanges import Tally


class AnswerSpan:
    """One answer from request to end; this one is told to nobody."""

    traceparent: str | None = None
    """Its place in a trace (W3C Trace Context), which its alerts name."""

    def end(self, exchange_id: str, generation: Generation, found: Tally, error: PilotfishError | None) -> None:
        """The answer has ended, with an error or without."""

    def fail(self, error: BaseException) -> None:
        """There is no answer: the engine refused, had no place, or the client left."""


class Tracer:
    """Makes spans of answers; this one tells nobody."""

    def start(self, call: Call, endpoint: str, model: str, headers: Mapping[str, str]) -> AnswerSpan:
        """A request has come. `headers` may name the trace that it belongs to."""
        return AnswerSpan()

    def close(self) -> None:
        """Sends what waits, and lets go."""
