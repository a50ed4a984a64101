"""A model and edits in; a model whose activations are written at chosen sites, phases, positions, rows and gates, out.

An edit never writes in place: what a tap or the autograd graph holds of the activation before it stays as it was. What
it does to a token depends on that token's activations, place and row alone; so a text comes out the same with a cache
or without, however it is cut into passes, and after drafted tokens are rolled back.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from pilotfish.core import Site
from pilotfish.errors import SettingError
from pilotfish.models import site_module
from pilotfish.taps.gate import Gate, GateReader, ProjectionGate, comes_before
from pilotfish.taps.hook import hook
from pilotfish.taps.ops import Detach, Op, vector_of

Phase = Literal["prompt", "generation", "both"]

Hidden = Float[Tensor, "batch token hidden"]
Chosen = Bool[Tensor, "#batch #token"] | bool
"""Tokens of a pass; True and False stand for all and none, so that the common cases need no mask."""


@dataclass(frozen=True, slots=True, kw_only=True)
class When:
    """The tokens that an edit applies to; by default all."""

    phase: Phase = "both"
    """The prompt is the pass that begins without a cache, generation every pass after it. Give `edited` a
    `prompt_length` where that does not hold: without a cache, where a prompt comes in chunks or on top of a cache, and
    under speculation (assisted decoding), whose first pass holds drafted tokens beside the prompt."""
    positions: tuple[int, int] | None = None
    """Half-open range of tokens. Counted in each row from its first token that is not padding, those in the cache
    included."""
    rows: tuple[int, ...] | None = None
    """Rows of the batch as the model sees it. Beams are rows, those of one prompt side by side; name all of a prompt's
    or none, since a beam may go on from another's row."""
    gate: Gate | None = None
    """Only tokens at which it opens."""

    def __post_init__(self) -> None:
        if self.phase not in get_args(Phase):
            raise SettingError(f"phase {self.phase!r} is unknown; use one of {', '.join(get_args(Phase))}")
        if self.positions is not None and not 0 <= self.positions[0] < self.positions[1]:
            raise SettingError(
                f"positions {self.positions} are empty or negative; give (start, end), counted from 0, end exclusive"
            )
        if self.rows is not None and (not self.rows or min(self.rows) < 0):
            raise SettingError(f"rows {self.rows} are empty or negative; give indices from 0, or None for all rows")


@dataclass(frozen=True, slots=True, eq=False)
class Edit:
    """One op at one site."""

    site: Site
    op: Op
    when: When = field(default_factory=When)


@contextmanager
def edited(
    model: PreTrainedModel, edits: Sequence[Edit], *, prompt_length: int | Sequence[int] | None = None
) -> Iterator[None]:
    """Writes activations in every forward pass inside the block, in the order given; however it ends, no hook outlives
    it.

    A `tapped` block inside this one reads what the edits wrote, one around it what was there before. With gradient
    checkpointing, call `backward` inside the block too: it runs the blocks again.

    Args:
        prompt_length: Columns of the batch up to the end of the prompt, padding on the left included; says where
            generation begins instead of the cache. One number for all rows, or one for each.

    Raises:
        SettingError: a layer that is not there, a vector of the wrong width, dtype or device, a gate that reads deeper
            than its edit writes; inside the block, from the forward pass: a row that the batch lacks, a mask that does
            not fit, lengths for another number of rows.
        UnknownFamily: the model has no row in the family table.
    """
    call = _Call(model.base_model, _lengths(prompt_length))
    modules = check_edits(model, edits)
    gates = [edit.when.gate for edit in edits if edit.when.gate is not None]
    reader = GateReader()
    with ExitStack() as hooks:
        # The base model is what every call goes through, with or without the output layer.
        before = model.base_model.register_forward_pre_hook(call.read, with_kwargs=True)
        hooks.callback(before.remove)
        for site in dict.fromkeys(site for gate in gates for site in gate.sites):
            hooks.callback(hook(site_module(model, site), site, partial(reader.keep, site)).remove)
        for edit, module in zip(edits, modules, strict=True):
            hooks.callback(hook(module, edit.site, _Writer(edit, call, reader, model.dtype)).remove)
        yield


def check_edits(model: PreTrainedModel, edits: Sequence[Edit]) -> list[nn.Module]:
    """The modules that `edited` would write at; hooks nothing, so the model may be in use.

    Raises:
        SettingError, UnknownFamily: as `edited` does before the forward pass.
    """
    modules = [site_module(model, edit.site) for edit in edits]
    for edit, module in zip(edits, modules, strict=True):
        _check_fits(edit, model, next(module.parameters()).device)
    return modules


