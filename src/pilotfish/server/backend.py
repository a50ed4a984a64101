"""Requests in, streams of an engine's events out: the one interface that a served engine has to offer."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

from pilotfish.actions import Policy
from pilotfish.core import Message, TokenScore
from pilotfish.engines import Event, Generation, Request
from pilotfish.errors import PilotfishError
from pilotfish.taps.edit import Phase


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadInfo:
    """What is known of one head."""

    metric: str
    reader: str
    """The model whose states it reads: draft or target."""
    threshold: float | None
    """The calibrated one."""
    card: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class DirectionInfo:
    """What is known of one direction that clients may steer along."""

    name: str
    site: str
    dose: float
    """That calibration chose, for the kind of edit on the card."""
    max_dose: float
    """The last one that a client may ask for, counted from 0; of the sign of `dose`."""
    sha256: str
    """Of the vector."""
    card: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Steer:
    """One direction that is asked for, checked against what is served."""

    direction: DirectionInfo
    dose: float
    scope: Phase
    metric: str | None = None
    """Of the gate; without one it is on throughout."""
    threshold: float | None = None
    """None takes the bank's calibrated one."""

    @property
    def name(self) -> str:
        return self.direction.name


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineInfo:
    """What an engine serves."""

    model: str
    draft: str | None
    max_tokens: int
    """Prompt and answer together."""
    heads: tuple[HeadInfo, ...]
    is_taxed: bool = False
    """Whether the draft runs for the scores alone: it reads beside a model that is elsewhere."""
    directions: tuple[DirectionInfo, ...] = ()
    """What clients may steer along."""

    @property
    def metrics(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(head.metric for head in self.heads))


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One generation that is asked for."""

    messages: tuple[Message, ...]
    request: Request
    is_raw: bool = False
    """Whether the one message is text to go on with, not a turn for the chat template."""
    steering: tuple[Steer, ...] = ()
    """The rules of its gates are the last of the request's policy."""
    traceparent: str | None = None
    """The trace that it belongs to (W3C Trace Context): a proxy's upstream is told."""

    @property
    def own_rules(self) -> range:
        """Indices in the policy of the rules that are the client's own gates."""
        num_rules = len(self.request.policy.rules)
        return range(num_rules - sum(each.metric is not None for each in self.steering), num_rules)


class ScoredText(NamedTuple):
    """Text that was there already, token by token."""

    pieces: tuple[str, ...]
    messages: tuple[int, ...]
    """Per token, the index of its message; -1 for the template's own."""
    scores: tuple[Mapping[str, TokenScore], ...]


@runtime_checkable
class EventStream(Protocol):
    """One generation under way: iterate it for batches of events, in the engine's order."""

    async def opened(self) -> Generation:
        """Waits until the engine has begun; the record is filled in as events come.

        Raises:
            PilotfishError: the engine refuses the request.
        """

    def __aiter__(self) -> AsyncIterator[list[Event]]:
        """Raises `EngineFailed` when the engine breaks; ends early after `cancel`."""

    def cancel(self) -> None:
        """Gives the place to somebody else; harmless at any time."""


class Ended(NamedTuple):
    """The last item of a stream's queue."""

    error: PilotfishError | None


async def until_ended(items: asyncio.Queue[Any]) -> AsyncIterator[list[Event]]:
    """Batches of events from a queue, up to its `Ended`, whose error is raised."""
    while not isinstance(item := await items.get(), Ended):
        yield item
    if item.error is not None:
        raise item.error


@runtime_checkable
class ServedEngine(Protocol):
    """An engine behind the server."""

    @property
    def info(self) -> EngineInfo: ...

    @property
    def load(self) -> tuple[int, int]:
        """Requests that run, and that wait."""

    async def check(self, policy: Policy) -> None:
        """Refuses a policy that could not be carried out, with `SettingError`."""

    def submit(self, call: Call) -> EventStream:
        """Takes a place or a seat in the queue; raises `Busy` when there is neither."""

    async def score(self, texts: Sequence[tuple[Message, ...]]) -> list[ScoredText]:
        """Reads texts teacher-forced, each in one pass; raises `Busy` as `submit` does."""

    def close(self) -> None:
        """Ends what still runs."""
