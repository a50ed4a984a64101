"""A slice to the final state and a logit objective in; the vector of one length that raises it most out.

The supervised comparison for discovery: it is told what to look for. Discovery that comes near it has found the thing.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from pilotfish.discovery.response import random_units, unit
from pilotfish.discovery.slice import Slice
from pilotfish.errors import SettingError


class Attacked(NamedTuple):
    vectors: Float[Tensor, "vector hidden"]
    """Each of the radius' length, the best first."""
    gains: Float[Tensor, " vector"]
    """What each adds to the objective."""


def attack(
    to_final: Slice,
    directions: Float[Tensor, "read hidden"],
    *,
    radius: float,
    generator: torch.Generator,
    steps: int = 100,
    num_starts: int = 4,
    learning_rate: float = 0.03,
) -> Attacked:
    """Gradient ascent on a sphere, from several starts, on the mean over read tokens of <direction, change>.

    Args:
        to_final: A slice whose target is `final`; with `last=1` it reads where the answer begins.
        directions: A difference of unembeddings for each read token, or one for all (`unembedding_difference`).

    Raises:
        SettingError: the slice ends elsewhere, or a number is not positive.
    """
    if to_final.target.stream != "final":
        raise SettingError(f"the slice ends at {to_final.target}; logits are read at `final`, so give such a slice")
    if min(steps, num_starts) < 1 or min(radius, learning_rate) <= 0:
        raise SettingError(
            f"steps {steps} and num_starts {num_starts} must be at least 1, radius {radius} and learning_rate "
            f"{learning_rate} above 0"
        )

    def gains(theta: Tensor) -> Tensor:
        return (to_final.token_changes(radius * unit(theta)) * directions).sum(-1).mean(-1)

    theta = random_units(to_final, num_starts, generator=generator).requires_grad_()
    optimiser = torch.optim.Adam([theta], lr=learning_rate, maximize=True)
    for _ in range(steps):
        with torch.enable_grad():
            theta.grad = torch.autograd.grad(gains(theta).sum(), theta)[0]
        optimiser.step()
        with torch.no_grad():
            theta.copy_(unit(theta))
    with torch.no_grad():
        reached = gains(theta)
    order = reached.argsort(descending=True)
    return Attacked(radius * theta.detach()[order], reached[order])
