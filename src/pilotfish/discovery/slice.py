"""A model, two sites and prompts in; the change at the second site, as a function of a vector added at the first, out.

The model below the source runs once and is kept, the model above the target never runs.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import suppress
from functools import cached_property
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PreTrainedModel

from pilotfish.core import Site
from pilotfish.discovery.response import Response
from pilotfish.errors import SettingError, TextError
from pilotfish.models import family_of, num_layers, site_module
from pilotfish.taps.hook import hook

logger = logging.getLogger(__name__)

_STREAM_ORDER = ("resid_pre", "attn_out", "mlp_out", "resid_post")
_PASSES_AT_ONCE = 4
"""A second derivative holds nearly this many times what a first one holds."""


class _Step(NamedTuple):
    module: nn.Module
    args: tuple[Any, ...]
    """What follows the hidden states."""
    kwargs: dict[str, Any]


class Slice(Response):
    """The mean change at `target`, over prompts and read tokens, when a vector is added at every token of `source`.

    Every architecture of the family table; the blocks between the sites are called with the very arguments that the
    model gives them. Prompts are padded on the right, which causal attention never sees.

    Source: the function Delta of Mack's "deep causal transcoding" (DCT), and of MELBO, where it is not averaged.

    Args:
        prompts: Token ids, special tokens included.
        last: Tokens at the end of each prompt that are read; None reads all. A shorter prompt is read whole.
        memory_bytes: What the activations of one chunk of vectors may take, about; weights come on top.

    Raises:
        SettingError: a site is not there, source does not lie below target, a size is not positive, or the model is in
            training mode.
        TextError: there are no prompts, or one is empty, too long or not of the model's vocabulary.
        UnknownFamily: the model has no row in the family table.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        source: Site,
        target: Site,
        prompts: Sequence[Sequence[int]],
        *,
        last: int | None = 3,
        memory_bytes: int = 2**30,
    ) -> None:
        _check(model, source, target, prompts, last)
        if memory_bytes < 1:
            raise SettingError(f"memory_bytes {memory_bytes} is too small; give the bytes that a chunk may take")
        width = int(model.config.hidden_size)
        super().__init__(self._mean_change, width, width, dtype=model.dtype, device=model.device)
        if model.dtype in (torch.float16, torch.bfloat16):
            logger.warning("the model is in %s: derivatives will be coarse; load it in float32", model.dtype)
        self.source, self.target = source, target
        self.num_prompts = len(prompts)
        self.prompt_index, self.token_index = (index.to(model.device) for index in _read_tokens(prompts, last))
        if source.stream == "resid_post" and source.layer + 1 < num_layers(model):
            source = Site(source.layer + 1, "resid_pre")  # the same place, one block later
        self._source = (site_module(model, source), source)
        self._target = (site_module(model, target), target)
        ids = _padded(prompts).to(model.device)
        first, last_block = source.layer, num_layers(model) - 1 if target.stream == "final" else target.layer
        self._start = _below(model, first, ids)
        self._steps = _steps(model, first, last_block, ids[:1])
        if target.stream == "final":
            self._steps.append(_Step(self._target[0], (), {}))
        with torch.no_grad():
            self._before = self._read(self._zero())
        self.rows_per_chunk = max(1, memory_bytes // (_PASSES_AT_ONCE * self.bytes_per_vector))

    def token_changes(self, theta: Float[Tensor, "vector hidden"]) -> Float[Tensor, "vector read hidden"]:
        """The change at each read token, in the order of `prompt_index` and `token_index`.

        Differentiable by autograd and `torch.func`; all vectors in one pass, whatever that takes.
        """
        return self._read(theta) - self._before

    def states(self, theta: Float[Tensor, "vector hidden"]) -> Float[Tensor, "vector read hidden"]:
        """The activations at the read tokens of the target, with each vector added; a row of zeros is the model as it
        is.
        """
        with torch.no_grad():
            return torch.cat([self._read(chunk) for chunk in torch.split(theta, self.rows_per_chunk)])

    def source_norms(self) -> Float[Tensor, " read"]:
        """The lengths of the activation at the read tokens of the source: what a radius is small or large against."""
        seen: list[Tensor] = []
        with torch.no_grad(), hook(*self._source, visit=seen.append):
            self._run(self._start)
        norms: Tensor = seen[0][self.prompt_index, self.token_index].norm(dim=-1)
        return norms

    @cached_property
    def bytes_per_vector(self) -> int:
        """What the autograd graph of one vector keeps, counted: what two keep beyond one, so that weights, and copies
        of weights in another dtype under autocast, do not count.
        """
        return max(1, self._bytes_kept(2) - self._bytes_kept(1))

    def _bytes_kept(self, num_vectors: int) -> int:
        kept: dict[int, int] = {}

        def count(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            graph = self.token_changes(self._zero().repeat(num_vectors, 1).requires_grad_())
        del graph
        return sum(kept.values())

    def _mean_change(self, theta: Tensor) -> Tensor:
        mean: Tensor = self.token_changes(theta).mean(dim=1)
        return mean

    def _read(self, theta: Tensor) -> Tensor:
        num_vectors = theta.shape[0]
        states: list[Tensor] = []

        def add(hidden: Tensor) -> Tensor:
            grid = hidden.view(num_vectors, self.num_prompts, *hidden.shape[1:])
            return (grid + theta[:, None, None, :]).flatten(0, 1)

        def stop(hidden: Tensor) -> None:
            states.append(hidden)
            raise _Reached

        with hook(*self._source, visit=add), hook(*self._target, visit=stop), suppress(_Reached):
            self._run(self._start.repeat(num_vectors, 1, 1))
        reached = states[0].view(num_vectors, self.num_prompts, *states[0].shape[1:])
        return reached[:, self.prompt_index, self.token_index]

    def _run(self, hidden: Tensor) -> None:
        with sdpa_kernel(SDPBackend.MATH):  # the fused kernels have no forward-mode derivative
            for step in self._steps:
                output = step.module(hidden, *step.args, **step.kwargs)
                hidden = output[0] if isinstance(output, tuple) else output


class _Reached(Exception):
    """The pass has come to where it was to end."""


def _below(model: PreTrainedModel, first: int, ids: Tensor) -> Tensor:
    """The input of block `first`; nothing from there on runs."""
    site = Site(first, "resid_pre")
    seen: list[Tensor] = []

    def keep(hidden: Tensor) -> None:
        seen.append(hidden.detach())
        raise _Reached

    with torch.no_grad(), hook(site_module(model, site), site, keep), suppress(_Reached):
        model.base_model(ids, use_cache=False)
    return seen[0]


def _steps(model: PreTrainedModel, first: int, last: int, ids: Int[Tensor, "1 token"]) -> list[_Step]:
    """The blocks and what the model calls them with beside the hidden states.

    Taken from one row: without a padding mask the arguments are the same for every row and broadcast over the batch.
    """
    blocks: Any = model.get_submodule(family_of(model).blocks)
    steps: list[_Step] = []

    def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        rest = {name: value for name, value in kwargs.items() if name != "hidden_states"}
        steps.append(_Step(module, args[1:], rest))
        if len(steps) == last - first + 1:
            raise _Reached

    handles = [block.register_forward_pre_hook(keep, with_kwargs=True) for block in blocks[first : last + 1]]
    try:
        with torch.no_grad(), suppress(_Reached):
            model.base_model(ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return steps


def _padded(prompts: Sequence[Sequence[int]]) -> Int[Tensor, "prompt token"]:
    rows = [torch.tensor(list(prompt)) for prompt in prompts]
    return nn.utils.rnn.pad_sequence(rows, batch_first=True)


def _read_tokens(
    prompts: Sequence[Sequence[int]], last: int | None
) -> tuple[Int[Tensor, " read"], Int[Tensor, " read"]]:
    """Prompt and position of each token that is read."""
    places = [
        (row, token)
        for row, prompt in enumerate(prompts)
        for token in range(0 if last is None else max(0, len(prompt) - last), len(prompt))
    ]
    rows, tokens = zip(*places, strict=True)
    return torch.tensor(rows), torch.tensor(tokens)


def lies_below(source: Site, target: Site) -> bool:
    """Whether what is written at `source` can be read at `target` in the same pass."""
    return _height(source) < _height(target)


def _height(site: Site) -> tuple[float, int]:
    if site.stream == "final":
        return float("inf"), 0
    return float(site.layer), _STREAM_ORDER.index(site.stream)


def _check(
    model: PreTrainedModel, source: Site, target: Site, prompts: Sequence[Sequence[int]], last: int | None
) -> None:
    for site in (source, target):
        site_module(model, site)
    if not lies_below(source, target):
        raise SettingError(f"source {source} does not lie below target {target}; give an earlier source")
    if last is not None and last < 1:
        raise SettingError(f"last {last} is too small; give how many tokens to read at the end, or None for all")
    if model.training:
        raise SettingError("the model is in training mode, where dropout changes its activations; call model.eval()")
    if not prompts:
        raise TextError("no prompts to perturb; give at least one")
    context, vocab_size = model.config.max_position_embeddings, model.config.vocab_size
    for index, prompt in enumerate(prompts):
        if not 1 <= len(prompt) <= context:
            raise TextError(f"prompt {index} has {len(prompt)} tokens; this model takes 1 to {context}")
        if not 0 <= min(prompt) <= max(prompt) < vocab_size:
            raise TextError(f"prompt {index} has token ids outside 0 to {vocab_size - 1}; use the model's tokenizer")
