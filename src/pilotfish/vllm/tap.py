"""What the taps of both model runners share: a step's life, what becomes of an exception, how scores leave."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

from torch import Tensor

from pilotfish.heads import HeadBank
from pilotfish.vllm.align import Rows, rows_of_cached
from pilotfish.vllm.host import HostCopy
from pilotfish.vllm.loops import steps_for
from pilotfish.vllm.scorer import Scorer
from pilotfish.vllm.sites import Sites
from pilotfish.vllm.wire import KEY, StepScores, no_scores

logger = logging.getLogger(__name__)


class Tap:
    """One model runner that is read."""

    def __init__(self, runner: Any, bank: HeadBank, sites: Sites, *, shift: int) -> None:
        self.runner, self.bank, self.sites, self.shift = runner, bank, sites, shift
        self._scorer: Scorer | None = None
        self._steps = steps_for(bank, runner.device)
        self.begin()

    def begin(self) -> None:
        """A step begins."""
        self._table: Tensor | None = None
        self._failure = ""
        self._seconds = 0.0

    @property
    def has_table(self) -> bool:
        return self._table is not None

    def scorer(self, block_size: int) -> Scorer:
        """Made with the first pass, when the size of the KV cache is known."""
        if self._scorer is None:
            config = self.runner.kv_cache_config
            size = max(group.kv_cache_spec.block_size for group in config.kv_cache_groups)
            self._scorer = Scorer(
                self.bank,
                num_slots=config.num_blocks * size,
                block_size=block_size,
                shift=self.shift,
                device=self.runner.device,
                steps=self._steps,
            )
        return self._scorer

    def guarded(self, work: Callable[[], Tensor | None]) -> None:
        """Runs the tap's work; what goes wrong makes the step's tokens unscored, and the step goes on."""
        started = time.perf_counter()
        try:
            self._table = work()
        except Exception as error:
            logger.exception("reading the step's states failed; its tokens are unscored")
            self._table, self._failure = None, f"head failed: {type(error).__name__}: {error}"
        self._seconds += time.perf_counter() - started

    def forget(self, slots: Tensor) -> None:
        """The tokens of this step took these slots and are not scored."""
        if self._scorer is not None:
            self._scorer.forget(slots)

    def cached(self, step: Any, place: Callable[[str], int]) -> Rows | None:
        """The tokens that a prefix cache spared the requests which begin, or begin again, with this step.

        Args:
            place: of a request its index in the batch.
        """
        spared = spared_tokens(step)
        if not spared:
            return None
        where = [place(request) for request in spared]
        return rows_of_cached(where, list(spared.values()), shift=self.shift, device=self.runner.device)

    def attach(self, output: Any, stream: Callable[[], Any]) -> Any:
        """The runner's output with the scores; an output that is still being copied waits for them, too."""
        table, failure, seconds = self._table, self._failure, self._seconds
        if not hasattr(output, "get_output"):
            setattr(output, KEY, self._packed(table, failure, seconds))
            return output
        copy = None if table is None else HostCopy(table, stream())
        get = output.get_output

        def get_output() -> Any:
            done = get()
            scores = no_scores(len(self.bank.metrics), failure)
            setattr(done, KEY, scores if copy is None else StepScores(copy.wait(), failure, seconds))
            return done

        output.get_output = get_output
        return output

    def _packed(self, table: Tensor | None, failure: str, seconds: float) -> StepScores:
        if table is None:
            return no_scores(len(self.bank.metrics), failure)
        return StepScores(HostCopy(table).wait(), failure, seconds)


def spared_tokens(step: Any) -> dict[str, int]:
    """Of each request that begins with this step how many tokens a prefix cache holds, none left out that has any."""
    again = step.scheduled_cached_reqs
    spared = {request.req_id: request.num_computed_tokens for request in step.scheduled_new_reqs}
    if again.resumed_req_ids:
        counts = dict(zip(again.req_ids, again.num_computed_tokens, strict=True))
        spared |= {request: counts[request] for request in again.resumed_req_ids}
    return {request: count for request, count in spared.items() if count}
