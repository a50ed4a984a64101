"""An engine's events in; the same events out once whatever they raise is in the store.

The order is the promise: a verdict's alert is committed before any event that the engine gave after it leaves, so
whoever has seen a later token can find the alert, whatever happens to the process.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple
from uuid import uuid4

from pilotfish.engines import Event, Generation, TokenEvent, VerdictEvent
from pilotfish.errors import EngineFailed, PilotfishError
from pilotfish.server.backend import Call, EventStream, ServedEngine
from pilotfish.server.exchanges import Exchange, State, Tally, is_wished, tally
from pilotfish.server.outbox import Courier
from pilotfish.server.steering import steering_json
from pilotfish.server.store import Store
from pilotfish.server.telemetry import Telemetry
from pilotfish.server.tracing import AnswerSpan, Tracer

logger = logging.getLogger(__name__)


class TimedOut(PilotfishError):
    """An answer that took longer than the server allows."""


class _Ended(NamedTuple):
    error: PilotfishError | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """Who asked for what."""

    call: Call
    endpoint: str
    prefix: str
    """Of the exchange's id, as OpenAI's clients know it."""
    key_id: str | None
    headers: Mapping[str, str] = field(default_factory=dict)
    """Of the request: they may name the trace that it belongs to."""


class Desk:
    """Where answers are begun: the engine, the store and what counts and traces them."""

    def __init__(
        self, engine: ServedEngine, store: Store, telemetry: Telemetry, tracer: Tracer, *, timeout_s: float
    ) -> None:
        self.engine, self.store, self.telemetry, self.tracer = engine, store, telemetry, tracer
        self.timeout_s = timeout_s
        self.couriers: list[Courier] = []
        self._pumps: set[asyncio.Task[None]] = set()
        self._executor = ThreadPoolExecutor(8 if store.takes_parallel_writes else 1, thread_name_prefix="store")

    async def begin(self, asked: Asked) -> Answer:
        """Takes a place in the engine and waits until it has begun.

        Raises:
            Busy: there is none.
            PilotfishError: the engine refuses the request.
            TimedOut: it waited too long.
        """
        started = time.monotonic()
        span = self.tracer.start(asked.call, asked.endpoint, self.engine.info.model, asked.headers)
        try:
            traceparent = span.traceparent or asked.headers.get("traceparent")
            stream = self.engine.submit(replace(asked.call, traceparent=traceparent))
            generation = await self._opened(stream)
        except BaseException as error:  # also when the client has gone
            span.fail(error)
            raise
        answer = Answer(self, stream, generation, asked, span, started=started)
        task = asyncio.create_task(answer.pump())
        self._pumps.add(task)
        task.add_done_callback(self._pumps.discard)
        return answer

    async def _opened(self, stream: EventStream) -> Generation:
        try:
            async with asyncio.timeout(self.timeout_s):
                return await stream.opened()
        except TimeoutError:
            stream.cancel()
            raise TimedOut(f"no place came free within {self.timeout_s:.0f} s; try again later") from None
        except BaseException:
            stream.cancel()
            raise

    async def in_store(self, call: Any, *arguments: Any, **options: Any) -> Any:
        """Runs one of the store's blocking methods beside the event loop."""
        return await asyncio.get_running_loop().run_in_executor(self._executor, lambda: call(*arguments, **options))

    async def record(self, exchange: Exchange) -> None:
        """Commits an exchange; its new alerts are on their way then."""
        started = time.monotonic()
        recorded = await self.in_store(self.store.record, exchange)
        self.telemetry.observe_record(time.monotonic() - started)
        if recorded.alert_ids:
            for courier in self.couriers:
                courier.wake()

    async def drain(self) -> None:
        """Waits until every exchange that was begun is in the store."""
        while self._pumps:
            await asyncio.wait(tuple(self._pumps))
        self._executor.shutdown()


