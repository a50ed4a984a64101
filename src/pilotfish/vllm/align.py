"""The rows of one forward pass in; the request, position and KV slot that each is about out. Tensor operations alone.

`score(i)` is the head's reading of the state after consuming token i; positions are absolute. A drafter's first pass
reads what the target has just verified and the token that follows. A draft model has consumed token p at position p
(shift 0), an EAGLE or MTP drafter token p + 1 (shift 1): its ids are rotated by one, its positions are not.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor


class Pass(NamedTuple):
    """What a model was run on: the rows of all requests, one request after the other."""

    starts: Int[Tensor, " starts"]
    """First row of each request, and at the end the number of rows."""
    positions: Int[Tensor, " row"]
    tokens: Int[Tensor, " row"]
    slots: Int[Tensor, " row"]
    last: Int[Tensor, " request"] | None = None
    """Of each request the last row that counts; what follows it was rejected."""


class Rows(NamedTuple):
    """What each row of a pass has consumed. Axis words: row, request (of the batch), block (of a request)."""

    request: Int[Tensor, " row"]
    """Index in the batch."""
    position: Int[Tensor, " row"]
    token: Int[Tensor, " row"]
    """-1 where only the slot knows it."""
    slot: Int[Tensor, " row"]
    """Where its channels are kept; -1 for rejected tokens and padding."""


class Places(NamedTuple):
    """The slots of a token and of those before it, oldest first."""

    slot: Int[Tensor, "row window"]
    is_known: Bool[Tensor, "row window"]


def rows_of_pass(ran: Pass, *, shift: int) -> Rows:
    starts, positions, tokens, slots, last = ran
    index = torch.arange(len(positions), device=positions.device, dtype=starts.dtype)
    request = torch.searchsorted(starts[1:-1], index, right=True)
    slots = slots.long()
    if last is not None:
        slots = slots.masked_fill(index > last.index_select(0, request), -1)
    return Rows(request, positions + shift if shift else positions, tokens, slots)


def rows_of_cached(requests: Sequence[int], lengths: Sequence[int], *, shift: int, device: torch.device) -> Rows:
    """The tokens that a prefix cache spared a request: the first `lengths` KV slots of each."""
    size = int(sum(lengths))
    starts = np.repeat(np.cumsum(lengths) - np.asarray(lengths, dtype=np.int64), lengths)
    position = torch.from_numpy(np.arange(size) - starts + shift).to(device)
    request = torch.from_numpy(np.repeat(np.asarray(requests, dtype=np.int64), lengths)).to(device)
    return Rows(request, position, torch.full_like(position, -1), torch.zeros_like(position))


def places(
    rows: Rows,
    blocks: Int[Tensor, "request block"],
    num_prompt_tokens: Int[Tensor, " request"],
    *,
    window: int,
    block_size: int,
    shift: int,
) -> Places:
    """Where the channels of each row's last `window` tokens are. An answer's do not reach back into its prompt."""
    position = rows.position[:, None]
    held = position - torch.arange(shift + window - 1, shift - 1, -1, device=position.device)
    prompt = num_prompt_tokens.index_select(0, rows.request)[:, None]
    first = prompt * (position >= prompt)
    if shift:
        first = first.clamp_min(shift) - shift
    column = held.div(block_size, rounding_mode="floor").clamp_(0, blocks.shape[1] - 1)
    block = blocks[rows.request[:, None], column]
    return Places(held.remainder(block_size).add_(block, alpha=block_size), held >= first)
