"""An engine, a store and settings in; what the routes share out."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Sequence

from pilotfish.actions import Policy, policy_from_dict, policy_to_dict
from pilotfish.errors import SettingError, StoreError
from pilotfish.server.access import Gatekeeper
from pilotfish.server.answer import Desk
from pilotfish.server.backend import ServedEngine
from pilotfish.server.keys import KeyRing, RateLimit
from pilotfish.server.outbox import Courier
from pilotfish.server.settings import DAY_S, ServerSettings
from pilotfish.server.sinks import Sink
from pilotfish.server.store import Store
from pilotfish.server.telemetry import Telemetry
from pilotfish.server.tracing import Tracer

logger = logging.getLogger(__name__)

SWEEP_S = 600.0


class Service:
    """Everything that lives as long as the server does."""

    def __init__(
        self,
        engine: ServedEngine,
        store: Store,
        settings: ServerSettings,
        *,
        policy: Policy,
        sinks: Sequence[Sink] = (),
        tracer: Tracer | None = None,
    ) -> None:
        """The policy that was last put in force over HTTP goes before `policy`. Answers are traced where there is a
        `tracer`.

        Raises:
            SettingError: there is no key, and others than this machine could reach the server; or the stored policy
                cannot be read.
        """
        self.engine, self.settings = engine, settings
        rows = store.keys()
        if not settings.is_loopback and all(row.revoked_s is not None for row in rows):
            raise SettingError(
                f"{settings.host} can be reached from other machines and there is no API key; make one with "
                "`pilotfish keys add`, or serve on 127.0.0.1"
            )
        stored = store.policy()
        self.policy = policy if stored is None else policy_from_dict(stored, "the stored policy")
        self.telemetry = Telemetry(lambda: engine.load, store.outbox)
        self.desk = Desk(engine, store, self.telemetry, tracer or Tracer(), timeout_s=settings.request_timeout_s)
        self.ring = KeyRing(store.keys)
        limit = RateLimit(settings.requests_per_minute)
        self.gate = Gatekeeper(self.desk, self.ring, limit, is_open=settings.is_loopback and not rows)
        count = self.telemetry.count_attempt
        self.desk.couriers += [Courier(store, sink, retrying=settings.retrying, on_outcome=count) for sink in sinks]

    @property
    def store(self) -> Store:
        return self.desk.store

    async def replace_policy(self, policy: Policy, *, key_id: str | None) -> None:
        """Puts a policy in force, for answers that begin from now on and after a restart.

        Raises:
            SettingError: the engine could not carry it out.
            StoreError: it could not be kept; the old one holds on.
        """
        await self.engine.check(policy)
        await self.desk.in_store(self.store.set_policy, policy_to_dict(policy), key_id=key_id)
        self.policy = policy

    async def why_not_ready(self) -> list[str]:
        try:
            await self.desk.in_store(self.store.ping)
        except StoreError:
            return ["the store does not answer"]
        return []

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """From the first request to the last alert that can still be sent."""
        await self.engine.check(self.policy)
        for courier in self.desk.couriers:
            courier.start()
        sweeping = asyncio.create_task(self._sweep())
        try:
            yield
        finally:
            sweeping.cancel()
            await asyncio.to_thread(self.engine.close)
            await self.desk.drain()
            for courier in self.desk.couriers:
                await asyncio.to_thread(courier.stop, self.settings.retrying.lease_s)
            self.store.close()
            await asyncio.to_thread(self.desk.tracer.close)

    async def _sweep(self) -> None:
        keep_s = None if self.settings.keep_days is None else self.settings.keep_days * DAY_S
        lost_after_s = 2 * self.settings.request_timeout_s + SWEEP_S
        while True:
            try:
                deleted = await self.desk.in_store(self.store.sweep, keep_s=keep_s, lost_after_s=lost_after_s)
                logger.info("retention deleted %d exchanges", deleted)
            except StoreError as error:
                logger.warning("retention: %s", error)
            await asyncio.sleep(SWEEP_S)
