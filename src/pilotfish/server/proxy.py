"""Another OpenAI-compatible server as this server's engine, with a small model that reads along."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from typing import TypeVar

from pilotfish.actions import Policy
from pilotfish.core import Message
from pilotfish.engines import Event, Generation
from pilotfish.engines.records import FinishReason
from pilotfish.errors import Busy, EngineFailed, PilotfishError, SettingError
from pilotfish.heads import HeadBank
from pilotfish.models import LoadedModel
from pilotfish.server.backend import Call, Ended, EngineInfo, HeadInfo, ScoredText, until_ended
from pilotfish.server.proxy_exchange import Beside, ReadExchange, cannot_judge
from pilotfish.server.steering import ELSEWHERE
from pilotfish.server.upstream import Arrival, Upstream

T = TypeVar("T")

logger = logging.getLogger(__name__)

LONGEST_RETRY_S = 60.0
MOST_ARRIVALS = 1024
"""Pieces of an answer that may wait to be read; the upstream waits then."""
LINGER_S = 0.2
_SMOOTHING = 0.2
"""Weight of the newest duration in the running mean that Retry-After is made from."""


class ProxyBackend:
    """Hands requests on to an upstream, and its answers back as they are read.

    All reading happens on one thread, up to 512 tokens of a stream in a turn: whatever has come of an answer since its
    last turn is read in one pass.
    """

    def __init__(
        self,
        upstream: Upstream,
        reader: LoadedModel,
        bank: HeadBank,
        *,
        max_streams: int = 8,
        max_queue: int = 32,
        score_limit_s: float | None = None,
    ) -> None:
        """Raises `BankMismatch` for a bank that was made for another reader."""
        bank.check(reader.identity)
        self.upstream, self.beside = upstream, Beside(reader, bank, score_limit_s)
        self._max_jobs, self._places = max_streams + max_queue, asyncio.Semaphore(max_streams)
        self._num_jobs = self._num_running = 0
        self._streams: set[ProxyStream] = set()
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="reader")
        self._loop: asyncio.AbstractEventLoop | None = None
        self._is_closing = False
        self._mean_s, self._max_streams = 1.0, max_streams
        self._info = _describe(upstream, self.beside)

    @property
    def info(self) -> EngineInfo:
        return self._info

    @property
    def load(self) -> tuple[int, int]:
        return self._num_running, self._num_jobs - self._num_running

    async def check(self, policy: Policy) -> None:
        for rule in policy.rules:
            why = cannot_judge(rule)
            if why is not None:
                raise SettingError(
                    f"the rule for {rule.metric!r} cannot be carried out behind a proxy: {why}, and there is the text "
                    "alone; use observe, flag, hold, stop or redact"
                )
        if policy.asks_signals:
            raise SettingError("the policy is about a second signal, but a proxy has one model alone; name a head")
        bank = self.beside.bank
        policy.check(bank.metrics, set(bank.metrics) - set(bank.thresholds), has_draft=False)

    def submit(self, call: Call) -> ProxyStream:
        """Raises `SettingError` for a call that steers."""
        if call.steering:
            raise SettingError(f"steering along {call.steering[0].name!r} cannot be carried out: {ELSEWHERE}")
        self._loop = asyncio.get_running_loop()
        self._take_seat()
        stream = ProxyStream(self, call)
        self._streams.add(stream)
        return stream

    async def score(self, texts: Sequence[tuple[Message, ...]]) -> list[ScoredText]:
        self._take_seat()
        try:
            async with self.place():
                return [
                    await self.on_reader(partial(self.beside.score, text, f"text {i}")) for i, text in enumerate(texts)
                ]
        finally:
            self._num_jobs -= 1

    def close(self) -> None:
        """Ends what still runs; not to be called on the event loop's own thread."""
        self._is_closing = True
        if self._loop is not None and self._loop.is_running():
            asyncio.run_coroutine_threadsafe(self._end(), self._loop).result()
        self._reader.shutdown(cancel_futures=True)

    async def _end(self) -> None:
        for stream in tuple(self._streams):
            stream.cancel()
        while self._streams:
            await asyncio.wait([stream.task for stream in self._streams])
        await self.upstream.close()

    def _take_seat(self) -> None:
        if self._is_closing or self._num_jobs >= self._max_jobs:
            ahead = (self._num_jobs - self._num_running + 1) / self._max_streams
            raise Busy(min(LONGEST_RETRY_S, max(1.0, math.ceil(self._mean_s * ahead))))
        self._num_jobs += 1

    # What a stream asks.

    @contextlib.asynccontextmanager
    async def place(self) -> AsyncIterator[None]:
        """Waits for one of the places."""
        async with self._places:
            self._num_running += 1
            started = time.monotonic()
            try:
                yield
            finally:
                self._num_running -= 1
                self._mean_s += _SMOOTHING * (time.monotonic() - started - self._mean_s)

    async def on_reader(self, work: Callable[[], T]) -> T:
        """Does something on the reader's thread, in its turn."""
        return await asyncio.get_running_loop().run_in_executor(self._reader, work)

    def leave(self, stream: ProxyStream) -> None:
        """Gives a stream's seat back."""
        self._streams.discard(stream)
        self._num_jobs -= 1


