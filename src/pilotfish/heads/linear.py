"""Activations of a few sites in, one logit a token out."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor, nn

from pilotfish.core import Site
from pilotfish.errors import ArtefactError


@dataclass(frozen=True, slots=True, eq=False)
class LinearHead:
    """A linear readout for one metric, float32; standardisation and calibration are folded into its weights."""

    metric: str
    sites: tuple[Site, ...]
    weight: Float[Tensor, " feature"]
    """The sites' hidden units one site after the other, in the order of `sites`."""
    bias: float

    def __post_init__(self) -> None:
        if not self.sites or len(set(self.sites)) != len(self.sites):
            raise ArtefactError(
                f"head {self.metric!r} reads the sites {list(map(str, self.sites))}; name one or more, once"
            )
        if self.weight.ndim != 1 or not self.weight.numel() or self.weight.numel() % len(self.sites):
            raise ArtefactError(
                f"head {self.metric!r} has weights of shape {tuple(self.weight.shape)} for {len(self.sites)} sites; "
                "one number a hidden unit of each site is needed"
            )
        if not bool(torch.isfinite(self.weight).all()) or not math.isfinite(self.bias):
            raise ArtefactError(f"head {self.metric!r} has weights that are not finite; fit it again")

    @property
    def hidden_size(self) -> int:
        return self.weight.numel() // len(self.sites)

    def logits(self, features: Float[Tensor, "token feature"]) -> Float[Tensor, " token"]:
        return features.float() @ self.weight.float() + self.bias

    def rescaled(self, scale: float, shift: float) -> LinearHead:
        """The same head after its logit z became scale · z + shift, as Platt calibration asks."""
        return replace(self, weight=self.weight * scale, bias=self.bias * scale + shift)


class LinearReadout(nn.Module):
    """Trainable linear readouts over standardised features, several candidates side by side in one matmul.

    Features stay as they are: each pass divides the weights by the standard deviations instead, which is the same and
    saves a pass over the activations. Weights start at 0, as a convex problem allows.
    """

    mean: Tensor
    inverse_std: Tensor

    def __init__(self, mean: Float[Tensor, " feature"], inverse_std: Float[Tensor, " feature"], num_candidates: int):
        super().__init__()
        self.register_buffer("mean", mean)
        self.register_buffer("inverse_std", inverse_std)
        self.weight = nn.Parameter(torch.zeros(num_candidates, len(mean)))
        self.bias = nn.Parameter(torch.zeros(num_candidates))

    def forward(self, features: Float[Tensor, "token feature"]) -> Float[Tensor, "token candidate"]:
        weight = self.weight * self.inverse_std
        return nn.functional.linear(features, weight, self.bias - weight @ self.mean)

    def folded(self, candidate: int) -> tuple[Float[Tensor, " feature"], float]:
        """Weight and bias of one candidate for features as they are."""
        weight, bias = self.weight[candidate].detach().double(), self.bias[candidate].detach().double()
        weight = weight * self.inverse_std
        return weight.float(), float(bias - weight @ self.mean.double())
