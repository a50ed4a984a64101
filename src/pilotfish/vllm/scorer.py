"""States of one pass and what it was run on in; a table of scores, still on the device, out.

One matmul for all metrics and rows, one scatter into the slots, one gather of windows: no loop over requests.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from pilotfish.heads import HeadBank
from pilotfish.vllm.align import Pass, Rows, places, rows_of_pass
from pilotfish.vllm.cache import SlotCache
from pilotfish.vllm.loops import Loops, Steps
from pilotfish.vllm.sites import Sites


class Batch(NamedTuple):
    """What a pass's requests have in common."""

    blocks: Int[Tensor, "request block"]
    num_prompt_tokens: Int[Tensor, " request"]


class Scorer:
    """A bank beside the KV cache of the model that it reads."""

    def __init__(
        self,
        bank: HeadBank,
        *,
        num_slots: int,
        block_size: int,
        shift: int,
        device: torch.device,
        steps: Steps | None = None,
    ) -> None:
        """`steps`: loops that do it in place of tensor operations."""
        self.bank = bank
        self._block_size, self._shift = block_size, shift
        self._cache = SlotCache(num_slots, bank.num_channels, device)
        self._loops = steps and Loops(bank, steps, block_size=block_size, shift=shift)

    def read(
        self,
        sites: Sites,
        final: Float[Tensor, "some hidden"],
        ran: Pass,
        batch: Batch,
        cached: Rows | None = None,
    ) -> Float[Tensor, "all column"]:
        """Scores what a pass has read, and before it what a prefix cache has spared.

        Args:
            final: What the model returned.

        Returns:
            The rows of `cached`, then those of the pass, as `wire.StepScores.table` has them.
        """
        bits, num_rows = sites.bits(final) if self._loops else None, len(ran.positions)
        if self._loops is None or bits is None:
            channels = self.bank.channels(sites.features(final, num_rows))
        else:
            channels = self._loops.channels(bits, num_rows)
        return self.score(channels, ran, batch, cached)

    def score(
        self,
        channels: Float[Tensor, "row channel"],
        ran: Pass,
        batch: Batch,
        cached: Rows | None = None,
    ) -> Float[Tensor, "all column"]:
        """As `read`, of what the heads have already made of the states."""
        if self._loops is not None:
            return self._loops.score(self._cache.rows, channels, ran, cached, *batch)
        rows = rows_of_pass(ran, shift=self._shift)
        self._cache.keep(rows.slot, channels, rows.token)
        if cached is not None:
            rows = Rows(*(torch.cat([one, other.to(one)]) for one, other in zip(cached, rows, strict=True)))
        where = places(
            rows,
            batch.blocks,
            batch.num_prompt_tokens,
            window=self.bank.window,
            block_size=self._block_size,
            shift=self._shift,
        )
        kept = self._cache.read(where.slot)
        scores = self.bank.score_windows(kept.channels, where.is_known)
        owner = rows.request.masked_fill(rows.slot < 0, -1)
        keys = torch.stack([owner, rows.position], dim=1)
        return torch.cat([keys.float(), kept.token[:, None], scores.tokens, scores.running], dim=1)

    def forget(self, slots: Int[Tensor, " row"]) -> None:
        """Tokens took these slots and are not scored."""
        self._cache.forget(slots)
