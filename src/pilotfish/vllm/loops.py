"""States of a pass and what it was run on in; a table of scores out, from compiled loops on a CPU.

They give what the tensor operations of `scorer` give. A model's pass empties the caches, so that each kind of operation
after it costs tens of microseconds to begin, however small it is; a loop is one. Numba, which vLLM itself needs,
compiles them.
"""

from __future__ import annotations

import functools
import importlib.util
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int, Int64, UInt16
from torch import Tensor

from pilotfish.heads import HeadBank
from pilotfish.vllm.align import Pass, Rows


class Steps(NamedTuple):
    """`read_rows`, `keep_rows` and `score_rows`, compiled or not."""

    read: Callable[..., Any]
    keep: Callable[..., Any]
    score: Callable[..., Any]


class Loops:
    """Of a bank whose heads are all linear."""

    def __init__(self, bank: HeadBank, steps: Steps, *, block_size: int, shift: int) -> None:
        forms = [head.form for head in bank.heads]
        ends = np.cumsum([form.num_channels for form in forms])
        self._heads = (
            np.array([ends - [form.width for form in forms], ends - 1, [form.window for form in forms]]),
            np.array([float(head.outputs[-1]) for head in bank.heads], dtype=np.float32),
        )
        self._weight, self._bias = bank.weight.T.contiguous().numpy(), bank.bias.numpy()
        self._read, self._keep, self._score = steps
        self._block_size, self._shift = block_size, shift

    def channels(self, bits: tuple[UInt16[np.ndarray, "some hidden"], ...], size: int) -> Float[Tensor, "row channel"]:
        """As `HeadBank.channels`, of so many rows in bfloat16: `Sites.bits`."""
        return torch.from_numpy(self._read(bits, size, self._weight, self._bias))

    def score(
        self,
        kept: Float[Tensor, "slot entry"],
        channels: Float[Tensor, "row channel"],
        ran: Pass,
        cached: Rows | None,
        blocks: Int[Tensor, "request block"],
        num_prompt_tokens: Int[Tensor, " request"],
    ) -> Float[Tensor, "all column"]:
        """Keeps the channels in their slots and scores `cached`, then the pass's rows: as `Scorer.score`."""
        starts, positions, tokens, slots = map(_integers, ran[:4])
        last = starts[1:] - 1 if ran.last is None else _integers(ran.last)
        memory, batch = kept.numpy(), (blocks.numpy(), _integers(num_prompt_tokens))
        owners = self._keep(memory, channels.numpy(), starts, last, slots, tokens)
        positions = positions + self._shift
        if cached is not None:
            owners = np.append(_integers(cached.request), owners)
            positions = np.append(_integers(cached.position), positions)
        return torch.from_numpy(
            self._score(memory, owners, positions, batch, self._heads, self._block_size, self._shift)
        )


def _integers(values: Tensor) -> Int64[np.ndarray, " some"]:
    return values.numpy().astype(np.int64, copy=False)


def steps_for(bank: HeadBank, device: torch.device) -> Steps | None:
    """None where tensor operations do it: on a GPU, for heads of other forms, without Numba."""
    is_linear = all(head.form.kind == "linear" for head in bank.heads)
    has_numba = importlib.util.find_spec("numba") is not None
    return compiled(len(bank.sites)) if device.type == "cpu" and is_linear and has_numba else None


@functools.cache
def compiled(num_sites: int) -> Steps:
    """Machine code; takes seconds, once a process."""
    import numba
    from llvmlite.binding import ffi

    # An engine that starts in this process later has vLLM 0.32 look into each object that any module holds: this one
    # would say that it has attributes, and hand out a function in their place.
    ffi.lib._fntab["__dict__"] = {}
    read = f"float32[:,::1](UniTuple(uint16[:,::1], {num_sites}), int64, float32[:,::1], float32[::1])"
    keep = "int64[:](float32[:,::1], float32[:,:], int64[:], int64[:], int64[:], int64[:])"
    batch, heads = "Tuple((int32[:,:], int64[:]))", "Tuple((int64[:,::1], float32[::1]))"
    score = f"float32[:,::1](float32[:,::1], int64[:], int64[:], {batch}, {heads}, int64, int64)"
    reads = numba.njit(read, fastmath={"reassoc", "contract"})(read_rows)  # sums in any order; NaN stays NaN
    return Steps(reads, numba.njit(keep)(keep_rows), numba.njit(score)(score_rows))


