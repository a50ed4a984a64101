"""A response in; the factors of its first, second or all derivatives out (deep causal transcoding).

Source: Mack, "Deep Causal Transcoding" (2024), whose objective sums over orders k the squared error of the k-th
derivative, R^k / k! each. Each objective is fitted here to the tensor that it names; docs/discovery.md says where the
published code does not do that.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from pilotfish.discovery.factors import Factors, Objective, fitted_strengths, orthonormal
from pilotfish.discovery.response import Response, random_units, unit
from pilotfish.errors import SettingError

EXACT_BELOW = 1024
"""Up to this many inputs or outputs the whole Jacobian costs less than finding a part of it."""


def linear(
    response: Response,
    num_factors: int,
    *,
    generator: torch.Generator,
    radius: float = 1.0,
    krylov_depth: int | None = None,
) -> Factors:
    """The top singular triples of J(0): inputs are right singular vectors, outputs left ones, strengths R sigma.

    Args:
        krylov_depth: Rounds of block Krylov iteration (Musco and Musco, arXiv 1504.05477) instead of the whole
            Jacobian. None takes the whole where a side is at most 1024 long, else 6 rounds. Each costs num_factors + 8
            products with J and as many with its transpose.

    Raises:
        SettingError: there are fewer inputs or outputs than factors.
    """
    _check(response, num_factors, radius)
    smaller = min(response.num_inputs, response.num_outputs)
    if krylov_depth is None and smaller > EXACT_BELOW:
        krylov_depth = 6
    if krylov_depth is None:
        left, values, right = torch.linalg.svd(response.jacobian(), full_matrices=False)
    else:
        left, values, right = _krylov(response, num_factors, krylov_depth, generator)
    # `torch.linalg.svd` returns the right vectors as rows already.
    return Factors(
        objective="linear",
        inputs=right[:num_factors],
        outputs=left[:, :num_factors].T,
        strengths=radius * values[:num_factors],
        radius=radius,
    )


def projected(
    response: Response, num_factors: int, *, generator: torch.Generator, radius: float, num_projections: int = 32
) -> Factors:
    """The right singular vectors of W J(0), W being random projections of the output: cheap, and no better than
    `num_projections` vectors can be.

    Raises:
        SettingError: more factors than projections.
    """
    _check(response, num_factors, radius)
    if num_factors > num_projections:
        raise SettingError(
            f"{num_factors} factors were asked of {num_projections} projections, but the rest would be arbitrary; give "
            f"at least as many projections"
        )
    drawn = torch.randn(num_projections, response.num_outputs, generator=generator, dtype=response.dtype)
    rows = response.vjp(unit(drawn).to(response.device))
    inputs = torch.linalg.svd(rows, full_matrices=False).Vh[:num_factors]
    change = response.change(radius * inputs)
    return _factors(inputs, change, "projected", radius)


def quadratic(
    response: Response,
    num_factors: int,
    *,
    generator: torch.Generator,
    radius: float = 1.0,
    iterations: int = 20,
    start: Float[Tensor, "factor input"] | None = None,
) -> Factors:
    """Factors of the second derivative T at 0: T(a, b) is about the sum of strength * <input, a> <input, b> output.

    Symmetric orthogonalised alternating least squares (Sharan and Valiant, arXiv 1703.01804): output becomes
    T(input, input), input becomes T(output, input), with an orthonormal basis of inputs before each round.

    Args:
        start: Inputs to start from; random ones by default.

    Raises:
        SettingError: there are fewer inputs than factors.
    """
    _check(response, num_factors, radius)
    inputs = random_units(response, num_factors, generator=generator) if start is None else start
    for _ in range(iterations):
        inputs = orthonormal(inputs)
        outputs = unit(response.second(inputs, inputs))
        inputs = unit(response.second_vjp(outputs, inputs))
    curved = response.second(inputs, inputs) * (radius**2 / 2)
    return _factors(inputs, curved, "quadratic", radius)


def exponential(
    response: Response,
    num_factors: int,
    *,
    generator: torch.Generator,
    radius: float,
    iterations: int = 10,
    start: Float[Tensor, "factor input"] | None = None,
) -> Factors:
    """Factors of all derivatives at once: f(R theta) is about the sum of strength * (exp <input, theta> - 1) * output.

    Orthogonalised gradient iteration: inputs are made orthonormal, then each becomes the gradient of |f(R input)|. One
    forward and one backward pass a round.

    Args:
        start: Inputs to start from; by default the true top right singular vectors of the Jacobian.

    Raises:
        SettingError: there are fewer inputs than factors, or the radius is not positive.
    """
    _check(response, num_factors, radius)
    inputs = linear(response, num_factors, generator=generator).inputs if start is None else start
    for _ in range(iterations):
        _, gradient = response.climb(radius * orthonormal(inputs))
        inputs = unit(gradient)
    change = response.change(radius * inputs)
    return _factors(inputs, change, "exponential", radius)


def _factors(inputs: Tensor, reached: Tensor, objective: Objective, radius: float) -> Factors:
    """Factors whose outputs point where the inputs lead, at the strengths that fit best."""
    outputs = unit(reached)
    strengths = fitted_strengths(inputs, outputs, reached.norm(dim=-1), objective)
    return Factors(objective=objective, inputs=inputs, outputs=outputs, strengths=strengths, radius=radius)


def _krylov(
    response: Response, num_factors: int, depth: int, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Singular triples of J from the space of (J J^T)^i J times random inputs, by products alone."""
    if depth < 1:
        raise SettingError(f"krylov_depth {depth} is too small; give 1 or more rounds")
    smaller = min(response.num_inputs, response.num_outputs)
    block = min(num_factors + 8, smaller)
    # More rounds than fill the space would only add copies.
    depth = min(depth, max(1, smaller // block))
    vectors = random_units(response, block, generator=generator)
    basis: list[Tensor] = []
    for _ in range(depth):
        images = orthonormal(response.jvp(vectors))
        basis.append(images)
        vectors = orthonormal(response.vjp(images))
    left = orthonormal(torch.cat(basis))
    inner, values, right = torch.linalg.svd(response.vjp(left), full_matrices=False)
    return left.T @ inner, values, right


def _check(response: Response, num_factors: int, radius: float) -> None:
    most = min(response.num_inputs, response.num_outputs)
    if not 1 <= num_factors <= most:
        raise SettingError(f"{num_factors} factors were asked for; this response has room for 1 to {most}")
    if not radius > 0:
        raise SettingError(f"radius {radius} is not positive; calibrate one with `calibrated_radius`")
