"""A model and edits in; a model whose activations are written at chosen sites, phases, positions and rows, out.

An edit never writes in place: what a tap or the autograd graph holds of the activation before it stays as it was.
"""

from __future__ import annotations

import inspect
import math
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
from pilotfish.taps.hook import hook

Phase = Literal["prompt", "generation", "both"]

Hidden = Float[Tensor, "batch token hidden"]


@dataclass(frozen=True, slots=True, eq=False)
class Add:
    """Adds `scale * vector`. With scale 0 the activation keeps its very bits."""

    vector: Float[Tensor, " hidden"]
    scale: float = 1.0

    def __post_init__(self) -> None:
        _check_vector("Add", self.vector)
        _check_finite("Add.scale", self.scale)

    def apply(self, hidden: Hidden) -> Hidden:
        return hidden if self.scale == 0 else torch.add(hidden, self.vector, alpha=self.scale)


@dataclass(frozen=True, slots=True, eq=False)
class Ablate:
    """Takes out the component along `direction`, whose length does not matter."""

    direction: Float[Tensor, " hidden"]

    def __post_init__(self) -> None:
        _check_vector("Ablate", self.direction)
        if not 0.0 < float(self.direction.detach().float().norm()) < math.inf:
            raise SettingError("Ablate got a direction of length 0 or infinity; give one of about unit length")

    def apply(self, hidden: Hidden) -> Hidden:
        precise = torch.promote_types(hidden.dtype, torch.float32)
        unit = nn.functional.normalize(self.direction.to(precise), dim=0, eps=0.0)
        values = hidden.to(precise)
        return values - (values @ unit).unsqueeze(-1) * unit


@dataclass(frozen=True, slots=True, eq=False)
class Replace:
    """Puts `vector` where the activation was."""

    vector: Float[Tensor, " hidden"]

    def __post_init__(self) -> None:
        _check_vector("Replace", self.vector)

    def apply(self, hidden: Hidden) -> Hidden:
        return self.vector.expand_as(hidden)


@dataclass(frozen=True, slots=True)
class Scale:
    """Multiplies by `factor`."""

    factor: float

    def __post_init__(self) -> None:
        _check_finite("Scale.factor", self.factor)

    def apply(self, hidden: Hidden) -> Hidden:
        return hidden * self.factor


@dataclass(frozen=True, slots=True, eq=False)
class Detach:
    """Lets the value through and no gradient back."""

    mask: Bool[Tensor, ...] | None = None
    """Where to cut; everywhere by default. Any shape that broadcasts to *batch token hidden*: `hidden` for some
    dimensions, `batch token 1` for some tokens."""

    def __post_init__(self) -> None:
        if self.mask is not None and self.mask.dtype != torch.bool:
            raise SettingError(f"Detach got a mask of {self.mask.dtype}; give torch.bool, True where gradients are cut")

    def apply(self, hidden: Hidden) -> Hidden:
        if self.mask is None:
            return hidden.detach()
        if not _broadcasts(self.mask.shape, hidden.shape):
            raise SettingError(
                f"Detach got a mask of shape {tuple(self.mask.shape)}, but this pass has (batch, token, hidden) = "
                f"{tuple(hidden.shape)}; give one that broadcasts to that, for example (hidden,) or (batch, token, 1)"
            )
        return torch.where(self.mask, hidden.detach(), hidden)


Op = Add | Ablate | Replace | Scale | Detach


@dataclass(frozen=True, slots=True, kw_only=True)
class When:
    """The tokens that an edit applies to; by default all."""

    phase: Phase = "both"
    """The prompt is the pass that begins without a cache, generation every pass after it. Without a cache every pass is
    prompt; give `edited` a `prompt_length` there, and where a prompt comes in chunks or on top of a cache."""
    positions: tuple[int, int] | None = None
    """Half-open range of tokens. Counted in each row from its first token that is not padding, those in the cache
    included."""
    rows: tuple[int, ...] | None = None
    """Rows of the batch as the model sees it (beams are rows)."""

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
def edited(model: PreTrainedModel, edits: Sequence[Edit], *, prompt_length: int | None = None) -> Iterator[None]:
    """Writes activations in every forward pass inside the block, in the order given; however it ends, no hook outlives
    it.

    A `tapped` block inside this one reads what the edits wrote, one around it what was there before. With gradient
    checkpointing, call `backward` inside the block too: it runs the blocks again.

    Args:
        prompt_length: Tokens of the prompt as it stands in the batch, padding included; says where generation begins
            instead of the cache.

    Raises:
        SettingError: a layer that is not there, a vector of the wrong width, dtype or device; inside the block, from
            the forward pass: a row that the batch lacks, a mask that does not fit.
        UnknownFamily: the model has no row in the family table.
    """
    if prompt_length is not None and prompt_length < 1:
        raise SettingError(f"prompt_length {prompt_length} is too small; give 1 or more tokens, or None")
    modules = [site_module(model, edit.site) for edit in edits]
    for edit, module in zip(edits, modules, strict=True):
        _check_fits(edit, model, next(module.parameters()).device)
    call = _Call(model.base_model, prompt_length)
    with ExitStack() as hooks:
        # The base model is what every call goes through, with or without the output layer.
        before = model.base_model.register_forward_pre_hook(call.read, with_kwargs=True)
        hooks.callback(before.remove)
        for edit, module in zip(edits, modules, strict=True):
            hooks.callback(hook(module, edit.site, partial(_write, edit, call)).remove)
        yield


