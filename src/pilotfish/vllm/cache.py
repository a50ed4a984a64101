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
    token: Int[Tensor, " row"]
    """Id beside the last place of each row; -1 where nothing was kept."""


class SlotCache:
    """One row of channels for every KV slot, and one for what nobody wants."""

    def __init__(self, num_slots: int, num_channels: int, device: torch.device) -> None:
        self._trash = num_slots
        self._channels = torch.full((num_slots + 1, num_channels), torch.nan, device=device)
        self._tokens = torch.full((num_slots + 1,), -1, dtype=torch.int32, device=device)

    @property
    def size_bytes(self) -> int:
        return self._channels.nbytes + self._tokens.nbytes

    def keep(
        self,
        slots: Int[Tensor, " row"],
        channels: Float[Tensor, "row channel"],
        tokens: Int[Tensor, " row"],
    ) -> None:
        """Slots below 0 are of rejected tokens and padding."""
        index = torch.where(slots < 0, self._trash, slots).long()
        self._channels[index] = channels
        self._tokens[index] = tokens.to(torch.int32)

    def forget(self, slots: Int[Tensor, " row"]) -> None:
        """Tokens came to stand in these slots without being scored."""
        index = torch.where(slots < 0, self._trash, slots).long()
        self._channels[index] = torch.nan
        self._tokens[index] = -1

    def read(self, slots: Int[Tensor, "row window"]) -> Kept:
        return Kept(self._channels[slots], self._tokens[slots[:, -1]])