class ProxyStream:
    """One answer of the upstream's under way."""

    def __init__(self, backend: ProxyBackend, call: Call) -> None:
        self._backend, self._call = backend, call
        self._items: asyncio.Queue[list[Event] | Ended] = asyncio.Queue()
        self._generation: Generation | None = None
        self._error: PilotfishError | None = None
        self._is_open = asyncio.Event()
        """Set once the upstream answers, or it is known that it will not."""
        self.task = asyncio.get_running_loop().create_task(self._run())
        self.task.add_done_callback(self._ended)

    async def opened(self) -> Generation:
        await self._is_open.wait()
        if self._generation is None:
            raise self._error or EngineFailed("the request was cancelled before it began")
        return self._generation

    def __aiter__(self) -> AsyncIterator[list[Event]]:
        return until_ended(self._items)

    def cancel(self) -> None:
        """Ends the upstream's request too."""
        self.task.cancel()

    def _ended(self, task: asyncio.Task[None]) -> None:
        error = None if task.cancelled() else task.exception()
        if error is not None and not isinstance(error, PilotfishError):
            logger.error("the proxy failed", exc_info=error)
            error = EngineFailed(f"the proxy failed ({type(error).__name__}); the server's log says more")
        self._error = error
        self._items.put_nowait(Ended(error))
        self._is_open.set()
        self._backend.leave(self)

    async def _run(self) -> None:
        backend, call = self._backend, self._call
        if call.request.signals:
            raise SettingError("second signals need a target and a draft; behind a proxy there are none")
        async with backend.place():
            exchange = await backend.on_reader(partial(ReadExchange, backend.beside, call))
            if exchange.holds:  # so that a prompt that is stopped never leaves this machine
                await self._read(exchange)
            if not exchange.is_over:
                await self._answered(exchange)
            self._open(exchange)

    async def _answered(self, exchange: ReadExchange) -> None:
        arrivals: asyncio.Queue[Arrival | PilotfishError] = asyncio.Queue(MOST_ARRIVALS)
        fetching = asyncio.create_task(self._fetch(exchange, arrivals))
        try:
            await self._read(exchange)
            ending = None
            while not exchange.is_over:
                text, ending, error = await _gathered(arrivals, exchange)
                if text or ending is not None:
                    self._items.put_nowait(await self._backend.on_reader(partial(exchange.push, text, ending)))
                    await self._read(exchange)
                if error is not None and not exchange.is_over:
                    raise error
            if ending is not None:  # the stream's own end follows, and then its connection can be used again
                await asyncio.wait([fetching], timeout=LINGER_S)
        finally:
            fetching.cancel()
            await asyncio.wait([fetching])

    async def _fetch(self, exchange: ReadExchange, arrivals: asyncio.Queue[Arrival | PilotfishError]) -> None:
        try:
            async with self._backend.upstream.answering(self._call) as pieces:
                self._open(exchange)
                async for piece in pieces:
                    await arrivals.put(piece)
        except PilotfishError as error:
            await arrivals.put(error)
        except Exception as error:
            logger.exception("the upstream's answer could not be read")
            await arrivals.put(EngineFailed(f"the proxy failed ({type(error).__name__}); the server's log says more"))

    async def _read(self, exchange: ReadExchange) -> None:
        """Until the reader has read all that is final."""
        while exchange.is_behind:
            self._items.put_nowait(await self._backend.on_reader(exchange.read))
            if exchange.generation.verdicts:  # whatever becomes of the answer, its alerts are kept
                self._open(exchange)

    def _open(self, exchange: ReadExchange) -> None:
        self._generation = exchange.generation
        self._is_open.set()


async def _gathered(
    arrivals: asyncio.Queue[Arrival | PilotfishError], exchange: ReadExchange
) -> tuple[str, FinishReason | None, PilotfishError | None]:
    """All that has come: the text, why it ends, and what went wrong after it."""
    items = [await arrivals.get()]
    while not arrivals.empty():
        items.append(arrivals.get_nowait())
    pieces = [item for item in items if isinstance(item, Arrival)]
    for name in dict.fromkeys(name for piece in pieces for name in piece.dropped):
        exchange.note(f"the upstream sent {name}, which is neither read nor handed on")
    ending = next((piece.ending for piece in pieces if piece.ending is not None), None)
    error = next((item for item in items if isinstance(item, PilotfishError)), None)
    return "".join(piece.text for piece in pieces), ending if error is None else None, error


def _describe(upstream: Upstream, beside: Beside) -> EngineInfo:
    bank = beside.bank
    heads = tuple(
        HeadInfo(
            metric=metric,
            reader="draft",
            threshold=bank.thresholds.get(metric),
            card=asdict(bank.card.subset([metric])),
        )
        for metric in bank.metrics
    )
    return EngineInfo(model=upstream.model, draft=beside.name, max_tokens=beside.max_tokens, heads=heads, is_taxed=True)
