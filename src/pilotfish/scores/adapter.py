"""A model in; a copy of it with low-rank adapters (LoRA, arXiv 2106.09685), and with these merged in, out."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from pilotfish.errors import SettingError
from pilotfish.models import family_of, num_layers


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterConfig:
    rank: int = 16
    """Of each change of weights."""
    alpha: float = 32.0
    """A change is scaled by alpha / rank."""
    modules: tuple[str, ...] = ()
    """Names of the linear maps that are tuned, for example q_proj; all of a block when none is named."""
    depth: float = 0.5
    """Share of the blocks that is tuned, from the top: those below need no backward pass."""

    def __post_init__(self) -> None:
        if self.rank < 1 or not 0.0 < self.alpha < float("inf"):
            raise SettingError(f"rank {self.rank} and alpha {self.alpha} are not allowed; give 1 or more, more than 0")
        if not 0.0 < self.depth <= 1.0:
            raise SettingError(f"depth {self.depth} is outside (0, 1]; 0.5 tunes the upper half of the blocks")


class Adapted(NamedTuple):
    """A copy that shares its frozen weights with the original, float32 adapters beside them."""

    model: PreTrainedModel
    merge: Callable[..., nn.Module]

    def parameters(self) -> list[nn.Parameter]:
        """Of the adapters: all that can be trained."""
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def merged(self) -> PreTrainedModel:
        """Plain weights of the original's dtype; this object cannot be used afterwards.

        Weights without an adapter stay shared with the original.

        Raises:
            SettingError: they are not finite.
        """
        try:
            merged = self.merge(safe_merge=True)  # safe: into copies, and checked
        except ValueError as error:
            raise SettingError("the tuned weights are not finite; take a smaller learning rate") from error
        assert isinstance(merged, PreTrainedModel), "what was wrapped comes out"
        return merged.requires_grad_(False)


def require_peft() -> None:
    """Raises `SettingError` when peft is not installed."""
    try:
        import peft  # noqa: F401
    except ModuleNotFoundError as error:
        raise SettingError("tuning a draft needs peft; install it with: pip install 'pilotfish[train]'") from error


def adapted(model: PreTrainedModel, config: AdapterConfig, *, generator: torch.Generator) -> Adapted:
    """Puts adapters beside linear maps of the upper blocks; until they are trained they change no bit of the output.

    The original is left as it is.

    Raises:
        SettingError: no linear map has one of the names, or peft is not installed.
        UnknownFamily: the model has no row in the family table.
    """
    require_peft()
    from peft import LoraConfig, LoraModel

    maps = dict(_linear_maps(model, config))
    sharing = _sharing_weights(model)
    lora = LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,  # type: ignore[arg-type]  # a number is all that is done with it
        target_modules=list(maps),
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in maps.values()),
    )
    with torch.random.fork_rng(devices=[]):  # its start draws from the global generator, only to be drawn again
        wrapper = LoraModel(sharing, lora, "default")
    for name, parameter in wrapper.named_parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
        if "lora_A" in name:  # the other factor starts at 0
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) / parameter.shape[1] ** 0.5)
    return Adapted(sharing.train(False), wrapper.merge_and_unload)


def _linear_maps(model: PreTrainedModel, config: AdapterConfig) -> Iterator[tuple[str, nn.Module]]:
    """Those to be tuned, by their full names."""
    blocks, depth = family_of(model).blocks, num_layers(model)
    tuned = range(depth - max(1, round(config.depth * depth)), depth)
    linear = {
        f"{blocks}.{index}.{name}": module
        for index in tuned
        for name, module in model.get_submodule(f"{blocks}.{index}").named_modules()
        if isinstance(module, nn.Linear | Conv1D)
    }
    there = {name.rpartition(".")[2] for name in linear}
    unknown = [name for name in config.modules if name not in there]
    if unknown:
        raise SettingError(f"no linear map of a block is called {unknown[0]!r}; there are {', '.join(sorted(there))}")
    for name, module in linear.items():
        if not config.modules or name.rpartition(".")[2] in config.modules:
            yield name, module


def _sharing_weights(model: PreTrainedModel) -> PreTrainedModel:
    """A copy whose parameters lie where the original's do, but are frozen."""
    shared = {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in model.parameters()}
    return copy.deepcopy(model, shared)