class _Call:
    """What the model's caller says of the new tokens: how many are cached before them, and which are padding."""

    def __init__(self, model: nn.Module, prompt_length: int | None) -> None:
        self._signature = inspect.signature(model.forward)
        self._prompt_length = prompt_length
        self._num_cached = 0
        self._attention_mask: Any = None

    def read(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = self._signature.bind_partial(*args, **kwargs).arguments
        cache = given.get("past_key_values")
        self._num_cached = 0 if cache is None else int(cache.get_seq_length())
        self._attention_mask = given.get("attention_mask")

    def columns(self, phase: Phase, num_new: int) -> range:
        """The new tokens that belong to a phase."""
        if self._prompt_length is not None:
            split = min(max(self._prompt_length - self._num_cached, 0), num_new)
        else:
            split = num_new if self._num_cached == 0 else 0
        return {"prompt": range(split), "generation": range(split, num_new), "both": range(num_new)}[phase]

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


def _write(edit: Edit, call: _Call, hidden: Hidden) -> Hidden:
    when = edit.when
    batch, num_new, _ = hidden.shape
    columns = call.columns(when.phase, num_new)
    if when.rows is not None and max(when.rows) >= batch:
        raise SettingError(f"rows {when.rows} of the edit at {edit.site} are outside the batch: it has {batch}")
    if not columns:
        return hidden
    written = edit.op.apply(hidden).to(hidden.dtype)  # autocast may hand on another dtype than the vector's
    if when.rows is None and when.positions is None and len(columns) == num_new:
        return written
    chosen = torch.zeros(batch, num_new, dtype=torch.bool, device=hidden.device)
    chosen[slice(None) if when.rows is None else list(when.rows), columns.start : columns.stop] = True
    if when.positions is not None:
        positions = call.positions(num_new, hidden.device)
        chosen &= (positions >= when.positions[0]) & (positions < when.positions[1])
    return torch.where(chosen.unsqueeze(-1), written, hidden)


def _check_fits(edit: Edit, model: PreTrainedModel, device: torch.device) -> None:
    match edit.op:
        case Add(vector=vector) | Replace(vector=vector) | Ablate(direction=vector):
            given = (tuple(vector.shape), vector.dtype, vector.device)
            needed = ((model.config.hidden_size,), model.dtype, device)
            if given != needed:
                raise SettingError(
                    f"{type(edit.op).__name__} at {edit.site} got a vector of shape, dtype and device {given}; the "
                    f"model has {needed} there. Make one of that width, and move it with .to(device, dtype)"
                )
        case Detach(mask=Tensor(device=other)) if other != device:
            raise SettingError(
                f"Detach at {edit.site} got a mask on {other}; the model is on {device}. Use .to({device})"
            )


def _check_vector(op: str, vector: Tensor) -> None:
    if vector.ndim != 1 or not vector.is_floating_point():
        raise SettingError(
            f"{op} got a tensor of shape {tuple(vector.shape)} and {vector.dtype}; give one vector of floats, (hidden,)"
        )
    if not vector.isfinite().all():
        raise SettingError(
            f"{op} got a vector with NaN or infinity, which would spread to every later token; give finite numbers"
        )


def _check_finite(name: str, value: float) -> None:
    if not math.isfinite(value):
        raise SettingError(f"{name} is {value}; give a finite number")


def _broadcasts(small: Sequence[int], large: Sequence[int]) -> bool:
    """Whether a tensor of shape `small` stretches to `large` without stretching `large`."""
    pairs = zip(reversed(small), reversed(large), strict=False)
    return len(small) <= len(large) and all(mine in (1, other) for mine, other in pairs)
