"""The embedded engine as a server's engine: one thread that decodes all answers together.

A request joins the others between two rounds of speculation and leaves whenever it ends. All that touches models or
tokenizer happens on that thread: taps hang on the models themselves, so two passes at once would read one another's
states.
"""

from __future__ import annotations

import asyncio
import logging
import math
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import asdict, replace
from typing import Any, Generic, NamedTuple, Protocol, TypeVar, runtime_checkable

from pilotfish.actions import Policy
from pilotfish.core import Conversation, Message, TokenScore
from pilotfish.engines import Batch, EmbeddedEngine, Event, Generation, GenerationStream, Progress, Request
from pilotfish.errors import Busy, EngineFailed, GenerationError, PilotfishError, TextError
from pilotfish.scores import score_tokens
from pilotfish.server.backend import Call, DirectionInfo, Ended, EngineInfo, HeadInfo, ScoredText, until_ended
from pilotfish.server.steering import AllowList
from pilotfish.steering import Direction
from pilotfish.texts import Rendered, encode, tokenize
from pilotfish.texts.conversations import check_encodable

T = TypeVar("T")

logger = logging.getLogger(__name__)

LONGEST_RETRY_S = 60.0
_SMOOTHING = 0.2
"""Weight of the newest duration in the running mean that Retry-After is made from."""


class _Opened(NamedTuple):
    generation: Generation


_Item = _Opened | list[Event] | Ended


@runtime_checkable
class _Job(Protocol):
    """Work that is done in turns."""

    cancelled: bool

    def turn(self) -> bool:
        """Does a little; returns whether there is more to do."""

    def end(self, error: PilotfishError | None) -> None:
        """Tells whoever waits that nothing more comes."""


class EmbeddedBackend:
    """Serves an `EmbeddedEngine`: up to `max_streams` generations together, the rest in a queue."""

    def __init__(
        self,
        engine: EmbeddedEngine,
        *,
        max_streams: int = 8,
        max_queue: int = 32,
        directions: Sequence[Direction] = (),
        max_dose: float = 1.0,
    ) -> None:
        """Serves an engine; clients may steer its target along `directions`.

        Args:
            max_dose: what they may ask for at most, in calibrated doses.

        Raises:
            SettingError: more streams than a `Batch` takes, or directions that cannot be served (`AllowList`).
            DirectionMismatch: one was made for another model than the target.
        """
        self._engine = engine
        self._allowed = AllowList(directions, engine.pair.target_identity, max_dose=max_dose)
        self._batch = Batch(max_streams=max_streams)
        self._decoding: dict[GenerationStream, EmbeddedStream] = {}
        self._max_streams, self._max_queue = max_streams, max_queue
        self._waiting: deque[_Job] = deque()
        self._running: list[_Job] = []
        self._condition = threading.Condition()
        self._closing = False
        self._mean_s = 1.0
        self._info = _describe(engine, self._allowed.infos)
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @property
    def info(self) -> EngineInfo:
        return self._info

    @property
    def load(self) -> tuple[int, int]:
        return len(self._running), len(self._waiting)

    async def check(self, policy: Policy) -> None:
        def checked() -> Iterator[GenerationStream]:
            yield self._engine.stream("policy", Request(max_new_tokens=1, policy=policy))  # never iterated

        await self._do(checked())

    def submit(self, call: Call) -> EmbeddedStream:
        stream = EmbeddedStream(self, call)
        self._enqueue(stream)
        return stream

    async def score(self, texts: Sequence[tuple[Message, ...]]) -> list[ScoredText]:
        return await self._do(_score_text(self._engine, text, f"text {i}") for i, text in enumerate(texts))

    async def _do(self, work: Iterator[T]) -> list[T]:
        job = _Work(work)
        self._enqueue(job)
        try:
            return await job.future
        finally:
            job.cancelled = True

    def close(self) -> None:
        with self._condition:
            self._closing = True
            self._condition.notify()
        self._thread.join()

    def _enqueue(self, job: _Job) -> None:
        with self._condition:
            num_jobs = len(self._running) + len(self._waiting)
            if self._closing or num_jobs >= self._max_streams + self._max_queue:
                ahead = (len(self._waiting) + 1) / self._max_streams
                raise Busy(min(LONGEST_RETRY_S, max(1.0, math.ceil(self._mean_s * ahead))))
            self._waiting.append(job)
            self._condition.notify()

    def _drop(self, job: _Job) -> None:
        """Frees the seat of a job that still waits."""
        with self._condition:
            if job not in self._waiting:
                return
            self._waiting.remove(job)
        job.end(None)

    # On the engine's thread.

    def _run(self) -> None:
        while self._admit():
            for job in tuple(self._running):
                if self._closing:
                    job.cancelled = True
                if not self._turn(job):
                    self._remove(job)
            self._step()

    def _admit(self) -> bool:
        """Fills free places from the queue, waiting for work; False when the backend is to end."""
        with self._condition:
            while not (self._running or self._waiting or self._closing):
                self._condition.wait()
            is_open = self._batch.is_between_rounds or self._closing
            while is_open and self._waiting and (len(self._running) < self._max_streams or self._closing):
                self._running.append(self._waiting.popleft())
            return bool(self._running)

    def _turn(self, job: _Job) -> bool:
        if job.cancelled:
            job.end(None)
            return False
        try:
            return job.turn()
        except PilotfishError as error:
            job.end(error)
        except Exception as error:
            logger.exception("the engine failed")
            job.end(_failure(error))
        return False

    def _remove(self, job: _Job) -> None:
        with self._condition:
            self._running.remove(job)

    def _join(self, stream: GenerationStream, job: EmbeddedStream) -> None:
        self._batch.join(stream)
        self._decoding[stream] = job

    def _leave(self, stream: GenerationStream) -> None:
        self._batch.leave(stream)
        self._decoding.pop(stream, None)

    def _step(self) -> None:
        """One forward pass of the batch; whatever it tells goes out."""
        try:
            found = self._batch.step()
        except Exception as error:
            logger.exception("the batch failed; its answers are ended")
            found = [Progress(stream, [], True, error) for stream in self._decoding]
        for progress in found:
            job = self._decoding[progress.stream]
            job.tell(progress.events)
            if progress.is_over:
                job.end(None if progress.error is None else _failure(progress.error))
                self._remove(job)

    def _note_duration(self, seconds: float) -> None:
        self._mean_s += _SMOOTHING * (seconds - self._mean_s)


