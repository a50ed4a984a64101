"""Token ids in; logits out, and the monitor's scores of exactly those tokens from the same forward pass."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from pilotfish.core import Reader, Site
from pilotfish.engines.records import Scores
from pilotfish.errors import GenerationError
from pilotfish.heads import HeadBank
from pilotfish.taps import Edit, edited, tapped

logger = logging.getLogger(__name__)

CHUNK = 512
"""Tokens a forward pass of a long prompt, to bound the memory of its activations."""


class CachedModel:
    """A model with the KV cache of one sequence. With a bank, every read is scored in the same forward pass."""

    def __init__(
        self,
        model: PreTrainedModel,
        reader: Reader,
        bank: HeadBank | None = None,
        *,
        vocab_size: int | None = None,
        boundary: int = 0,
        score_limit_s: float | None = None,
    ) -> None:
        """`vocab_size` cuts the logits to it: two models of one vocabulary may pad theirs differently.

        `boundary` is the position where the answer begins, which is judged without a look back at the prompt. Scores
        that take longer than `score_limit_s` count as none.
        """
        self.model = model
        self.reader: Reader = reader
        self.bank = bank
        self.boundary = boundary
        self.cache = DynamicCache()  # full layers even for sliding-window models, so that any rollback is exact
        self._vocab_size = vocab_size
        self._score_limit_s = score_limit_s
        self._device = next(model.parameters()).device
        self.length = 0
        """Tokens consumed."""
        self._scores: list[Scores] = []
        self._features: list[Tensor] = []
        self._num_unscored = 0
        """Tokens read whose features wait for the matmul."""
        self._channels = torch.zeros(0, 0)
        """Of all tokens scored so far: what a head looks back on."""

    @torch.inference_mode()
    def read(self, ids: Sequence[int], num_logits: int = 1) -> Float[Tensor, "token vocab"]:
        """Consumes tokens; returns the logits after each of the last `num_logits` (0 spares the output layer).

        Raises:
            GenerationError: a logit is not finite: the model's output cannot be used.
        """
        assert 0 <= num_logits <= len(ids) > 0, "logits follow consumed tokens"
        *first, last = chunks_of(ids, num_logits)
        for chunk in first:
            self._forward(chunk, 0)
        return self._forward(last, num_logits)

    def take_scores(self) -> list[Scores]:
        """The scores of all tokens read since the last call, in order; empty without a bank."""
        self._score()
        taken, self._scores = self._scores, []
        return taken

    def rollback(self, length: int) -> None:
        """Forgets all but the first `length` tokens."""
        assert 0 <= length <= self.length and not self._num_unscored, "rollback goes back, over scored tokens"
        if length < self.length:
            self.cache.crop(length - self.length)
            self.length = length
            self._channels = self._channels[:length]

    def cut_back(self, length: int) -> None:
        """Takes out of the cache what a forward pass that failed left in some of its layers."""
        layers: list[Any] = self.cache.layers  # of a `DynamicCache` all keep keys and values
        for layer in layers:
            layer.crop(length - layer.get_seq_length())

    def note(self, num_tokens: int, taps: Mapping[Site, Tensor]) -> None:
        """Keeps what a forward pass left of new tokens at the bank's sites; the cache has them already."""
        if self.bank is not None:
            self._keep_features(self.bank, taps, num_tokens)
        self.length += num_tokens
        if self._num_unscored >= CHUNK:
            self._score()  # so that a long prompt's features are never all in memory

    def checked(self, logits: Float[Tensor, "token vocab"]) -> Float[Tensor, "token vocab"]:
        """The last tokens' logits, cut to the vocabulary; raises where they cannot be used."""
        if not bool(torch.isfinite(logits[-1:, : self._vocab_size].sum())):
            raise GenerationError(
                f"the {self.reader}'s logits at position {self.length - 1} are not finite; "
                "check its weights and dtype (float16 overflows in some models; use bfloat16 or float32)"
            )
        return logits[:, : self._vocab_size]

    def _forward(self, ids: Sequence[int], num_logits: int) -> Float[Tensor, "token vocab"]:
        batch = torch.tensor([list(ids)], device=self._device)
        model = self.model if num_logits else self.model.base_model
        options = {"logits_to_keep": num_logits} if num_logits else {}
        with tapped_for(self.model, self.bank) as taps:
            output = model(batch, past_key_values=self.cache, use_cache=True, **options)
            self.note(len(ids), taps)
        return self.checked(output.logits[0]) if num_logits else torch.empty(0, self.model.config.vocab_size)

    def _keep_features(self, bank: HeadBank, taps: Mapping[Site, Tensor], num_tokens: int) -> None:
        self._num_unscored += num_tokens
        try:
            self._features.append(bank.features(taps))
        except Exception:  # too few rows then make all of the batch unscored
            logger.exception("reading the sites failed")

    @torch.inference_mode()
    def _score(self) -> None:
        """One fused matmul for all metrics and waiting tokens; what goes wrong becomes unscored tokens."""
        if self.bank is None or not self._num_unscored:
            return
        bank, features, num_tokens = self.bank, self._features, self._num_unscored
        self._features, self._num_unscored, past = [], 0, self._channels
        started = time.perf_counter()
        try:
            new = bank.channels(torch.cat(features))
            if len(new) != num_tokens:
                raise ValueError(f"{len(new)} rows of features for {num_tokens} tokens")
            self._channels = torch.cat([past, new]) if len(past) else new
            found = bank.score(self._channels, num_tokens, boundary=self.boundary)
            values = zip(found.tokens.tolist(), found.running.tolist(), strict=True)
            scores = [Scores(bank.metrics, each, self.reader, running=running) for each, running in values]
            self._check_time(time.perf_counter() - started)
            self._scores += scores
        except Exception as error:
            logger.exception("scoring failed; %d tokens are unscored", num_tokens)
            # So that what looks back on these tokens is unscored as well.
            gap = torch.full((num_tokens, bank.num_channels), torch.nan, device=self._device)
            self._channels = torch.cat([past, gap]) if len(past) else gap
            reason = f"head failed: {type(error).__name__}: {error}"
            self._scores += [Scores(bank.metrics, None, self.reader, reason) for _ in range(num_tokens)]

    def _check_time(self, seconds: float) -> None:
        if self._score_limit_s is not None and seconds > self._score_limit_s:
            raise TimeoutError(
                f"its scores took {seconds:.2f} s, more than the {self._score_limit_s:g} s that are given"
            )


def tapped_for(model: PreTrainedModel, bank: HeadBank | None) -> AbstractContextManager[Mapping[Site, Tensor]]:
    """Reads what a bank wants of a model; nothing without one."""
    return tapped(model, bank.sites) if bank is not None else nullcontext({})


def chunks_of(ids: Sequence[int], num_logits: int) -> list[Sequence[int]]:
    """A text as the forward passes that read it, the logits all from the last."""
    head = max(0, len(ids) - max(num_logits, CHUNK))
    return [*(ids[start : min(start + CHUNK, head)] for start in range(0, head, CHUNK)), ids[head:]]


class Pass(NamedTuple):
    """A read that an answer's loop asks for; who drives the loop makes it, alone or with those of other answers."""

    model: CachedModel
    ids: Sequence[int]
    num_logits: int
    edits: Sequence[Edit] = ()

    def run(self) -> Float[Tensor, "token vocab"]:
        """Makes it alone. A token's cache entries stay those of the pass that read it, edits included.

        Raises:
            GenerationError: as `CachedModel.read` does.
        """
        if not self.edits:
            return self.model.read(self.ids, self.num_logits)
        with edited(self.model.model, self.edits, prompt_length=self.model.boundary):
            return self.model.read(self.ids, self.num_logits)
