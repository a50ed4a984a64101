"""Platt scaling, exact binomial bounds, and thresholds that keep a budget."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom

from pilotfish.errors import SettingError, TextError
from pilotfish.runs import generator
from pilotfish.scores import (
    clopper_pearson,
    clopper_pearson_upper,
    num_benign_needed,
    platt,
    threshold_at_budget,
)

SCORES = st.lists(st.integers(0, 11).map(lambda count: count / 12), min_size=60, max_size=200)


def test_platt_finds_the_map_that_made_the_labels():
    random = generator(0, "platt")
    logits = torch.randn(50_000, generator=random, dtype=torch.float64) * 2
    labels = torch.bernoulli((1.5 * logits - 2.0).sigmoid(), generator=random)
    assert platt(logits, labels) == pytest.approx((1.5, -2.0), abs=0.06)


def test_platt_of_constant_logits_is_the_smoothed_share_of_positives():
    scale, shift = platt(torch.full((9,), 3.0), torch.tensor([1.0] * 3 + [0.0] * 6))
    share = (3 * 4 / 5 + 6 * 1 / 8) / 9
    assert 3.0 * scale + shift == pytest.approx(math.log(share / (1 - share)), abs=1e-6)


def test_platt_stays_finite_on_separable_labels():
    scale, shift = platt(torch.tensor([-2.0, -1.0, 1.0, 2.0]), torch.tensor([0.0, 0.0, 1.0, 1.0]))
    assert 0 < scale < 100
    assert shift == pytest.approx(0.0, abs=1e-6)


def test_calibrated_probabilities_sum_to_the_smoothed_number_of_positives():
    random = generator(1, "platt")
    logits, labels = torch.randn(500, generator=random), torch.bernoulli(torch.full((500,), 0.2), generator=random)
    scale, shift = platt(logits, labels)
    positive = float(labels.sum())
    expected = positive * (positive + 1) / (positive + 2) + (500 - positive) / (500 - positive + 2)
    assert float((scale * logits.double() + shift).sigmoid().sum()) == pytest.approx(expected, abs=1e-4)


@given(scale=st.floats(0.01, 100), shift=st.floats(-1000, 1000), seed=st.integers(0, 100))
@settings(deadline=None)
def test_platt_does_not_care_about_the_unit_of_the_logits(scale, shift, seed):
    random = generator(seed, "platt")
    logits = torch.randn(200, generator=random, dtype=torch.float64)
    labels = torch.bernoulli(logits.sigmoid(), generator=random)
    ours, theirs = platt(logits, labels), platt(logits * scale + shift, labels)
    expected, found = logits * ours.scale + ours.shift, (logits * scale + shift) * theirs.scale + theirs.shift
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("label", [0.0, 1.0])
def test_platt_refuses_labels_of_one_kind(label):
    with pytest.raises(TextError, match="needs both labels"):
        platt(torch.randn(5, generator=generator(0, "x")), torch.full((5,), label))


@pytest.mark.parametrize(("logit", "label"), [(math.inf, 1.0), (math.nan, 1.0), (0.5, math.nan)])
def test_platt_refuses_what_is_not_finite(logit, label):
    with pytest.raises(SettingError, match="not finite"):
        platt(torch.tensor([0.0, logit]), torch.tensor([0.0, label]))


def test_clopper_pearson_has_the_published_values():
    assert clopper_pearson(5, 10) == pytest.approx((0.1871, 0.8129), abs=1e-4)
    assert clopper_pearson(0, 10) == pytest.approx((0.0, 0.3085), abs=1e-4)
    assert clopper_pearson(10, 10) == pytest.approx((0.6915, 1.0), abs=1e-4)
    assert clopper_pearson_upper(0, 100) == pytest.approx(1 - 0.05 ** (1 / 100))
    assert clopper_pearson_upper(7, 7) == 1.0


@given(n=st.integers(1, 60), share=st.floats(0.001, 0.999), level=st.sampled_from([0.8, 0.95, 0.99]))
@settings(deadline=None)
def test_clopper_pearson_covers_at_least_its_level(n, share, level):
    weights = [float(binom.pmf(k, n, share)) for k in range(n + 1)]
    intervals = [clopper_pearson(k, n, level) for k in range(n + 1)]
    covered = sum(w for w, (low, high) in zip(weights, intervals, strict=True) if low <= share <= high)
    bounded = sum(w for k, w in enumerate(weights) if share <= clopper_pearson_upper(k, n, level))
    assert min(covered, bounded) >= level - 1e-9


@pytest.mark.parametrize(("k", "n", "level"), [(-1, 5, 0.95), (6, 5, 0.95), (0, 0, 0.95), (1, 5, 0.0), (1, 5, 1.0)])
def test_clopper_pearson_refuses_what_is_no_proportion(k, n, level):
    with pytest.raises(SettingError, match=r"no proportion|outside"):
        clopper_pearson(k, n, level)
    with pytest.raises(SettingError, match=r"no proportion|outside"):
        clopper_pearson_upper(k, n, level)


@given(budget=st.floats(1e-4, 0.9), level=st.sampled_from([0.5, 0.9, 0.95, 0.99]))
@settings(deadline=None)
def test_the_number_of_benign_responses_needed_is_the_smallest_that_shows_the_budget(budget, level):
    needed = num_benign_needed(budget, level)
    assert clopper_pearson_upper(0, needed, level) <= budget
    assert needed == 1 or clopper_pearson_upper(0, needed - 1, level) > budget - 1e-12


@given(count=st.integers(1, 3000))
@settings(deadline=None)
def test_a_budget_that_a_sample_shows_by_a_hair_still_gets_a_threshold(count):
    budget = clopper_pearson_upper(0, count)
    found = threshold_at_budget(torch.full((count + 1,), 0.5), budget)
    assert found.num_flagged == 0
    assert found.fpr_upper <= budget


def test_the_threshold_stands_just_above_the_first_response_that_must_not_be_flagged():
    scores = torch.linspace(0.0, 0.9, 100, dtype=torch.float64)
    found = threshold_at_budget(scores, 0.05)
    assert clopper_pearson_upper(1, 100) <= 0.05 < clopper_pearson_upper(2, 100)
    assert found.threshold == math.nextafter(float(scores[-2]), 1.0)
    assert found[1:4] == (0.05, 100, 1)


@given(scores=SCORES, budget=st.floats(0.05, 0.9))
@settings(deadline=None)
def test_a_threshold_keeps_its_budget_and_the_next_lower_one_does_not(scores, budget):
    values = torch.tensor(scores, dtype=torch.float32)
    found = threshold_at_budget(values, budget)
    assert found.fpr_upper <= budget
    assert found.num_flagged == int((values >= found.threshold).sum())
    lower = values[values < found.threshold].max()
    assert clopper_pearson_upper(int((values >= lower).sum()), len(scores)) > budget


def test_a_threshold_survives_being_compared_in_float32():
    scores = torch.full((100,), 0.3)
    found = threshold_at_budget(scores, 0.05)
    assert not bool((scores >= found.threshold).any())


def test_a_sample_that_is_too_small_is_refused_with_the_number_that_is_needed():
    assert threshold_at_budget(torch.zeros(59), 0.05).num_flagged == 0
    with pytest.raises(SettingError, match=r"58 benign responses.* Give 59 or more"):
        threshold_at_budget(torch.zeros(58), 0.05)


def test_benign_responses_that_all_score_1_are_refused():
    with pytest.raises(SettingError, match="100 of 100 benign responses reach probability 1"):
        threshold_at_budget(torch.ones(100), 0.05)


@pytest.mark.parametrize("score", [math.nan, -0.1, 1.5])
def test_a_score_that_is_no_probability_is_refused(score):
    with pytest.raises(SettingError, match="no probability"):
        threshold_at_budget(torch.tensor([score] + [0.0] * 99), 0.05)


@pytest.mark.parametrize("budget", [0.0, 1.0, -1.0, math.nan])
def test_a_budget_outside_0_and_1_is_refused(budget):
    with pytest.raises(SettingError, match="budget"):
        threshold_at_budget(torch.zeros(100), budget)