class EmbeddedStream:
    """One generation on the engine's thread, read from the event loop."""

    def __init__(self, backend: EmbeddedBackend, call: Call) -> None:
        self._backend, self._call = backend, call
        self._loop = asyncio.get_running_loop()
        self._items: asyncio.Queue[_Item] = asyncio.Queue()
        self._stream: GenerationStream | None = None
        self._started = 0.0
        self.cancelled = False

    async def opened(self) -> Generation:
        item = await self._items.get()
        if isinstance(item, _Opened):
            return item.generation
        assert isinstance(item, Ended), "a stream opens or ends"
        raise item.error or EngineFailed("the request was cancelled before it began")

    def __aiter__(self) -> AsyncIterator[list[Event]]:
        return until_ended(self._items)

    def cancel(self) -> None:
        self.cancelled = True
        self._backend._drop(self)

    def turn(self) -> bool:
        """Joins the others, once; on the engine's thread."""
        if self._stream is None:
            self._started = time.monotonic()
            self._stream = _open(self._backend._engine, self._call, self._backend._allowed)
            self._post(_Opened(self._stream.generation))
            self._backend._join(self._stream, self)
        return True

    def tell(self, events: list[Event]) -> None:
        if events:
            self._post(events)

    def end(self, error: PilotfishError | None) -> None:
        if self._stream is not None:
            self._backend._leave(self._stream)
            self._backend._note_duration(time.monotonic() - self._started)
        self._post(Ended(error))

    def _post(self, item: _Item) -> None:
        _post(self._loop, self._items.put_nowait, item)


