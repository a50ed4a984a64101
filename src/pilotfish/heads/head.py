"""Activations of a few sites in; a logit a token, and one for the response so far, out."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from pilotfish.core import Site
from pilotfish.errors import ArtefactError
from pilotfish.heads.form import Form

Which = Literal["token", "response"]


@dataclass(frozen=True, slots=True, eq=False)
class Head:
    """A readout for one metric, float32; standardisation and calibration are folded into its weights."""

    metric: str
    sites: tuple[Site, ...]
    weight: Float[Tensor, "channel feature"]
    """The sites' hidden units one site after the other, in the order of `sites`."""
    bias: Float[Tensor, " channel"]
    form: Form = field(default_factory=Form)
    outputs: Float[Tensor, " output"] = field(default_factory=lambda: torch.zeros(1))
    """`linear`: the logit of a response before its first token. `mlp`: two rows of weights, two biases, that logit.
    Else empty.
    """

    def __post_init__(self) -> None:
        if not self.sites or len(set(self.sites)) != len(self.sites):
            raise ArtefactError(
                f"head {self.metric!r} reads the sites {list(map(str, self.sites))}; name one or more, once"
            )
        expected = (self.form.num_channels, self.form.num_channels, self.form.num_outputs)
        size = self.weight.shape[-1]
        if (len(self.weight), len(self.bias), len(self.outputs)) != expected or not size or size % len(self.sites):
            shapes = ", ".join(str(tuple(item.shape)) for item in (self.weight, self.bias, self.outputs))
            raise ArtefactError(
                f"head {self.metric!r} has weights, biases and outputs of shape {shapes} for {len(self.sites)} sites "
                f"and {self.form.num_channels} channels; one number a hidden unit of each site and channel is needed"
            )
        if not all(bool(torch.isfinite(item).all()) for item in (self.weight, self.bias, self.outputs)):
            raise ArtefactError(f"head {self.metric!r} has weights that are not finite; fit it again")

    @property
    def hidden_size(self) -> int:
        return self.weight.shape[1] // len(self.sites)

    def channels(self, features: Float[Tensor, "token feature"]) -> Float[Tensor, "token channel"]:
        return torch.addmm(self.bias.float(), features.float(), self.weight.float().T)

    def logits(self, features: Float[Tensor, "token feature"], which: Which = "token") -> Float[Tensor, " token"]:
        """Of each token alone, or of the response up to it, which begins with the first of `features`."""
        read = self.form.tokens if which == "token" else self.form.running
        return read(self.channels(features), self.outputs)

    def rescaled(self, which: Which, scale: float, shift: float) -> Head:
        """The same head after one of its logits z became scale · z + shift, scale > 0, as Platt calibration asks.

        A head that reads both off one channel has both rescaled.
        """
        assert scale > 0 and math.isfinite(shift), "a calibration keeps the order"
        bias, weight, outputs = self.bias.clone(), self.weight.clone(), self.outputs.clone()
        if which == "response" or self.form.shares:
            outputs[-1:] = outputs[-1:] * scale + shift  # the prior, where there is one
        if self.form.kind == "mlp":
            row, width = int(which == "response"), self.form.width
            outputs[row * width : (row + 1) * width] *= scale
            outputs[2 * width + row] = outputs[2 * width + row] * scale + shift
        else:
            chosen = slice(0, 1) if which == "token" else self.form.response_channels()
            weight[chosen] *= scale
            bias[chosen] = bias[chosen] * scale + shift / len(bias[chosen])  # they are summed up
        return replace(self, bias=bias, weight=weight, outputs=outputs)


def linear_head(metric: str, sites: tuple[Site, ...], weight: Float[Tensor, " feature"], bias: float) -> Head:
    """A head of one direction, such as a probe made elsewhere; a response scores what its highest token scores."""
    if weight.ndim != 1:
        raise ArtefactError(f"head {metric!r} got weights of shape {tuple(weight.shape)}; a direction has one axis")
    return Head(metric, sites, weight[None], torch.tensor([bias]), Form(width=1, window=1))
