"""Directions that an operator serves in; edits and rules of one request, and what the record says of them, out."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

from transformers import PreTrainedModel

from pilotfish.actions import Policy, Rule
from pilotfish.engines import Generation
from pilotfish.errors import SettingError
from pilotfish.models import Identity
from pilotfish.server.backend import DirectionInfo, Steer
from pilotfish.steering import Direction, Steering
from pilotfish.taps import Edit, When

ELSEWHERE = "behind a proxy the model that answers is elsewhere, and its activations cannot be written"


class AllowList:
    """The directions that clients may steer along, by name: that of the card, or `NAME@SITE` where several have it."""

    def __init__(self, directions: Sequence[Direction], identity: Identity, *, max_dose: float) -> None:
        """`max_dose` is what a client may ask for at most, in calibrated doses.

        Raises:
            SettingError: a direction has no calibrated dose, or two share name and site; or `max_dose` is not positive.
            DirectionMismatch: a direction was made for another model.
        """
        if not 0 < max_dose < math.inf:
            raise SettingError(f"a largest dose of {max_dose} calibrated doses is not allowed; give a positive number")
        times = Counter(direction.card.name for direction in directions)
        self._directions: dict[str, Direction] = {}
        for direction in directions:
            direction.check(identity)
            name = direction.card.name
            name = name if times[name] == 1 else f"{name}@{direction.site}"
            if name in self._directions:
                raise SettingError(f"two directions to serve are called {name!r}; rename one, or leave one out")
            if not direction.card.dose:
                raise SettingError(
                    f"direction {name!r} has no calibrated dose to hold clients to; find one with `pilotfish steer "
                    "calibrate`"
                )
            self._directions[name] = direction
        self.infos = tuple(_info(name, direction, max_dose) for name, direction in self._directions.items())

    def edits(self, steering: Sequence[Steer], model: PreTrainedModel) -> dict[str, tuple[Edit, ...]]:
        """What a request writes, by the names that `gated` gives to rules."""
        return {each.name: self._steering(each).edits(each.dose, model) for each in steering}

    def _steering(self, asked: Steer) -> Steering:
        """With the kind of edit that its dose was calibrated for."""
        direction = self._directions[asked.name]
        return Steering(directions=(direction,), kind=direction.card.kind, when=When(phase=asked.scope))


def gated(policy: Policy, steering: Sequence[Steer]) -> Policy:
    """The policy with one more rule for each gate."""
    rules = tuple(
        Rule(metric=each.metric, action="steer", edit=each.name, threshold=each.threshold)
        for each in steering
        if each.metric is not None
    )
    return replace(policy, rules=policy.rules + rules) if rules else policy


def steering_json(steering: Sequence[Steer], generation: Generation) -> list[dict[str, Any]]:
    """What was asked for, and for how much of the answer it was on."""
    times = Counter(name for token in generation.committed for name in token.edits)
    return [
        {
            "name": each.name,
            "site": each.direction.site,
            "sha256": each.direction.sha256,
            "kind": each.direction.card["kind"],
            "dose": each.dose,
            "scope": each.scope,
            "gate": None if each.metric is None else {"metric": each.metric, "threshold": each.threshold},
            "num_tokens": times[each.name],
        }
        for each in steering
    ]


def _info(name: str, direction: Direction, max_dose: float) -> DirectionInfo:
    dose = direction.card.dose
    assert dose is not None, "what is served has a dose"
    return DirectionInfo(
        name=name,
        site=str(direction.site),
        dose=dose,
        max_dose=dose * max_dose,
        sha256=direction.sha256,
        card=asdict(direction.card),
    )