class _Work(Generic[T]):
    """An iterator's items, one a turn."""

    def __init__(self, work: Iterator[T]) -> None:
        self._loop = asyncio.get_running_loop()
        self.future: asyncio.Future[list[T]] = self._loop.create_future()
        self._results: list[T] = []
        self._work = work
        self.cancelled = False

    def turn(self) -> bool:
        found = next(self._work, None)
        if found is not None:
            self._results.append(found)
            return True
        _post(self._loop, self._settle, None)
        return False

    def end(self, error: PilotfishError | None) -> None:
        _post(self._loop, self._settle, error or EngineFailed("the request was cancelled"))

    def _settle(self, error: PilotfishError | None) -> None:
        if self.future.done():
            return
        if error is None:
            self.future.set_result(self._results)
        else:
            self.future.set_exception(error)


def _failure(error: Exception) -> PilotfishError:
    """What the client is told; only our own errors say more than that there was one."""
    if isinstance(error, PilotfishError):
        return error
    return EngineFailed(f"the engine failed ({type(error).__name__}); the server's log says more")


def _post(loop: asyncio.AbstractEventLoop, call: Any, item: Any) -> None:
    try:
        loop.call_soon_threadsafe(call, item)
    except RuntimeError:  # the loop has ended, and whoever waited with it
        logger.debug("nobody waits for %s any more", type(item).__name__)


def _open(engine: EmbeddedEngine, call: Call, allowed: AllowList) -> GenerationStream:
    request = replace(call.request, edits=allowed.edits(call.steering, engine.pair.target))
    stream = engine.stream(call.messages, request)  # checks the policy and the length; computes nothing yet
    if not call.is_raw:
        return stream
    (message,) = call.messages
    check_encodable(message.content, "the prompt")
    size = len(message.content)
    plain = Rendered(message.content, (0,), (size,), (0,), templated=False)
    ids = encode(plain, engine.pair.tokenizer).token_ids
    if not ids or len(ids) + request.max_new_tokens > engine.max_tokens:
        raise GenerationError(
            f"the prompt has {len(ids):,} tokens and the answer may have {request.max_new_tokens:,}; "
            f"give at least one, and together at most {engine.max_tokens:,}"
        )
    return GenerationStream(engine, message.content, ids, request)


def _score_text(engine: EmbeddedEngine, messages: tuple[Message, ...], name: str) -> ScoredText:
    """All readers' scores of one text; an answer's running score does not look back on its prompt."""
    text = tokenize(Conversation(name, name, messages), engine.pair.tokenizer)
    if len(text.token_ids) > engine.max_tokens:
        raise TextError(
            f"{name} has {len(text.token_ids):,} tokens; at most {engine.max_tokens:,} fit these models. Cut the text"
        )
    answers = [i for i, message in enumerate(messages) if message.role == "assistant"]
    boundary = text.messages.index(answers[-1]) if answers and answers[-1] in text.messages else 0
    scores: list[dict[str, TokenScore]] = [{} for _ in text.token_ids]
    for reader, bank in engine.banks.items():
        model = engine.pair.draft if reader == "draft" else engine.pair.target
        assert model is not None, "a bank has its reader"
        found = score_tokens(model, bank, text.token_ids, boundary=boundary)
        rows = zip(scores, found.tokens.tolist(), found.running.tolist(), strict=True)
        for into, values, running in rows:
            for metric, value, so_far in zip(bank.metrics, values, running, strict=True):
                into.setdefault(metric, TokenScore.scored(value, reader, running=so_far))
    return ScoredText(text.pieces, tuple(text.messages), tuple(scores))


def _describe(engine: EmbeddedEngine, directions: tuple[DirectionInfo, ...]) -> EngineInfo:
    pair = engine.pair
    heads = tuple(
        HeadInfo(metric=metric, reader=reader, threshold=bank.thresholds.get(metric), card=_card(bank.card, metric))
        for reader, bank in engine.banks.items()
        for metric in bank.metrics
    )
    draft = pair.draft_identity.name if pair.draft_identity else None
    return EngineInfo(
        model=pair.target_identity.name,
        draft=draft,
        max_tokens=engine.max_tokens,
        heads=heads,
        directions=directions,
    )


def _card(card: Any, metric: str) -> dict[str, Any]:
    """What the bank's card says of one head."""
    described: dict[str, Any] = asdict(card.subset([metric]))
    return described
