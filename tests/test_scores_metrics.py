"""Figures by hand and by brute force, and intervals over documents."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pilotfish.errors import SettingError
from pilotfish.runs import generator
from pilotfish.scores import auroc, bootstrap_by_group, pairwise_accuracy, tpr_at_fpr
from pilotfish.scores.metrics import auroc_of_draws, mean_of, tpr_at_fprs

ITEMS = st.lists(st.tuples(st.integers(-3, 3), st.booleans()), min_size=1, max_size=40)


def tensors(items):
    scores, labels = zip(*items, strict=True)
    return torch.tensor(scores, dtype=torch.float64), torch.tensor(labels, dtype=torch.float64)


def test_auroc_by_hand():
    labels = torch.tensor([0.0, 0.0, 1.0, 1.0])
    assert auroc(torch.tensor([0.1, 0.4, 0.35, 0.8]), labels) == 0.75
    assert auroc(torch.tensor([0.5, 0.5, 0.5, 0.5]), labels) == 0.5
    assert auroc(torch.tensor([0.0, 0.5, 0.5, 1.0]), labels) == 0.875
    assert auroc(torch.tensor([-math.inf, 0.0, 1.0, math.inf]), labels) == 1.0


@given(items=ITEMS)
@settings(deadline=None)
def test_auroc_is_the_share_of_pairs_in_the_right_order(items):
    positives, negatives = ([score for score, label in items if label == kind] for kind in (True, False))
    pairs = [(p > n) + (p == n) / 2 for p in positives for n in negatives]
    expected = sum(pairs) / len(pairs) if pairs else math.nan
    assert auroc(*tensors(items)) == pytest.approx(expected, nan_ok=True)


@given(items=ITEMS)
@settings(deadline=None)
def test_auroc_sees_order_alone_and_turns_round_with_the_scores(items):
    scores, labels = tensors(items)
    assert auroc(scores.exp(), labels) == pytest.approx(auroc(scores, labels), nan_ok=True)
    assert auroc(-scores, labels) == pytest.approx(1 - auroc(scores, labels), nan_ok=True)


@given(items=ITEMS, fpr=st.sampled_from([0.0, 0.01, 0.1, 1 / 3, 0.5, 1.0]))
@settings(deadline=None)
def test_tpr_at_fpr_is_the_best_of_all_thresholds(items, fpr):
    positives, negatives = ([score for score, label in items if label == kind] for kind in (True, False))

    def share(values, threshold):
        return sum(value >= threshold for value in values) / len(values)

    expected = math.nan
    if positives and negatives:
        thresholds = [*{score for score, _ in items}, math.inf]
        expected = max(share(positives, t) for t in thresholds if share(negatives, t) <= fpr + 1e-12)
    assert tpr_at_fpr(*tensors(items), fpr) == pytest.approx(expected, nan_ok=True)


@given(items=ITEMS, data=st.data())
@settings(deadline=None)
def test_auroc_of_a_draw_is_that_of_the_repeated_rows(items, data):
    scores, labels = tensors(items)
    places = st.integers(0, len(items) - 1)
    rows = torch.tensor(data.draw(st.lists(places, max_size=60)), dtype=torch.int64)
    assert auroc_of_draws(scores, labels)(rows) == pytest.approx(auroc(scores[rows], labels[rows]), abs=0, nan_ok=True)


def test_auroc_is_that_of_scikit_learn_with_weights():
    metrics = pytest.importorskip("sklearn.metrics")
    random = generator(0, "parity")
    scores = torch.randint(50, (500,), generator=random).double()
    labels = torch.bernoulli(scores / 50, generator=random)
    weights = torch.randint(4, (500,), generator=random)
    expected = metrics.roc_auc_score(labels.numpy(), scores.numpy(), sample_weight=weights.numpy())
    rows = torch.arange(500).repeat_interleave(weights)
    assert auroc_of_draws(scores, labels)(rows) == pytest.approx(expected, abs=1e-12)


def test_tpr_at_fpr_by_hand():
    scores, labels = torch.tensor([0.9, 0.8, 0.7, 0.6, 0.5]), torch.tensor([1.0, 0.0, 1.0, 0.0, 1.0])
    assert [tpr_at_fpr(scores, labels, fpr) for fpr in (0.0, 0.5, 1.0)] == pytest.approx([1 / 3, 2 / 3, 1.0])


def test_several_rates_are_read_off_one_sorting():
    scores, labels = torch.tensor([0.9, 0.8, 0.7, 0.6, 0.5]), torch.tensor([1.0, 0.0, 1.0, 0.0, 1.0])
    assert tpr_at_fprs(scores, labels, [0.5, 0.0]) == pytest.approx([2 / 3, 1 / 3])
    assert tpr_at_fprs(scores, labels, []) == []


def test_a_mean_counts_repeated_rows():
    assert mean_of([1.0, 4.0, True])(torch.tensor([0, 1, 1, 2])) == 2.5
    assert math.isnan(mean_of([])(torch.arange(0)))


@pytest.mark.parametrize("fpr", [-0.1, 1.1, math.nan])
def test_a_false_positive_rate_outside_0_and_1_is_refused(fpr):
    with pytest.raises(SettingError, match="false-positive rate"):
        tpr_at_fpr(torch.zeros(2), torch.tensor([0.0, 1.0]), fpr)


def test_pairwise_accuracy_by_hand():
    assert pairwise_accuracy(torch.tensor([2.0, 1.0, 0.0, 5.0]), torch.tensor([1.0, 1.0, 1.0, 5.0])) == 0.5
    assert math.isnan(pairwise_accuracy(torch.zeros(0), torch.zeros(0)))


def test_a_nan_score_is_refused_and_never_counted_as_a_loss():
    scores, labels = torch.tensor([math.nan, 1.0]), torch.tensor([1.0, 0.0])
    for figure in (
        lambda: auroc(scores, labels),
        lambda: tpr_at_fpr(scores, labels, 0.1),
        lambda: pairwise_accuracy(scores, labels),
        lambda: pairwise_accuracy(labels, scores),
    ):
        with pytest.raises(SettingError, match="NaN"):
            figure()


def test_the_interval_of_a_mean_is_that_of_the_normal_distribution():
    values = torch.randn(400, generator=generator(0, "values"), dtype=torch.float64)
    found = bootstrap_by_group(
        lambda rows: float(values[rows].mean()), [str(i) for i in range(400)], generator=generator(0, "draws")
    )
    half = 1.96 * float(values.std()) / math.sqrt(400)
    assert found.value == pytest.approx(float(values.mean()))
    assert (found.low, found.high) == pytest.approx((found.value - half, found.value + half), abs=half / 6)
    assert found.n == 400


@given(copies=st.integers(2, 5), seed=st.integers(0, 20))
@settings(deadline=None)
def test_copies_of_a_row_within_its_group_do_not_narrow_the_interval(copies, seed):
    values = torch.randn(20, generator=generator(seed, "values"), dtype=torch.float64)
    groups = [f"document {i}" for i in range(20)]

    def interval(values, groups):
        return bootstrap_by_group(
            lambda rows: float(values[rows].mean()), groups, generator=generator(seed, "draws"), num_resamples=50
        )

    assert interval(values.repeat(copies), groups * copies) == pytest.approx(interval(values, groups))


def test_every_draw_takes_whole_groups():
    groups = ["a", "b", "a", "c", "b", "a"]
    sizes = {"a": 3, "b": 2, "c": 1}

    def share_of_whole_groups(rows):
        drawn = [groups[row] for row in rows.tolist()]
        return float(all(drawn.count(name) % size == 0 for name, size in sizes.items()))

    found = bootstrap_by_group(share_of_whole_groups, groups, generator=generator(0, "draws"), num_resamples=200)
    assert found == (1.0, 1.0, 1.0, 3)


def test_the_same_generator_gives_the_same_interval_and_another_one_another():
    values = torch.randn(50, generator=generator(0, "values"))
    first, again, other = (
        bootstrap_by_group(
            lambda rows: float(values[rows].mean()), list(map(str, range(50))), generator=generator(seed, "draws")
        )
        for seed in (0, 0, 1)
    )
    assert first == again != other


def test_shuffled_labels_have_an_auroc_of_one_half_within_the_interval():
    random = generator(3, "shuffled")
    scores, labels = torch.randn(4000, generator=random), torch.bernoulli(torch.full((4000,), 0.1), generator=random)
    groups = [str(row // 20) for row in range(4000)]
    found = bootstrap_by_group(
        lambda rows: auroc(scores[rows], labels[rows]), groups, generator=random, num_resamples=300
    )
    assert found.low < 0.5 < found.high
    shifted = scores + 0.5 * labels
    better = bootstrap_by_group(
        lambda rows: auroc(shifted[rows], labels[rows]), groups, generator=random, num_resamples=300
    )
    assert better.low > 0.5


def test_draws_without_both_labels_are_left_out_and_too_many_of_them_are_refused():
    scores, labels = torch.arange(6.0), torch.tensor([0.0, 0.0, 0.0, 0.0, 1.0, 1.0])

    def figure(rows):
        return auroc(scores[rows], labels[rows])

    found = bootstrap_by_group(figure, list("abcdef"), generator=generator(0, "draws"))
    assert found[:3] == (1.0, 1.0, 1.0)
    with pytest.raises(SettingError, match="not defined for these 2 rows"):
        bootstrap_by_group(lambda rows: figure(rows + 4), ["a", "b"], generator=generator(0, "draws"))


@pytest.mark.parametrize("groups", [[], ["a", "a"]])
def test_an_interval_over_fewer_than_two_groups_is_refused(groups):
    with pytest.raises(SettingError, match="two groups or more"):
        bootstrap_by_group(lambda rows: 0.0, groups, generator=generator(0, "draws"))
