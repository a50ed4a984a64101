"""Rows of tokens in; what all of them begin with, read by the model once for all, out."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from typing import NamedTuple

import torch
from transformers import DynamicCache, PreTrainedModel

from pilotfish.taps import Edit, edited

_WORTH_A_PASS = 64
"""Tokens that must be saved for a pass of their own to pay."""


class Beginning(NamedTuple):
    num_tokens: int
    """0 where there is nothing to share, or too little."""
    cache: DynamicCache

    def for_rows(self, count: int) -> DynamicCache:
        """A cache of its own for a batch of so many rows that go on from here."""
        copy = deepcopy(self.cache)
        copy.batch_repeat_interleave(count)
        return copy


@torch.no_grad()
def read_beginning(model: PreTrainedModel, rows: Sequence[Sequence[int]], edits: Sequence[Edit] = ()) -> Beginning:
    """Reads the tokens that all rows begin with, as a prompt; under causal attention nothing after them changes them.

    Args:
        rows: As far as they may be shared: what is to be read anew, say a last token for its logits, is left out.
    """
    num_tokens = _num_shared(rows)
    cache = DynamicCache()  # full layers even for sliding-window models
    if num_tokens:
        ids = torch.tensor([list(rows[0][:num_tokens])], device=model.device)
        with edited(model, edits, prompt_length=num_tokens):
            model.base_model(ids, past_key_values=cache, use_cache=True)
    return Beginning(num_tokens, cache)


def _num_shared(rows: Sequence[Sequence[int]]) -> int:
    limit = min(map(len, rows), default=0)
    columns = zip(*(row[:limit] for row in rows), strict=True)
    shared = next((index for index, column in enumerate(columns) if len(set(column)) > 1), limit)
    return shared if shared * (len(rows) - 1) >= _WORTH_A_PASS else 0