def read_rows(bits: Any, num_rows: int, weight: Any, bias: Any) -> Any:
    """What the heads make of each row by itself.

    Args:
        bits: Of each site the states in bfloat16, rows and more x hidden units: the upper halves of float32.
        weight: Channels x hidden units, one site after the other.

    Returns:
        Float32, rows x channels.
    """
    num_channels, hidden = len(bias), bits[0].shape[1]
    found = np.empty((num_rows, num_channels), dtype=np.float32)
    whole = np.empty(hidden, dtype=np.uint32)
    values = whole.view(np.float32)
    for row in range(num_rows):
        found[row] = bias
        for site in range(len(bits)):
            for unit in range(hidden):
                whole[unit] = np.uint32(bits[site][row, unit]) << np.uint32(16)
            for channel in range(num_channels):
                total = np.float32(0)
                for unit in range(hidden):
                    total += weight[channel, site * hidden + unit] * values[unit]
                found[row, channel] += total
    return found


def keep_rows(kept: Any, channels: Any, starts: Any, last: Any, slots: Any, tokens: Any) -> Any:
    """Writes the channels of a pass's rows, and the tokens' ids, into their slots.

    Args:
        kept: Slots and one more x channels and the token's id.

    Returns:
        Of each row its request, -1 where it is nobody's.
    """
    num_channels, owners = channels.shape[1], np.full(len(slots), -1)
    for request in range(len(last)):
        for row in range(starts[request], min(starts[request + 1], last[request] + 1)):
            slot = slots[row]
            if slot >= len(kept) - 1:
                raise IndexError("a row's slot lies outside the KV cache")
            if slot >= 0:
                owners[row] = request
                for channel in range(num_channels):
                    kept[slot, channel] = channels[row, channel]
                kept[slot, num_channels] = tokens[row]
    return owners


def score_rows(kept: Any, owners: Any, positions: Any, batch: Any, heads: Any, block_size: int, shift: int) -> Any:
    """What the heads say of each row that is somebody's.

    Args:
        batch: Blocks by request, and the length of each one's prompt.
        heads: Of each metric its token's channel, its response's, and its window, in three rows; and the priors.

    Returns:
        As `wire.StepScores.table`.
    """
    blocks, num_prompt_tokens = batch
    channels, priors = heads
    num_metrics, table = len(priors), np.full((len(owners), 3 + 2 * len(priors)), -1, dtype=np.float32)
    for row in range(len(owners)):
        request, place, num_prompt = owners[row], positions[row] - shift, num_prompt_tokens[owners[row]]
        if request < 0:
            continue
        if place < 0 or place >= blocks.shape[1] * block_size:
            raise IndexError("a row's position lies outside its request's blocks")
        first = max(num_prompt - shift, 0) if positions[row] >= num_prompt else 0
        own = blocks[request, place // block_size] * block_size + place % block_size
        table[row, 0], table[row, 1], table[row, 2] = request, positions[row], kept[own, -1]
        for metric in range(num_metrics):
            at_token, at_response, window = channels[0, metric], channels[1, metric], channels[2, metric]
            total = priors[metric] * max(0, window - 1 - (place - first))
            for back in range(max(first, place - window + 1), place + 1):
                slot = blocks[request, back // block_size] * block_size + back % block_size
                total += kept[slot, at_response]
            table[row, 3 + metric] = 0.5 + 0.5 * math.tanh(kept[own, at_token] / 2)
            table[row, 3 + num_metrics + metric] = 0.5 + 0.5 * math.tanh(total / window / 2)
    return table
