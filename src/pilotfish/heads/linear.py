"""Activations of a few sites in, one logit a token out."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

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
        if not self.sites:
            raise ArtefactError(f"head {self.metric!r} reads no site; name at least one")
        if self.weight.ndim != 1 or self.weight.numel() % len(self.sites):
            raise ArtefactError(
                f"head {self.metric!r} has weights of shape {tuple(self.weight.shape)} for {len(self.sites)} sites; "
                "one number a hidden unit of each site is needed"
            )
        if not bool(torch.isfinite(self.weight).all()) or self.bias != self.bias or abs(self.bias) == float("inf"):
            raise ArtefactError(f"head {self.metric!r} has weights that are not finite; fit it again")

    @property
    def hidden_size(self) -> int:
        return self.weight.numel() // len(self.sites)

    def logits(self, features: Float[Tensor, "token feature"]) -> Float[Tensor, " token"]:
        return features.float() @ self.weight.float() + self.bias

    def rescaled(self, scale: float, shift: float) -> LinearHead:
        """The same head after its logit z became scale · z + shift, as Platt calibration asks."""
        return replace(self, weight=self.weight * scale, bias=self.bias * scale + shift)
