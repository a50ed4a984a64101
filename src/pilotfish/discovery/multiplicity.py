"""Found vectors and what they do in; which of them do the same thing, and what that thing takes, out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.spatial.distance import pdist
from torch import Tensor

from pilotfish.core import Site
from pilotfish.discovery.ranking import Measure
from pilotfish.discovery.response import unit
from pilotfish.errors import SettingError
from pilotfish.taps import Ablate, Add, Edit


class Doses(NamedTuple):
    """The measure under one kind of edit."""

    mean: float
    """Over the single vectors."""
    best: float
    """Of the single vectors: the highest when they are added, the lowest when they are ablated."""
    average: float
    """With the average vector."""
    principal: float
    """With the first singular vector."""


class Multiplicity(NamedTuple):
    """How many ways lead to one behaviour."""

    members: tuple[int, ...]
    """Vectors that reach the threshold when added."""
    unsteered: float
    """The measure without any edit."""
    added: Doses
    ablated: Doses
    mean_cosine: float
    """Of |cosine| between members."""
    condition: float
    """Largest singular value over smallest, members at length 1. Large: they all but lie in fewer dimensions."""


def effect_clusters(effects: Float[Tensor, "vector output"], *, similarity: float = 0.8) -> tuple[tuple[int, ...], ...]:
    """Groups of vectors whose effects point the same way, the largest group first.

    Average linkage on the cosine of effects. What a vector does decides, not where it points: many directions far from
    one another do the same thing.

    Args:
        effects: Change at the target (or at `final`) under each vector.
        similarity: Mean cosine down to which groups are joined, in (0, 1).

    Raises:
        SettingError: the similarity is outside (0, 1), or an effect is 0.
    """
    units = _unit_effects(effects, similarity)
    if len(units) == 1:
        return ((0,),)
    labels = fcluster(linkage(pdist(units, "cosine"), "average"), 1 - similarity, "distance")
    groups = [tuple(map(int, np.flatnonzero(labels == label))) for label in np.unique(labels)]
    return tuple(sorted(groups, key=lambda group: (-len(group), group)))


def deduplicated(
    effects: Float[Tensor, "vector output"], strengths: Float[Tensor, " vector"], *, similarity: float = 0.9
) -> Int[Tensor, " kept"]:
    """The vectors, strongest first, without those whose effect is that of a stronger one.

    Raises:
        SettingError: the similarity is outside (0, 1), or an effect is 0.
    """
    units = torch.from_numpy(_unit_effects(effects, similarity))
    kept: list[int] = []
    for index in strengths.abs().argsort(descending=True).tolist():
        if not kept or float((units[kept] @ units[index]).max()) < similarity:
            kept.append(index)
    return torch.tensor(kept)


def average_direction(vectors: Float[Tensor, "vector hidden"]) -> Float[Tensor, " hidden"]:
    """The mean of the unit vectors, at length 1."""
    return unit(unit(vectors).mean(0))


def principal_direction(vectors: Float[Tensor, "vector hidden"]) -> Float[Tensor, " hidden"]:
    """The first right singular vector of the unit vectors, in the sense of their mean."""
    units = unit(vectors)
    first: Tensor = torch.linalg.svd(units, full_matrices=False).Vh[0]
    return -first if float(first @ units.sum(0)) < 0 else first


def multiplicity(
    vectors: Float[Tensor, "vector hidden"],
    measure: Measure,
    *,
    site: Site,
    radius: float,
    threshold: float,
    ablate_at: Sequence[Site] = (),
) -> Multiplicity:
    """Adds each vector, ablates each that reached the threshold, then does both with their average and principal one.

    Published finding to hold yours against: averaging does little for adding and much for ablating, that is, one
    primary direction and many secondary ones (Mack 2024, section on feature multiplicity).

    Args:
        site: Where vectors are added, at length `radius`.
        ablate_at: Sites at which a direction is taken out together; `site` alone by default.

    Raises:
        SettingError: no vector reaches the threshold.
    """
    units = unit(vectors)
    places = tuple(ablate_at) or (site,)

    def add(vector: Tensor) -> float:
        return measure([Edit(site, Add(vector, radius))])

    def ablate(vector: Tensor) -> float:
        return measure([Edit(place, Ablate(vector)) for place in places])

    reached = [add(vector) for vector in units]
    members = tuple(i for i, value in enumerate(reached) if value >= threshold)
    if not members:
        raise SettingError(
            f"none of {len(units)} vectors reaches {threshold}; the best has {max(reached):.4g}. Lower the threshold, "
            f"or take a larger radius than {radius:g}"
        )
    chosen = units[list(members)]
    joint = (average_direction(chosen), principal_direction(chosen))
    alone, removed = [reached[i] for i in members], [ablate(vector) for vector in chosen]
    singular = torch.linalg.svdvals(chosen)
    return Multiplicity(
        members=members,
        unsteered=measure([]),
        added=Doses(_mean(alone), max(alone), *map(add, joint)),
        ablated=Doses(_mean(removed), min(removed), *map(ablate, joint)),
        mean_cosine=_mean_cosine(chosen),
        condition=float(singular[0] / singular[-1]),
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _mean_cosine(units: Tensor) -> float:
    """Over pairs; 1 for a single vector."""
    if len(units) == 1:
        return 1.0
    size = len(units)
    rows, columns = torch.triu_indices(size, size, offset=1)
    return float((units @ units.T).abs()[rows, columns].mean())


def _unit_effects(effects: Tensor, similarity: float) -> np.ndarray[tuple[int, int], np.dtype[np.float64]]:
    if not 0 < similarity < 1:
        raise SettingError(f"similarity {similarity} is outside (0, 1); it is a cosine")
    if bool((effects.norm(dim=-1) == 0).any()):
        raise SettingError("an effect is 0, so it points nowhere; leave such vectors out")
    found: np.ndarray[tuple[int, int], np.dtype[np.float64]] = unit(effects.double()).cpu().numpy()
    return found
