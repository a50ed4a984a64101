"""Streams of one engine in; their events out, from passes that all of them share.

Each stream keeps its own loop: its request, policy, random numbers, caches and length of draft. The batch only makes
the passes that the loops ask for, those of one model together. So what a stream gives does not depend on its
neighbours: they may join and leave at any time, and one that fails ends alone. In float32 its tokens are those that it
gives alone; its scores differ by rounding, since a matrix product of more rows may sum in another order.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import NamedTuple

from pilotfish.core import Message
from pilotfish.engines.batch_pass import read_together
from pilotfish.engines.embedded import EmbeddedEngine, GenerationStream
from pilotfish.engines.loop import Logits
from pilotfish.engines.reader import Pass
from pilotfish.engines.records import Event, Generation
from pilotfish.engines.request import Request
from pilotfish.errors import SettingError

logger = logging.getLogger(__name__)

LARGEST = 16
"""Streams of a batch at most."""
MOST_TOKENS = 1024
"""Of one forward pass, where several long prompts begin at once; bounds the memory of its activations."""


class Progress(NamedTuple):
    """What is new of one stream."""

    stream: GenerationStream
    events: list[Event]
    is_over: bool
    error: Exception | None
    """Why it ended, where it failed."""


class Batch:
    """Streams that are decoded together; each may join and leave at any time."""

    def __init__(self, *, max_streams: int = LARGEST) -> None:
        """Raises `SettingError` for a size outside 1 to 16."""
        if not 1 <= max_streams <= LARGEST:
            raise SettingError(f"a batch of {max_streams} streams is not allowed; give 1 to {LARGEST}")
        self._max_streams = max_streams
        self._streams: list[GenerationStream] = []
        self._waiting: dict[GenerationStream, Pass] = {}

    def __len__(self) -> int:
        return len(self._streams)

    @property
    def is_full(self) -> bool:
        return len(self._streams) == self._max_streams

    @property
    def is_between_rounds(self) -> bool:
        """Whether no stream is within a round of speculation: one that joins then shares all passes of its first."""
        return not self._waiting

    def join(self, stream: GenerationStream) -> None:
        """Takes a stream that nobody iterates.

        Raises:
            SettingError: the batch is full, or its streams are another engine's.
        """
        if self.is_full:
            raise SettingError(f"the batch has {self._max_streams} streams, its limit; join again once one has ended")
        if self._streams and self._streams[0].setup is not stream.setup:
            raise SettingError("the streams of a batch share one engine; give each engine a batch of its own")
        self._streams.append(stream)

    def leave(self, stream: GenerationStream) -> None:
        """Ends a stream where it stands; without effect on the others, and on one that has ended."""
        if stream in self._streams:
            self._streams.remove(stream)
            self._waiting.pop(stream, None)
            stream.steps.close()

    def step(self) -> list[Progress]:
        """Makes one forward pass for the streams that wait for one, or begins a round of all where none does.

        Returns:
            What is new of the streams that have something to tell.
        """
        found = []
        given = self._passes() if self._waiting else dict.fromkeys(self._streams)
        for stream, logits in given.items():
            progress, wanted = _advanced(stream, logits)
            if wanted is not None:
                self._waiting[stream] = wanted
            if progress.is_over:
                self._streams.remove(stream)
            if progress.events or progress.is_over:
                found.append(progress)
        return found

    def _passes(self) -> dict[GenerationStream, Logits | Exception]:
        """Makes the draft's passes that are waited for, or else the target's: so the target runs once a round."""
        drafts = [stream for stream, wanted in self._waiting.items() if wanted.model.reader == "draft"]
        chosen: list[GenerationStream] = []
        num_tokens = 0
        for stream in drafts or self._waiting:
            num_tokens += len(self._waiting[stream].ids)
            if chosen and num_tokens > MOST_TOKENS:
                break
            chosen.append(stream)
        found = read_together([self._waiting.pop(stream) for stream in chosen])
        return dict(zip(chosen, found, strict=True))


def generate_together(
    engine: EmbeddedEngine,
    prompts: Sequence[str | Sequence[Message]],
    requests: Request | Sequence[Request] | None = None,
    *,
    max_streams: int = LARGEST,
) -> list[Generation]:
    """Answers all prompts, up to `max_streams` at a time: one begins as soon as another has ended.

    Args:
        requests: one for all prompts, or one for each.

    Raises:
        SettingError, GenerationError: as `EmbeddedEngine.stream` does, before anything runs; a failure of one answer is
            raised once the others have ended.
    """
    each = requests if isinstance(requests, Sequence) else [requests or Request()] * len(prompts)
    if len(each) != len(prompts):
        raise SettingError(f"{len(prompts)} prompts came with {len(each)} requests; give one for all, or one for each")
    streams = [engine.stream(prompt, request) for prompt, request in zip(prompts, each, strict=True)]
    batch, queue, failed = Batch(max_streams=max_streams), list(reversed(streams)), []
    while queue or len(batch):
        while queue and not batch.is_full:
            batch.join(queue.pop())
        failed += [progress.error for progress in batch.step() if progress.error is not None]
    if failed:
        raise failed[0]
    return [stream.generation for stream in streams]


def _advanced(stream: GenerationStream, logits: Logits | Exception | None) -> tuple[Progress, Pass | None]:
    """Runs a stream up to the next pass that it needs, or to the end of its round."""
    events: list[Event] = []
    try:
        step = stream.steps.throw(logits) if isinstance(logits, Exception) else stream.steps.send(logits)
        while step is not None and not isinstance(step, Pass):
            events.append(step)
            step = next(stream.steps)
    except StopIteration:
        return Progress(stream, events, True, None), None
    except Exception as error:  # of this stream alone
        if error is not logits:
            logger.exception("a stream of the batch failed")
        return Progress(stream, events, True, error), None
    return Progress(stream, events, False, None), step