class Answer:
    """One exchange under way. Iterate it once for batches of events that may leave."""

    def __init__(
        self, desk: Desk, stream: EventStream, generation: Generation, asked: Asked, span: AnswerSpan, *, started: float
    ) -> None:
        self._desk, self._stream, self._asked, self._span, self._started = desk, stream, asked, span, started
        self.generation = generation
        self.tally = Tally(0, {}, {})
        """Of the whole generation, once it has ended."""
        self.id = f"{asked.prefix}-{uuid4().hex}"
        self.created_s = time.time()
        self._out: asyncio.Queue[Event | _Ended] = asyncio.Queue()
        self._known: set[tuple[str, str]] = set()
        self._last_sent = -1
        """Position of the last token that was let through."""

    def cancel(self) -> None:
        """Nobody reads on: the engine's place goes to the next, what is known is still recorded."""
        self._stream.cancel()

    async def __aiter__(self) -> AsyncIterator[list[Event]]:
        """Whatever has come since the last batch.

        Raises:
            PilotfishError: the engine or the store failed, or time ran out; nothing follows.
        """
        while True:
            items = [await self._out.get()]
            while not self._out.empty():
                items.append(self._out.get_nowait())
            last = items[-1]
            events = [item for item in items if not isinstance(item, _Ended)]
            if events:
                yield events
            if isinstance(last, _Ended):
                if last.error is not None:
                    raise last.error
                return

    async def pump(self) -> None:
        """Carries the engine's events over; ends with the exchange in the store, or with an error for the reader."""
        error: PilotfishError | None = None
        try:
            async with asyncio.timeout(self._desk.timeout_s - (time.monotonic() - self._started)):
                async for batch in self._stream:
                    for event in batch:
                        await self._let_through(event)
        except TimeoutError:
            error = TimedOut(f"the answer took longer than {self._desk.timeout_s:.0f} s and was ended")
        except PilotfishError as failure:
            error = failure
        except Exception as failure:
            logger.exception("an exchange failed")
            error = EngineFailed(f"the exchange failed ({type(failure).__name__}); the server's log says more")
        finally:
            self._stream.cancel()
        try:
            await self._desk.record(self._exchange(error))
        except PilotfishError as failure:  # an answer that cannot be recorded is not handed out as complete
            logger.warning("%s: %s", self.id, failure)
            error = error or failure
        self.tally = tally(self.generation)
        self._count(error)
        self._span.end(self.id, self.generation, self.tally, error)
        self._out.put_nowait(_Ended(error))

    async def _let_through(self, event: Event) -> None:
        if isinstance(event, VerdictEvent):
            verdict = event.verdict
            is_new = (verdict.metric, verdict.action) not in self._known
            if is_new and not is_wished(verdict, self._asked.call.own_rules):
                self._known.add((verdict.metric, verdict.action))
                await self._desk.record(replace(self._exchange(None), state="running", finished_s=None))
                self._desk.telemetry.count_flag(verdict, lag=max(0, self._last_sent + 1 - verdict.position))
        elif isinstance(event, TokenEvent):
            if self._last_sent < 0:
                self._desk.telemetry.observe_first_token(time.monotonic() - self._started)
            self._last_sent = event.token.position
        self._out.put_nowait(event)

    def _exchange(self, error: PilotfishError | None) -> Exchange:
        """What is known now. The engine may be ahead of what was let through; its records are never behind."""
        generation = self.generation
        finish = generation.finish_reason
        state: State = "failed" if error is not None else "cancelled" if finish is None else "done"
        tokens = tuple(generation.tokens)
        return Exchange(
            id=self.id,
            created_s=self.created_s,
            finished_s=time.time(),
            endpoint=self._asked.endpoint,
            model=self._desk.engine.info.model,
            key_id=self._asked.key_id,
            state=state,
            finish_reason=finish,
            prompt=generation.prompt,
            tokens=tokens,
            num_prompt_tokens=generation.num_prompt_tokens,
            rounds=tuple(generation.rounds),
            verdicts=tuple(generation.verdicts),
            stats=_stats(generation, error) | {"steering": steering_json(self._asked.call.steering, generation)},
            own_rules=self._asked.call.own_rules,
            traceparent=self._span.traceparent,
        )

    def _count(self, error: PilotfishError | None) -> None:
        finish = self.generation.finish_reason or ("error" if error is not None else "abort")
        seconds = time.monotonic() - self._started
        self._desk.telemetry.count_generation(self.generation, self.tally, seconds=seconds, finish=finish)
        if error is not None:
            self._desk.telemetry.count_error(type(error).__name__)


def _stats(generation: Generation, error: PilotfishError | None) -> dict[str, Any]:
    found = tally(generation)
    return {
        "highest": dict(found.in_answer),
        "highest_prompt": dict(found.in_prompt),
        "seconds": generation.seconds,
        "acceptance": generation.acceptance,
        "num_taxed_reads": generation.num_taxed_reads,
        "notes": list(generation.notes),
        "error": str(error) if error is not None else None,
    }
