"""A model and prompts in; directions that change what it does, found without labels, out."""

from pilotfish.discovery.dct import exponential, linear, projected, quadratic
from pilotfish.discovery.factors import Factors
from pilotfish.discovery.melbo import Found, MelboConfig, melbo
from pilotfish.discovery.multiplicity import (
    Doses,
    Multiplicity,
    average_direction,
    deduplicated,
    effect_clusters,
    multiplicity,
    principal_direction,
)
from pilotfish.discovery.promote import promoted
from pilotfish.discovery.radius import Radius, calibrated_radius
from pilotfish.discovery.ranking import (
    Measure,
    head_scores,
    logit_measure,
    logit_scores,
    unembedding_difference,
)
from pilotfish.discovery.response import Response
from pilotfish.discovery.slice import Slice

__all__ = [
    "Doses",
    "Factors",
    "Found",
    "Measure",
    "MelboConfig",
    "Multiplicity",
    "Radius",
    "Response",
    "Slice",
    "average_direction",
    "calibrated_radius",
    "deduplicated",
    "effect_clusters",
    "exponential",
    "head_scores",
    "linear",
    "logit_measure",
    "logit_scores",
    "melbo",
    "multiplicity",
    "principal_direction",
    "projected",
    "promoted",
    "quadratic",
    "unembedding_difference",
]
