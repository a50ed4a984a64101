"""A slice in; vectors of one length that change its target most, found by gradient ascent on a sphere, out.

Source: Mack and Turner, "Mechanistically Eliciting Latent Behaviors" (MELBO, 2024).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from pilotfish.discovery.factors import orthonormal
from pilotfish.discovery.response import random_units, unit
from pilotfish.discovery.slice import Slice
from pilotfish.errors import SettingError
from pilotfish.runs import progress


@dataclass(frozen=True, slots=True, kw_only=True)
class MelboConfig:
    """Settings of the search."""

    num_vectors: int = 32
    """How many to find."""
    radius: float = 1.0
    """Length of each vector."""
    power: float = 2.0
    """p: the power of a token's change. Above 2, vectors that change few tokens much are preferred."""
    root: float = 1.0
    """q: the root taken of a prompt's sum. Above 1, no single prompt dominates."""
    orthogonal: bool = True
    """Whether each vector is kept at right angles to all earlier ones."""
    batch: int = 32
    """Vectors that are trained at once. With 1 and `orthogonal` it is the published order: one after the other."""
    steps: int = 300
    """Steps of the optimiser for each batch."""
    learning_rate: float = 1e-3
    """Of AMSGrad, per unit of radius 1: a step moves each coordinate by up to this times the radius."""

    def __post_init__(self) -> None:
        smallest = min(self.num_vectors, self.batch, self.steps)
        if smallest < 1 or min(self.radius, self.learning_rate) <= 0 or min(self.power, self.root) < 1:
            raise SettingError(
                f"{self} is outside what is allowed: counts at least 1, radius and learning_rate above 0, power and "
                f"root at least 1"
            )


class Found(NamedTuple):
    vectors: Float[Tensor, "vector hidden"]
    """Each of length `radius`."""
    gains: Float[Tensor, " vector"]
    """The objective at each vector."""


def objective(
    changes: Float[Tensor, "vector read hidden"],
    prompt_index: Tensor,
    *,
    num_prompts: int,
    power: float,
    root: float,
) -> Float[Tensor, " vector"]:
    """The sum over prompts of (the sum over read tokens of |change|^p)^(1/q), the norm being over hidden.

    The published code takes the norm over tokens and sums over hidden units; that is the same for p = 2 alone.
    """
    tokens = changes.square().sum(-1).pow(power / 2)
    prompts = tokens.new_zeros(len(tokens), num_prompts).index_add(1, prompt_index, tokens)
    return prompts.pow(1.0 / root).sum(-1)


def melbo(response: Slice, config: MelboConfig, *, generator: torch.Generator) -> Found:
    """Finds the vectors, batch by batch.

    Each step: gradient; its part along earlier vectors and along the vector itself is taken out; AMSGrad; earlier
    vectors are taken out again and the length is restored. Within a batch "earlier" is the order of the rows.

    Raises:
        SettingError: more orthogonal vectors than the source has dimensions.
    """
    if config.orthogonal and config.num_vectors > response.num_inputs:
        raise SettingError(
            f"{config.num_vectors} orthogonal vectors do not fit into {response.num_inputs} dimensions; ask for fewer, "
            f"or set orthogonal to False"
        )
    found = Found(
        torch.empty(0, response.num_inputs, dtype=response.dtype, device=response.device),
        torch.empty(0, dtype=response.dtype, device=response.device),
    )
    for begin in progress(range(0, config.num_vectors, config.batch), "melbo"):
        count = min(config.batch, config.num_vectors - begin)
        vectors = random_units(response, count, generator=generator)
        batch = _climbed(response, config, vectors, found.vectors / config.radius)
        found = Found(*(torch.cat(pair) for pair in zip(found, batch, strict=True)))
    return found


def _climbed(response: Slice, config: MelboConfig, vectors: Tensor, earlier: Tensor) -> Found:
    """`vectors` and `earlier` of length 1."""
    theta = _retracted(vectors, earlier, config.orthogonal).requires_grad_()
    optimiser = torch.optim.Adam([theta], lr=config.learning_rate, betas=(0.9, 0.98), amsgrad=True, maximize=True)
    for _ in range(config.steps):
        _, gradient = _gain_and_gradient(response, config, theta.detach())
        theta.grad = _tangent(gradient, theta.detach(), earlier, config.orthogonal)
        optimiser.step()
        with torch.no_grad():
            theta.copy_(_retracted(theta, earlier, config.orthogonal))
    gains, _ = _gain_and_gradient(response, config, theta.detach())
    return Found(config.radius * theta.detach(), gains)


def _gain_and_gradient(response: Slice, config: MelboConfig, theta: Tensor) -> tuple[Tensor, Tensor]:
    gains, gradients = [], []
    for chunk in torch.split(theta, response.rows_per_chunk):
        rows = chunk.detach().requires_grad_()
        with torch.enable_grad():
            changes = response.token_changes(config.radius * rows)
            gain = objective(
                changes,
                response.prompt_index,
                num_prompts=response.num_prompts,
                power=config.power,
                root=config.root,
            )
            gradients.append(torch.autograd.grad(gain.sum(), rows)[0])
        gains.append(gain.detach())
    return torch.cat(gains), torch.cat(gradients)


def _tangent(gradient: Tensor, theta: Tensor, earlier: Tensor, orthogonal: bool) -> Tensor:
    """The gradient without what would only lengthen the vector or turn it towards an earlier one."""
    if not orthogonal:
        return gradient - (gradient * theta).sum(-1, keepdim=True) * theta
    # The rows before a vector are its elders, and it is its own radial part: one lower triangle with the diagonal.
    within = (gradient @ theta.T).tril() @ theta
    return gradient - (gradient @ earlier.T) @ earlier - within


def _retracted(theta: Tensor, earlier: Tensor, orthogonal: bool) -> Tensor:
    """Back on the unit sphere, at right angles to what came before."""
    if not orthogonal:
        return unit(theta)
    return orthonormal(theta - (theta @ earlier.T) @ earlier)
