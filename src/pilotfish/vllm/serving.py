"""Outputs on their way to a client in; the same ones, recorded, counted and reported, out."""

from __future__ import annotations

import functools
import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

from pilotfish.engines.records import FinishReason
from pilotfish.vllm import asked
from pilotfish.vllm.archive import Archive, exchange_of
from pilotfish.vllm.compat import wrapped
from pilotfish.vllm.frontend import record_of
from pilotfish.vllm.http import MonitorMiddleware
from pilotfish.vllm.metrics import metrics
from pilotfish.vllm.record import Record
from pilotfish.vllm.settings import VllmSettings


def install(settings: VllmSettings) -> None:
    """Wraps the engine that API servers ask, and puts a middleware before their routes."""
    import vllm.entrypoints.launchers.app
    from vllm.v1.engine.async_llm import AsyncLLM

    archive = functools.cache(lambda: None if settings.store is None else Archive(settings))

    def telling(generate: Any) -> Any:
        @functools.wraps(generate)
        def told(self: Any, prompt: Any, sampling_params: Any, request_id: str, **kwargs: Any) -> AsyncIterator[Any]:
            outputs = generate(self, prompt, sampling_params, request_id, **kwargs)
            return Exchanges(request_id, sampling_params, archive(), counts=settings.metrics).of(outputs)

        return told

    def opened(middlewares: Any) -> Any:
        @functools.wraps(middlewares)
        def init(args: Any, app: Any, *rest: Any) -> None:
            middlewares(args, app, *rest)
            app.add_middleware(MonitorMiddleware)
            archive()  # a store that cannot be opened is found before the first request

        return init

    wrapped(AsyncLLM, "generate", telling)
    wrapped(vllm.entrypoints.launchers.app, "init_entrypoints_middleware", opened)


class Exchanges:
    """The answers to one prompt."""

    def __init__(self, request_id: str, sampling_params: Any, archive: Archive | None, *, counts: bool) -> None:
        self._request_id, self._archive, self._counts = request_id, archive, counts
        self._num_answers = sampling_params.n
        self._has_deltas = sampling_params.output_kind.name == "DELTA"
        self._asked = asked.current.get()
        self._prompt = 0 if self._asked is None else self._asked.next_prompt()
        self._created_s = time.time()
        self._records: dict[int, Record] = {}
        """By choice; those that have ended are taken out."""
        self._num_sent: dict[int, int] = {}
        self._num_flags: dict[int, int] = {}
        """Kinds of verdicts that are in the store."""

    async def of(self, outputs: Any) -> AsyncIterator[Any]:
        """Passes outputs on, each after the alerts that it gives rise to are in the store."""
        try:
            async with aclosing(outputs):
                async for output in outputs:
                    for completion in output.outputs:
                        await self._hear(completion)
                    yield output
        finally:
            for choice, record in self._records.items():  # the client has gone, or the engine has failed
                if self._counts:
                    metrics().count(record)
                if self._archive is not None:
                    record.finish(None)
                    await self._archive.keep(self._exchange(choice, record, "cancelled"))

    async def _hear(self, completion: Any) -> None:
        record, choice = record_of(completion), completion.index
        if record is None:
            return
        self._records[choice] = record
        is_done = completion.finish_reason is not None
        before = self._num_sent.get(choice, 0) if self._has_deltas else 0
        self._num_sent[choice] = before + len(completion.token_ids)
        if self._asked is not None:
            told = self._asked.told(self._prompt * self._num_answers + choice, record, self._name(choice))
            if self._asked.wants_events:
                told.hear(record.advance(None if is_done else self._num_sent[choice]))
        if self._archive is not None and not is_done and len(record.first_flags) > self._num_flags.get(choice, 0):
            record.advance(self._num_sent[choice])
            await self._archive.keep(self._exchange(choice, record, "running"))
            self._num_flags[choice] = len(record.first_flags)
        if is_done:
            await self._end(choice, completion, record)

    async def _end(self, choice: int, completion: Any, record: Record) -> None:
        del self._records[choice]
        if self._counts:
            metrics().count(record)
        is_asked = self._asked is not None and (self._asked.wants_events or record.stopped_by)
        if self._archive is None and not is_asked:
            return
        record.finish(_reason(completion))
        if self._archive is not None:
            state = "cancelled" if completion.finish_reason == "abort" else "done"
            await self._archive.keep(self._exchange(choice, record, state))

    def _exchange(self, choice: int, record: Record, state: Any) -> Any:
        return exchange_of(record, self._name(choice), self._created_s, state)

    def _name(self, choice: int) -> str:
        return self._request_id if self._num_answers == 1 else f"{self._request_id}-{choice}"


def _reason(completion: Any) -> FinishReason | None:
    """vLLM's reasons in the engine's words."""
    if completion.finish_reason == "stop":
        return "stop_string" if isinstance(completion.stop_reason, str) else "eos"
    return "length" if completion.finish_reason == "length" else None