class _Call:
    """What the model's caller says of the new tokens: how many are cached before them, and which are padding."""

    def __init__(self, model: nn.Module, prompt_lengths: tuple[int, ...] | None) -> None:
        self._signature = inspect.signature(model.forward)
        self._lengths = prompt_lengths
        self._num_cached = 0
        self._attention_mask: Any = None

    def read(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = self._signature.bind_partial(*args, **kwargs).arguments
        cache = given.get("past_key_values")
        self._num_cached = 0 if cache is None else int(cache.get_seq_length())
        self._attention_mask = given.get("attention_mask")

    def of_phase(self, phase: Phase, hidden: Hidden) -> Chosen:
        """The new tokens that belong to a phase."""
        if phase == "both":
            return True
        batch, num_new, _ = hidden.shape
        first, end = self._num_cached, self._num_cached + num_new
        if self._lengths is None:
            return (first == 0) == (phase == "prompt")
        if len(self._lengths) not in (1, batch):
            raise SettingError(
                f"prompt_length has {len(self._lengths)} numbers, but this pass has {batch} rows; give one a row "
                "(beams are rows), or one for all"
            )
        if end <= min(self._lengths) or first >= max(self._lengths):
            return (end <= min(self._lengths)) == (phase == "prompt")
        columns = torch.arange(first, end, device=hidden.device)
        in_prompt = columns < torch.tensor(self._lengths, device=hidden.device).unsqueeze(-1)
        return in_prompt if phase == "prompt" else ~in_prompt

    def positions(self, num_new: int, device: torch.device) -> Int[Tensor, "#batch token"]:
        """Each new token's place in its row, padding not counted; -1 for padding."""
        num_all = self._num_cached + num_new
        mask = self._attention_mask
        if mask is None:
            return torch.arange(self._num_cached, num_all, device=device).unsqueeze(0)
        if not isinstance(mask, Tensor) or mask.ndim != 2 or mask.shape[1] != num_all:
            shape = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
            raise SettingError(
                f"an edit with positions needs to know the padding, but attention_mask is {shape}; give one of shape "
                f"(batch, {num_all}), the {self._num_cached} cached tokens included, or none where nothing is padded"
            )
        is_text = mask.to(device) != 0
        return (is_text.cumsum(-1) - 1).masked_fill(~is_text, -1)[:, self._num_cached :]


class _Writer:
    """One edit in the passes of one block."""

    def __init__(self, edit: Edit, call: _Call, reader: GateReader, dtype: torch.dtype) -> None:
        self._edit, self._call, self._reader = edit, call, reader
        vector = vector_of(edit.op)
        is_trained = vector is not None and vector.requires_grad  # each pass then has its own graph
        self._prepared = None if is_trained else edit.op.prepared(dtype)
        self._dtype = dtype

    def __call__(self, hidden: Hidden) -> Hidden:
        chosen = self._chosen(hidden)
        if chosen is False:
            return hidden
        # Autocast may hand on another dtype than the model's.
        prepared = self._prepared if hidden.dtype == self._dtype else None
        apply = prepared or self._edit.op.apply
        written = apply(hidden).to(hidden.dtype)
        return written if chosen is True else torch.where(chosen.unsqueeze(-1), written, hidden)

    def _chosen(self, hidden: Hidden) -> Chosen:
        when, (batch, num_new, _) = self._edit.when, hidden.shape
        if when.rows is not None and max(when.rows) >= batch:
            raise SettingError(
                f"rows {when.rows} of the edit at {self._edit.site} are outside the batch: it has {batch}"
            )
        chosen = self._call.of_phase(when.phase, hidden)
        if chosen is False:
            return False
        if when.rows is not None:
            rows = torch.zeros(batch, 1, dtype=torch.bool, device=hidden.device)
            rows[list(when.rows)] = True
            chosen = rows & chosen
        if when.positions is not None:
            positions = self._call.positions(num_new, hidden.device)
            chosen = chosen & ((positions >= when.positions[0]) & (positions < when.positions[1]))
        return chosen if when.gate is None else chosen & self._reader.opens(when.gate)


def _lengths(given: int | Sequence[int] | None) -> tuple[int, ...] | None:
    if given is None:
        return None
    lengths = (given,) if isinstance(given, int) else tuple(given)
    if not lengths or min(lengths) < 1:
        raise SettingError(f"prompt_length {given} is too small; give 1 or more tokens (for each row), or None")
    return lengths


def _check_fits(edit: Edit, model: PreTrainedModel, device: torch.device) -> None:
    vector, gate = vector_of(edit.op), edit.when.gate
    if vector is not None:
        given = (tuple(vector.shape), vector.dtype, vector.device)
        needed = ((model.config.hidden_size,), model.dtype, device)
        if given != needed:
            raise SettingError(
                f"{type(edit.op).__name__} at {edit.site} got a vector of shape, dtype and device {given}; the "
                f"model has {needed} there. Make one of that width, and move it with .to(device, dtype)"
            )
    if isinstance(edit.op, Detach) and edit.op.mask is not None and edit.op.mask.device != device:
        raise SettingError(
            f"Detach at {edit.site} got a mask on {edit.op.mask.device}; the model is on {device}. Use .to({device})"
        )
    if gate is None:
        return
    deeper = [site for site in gate.sites if not comes_before(site, edit.site)]
    if deeper or not gate.sites:
        raise SettingError(
            f"the gate of the edit at {edit.site} reads {', '.join(map(str, deeper)) or 'no site'}, which a pass "
            "reaches only later; give a gate on that site or an earlier one"
        )
    if isinstance(gate, ProjectionGate) and gate.direction.shape != (model.config.hidden_size,):
        raise SettingError(
            f"the gate of the edit at {edit.site} has a direction of {len(gate.direction)} numbers; the model has "
            f"{model.config.hidden_size} there"
        )
