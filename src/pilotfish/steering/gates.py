"""A monitor head and a threshold in; a gate that lets an edit act on the tokens that the head flags, out."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from pilotfish.core import Site
from pilotfish.errors import SettingError
from pilotfish.heads import Head


@dataclass(frozen=True, slots=True, eq=False)
class HeadGate:
    """Opens where the token's own probability reaches the threshold.

    It reads the token alone: the probability of the text so far looks back, and would differ after a rollback. Where
    the head gives no number the gate opens, as a monitor never fails open.
    """

    head: Head
    """Of the edited model itself, its weights on that model's device (`on`)."""
    threshold: float
    """Calibrated probability in (0, 1)."""

    def __post_init__(self) -> None:
        if not 0.0 < self.threshold < 1.0:
            raise SettingError(f"gate threshold {self.threshold} is outside (0, 1); give a probability")

    @property
    def sites(self) -> tuple[Site, ...]:
        return self.head.sites

    def on(self, device: torch.device) -> HeadGate:
        """The same gate with its weights on a device."""
        moved = {name: getattr(self.head, name).to(device) for name in ("weight", "bias", "outputs")}
        return replace(self, head=replace(self.head, **moved))

    def opens(self, features: Float[Tensor, "batch token feature"]) -> Bool[Tensor, "batch token"]:
        logits = self.head.logits(features.flatten(0, 1), "token")
        limit = math.log(self.threshold / (1 - self.threshold))
        return ~(logits < limit).reshape(features.shape[:2])  # also where the logit is NaN
