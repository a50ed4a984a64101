"""A token's activations in; whether an edit applies to that token out.

A gate looks at the token itself, never back: so it opens for the same tokens with or without a cache, in a batch, after
a rollback and in every beam.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol, get_args, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from pilotfish.core import STREAMS, Site
from pilotfish.errors import SettingError
from pilotfish.taps.ops import check_direction, unit

Side = Literal["above", "below"]


@runtime_checkable
class Gate(Protocol):
    """Anything that says of each token whether it is to be edited."""

    @property
    def sites(self) -> tuple[Site, ...]:
        """What it reads: no deeper than the edit's own site, where it reads what was there before the edit."""
        ...

    def opens(self, features: Float[Tensor, "batch token feature"]) -> Bool[Tensor, "batch token"]:
        """`features` are the sites' hidden units one site after the other, in the model's dtype."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class ProjectionGate:
    """Opens where the projection on a direction, taken at unit length, is on one side of a threshold."""

    site: Site
    direction: Float[Tensor, " hidden"]
    threshold: float
    """In the units of the activation; reaching it opens the gate."""
    side: Side = "above"

    def __post_init__(self) -> None:
        check_direction("ProjectionGate", self.direction)
        if self.side not in get_args(Side):
            raise SettingError(f"gate side {self.side!r} is unknown; use one of {', '.join(get_args(Side))}")

    @property
    def sites(self) -> tuple[Site, ...]:
        return (self.site,)

    def opens(self, features: Float[Tensor, "batch token feature"]) -> Bool[Tensor, "batch token"]:
        axis = unit(self.direction.to(features.device), features.dtype)
        along = features.to(axis.dtype) @ axis
        return along >= self.threshold if self.side == "above" else along <= self.threshold


def comes_before(gate: Site, edit: Site) -> bool:
    """Whether a pass reaches the gate's site no later than the edit's."""
    return _depth(gate) <= _depth(edit)


def _depth(site: Site) -> tuple[bool, int, int]:
    order = ("resid_pre", "attn_out", "mlp_out", "resid_post", "final")
    assert set(order) == set(STREAMS), "every stream has a place in the pass"
    return site.stream == "final", site.layer, order.index(site.stream)


class GateReader:
    """Keeps what the last pass had at the sites that gates read."""

    def __init__(self) -> None:
        self._values: dict[Site, Tensor] = {}

    def keep(self, site: Site, hidden: Tensor) -> None:
        self._values[site] = hidden.detach()

    def opens(self, gate: Gate) -> Bool[Tensor, "batch token"]:
        return gate.opens(torch.cat([self._values[site] for site in gate.sites], dim=-1))
