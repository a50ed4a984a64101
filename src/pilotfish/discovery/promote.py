"""A found vector in; a direction, a monitor head or a gated edit, ready to be used, out."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from pilotfish.core import Site
from pilotfish.errors import SettingError
from pilotfish.heads import Head, linear_head
from pilotfish.models import Identity
from pilotfish.steering.card import DirectionCard
from pilotfish.steering.direction import Direction
from pilotfish.steering.gates import HeadGate
from pilotfish.taps import Edit, When

STEEPNESS = 8.0
"""Logits between where the plain model stands and where the vector brings it: from -4 to 4."""


def promoted(
    vector: Float[Tensor, " hidden"], site: Site, *, name: str, identity: Identity, radius: float, notes: str = ""
) -> Direction:
    """The unit vector as a direction whose dose is the radius that it was found at: `to_edit` adds what was found.

    Args:
        radius: Negative for one that takes away what was found.

    Raises:
        DirectionMismatch: the vector is not as wide as the model.
        SettingError: the vector is not finite, or 0.
    """
    card = DirectionCard(name=name, identity=identity, method="discovered", notes=notes)
    found = Direction(site=site, vector=vector.detach().float().cpu(), card=card)
    return Direction(site=site, vector=found.unit().vector, card=card).with_dose(radius)


def monitor(effect: Float[Tensor, " hidden"], site: Site, *, metric: str, center: float, length: float) -> Head:
    """A head at the target that says how far a token stands along what the vector does there.

    Its probability is one half midway between the plain model and the steered one. It has seen no labels and knows
    nothing of false alarms: choose a threshold on ordinary traffic.

    Args:
        effect: Unit vector at the target.
        center: Mean projection of the plain model's states on it.
        length: By how much the vector raises it, above 0.

    Raises:
        SettingError: the length is not positive.
    """
    if not length > 0:
        raise SettingError(f"length {length} is not positive; a vector that changes nothing makes no monitor")
    slope = STEEPNESS / length
    return linear_head(metric, (site,), slope * effect.detach().float().cpu(), -slope * (center + length / 2))


def gated(direction: Direction, head: Head, *, threshold: float = 0.5) -> Edit:
    """The direction at its dose, at the tokens alone at which the head reaches the threshold.

    With the effect of a vector at minus its length it takes back what the vector does, where it is seen to be done.

    Raises:
        SettingError: the direction has no dose, or the threshold is outside (0, 1).
    """
    return direction.to_edit(when=When(gate=HeadGate(head, threshold)))
