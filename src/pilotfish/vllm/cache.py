"""Channels by KV slot in, those of a token and of what came before it out: what a prefix cache spares is still scored.

A slot keeps what the heads made of one token, beside the token's id. vLLM hands out a block with a hash of all tokens
up to its end, so what a block's slots hold is right for whoever holds the block, as long as it was written when the
block was: `forget` says where it was not. Slots are read only in a step in which the request holds their blocks.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor


class Kept(NamedTuple):
    channels: Float[Tensor, "row window channel"]
    """NaN where nothing was kept."""
    token: Float[Tensor, " row"]
    """Id beside the last place of each row; NaN where nothing was kept."""


class SlotCache:
    """One row of channels and an id for every KV slot; the last row is for what nobody wants, whose slot is -1.

    An id is kept as float32 beside the channels, which is exact for all vocabularies (up to 2^24), so that one scatter
    and one gather serve both.
    """

    def __init__(self, num_slots: int, num_channels: int, device: torch.device) -> None:
        self.rows = torch.full((num_slots + 1, num_channels + 1), torch.nan, device=device)

    @property
    def size_bytes(self) -> int:
        return self.rows.nbytes

    def keep(
        self,
        slots: Int[Tensor, " row"],
        channels: Float[Tensor, "row channel"],
        tokens: Int[Tensor, " row"],
    ) -> None:
        """Slot -1 is of rejected tokens and padding."""
        self.rows[slots] = torch.cat([channels, tokens[:, None].float()], dim=1)

    def forget(self, slots: Int[Tensor, " row"]) -> None:
        """Tokens came to stand in these slots without being scored."""
        self.rows[slots] = torch.nan

    def read(self, slots: Int[Tensor, "row window"]) -> Kept:
        rows = self.rows.index_select(0, slots.flatten()).view(*slots.shape, -1)
        return Kept(rows[..., :-1], rows[:, -1, -1])
