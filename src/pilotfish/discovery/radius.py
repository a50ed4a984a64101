"""A response in; the length at which its perturbations leave the linear regime out."""

from __future__ import annotations

import logging
import math
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from scipy.optimize import brentq
from torch import Tensor

from pilotfish.discovery.response import Response, random_units
from pilotfish.discovery.slice import Slice
from pilotfish.errors import SettingError

logger = logging.getLogger(__name__)

GRID_PER_DECADE = 5
LOW_DOSE = 0.1
"""Share of the stream's length below which a calibrated radius has been seen to do nothing."""


class Radius(NamedTuple):
    value: float
    ratio: float | None
    """The linearity ratio at `value`: 0 where the response is linear; None for a length that was given."""
    dose: float | None
    """`value` over the median length of the stream at the source; None for a response that is no model's."""
    warnings: tuple[str, ...]
    """Why it may not be the length to steer with."""


def linearity_ratio(
    response: Response, radius: float, directions: Float[Tensor, "vector input"], slopes: Float[Tensor, "vector output"]
) -> float:
    """sqrt(mean of |f(R v) - R J v|^2 / |R J v|^2) over unit directions v with slopes J v."""
    straight = radius * slopes
    excess = (response.change(radius * directions) - straight).double().square().sum(-1)
    return float((excess / straight.double().square().sum(-1)).mean().sqrt())


def calibrated_radius(
    response: Response,
    *,
    generator: torch.Generator,
    ratio: float = 0.5,
    num_directions: int = 30,
    bracket: tuple[float, float] = (1e-3, 1e3),
) -> Radius:
    """The smallest length at which random directions reach the linearity ratio: a steering coefficient for no behaviour
    in particular.

    The ratio is looked at on a grid of the bracket and then solved for in its first crossing. Warnings are also logged:
    a dose under 0.1 (on a model made robust by rerouting the published rule gave a radius that had to be taken four
    times), and a ratio that crosses more than once.

    Source: Mack, "Deep Causal Transcoding" (2024), section on calibration: ratio 0.5, 30 directions. There the root is
    any one in [1e-3, 100].

    Raises:
        SettingError: the ratio is not reached within the bracket, or is exceeded at its lower end.
    """
    if not 0 < bracket[0] < bracket[1] < math.inf or ratio <= 0 or num_directions < 1:
        raise SettingError(
            f"bracket {bracket}, ratio {ratio} and num_directions {num_directions} must be positive, and the bracket "
            f"(low, high)"
        )
    directions = random_units(response, num_directions, generator=generator)
    slopes = response.jvp(directions)

    def excess(log_radius: float) -> float:
        return linearity_ratio(response, math.exp(log_radius), directions, slopes) - ratio

    low, high = map(math.log, bracket)
    grid = np.linspace(low, high, 1 + math.ceil(GRID_PER_DECADE * math.log10(bracket[1] / bracket[0]))).tolist()
    above = [excess(point) > 0 for point in grid]
    crossings = [i for i in range(1, len(grid)) if above[i] and not above[i - 1]]
    if above[0] or not crossings:
        side = "exceeded already at the lower end" if above[0] else "not reached at the upper end"
        raise SettingError(
            f"the linearity ratio {ratio} is {side} of the bracket {bracket}; widen it, or take a longer slice: over "
            f"few layers a response may be almost linear"
        )
    root = brentq(excess, grid[crossings[0] - 1], grid[crossings[0]], xtol=1e-3)
    value = math.exp(root)
    dose = value / float(response.source_norms().median()) if isinstance(response, Slice) else None
    warnings = _warnings(value, dose, len(crossings))
    for warning in warnings:
        logger.warning("%s", warning)
    return Radius(value, excess(root) + ratio, dose, warnings)


def _warnings(value: float, dose: float | None, num_crossings: int) -> tuple[str, ...]:
    found = []
    if dose is not None and dose < LOW_DOSE:
        found.append(
            f"radius {value:.3g} is {dose:.1%} of the stream's length: few directions will change what the model says; "
            f"try two to four times as much and look at the texts"
        )
    if num_crossings > 1:
        found.append(
            f"the linearity ratio reaches its value at {num_crossings} lengths; radius {value:.3g} is the smallest, "
            f"and the response becomes more linear again above it"
        )
    return tuple(found)
