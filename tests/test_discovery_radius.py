"""The radius is where random directions leave the linear regime, and says when that is no length to steer with."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import random_ids
from torch import Tensor

from pilotfish.core import Site
from pilotfish.discovery import Response, Slice, calibrated_radius
from pilotfish.discovery.radius import linearity_ratio
from pilotfish.discovery.response import random_units
from pilotfish.errors import SettingError
from pilotfish.models import tiny_model


def stream() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def bent(curve: float) -> Response:
    """x + curve |x| x: at length R the excess over the linear part is curve R of it, in every direction."""
    return Response(
        lambda x: x + curve * (x.square().sum(-1, keepdim=True) + 1e-24).sqrt() * x, 8, 8, dtype=torch.float64
    )


@pytest.mark.parametrize("curve", [0.01, 0.1, 2.0])
@pytest.mark.parametrize("ratio", [0.2, 0.5])
def test_the_radius_by_hand(curve: float, ratio: float) -> None:
    found = calibrated_radius(bent(curve), generator=stream(), ratio=ratio)
    assert found.value == pytest.approx(ratio / curve, rel=2e-3)
    assert found.ratio == pytest.approx(ratio, rel=2e-3)
    assert (found.dose, found.warnings) == (None, ())


def test_a_model_has_a_dose_and_its_ratio_is_the_one_asked_for() -> None:
    prompts = [random_ids(1, 8)[0].tolist()]
    response = Slice(tiny_model("llama", seed=0), Site(0, "resid_post"), Site(2, "resid_post"), prompts)
    found = calibrated_radius(response, generator=stream())
    directions = random_units(response, 30, generator=stream())
    ratio = linearity_ratio(response, found.value, directions, response.jvp(directions))
    assert ratio == pytest.approx(0.5, rel=1e-2)
    assert found.dose == pytest.approx(found.value / float(response.source_norms().median()))


def test_a_tiny_dose_is_warned_about(caplog: pytest.LogCaptureFixture) -> None:
    """A stand-in for the published counter-example: a model that turns nonlinear long before anything happens."""
    prompts = [random_ids(1, 8)[0].tolist()]
    response = Slice(tiny_model("llama", seed=0), Site(0, "resid_post"), Site(2, "resid_post"), prompts)
    smooth = response.function

    def rerouted(theta: Tensor) -> Tensor:
        return smooth(theta) + 30.0 * theta.square()

    response.function = rerouted
    found = calibrated_radius(response, generator=stream())
    assert found.dose is not None
    assert found.dose < 0.1
    assert "two to four times as much" in found.warnings[0]
    assert "two to four times as much" in caplog.text


def test_a_ratio_that_comes_back_down_is_warned_about() -> None:
    def waves(x: Tensor) -> Tensor:
        length = (x.square().sum(-1, keepdim=True) + 1e-24).sqrt()
        return x * (1 + 0.8 * torch.sin(length / 10).square())

    found = calibrated_radius(Response(waves, 8, 8, dtype=torch.float64), generator=stream())
    assert found.value == pytest.approx(10 * math.asin((0.5 / 0.8) ** 0.5), rel=1e-2)
    assert "the smallest" in found.warnings[0]


def test_a_response_that_is_linear_or_never_is_refused() -> None:
    with pytest.raises(SettingError, match="not reached at the upper end"):
        calibrated_radius(bent(1e-9), generator=stream())
    with pytest.raises(SettingError, match="exceeded already at the lower end"):
        calibrated_radius(bent(1e5), generator=stream())
    with pytest.raises(SettingError, match="low, high"):
        calibrated_radius(bent(1.0), generator=stream(), bracket=(2.0, 1.0))
