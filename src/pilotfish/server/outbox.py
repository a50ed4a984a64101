"""Alerts that wait in the store in; each delivered to its sink at least once out."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from secrets import SystemRandom
from typing import Literal
from uuid import uuid4

from pilotfish.errors import DeliveryError, StoreError
from pilotfish.server.sinks import Sink
from pilotfish.server.store import Due, Store

logger = logging.getLogger(__name__)

_RANDOM = SystemRandom()

Outcome = Literal["delivered", "failed", "dead"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Retrying:
    """How often and how long a delivery is tried."""

    first_pause_s: float = 1.0
    """Each later pause is twice as long."""
    longest_pause_s: float = 3600.0
    max_attempts: int = 30
    """Then it is a dead letter: with the pauses above, after about a day."""
    lease_s: float = 60.0
    """For so long nobody else tries what a process has taken; longer than any sink's timeout."""
    poll_s: float = 1.0
    """Pause between looks at an outbox in which nothing is due."""
    batch: int = 4
    """Deliveries taken at a time; all of them must be done within the lease."""


class Courier:
    """A thread that delivers what waits for one sink, so that a slow one holds up no other."""

    def __init__(
        self,
        store: Store,
        sink: Sink,
        *,
        retrying: Retrying | None = None,
        jitter: Callable[[], float] = _RANDOM.random,
        on_outcome: Callable[[str, Outcome], None] = lambda sink, outcome: None,
    ) -> None:
        """`jitter` draws from [0, 1); `on_outcome` hears the sink's name and how each try went."""
        self._store, self._sink, self._retrying = store, sink, retrying or Retrying()
        self._jitter, self._on_outcome = jitter, on_outcome
        self._owner = uuid4().hex
        self._wake = threading.Event()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name=f"courier-{sink.name}", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def wake(self) -> None:
        """Says that something new may be due."""
        self._wake.set()

    def stop(self, timeout_s: float) -> None:
        """Lets the delivery in flight end; what is left stays in the store for the next start."""
        self._stopping = True
        self._wake.set()
        self._thread.join(timeout_s)
        self._sink.close()

    def deliver_due(self) -> int:
        """Tries everything that is due now, once; returns how many tries that were."""
        retrying, total = self._retrying, 0
        while True:
            claimed = self._store.claim(
                self._sink.name, owner=self._owner, limit=retrying.batch, lease_s=retrying.lease_s
            )
            for due in claimed:
                self._deliver(due)
            total += len(claimed)
            if len(claimed) < retrying.batch or self._stopping:
                return total

    def _deliver(self, due: Due) -> None:
        error, retry_in_s = None, None
        outcome: Outcome = "delivered"
        try:
            self._sink.deliver(due.payload)
        except DeliveryError as failure:
            error, retry_in_s = str(failure), self._pause_s(due.attempts + 1)
            outcome = "dead" if retry_in_s is None else "failed"
            logger.warning("%s: %s; try %d is %s", self._sink.name, failure, due.attempts + 1, outcome)
        self._store.settle(due, owner=self._owner, error=error, retry_in_s=retry_in_s)
        self._on_outcome(self._sink.name, outcome)

    def _pause_s(self, attempts: int) -> float | None:
        """Before the next try: between half and all of a pause that doubles. None when there is no next."""
        retrying = self._retrying
        if attempts >= retrying.max_attempts:
            return None
        full = min(retrying.longest_pause_s, retrying.first_pause_s * 2.0 ** min(attempts - 1, 60))
        return full * (0.5 + 0.5 * self._jitter())

    def _run(self) -> None:
        while not self._stopping:
            self._wake.clear()
            try:
                self.deliver_due()
            except StoreError as error:  # the lease runs out and the delivery is tried again
                logger.warning("%s: %s", self._sink.name, error)
            except Exception:  # a courier that dies would lose alerts in silence
                logger.exception("%s: delivering failed", self._sink.name)
            self._wake.wait(self._retrying.poll_s)
