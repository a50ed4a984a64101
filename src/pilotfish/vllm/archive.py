"""Answers with verdicts in; exchanges in the store and alerts on their way to the sinks out.

The promise is that of our own server: an alert is committed before any token that came after its cause leaves.
"""

from __future__ import annotations

import asyncio
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pilotfish.errors import SettingError
from pilotfish.server import Courier, JsonlSink, Sink, Store, WebhookSink
from pilotfish.server.exchanges import Exchange, State, tally
from pilotfish.vllm.record import Record
from pilotfish.vllm.settings import VllmSettings


class Archive:
    """The store of one API server process; several may share a database."""

    def __init__(self, settings: VllmSettings) -> None:
        """Raises SettingError or StoreError when the store or a sink cannot be opened."""
        assert settings.store is not None, "an archive has a store"
        sinks = _sinks(settings)
        self._store = Store(settings.store, sinks=[sink.name for sink in sinks], redact=settings.redact)
        self._couriers = [Courier(self._store, sink) for sink in sinks]
        self._executor = ThreadPoolExecutor(8 if self._store.takes_parallel_writes else 1, thread_name_prefix="store")
        for courier in self._couriers:
            courier.start()

    async def keep(self, exchange: Exchange) -> None:
        """Commits an exchange; raises StoreError when it cannot be."""
        loop = asyncio.get_running_loop()
        recorded = await loop.run_in_executor(self._executor, self._store.record, exchange)
        if recorded.alert_ids:
            for courier in self._couriers:
                courier.wake()


def exchange_of(record: Record, name: str, created_s: float, state: State) -> Exchange:
    """An answer as the store keeps it."""
    generation = record.generation
    stats = {
        "highest": dict(tally(generation).in_answer),
        "seconds": generation.seconds,
        "acceptance": None,
        "num_taxed_reads": 0,
        "notes": list(generation.notes),
        "error": None,
    }
    return Exchange(
        id=name,
        created_s=created_s,
        finished_s=None if state == "running" else time.time(),
        endpoint="vllm",
        model=record.about.info.model,
        key_id=None,
        state=state,
        finish_reason=generation.finish_reason,
        prompt=generation.prompt,
        tokens=tuple(generation.tokens),
        num_prompt_tokens=generation.num_prompt_tokens,
        verdicts=tuple(generation.verdicts),
        stats=stats,
    )


def _sinks(settings: VllmSettings) -> list[Sink]:
    sinks: list[Sink] = []
    if settings.webhook is not None:
        secret = os.environ.get(settings.webhook_secret_env)
        if secret is None:
            raise SettingError(
                f"the environment variable {settings.webhook_secret_env} is not set; put the webhook's secret into it"
            )
        sinks.append(WebhookSink(settings.webhook, secret))
    if settings.alerts_file is not None:
        sinks.append(JsonlSink(Path(settings.alerts_file)))
    return sinks
