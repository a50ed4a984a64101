"""A dose is found at its budget, or it is said why not."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_steering_dose import MID, direction

from pilotfish.core import Site
from pilotfish.errors import SettingError
from pilotfish.models import Pair
from pilotfish.steering import Budget, Calibration, CalibrationConfig, Decoding, Steering, best, calibrate, search

PROMPTS = [[5, 9, 20, 31], [7, 7], [40, 2, 11]]
SHORT = CalibrationConfig(decoding=Decoding(max_new_tokens=5), tolerance=0.1)


def found(pair: Pair, budget: Budget, *, scale: float = 1.0, site: Site = MID, **options: Any) -> Calibration:
    steering = Steering(directions=(direction(pair, site, scale=scale),))
    return calibrate(pair.target, steering, PROMPTS, budget=budget, config=SHORT, **options)


# The search, on functions


@settings(max_examples=100, deadline=None)
@given(
    crossing=st.floats(1e-3, 3.9), power=st.floats(0.3, 4), first=st.floats(0.01, 0.5), tolerance=st.floats(0.01, 0.3)
)
def test_the_crossing_of_a_rising_curve_is_found_to_the_tolerance(
    crossing: float, power: float, first: float, tolerance: float
) -> None:
    result = search(lambda x: (x / crossing) ** power, first=first, highest=4.0, tolerance=tolerance)
    if result.is_reached:
        assert (1 - tolerance) * crossing * 0.999 <= result.x <= crossing * 1.001
    else:
        assert result.x == 0.0 and crossing < first / 32 and "overspends" in result.reason


@settings(max_examples=100, deadline=None)
@given(values=st.lists(st.floats(0, 3), min_size=12, max_size=12))
def test_on_any_curve_what_is_found_was_measured_within_the_budget_and_more_was_not(values: list[float]) -> None:
    measured: dict[float, float] = {}

    def spent(x: float) -> float:
        measured[x] = values[hash(x) % 12]
        return measured[x]

    result = search(spent, first=0.1, highest=3.0, tolerance=0.1)
    assert result.x == 0.0 or measured[result.x] <= 1.0
    if result.is_reached:
        beyond = min(x for x in measured if x > result.x and measured[x] > 1.0)
        assert beyond - result.x <= 0.1 * beyond


def test_a_curve_that_falls_again_is_left_at_its_first_crossing() -> None:
    """Text that has fallen apart can cost little: the second entry into the budget does not count."""
    result = search(lambda x: 2.0 if 0.5 < x < 2.0 else 0.5, first=0.1, highest=4.0, tolerance=0.01)
    assert result.is_reached and 0.49 <= result.x <= 0.5


def test_a_budget_that_is_never_spent_is_said_so_with_the_highest_dose() -> None:
    result = search(lambda x: 0.1 * x, first=0.1, highest=4.0)
    assert result.x == 4.0 and not result.is_reached
    assert "at the highest, 4, only 0.4" in result.reason


def test_a_curve_that_always_overspends_leaves_no_dose() -> None:
    result = search(lambda _: 5.0, first=0.1, highest=4.0)
    assert result.x == 0.0 and not result.is_reached and "overspends it" in result.reason


def test_a_meter_without_a_number_is_refused() -> None:
    with pytest.raises(SettingError, match=r"no number at 0\.1"):
        search(lambda _: math.nan, first=0.1, highest=4.0)


# On a model


@pytest.mark.parametrize(
    "budget",
    [Budget(limit=0.5), Budget(meter="kl_mean", limit=0.2), Budget(meter="acceptance", limit=0.8)],
    ids=lambda budget: budget.meter,
)
def test_the_dose_spends_its_budget_and_no_more(pair: Pair, budget: Budget) -> None:
    result = found(pair, budget)
    assert result.is_reached and result.dose > 0
    assert budget.spent(result.meters) <= 1.0
    above = next(one for one in result.curve if one.dose > result.dose)
    assert budget.spent(above) > 1.0 and above.dose <= result.dose / (1 - SHORT.tolerance) * 1.001
    assert [one.dose for one in result.curve] == sorted({one.dose for one in result.curve})
    assert result.curve[0].dose == 0.0


def test_a_vector_twice_as_long_has_half_the_dose(pair: Pair) -> None:
    one, two = found(pair, Budget(limit=0.5)), found(pair, Budget(limit=0.5), scale=2.0)
    assert two.dose == pytest.approx(one.dose / 2, rel=1e-3)
    assert two.meters.relative == pytest.approx(one.meters.relative, rel=1e-3)


def test_calibration_says_when_the_draft_is_below_the_budget_from_the_start(pair: Pair) -> None:
    result = found(pair, Budget(meter="acceptance", limit=0.999), draft=pair.draft)
    assert result.dose == 0.0 and not result.is_reached
    assert "without any steering acceptance is" in result.reason


def test_an_ablation_ends_where_all_is_taken_out(pair: Pair) -> None:
    end = calibrate(
        pair.target,
        Steering(directions=(direction(pair),), kind="ablate"),
        PROMPTS,
        budget=Budget(meter="kl_mean", limit=50.0),
        config=SHORT,
    )
    assert end.dose == 1.0 and not end.is_reached and end.reason.startswith("at the highest, 1, only")


def test_the_behaviour_is_measured_at_every_dose(pair: Pair) -> None:
    result = found(
        pair, Budget(limit=0.5), behaviour=lambda edits, answers: float(len(answers) + (edits[0].op.scale != 0))
    )
    assert [one.behaviour for one in result.curve] == [3.0] + [4.0] * (len(result.curve) - 1)


def test_the_best_place_is_that_with_the_largest_effect_at_equal_damage(pair: Pair) -> None:
    calibrations = [found(pair, Budget(limit=0.5), site=Site(layer, "resid_post")) for layer in range(3)]
    effects = {Site(0, "resid_post"): 0.1, MID: 0.7, Site(2, "resid_post"): -0.2}
    ranked = best(calibrations, lambda edits: effects[edits[0].site], pair.target)
    assert [candidate.effect for candidate in ranked] == [0.7, 0.1, -0.2]
    assert ranked[0].calibration.steering.directions[0].site == MID
    assert all(one.calibration.is_reached for one in ranked)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Budget(limit=0.0), "a budget of 0.0 is not allowed for kl_p95"),
        (lambda: Budget(meter="acceptance", limit=1.0), "acceptance in \\(0, 1\\)"),
        (lambda: CalibrationConfig(first_relative=5.0), "0 < first < highest"),
    ],
)
def test_what_cannot_be_is_refused(make: Any, words: str) -> None:
    with pytest.raises(SettingError, match=words):
        make()


def test_no_prompts_are_refused(pair: Pair) -> None:
    with pytest.raises(SettingError, match="no prompts to calibrate on"):
        calibrate(pair.target, Steering(directions=(direction(pair),)), [])
