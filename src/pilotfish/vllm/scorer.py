"""States of one pass and the rows they belong to in; a table of scores, still on the device, out.

One matmul for all metrics and rows, one scatter into the slots, one gather of windows: no loop over requests.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from pilotfish.heads import HeadBank
from pilotfish.vllm.align import Rows, places
from pilotfish.vllm.cache import SlotCache


class Batch(NamedTuple):
    """What a pass's requests have in common."""

    blocks: Int[Tensor, "request block"]
    num_prompt_tokens: Int[Tensor, " request"]


class Scorer:
    """A bank beside the KV cache of the model that it reads."""

    def __init__(self, bank: HeadBank, *, num_slots: int, block_size: int, shift: int, device: torch.device) -> None:
        self.bank = bank
        self._block_size, self._shift = block_size, shift
        self._cache = SlotCache(num_slots, bank.num_channels, device)

    def read(
        self,
        features: Float[Tensor, "row feature"],
        rows: Rows,
        batch: Batch,
        cached: Rows | None = None,
    ) -> Float[Tensor, "all column"]:
        """Scores what a pass has read, and before it what a prefix cache has spared.

        Returns:
            The rows of `cached`, then those of the pass, as `wire.StepScores.table` has them.
        """
        return self.score(self.bank.channels(features), rows, batch, cached)

    def score(
        self,
        channels: Float[Tensor, "row channel"],
        rows: Rows,
        batch: Batch,
        cached: Rows | None = None,
    ) -> Float[Tensor, "all column"]:
        """As `read`, of what the heads have already made of the states."""
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
