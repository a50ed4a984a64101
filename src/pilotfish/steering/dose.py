"""Directions and a dose in, edits out; and what a dose is in units of the stream that it enters."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import get_args

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pilotfish.core import Site
from pilotfish.errors import SettingError
from pilotfish.models import site_module
from pilotfish.steering.card import Kind
from pilotfish.steering.direction import Direction, op_of
from pilotfish.taps import Edit, When, tapped


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Steering:
    """Directions, and how they act; all it lacks is a dose."""

    directions: tuple[Direction, ...]
    """All at once, each at its own site."""
    kind: Kind = "add"
    """What a dose c does with a vector v: add c v; add it and keep the length of the activation; take out the share c
    of the component along v (1 is all of it); or take that out and put c v in its place."""
    when: When = field(default_factory=When)

    def __post_init__(self) -> None:
        if not self.directions:
            raise SettingError("there is no direction to steer along; give at least one")
        if self.kind not in get_args(Kind):
            raise SettingError(f"kind {self.kind!r} is unknown; use one of {', '.join(get_args(Kind))}")

    def edits(self, dose: float, model: PreTrainedModel) -> tuple[Edit, ...]:
        """One edit a direction, on the model's device and in its dtype. With dose 0 the model keeps its very bits.

        Raises:
            SettingError: the dose is not finite, a vector is 0 where its direction is needed, or a layer is not there.
        """
        return tuple(
            Edit(direction.site, op_of(self.kind, _for_model(direction, model), dose), self.when)
            for direction in self.directions
        )


def _for_model(direction: Direction, model: PreTrainedModel) -> Tensor:
    device = next(site_module(model, direction.site).parameters()).device
    return direction.vector.to(device, model.dtype)


@torch.inference_mode()
def stream_norms(model: PreTrainedModel, sites: Iterable[Site], rows: Sequence[Sequence[int]]) -> dict[Site, float]:
    """The median length of the activations at each site, over all tokens of some rows but the first of each.

    The first token is left out, BOS or not: its activations are many times as long as any other's in most models
    ("massive activations", Sun et al., 2024, arXiv 2402.17762). The median, since a few other tokens share that.

    Args:
        rows: Token ids of texts such as will be steered; a few hundred tokens are enough, and very short texts mislead.

    Raises:
        SettingError: no row has a second token.
    """
    chosen = tuple(dict.fromkeys(sites))
    lengths: dict[Site, list[Tensor]] = {site: [] for site in chosen}
    with tapped(model, chosen) as taps:
        for row in rows:
            if len(row) > 1:
                model.base_model(torch.tensor([list(row)], device=model.device), use_cache=False)
                for site, value in taps.items():
                    lengths[site].append(value[0, 1:].double().norm(dim=-1).cpu())
    if not all(lengths.values()):
        raise SettingError("the first token of a row does not count, and there is no other; give rows of 2 or more")
    return {site: float(torch.cat(parts).median()) for site, parts in lengths.items()}


def relative_dose(steering: Steering, dose: float, norms: dict[Site, float]) -> float:
    """|c| ‖v‖ / ‖h‖, the largest of the directions': how long what is added is beside what was there.

    Around 0.1 to 0.7 vectors tend to work, and over 1 or 2 text falls apart. An ablation adds nothing: its relative
    dose is the share |c|.
    """
    if steering.kind == "ablate":
        return abs(dose)
    return max(abs(dose) * direction.norm / norms[direction.site] for direction in steering.directions)


def dose_of(steering: Steering, relative: float, norms: dict[Site, float]) -> float:
    """The inverse of `relative_dose` for doses of 0 and more.

    Raises:
        SettingError: every vector is 0.
    """
    per_unit = relative_dose(steering, 1.0, norms)
    if not per_unit > 0:
        raise SettingError("the vectors are 0, and no dose makes them act; read them at another layer or token")
    return relative / per_unit
