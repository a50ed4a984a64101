"""A model and prompts in; directions that change what it does, found without labels, out."""

from pilotfish.discovery.attack import Attacked, attack
from pilotfish.discovery.dct import exponential, linear, projected, quadratic
from pilotfish.discovery.explore import Exploration, ExploreConfig, Finding, explore
from pilotfish.discovery.factors import Factors
from pilotfish.discovery.files import Discovered, described, load_findings, load_gate, promote, save_findings
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
from pilotfish.discovery.observe import NextToken, ObserveConfig, Observed, observe
from pilotfish.discovery.promote import gated, monitor, promoted
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
    "Attacked",
    "Discovered",
    "Doses",
    "Exploration",
    "ExploreConfig",
    "Factors",
    "Finding",
    "Found",
    "Measure",
    "MelboConfig",
    "Multiplicity",
    "NextToken",
    "ObserveConfig",
    "Observed",
    "Radius",
    "Response",
    "Slice",
    "attack",
    "average_direction",
    "calibrated_radius",
    "deduplicated",
    "described",
    "effect_clusters",
    "explore",
    "exponential",
    "gated",
    "head_scores",
    "linear",
    "load_findings",
    "load_gate",
    "logit_measure",
    "logit_scores",
    "melbo",
    "monitor",
    "multiplicity",
    "observe",
    "principal_direction",
    "projected",
    "promote",
    "promoted",
    "quadratic",
    "save_findings",
    "unembedding_difference",
]
