"""A found vector in; a direction with a card, ready to be steered with, watched for or gated on, out."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from pilotfish.core import Site
from pilotfish.models import Identity
from pilotfish.steering.card import DirectionCard
from pilotfish.steering.direction import Direction


def promoted(
    vector: Float[Tensor, " hidden"], site: Site, *, name: str, identity: Identity, radius: float, notes: str = ""
) -> Direction:
    """The unit vector as a direction whose dose is the radius that it was found at.

    `to_edit` of it adds what was found; `to_head` makes a monitor of it, which knows nothing yet of false alarms.

    Raises:
        DirectionMismatch: the vector is not as wide as the model.
        SettingError: the vector is not finite, or 0.
    """
    card = DirectionCard(name=name, identity=identity, method="discovered", notes=notes)
    found = Direction(site=site, vector=vector.detach().float().cpu(), card=card)
    return Direction(site=site, vector=found.unit().vector, card=card).with_dose(radius)
