"""One HTTP request's answers in, as the engine gives them; what is said of them beside vLLM's own words out.

A route of vLLM's pulls outputs from the engine and sends chunks. Whatever was pulled since the last chunk belongs to
the next one, so nothing of the routes themselves has to be known but where a choice stands in their JSON.
"""

from __future__ import annotations

import json
from contextvars import ContextVar
from typing import Any

from pilotfish.engines import Event
from pilotfish.server.exchanges import tally, verdict_json
from pilotfish.server.report import Report, stop_of
from pilotfish.server.schemas import MonitorOptions
from pilotfish.vllm.record import Record


class Told:
    """One choice of a response."""

    def __init__(self, record: Record, name: str, options: MonitorOptions | None) -> None:
        about = record.about
        self.record, self.name = record, name
        self._report = None if options is None else Report(options, about.info, about.policy)
        self._events: list[Event] = []

    def hear(self, events: list[Event]) -> None:
        if self._report is not None:
            self._events += events

    def chunk(self, *, is_last: bool) -> dict[str, Any]:
        """What has come since the last chunk; with the last one the summary."""
        said = self._stopped() if is_last else {}
        if self._report is None:
            return said
        generation, events, self._events = self.record.generation, self._events, []
        said |= self._report.of(events, generation.num_prompt_tokens)
        return said | self._report.summary(generation, self.name, tally(generation)) if is_last else said

    def whole(self) -> dict[str, Any]:
        """All of it, for an answer in one piece."""
        if self._report is None:
            return self._stopped()
        generation = self.record.generation
        return self._report.whole(generation, self.name, tally(generation))

    def _stopped(self) -> dict[str, Any]:
        """Why the answer was stopped: said to every client that it happens to."""
        stop = stop_of(self.record.generation) if self.record.stopped_by else None
        return {"verdicts": [verdict_json(stop)]} if stop is not None else {}


class Asked:
    """What a client wants to hear, and of which choices there is something to say."""

    def __init__(self, options: MonitorOptions | None) -> None:
        self._options = options
        self._told: dict[int, Told] = {}
        self._num_prompts = 0

    @property
    def wants_events(self) -> bool:
        return self._options is not None

    def next_prompt(self) -> int:
        """Routes ask the engine once for each prompt, in order."""
        self._num_prompts += 1
        return self._num_prompts - 1

    def told(self, choice: int, record: Record, name: str) -> Told:
        if choice not in self._told:
            self._told[choice] = Told(record, name, self._options)
        return self._told[choice]

    def edited(self, body: dict[str, Any], *, is_chunk: bool) -> dict[str, Any]:
        """A response's JSON with the monitor's word in it."""
        for choice in body.get("choices") or ():
            told = self._told.get(choice.get("index", 0))
            if told is None:
                continue
            is_last = choice.get("finish_reason") is not None
            said = told.chunk(is_last=is_last) if is_chunk else told.whole()
            if is_last and told.record.stopped_by:
                choice["finish_reason"] = "content_filter"
            if said:
                choice["monitor"] = said
        whole = body if body.get("object") == "response" else body.get("response")
        if isinstance(whole, dict) and whole.get("status") not in {None, "queued", "in_progress"} and 0 in self._told:
            whole["monitor"] = self._told[0].whole()
        elif str(body.get("type", "")).endswith(".delta") and 0 in self._told:
            body["monitor"] = self._told[0].chunk(is_last=False)
        return body

    def edited_event(self, event: bytes) -> bytes:
        """One server-sent event."""
        lines = event.split(b"\n")
        for number, line in enumerate(lines):
            if line.startswith(b"data: {"):
                body = self.edited(json.loads(line[6:]), is_chunk=True)
                lines[number] = b"data: " + _json(body)
        return b"\n".join(lines)

    def edited_body(self, body: bytes) -> bytes:
        """A response in one piece."""
        try:
            said = json.loads(body)
        except ValueError:
            return body
        return _json(self.edited(said, is_chunk=False)) if isinstance(said, dict) and self._told else body


def _json(value: dict[str, Any]) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()


current: ContextVar[Asked | None] = ContextVar("pilotfish_asked", default=None)
"""Of the HTTP request in whose context the engine is asked."""
