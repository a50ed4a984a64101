"""Platt scaling and isotonic regression, exact binomial bounds, and thresholds that keep a budget."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom

from pilotfish.errors import SettingError, TextError
from pilotfish.runs import generator
from pilotfish.scores import (
    Isotonic,
    Platt,
    choose_calibration,
    clopper_pearson,
    clopper_pearson_upper,
    isotonic,
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


def test_isotonic_pools_what_falls_and_draws_lines_between():
    found = isotonic(torch.tensor([0.0, 1.0, 2.0, 3.0, 4.0]), torch.tensor([0.0, 1.0, 0.0, 0.0, 1.0]))
    assert found.logits.tolist() == [0.0, 1.0, 3.0, 4.0]
    assert found.probabilities.tolist() == pytest.approx([0.0, 1 / 3, 1 / 3, 1.0])
    at = torch.tensor([-9.0, 0.5, 2.2, 3.5, 9.0, math.nan, math.inf])
    expected = torch.tensor([0.0, 1 / 6, 1 / 3, 2 / 3, 1.0, math.nan, 1.0])
    torch.testing.assert_close(found.probability(at), expected, equal_nan=True)


def test_isotonic_counts_weights_and_ties():
    found = isotonic(torch.tensor([1.0, 1.0, 0.0]), torch.tensor([1.0, 0.0, 1.0]), torch.tensor([6.0, 2.0, 1.0]))
    assert found.logits.tolist() == [0.0, 1.0]
    assert found.probabilities.tolist() == pytest.approx([7 / 9, 7 / 9])


def test_isotonic_of_constant_logits_is_the_share_of_positives():
    found = isotonic(torch.full((4,), 2.0), torch.tensor([1.0, 0.0, 0.0, 0.0]))
    assert found.probability(torch.tensor([[-1.0, 2.0], [5.0, 2.0]])).tolist() == [[0.25, 0.25], [0.25, 0.25]]


@given(seed=st.integers(0, 10_000), count=st.integers(2, 40), spread=st.sampled_from([0.3, 3.0]))
@settings(deadline=None, max_examples=25)
def test_isotonic_is_the_min_max_of_weighted_means_and_never_falls(seed, count, spread):
    random = generator(seed, "isotonic")
    logits = (torch.randn(count, generator=random, dtype=torch.float64) * spread).round(decimals=1)
    labels = torch.bernoulli(logits.sigmoid(), generator=random)
    labels[:2] = torch.tensor([0.0, 1.0])
    weights = torch.rand(count, generator=random, dtype=torch.float64) + 0.1
    found = isotonic(logits, labels, weights)
    at = logits.unique()

    def mean(low: float, high: float) -> float:
        between = (logits >= low) & (logits <= high)
        return float((weights * labels)[between].sum() / weights[between].sum())

    expected = [max(min(mean(a, b) for b in at.tolist() if b >= z) for a in at.tolist() if a <= z) for z in at.tolist()]
    assert found.probability(at).tolist() == pytest.approx(expected, abs=1e-9)
    everywhere = found.probability(torch.linspace(-10, 10, 999))
    assert bool((everywhere.diff() >= 0).all())
    assert 0.0 <= float(everywhere.min()) <= float(everywhere.max()) <= 1.0


def test_isotonic_gives_what_scikit_learn_gives():
    module = pytest.importorskip("sklearn.isotonic")
    random = generator(3, "isotonic")
    logits = torch.randn(3000, generator=random, dtype=torch.float64).round(decimals=2)
    labels = torch.bernoulli((2 * logits).sigmoid(), generator=random)
    weights = torch.rand(3000, generator=random, dtype=torch.float64) + 0.1
    theirs = module.IsotonicRegression(out_of_bounds="clip").fit(logits.numpy(), labels.numpy(), weights.numpy())
    at = torch.linspace(-5, 5, 4001, dtype=torch.float64)
    found = isotonic(logits, labels, weights).probability(at)
    torch.testing.assert_close(found, torch.from_numpy(theirs.predict(at.numpy())), atol=1e-9, rtol=0)


@pytest.mark.parametrize("weight", [0.0, -1.0, math.nan])
def test_isotonic_refuses_a_weight_that_does_not_count(weight):
    with pytest.raises(SettingError, match="weight is not a positive number"):
        isotonic(torch.tensor([0.0, 1.0]), torch.tensor([0.0, 1.0]), torch.tensor([1.0, weight]))


def test_isotonic_refuses_labels_of_one_kind():
    with pytest.raises(TextError, match="needs both labels"):
        isotonic(torch.tensor([0.0, 1.0]), torch.ones(2))


def drawn(kind: str, count: int = 4000, num_groups: int = 200):
    """Logits with labels whose log-odds are a line in them, or a step."""
    random = generator(5, kind)
    logits = torch.randn(count, generator=random) * 2
    odds = 1.5 * logits - 1 if kind == "line" else torch.where(logits.abs() > 3, logits.sign() * 4, -1.0)
    return logits, torch.bernoulli(odds.sigmoid(), generator=random), [f"g{i % num_groups}" for i in range(count)]


def test_a_step_is_calibrated_by_the_isotonic_map_and_a_line_by_platt():
    step, line = choose_calibration(*drawn("step")), choose_calibration(*drawn("line"))
    assert isinstance(step.found, Isotonic)
    assert step.isotonic.log_loss < step.platt.log_loss
    assert step.isotonic.calibration_error < 0.5 * step.platt.calibration_error
    assert "lower loss on held-out groups" in step.reason
    assert line.found == platt(*drawn("line")[:2])
    assert "not shown to be better" in line.reason


def test_the_choice_does_not_depend_on_the_order_of_rows():
    logits, labels, groups = drawn("step")
    order = torch.randperm(len(groups), generator=generator(0, "order"))
    there, back = (
        choose_calibration(logits, labels, groups),
        choose_calibration(logits[order], labels[order], [groups[i] for i in order]),
    )
    assert (*there.platt, *there.isotonic) == pytest.approx((*back.platt, *back.isotonic))
    assert isinstance(back.found, Isotonic)


def test_one_document_that_is_learned_by_heart_does_not_win_the_choice():
    """Labels that follow the document, not the logit: whole documents are held out, so there is nothing to gain."""
    random = generator(7, "documents")
    documents = torch.randn(40, generator=random) * 2
    logits = (documents[:, None] + 0.01 * torch.randn(40, 50, generator=random)).flatten()
    labels = (torch.rand(40, generator=random) < 0.5).float()[:, None].expand(40, 50).flatten()
    by_document = choose_calibration(logits, labels, [f"d{i // 50}" for i in range(2000)])
    by_token = choose_calibration(logits, labels, [f"t{i}" for i in range(2000)])
    assert isinstance(by_document.found, Platt)
    assert isinstance(by_token.found, Isotonic), "else the grouping is not what this test shows"


@pytest.mark.parametrize(("count", "num_groups"), [(999, 200), (4000, 19)])
def test_a_small_sample_falls_to_platt(count, num_groups):
    found = choose_calibration(*drawn("step", count, num_groups))
    assert isinstance(found.found, Platt)
    assert found.platt is found.isotonic is None
    assert "too few to choose by" in found.reason


def test_a_label_that_stands_in_one_document_alone_falls_to_platt():
    logits, _, groups = drawn("line")
    only = torch.tensor([float(group == "g7") for group in groups])
    assert isinstance(choose_calibration(logits, only, groups).found, Platt)


def test_a_chosen_isotonic_map_stays_off_0_and_1():
    logits, _, groups = drawn("step")
    found = choose_calibration(logits, (logits > 0).float(), groups).found
    assert isinstance(found, Isotonic)
    assert 0.0 < float(found.probability(torch.tensor(-99.0))) < float(found.probability(torch.tensor(99.0))) < 1.0


def test_groups_that_are_not_one_a_token_are_refused():
    logits, labels, groups = drawn("line")
    with pytest.raises(SettingError, match="3999 groups were given for 4000 tokens"):
        choose_calibration(logits, labels, groups[:-1])
    with pytest.raises(SettingError, match="1 folds leave nothing"):
        choose_calibration(logits, labels, groups, num_folds=1)


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


@given(scores=SCORES, budget=st.floats(0.05, 0.9), num_documents=st.integers(59, 70))
@settings(deadline=None)
def test_responses_of_one_document_count_once_with_their_highest_score(scores, budget, num_documents):
    values = torch.tensor((scores * 60)[: max(len(scores), num_documents)], dtype=torch.float32)
    groups = [f"d{index % num_documents}" for index in range(len(values))]
    highest = torch.stack([values[index::num_documents].max() for index in range(num_documents)])
    assert threshold_at_budget(values, budget, groups=groups) == threshold_at_budget(highest, budget)


def test_copies_of_one_response_do_not_show_a_budget():
    with pytest.raises(SettingError, match=r"1 benign documents.* Give 299 or more"):
        threshold_at_budget(torch.zeros(299), 0.01, groups=["one"] * 299)


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
