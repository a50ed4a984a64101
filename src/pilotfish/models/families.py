"""The one table that says where each architecture keeps its sites."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from pilotfish.core import Site
from pilotfish.errors import SettingError, UnknownFamily

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """Module paths of one architecture; `attn_out` and `mlp_out` are what is added to the residual stream."""

    blocks: str
    attn_out: str
    """Path inside a block."""
    mlp_out: str
    """Path inside a block."""
    final: str


_LLAMA = Family(blocks="model.layers", attn_out="self_attn", mlp_out="mlp", final="model.norm")

FAMILIES: dict[str, Family] = {
    "llama": _LLAMA,  # Llama, SmolLM2
    "qwen2": _LLAMA,  # Qwen2, Qwen2.5
    "qwen3": _LLAMA,
    "gemma3_text": Family(
        blocks="model.layers",
        attn_out="post_attention_layernorm",
        mlp_out="post_feedforward_layernorm",
        final="model.norm",
    ),
    "gpt2": Family(blocks="transformer.h", attn_out="attn", mlp_out="mlp", final="transformer.ln_f"),
    "gpt_neox": Family(
        blocks="gpt_neox.layers", attn_out="attention", mlp_out="mlp", final="gpt_neox.final_layer_norm"
    ),
}
"""transformers' `config.model_type` to its family; a new architecture is one more row."""


def family_of(model: nn.Module) -> Family:
    """Looks up a model's row.

    Raises:
        UnknownFamily: there is none.
    """
    return family_named(getattr(getattr(model, "config", None), "model_type", type(model).__name__))


def family_named(model_type: str) -> Family:
    """Looks up the row of transformers' `config.model_type`.

    Raises:
        UnknownFamily: there is none.
    """
    if model_type not in FAMILIES:
        raise UnknownFamily(
            f"model type {model_type!r} has no row in the family table; "
            f"known are {', '.join(FAMILIES)}. Add a row to pilotfish.models.families.FAMILIES"
        )
    return FAMILIES[model_type]


def num_layers(model: nn.Module) -> int:
    return len(model.get_submodule(family_of(model).blocks))  # type: ignore[arg-type]  # a ModuleList


def site_module(model: nn.Module, site: Site) -> nn.Module:
    """The module at whose input (`resid_pre`) or output (all other streams) the site lies.

    Raises:
        SettingError: the model has no such layer.
        UnknownFamily: the model has no row in the family table.
    """
    family = family_of(model)
    if site.stream == "final":
        return model.get_submodule(family.final)
    depth = num_layers(model)
    if site.layer >= depth:
        raise SettingError(f"site {site} is outside the model: it has {depth} layers, 0 to {depth - 1}")
    block = model.get_submodule(f"{family.blocks}.{site.layer}")
    path = {"attn_out": family.attn_out, "mlp_out": family.mlp_out}.get(site.stream)
    return block.get_submodule(path) if path else block


def evenly_spaced_sites(model: nn.Module, count: int) -> tuple[Site, ...]:
    """`count` sites for a head: the final norm, and before it the outputs of evenly spaced blocks.

    Raises:
        SettingError: the model has fewer blocks than that.
    """
    depth = num_layers(model)
    if not 1 <= count <= depth:
        raise SettingError(f"{count} sites were asked for; the model has {depth} blocks, so give 1 to {depth}")
    layers = [round((i + 1) * depth / count) - 1 for i in range(count - 1)]
    return (*(Site(layer, "resid_post") for layer in layers), Site(-1, "final"))
