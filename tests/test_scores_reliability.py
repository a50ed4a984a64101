"""Calibration error and curves: by hand, as properties, and against scikit-learn."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pilotfish.errors import SettingError
from pilotfish.runs import generator
from pilotfish.scores import (
    brier_score,
    expected_calibration_error,
    reliability_curve,
    roc_points,
    tpr_at_fpr,
)
from pilotfish.scores.reliability import calibration_error_of_draws

ITEMS = st.lists(st.tuples(st.integers(0, 8).map(lambda count: count / 8), st.booleans()), min_size=1, max_size=50)


def tensors(items):
    scores, labels = zip(*items, strict=True)
    return torch.tensor(scores, dtype=torch.float64), torch.tensor(labels, dtype=torch.float64)


def random_items(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Perfectly calibrated ones."""
    random = generator(0, "items")
    p = torch.rand(count, generator=random, dtype=torch.float64)
    return p, torch.bernoulli(p, generator=random)


def test_the_curve_and_its_error_are_those_counted_by_hand():
    p = torch.tensor([0.9, 0.1, 0.2, 0.7, 0.3, 0.8], dtype=torch.float64)
    labels = torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0, 0.5], dtype=torch.float64)
    low, high = reliability_curve(p, labels, 2)
    assert low == pytest.approx((0.2, 1 / 3, 3))
    assert high == pytest.approx((0.8, 2.5 / 3, 3))
    assert expected_calibration_error(p, labels, 2) == pytest.approx((abs(0.6 - 1) + abs(2.4 - 2.5)) / 6)
    assert brier_score(p, labels) == pytest.approx((0.01 + 0.01 + 0.64 + 0.09 + 0.09 + 0.09) / 6)


@given(items=ITEMS, num_bins=st.integers(1, 20))
@settings(deadline=None)
def test_the_error_is_that_of_the_curve_and_bins_lose_nothing(items, num_bins):
    p, labels = tensors(items)
    points = reliability_curve(p, labels, num_bins)
    assert sum(point.num_items for point in points) == len(items)
    assert len(points) <= num_bins
    means = [point.mean_probability for point in points]
    assert means == sorted(set(means)), "equal probabilities share a bin"
    gaps = sum(abs(point.mean_probability - point.share_positive) * point.num_items for point in points)
    assert expected_calibration_error(p, labels, num_bins) == pytest.approx(gaps / len(items))


@given(count=st.integers(1, 60), num_bins=st.integers(1, 20))
@settings(deadline=None)
def test_bins_of_different_probabilities_differ_by_one_at_most(count, num_bins):
    sizes = [point.num_items for point in reliability_curve(*random_items(count), num_bins)]
    assert len(sizes) == min(count, num_bins)
    assert max(sizes) - min(sizes) <= 1


def test_calibrated_probabilities_have_an_error_of_the_size_that_is_documented():
    p, labels = random_items(20_000)
    bias = math.sqrt(float((p * (1 - p)).mean()) * 15 / len(p))
    assert 0 < expected_calibration_error(p, labels) < 1.5 * bias
    assert expected_calibration_error(p / 2, labels) == pytest.approx(0.25, abs=0.01)


def test_the_share_of_positives_said_everywhere_has_no_calibration_error():
    labels = torch.tensor([1.0, 0.0, 0.0, 0.0])
    said = torch.full((4,), 0.25)
    assert expected_calibration_error(said, labels) == 0.0
    assert brier_score(said, labels) == 0.25 * 0.75


def test_a_draw_is_measured_in_the_bins_of_all_rows():
    p, labels = torch.tensor([0.1, 0.2, 0.8, 0.9]), torch.tensor([0.0, 0.0, 1.0, 1.0])
    error = calibration_error_of_draws(p, labels, 2)
    assert error(torch.tensor([0, 0, 3])) == pytest.approx((0.2 + 0.1) / 3)
    assert math.isnan(error(torch.tensor([], dtype=torch.int64)))


def test_no_items_have_no_figure():
    nothing = torch.zeros(0)
    assert math.isnan(expected_calibration_error(nothing, nothing))
    assert math.isnan(brier_score(nothing, nothing))
    assert reliability_curve(nothing, nothing) == []
    assert roc_points(nothing, nothing) == []


def test_brier_and_roc_are_those_of_scikit_learn():
    metrics = pytest.importorskip("sklearn.metrics")
    p, labels = random_items(3000)
    assert brier_score(p, labels) == pytest.approx(metrics.brier_score_loss(labels.numpy(), p.numpy()))
    fprs, tprs, _ = metrics.roc_curve(labels.numpy(), p.numpy(), drop_intermediate=False)
    for point in roc_points(p, labels):
        assert point.tpr == pytest.approx(tprs[fprs <= point.fpr + 1e-9].max())


@given(items=ITEMS)
@settings(deadline=None, max_examples=30)
def test_the_roc_curve_rises_from_its_lowest_rate_to_1(items):
    p, labels = tensors(items)
    points = roc_points(p, labels, lowest=0.01, num_points=7)
    if not 0 < labels.sum() < len(labels):
        assert points == []
        return
    assert [points[0].fpr, points[3].fpr, points[-1].fpr] == pytest.approx([0.01, 0.1, 1.0])
    assert points[-1].tpr == 1.0
    tprs = [point.tpr for point in points]
    assert tprs == sorted(tprs)
    assert tprs[3] == tpr_at_fpr(p, labels, points[3].fpr)


@pytest.mark.parametrize("score", [-0.1, 1.1, math.nan, math.inf])
@pytest.mark.parametrize("figure", [expected_calibration_error, brier_score, reliability_curve])
def test_what_is_no_probability_is_refused(score, figure):
    with pytest.raises(SettingError, match="no probability"):
        figure(torch.tensor([0.5, score]), torch.tensor([0.0, 1.0]))


def test_no_bins_and_no_curve_are_refused():
    p, labels = torch.tensor([0.2, 0.8]), torch.tensor([0.0, 1.0])
    with pytest.raises(SettingError, match="0 bins"):
        reliability_curve(p, labels, 0)
    for wrong in ({"lowest": 0.0}, {"lowest": 1.0}, {"num_points": 1}):
        with pytest.raises(SettingError, match="make no curve"):
            roc_points(p, labels, **wrong)
