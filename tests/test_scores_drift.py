"""The four verdicts on made-up scores, the bounds they rest on, and what cannot be compared."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pilotfish.errors import SettingError, TextError
from pilotfish.runs import generator
from pilotfish.scores import (
    Drift,
    ScoredText,
    Tolerances,
    auroc,
    clopper_pearson,
    clopper_pearson_upper,
    compare_configurations,
)

NAN = math.nan


def texts(scores: list[float], labels: list[float], groups: list[str] | None = None) -> list[ScoredText]:
    return [
        ScoredText(
            id=f"t{i}",
            group=groups[i] if groups else f"g{i}",
            prompt="",
            label=label,
            score=score,
            token_labels=torch.tensor([]),
            token_scores=None,
        )
        for i, (score, label) in enumerate(zip(scores, labels, strict=True))
    ]


def sample(num_positive: int = 200, num_benign: int = 400) -> list[ScoredText]:
    """A good scorer: positives about 2 standard deviations above the benign; threshold 0.9 flags few of those."""
    random = generator(0, "drift")
    labels = [1.0] * num_positive + [0.0] * num_benign
    logits = torch.randn(len(labels), generator=random, dtype=torch.float64) + 4 * torch.tensor(labels) - 2
    return texts(logits.sigmoid().tolist(), labels)


def changed(rows: list[ScoredText], change) -> list[ScoredText]:
    """The rows with other log-odds."""
    values = [change(math.log(row.score / (1 - row.score)), row) for row in rows]
    return [dataclasses.replace(row, score=1 / (1 + math.exp(-z))) for row, z in zip(rows, values, strict=True)]


def check(reference, candidate, *, threshold: float = 0.75, budget: float = 0.01, **settings) -> Drift:
    return compare_configurations(
        reference,
        candidate,
        threshold=threshold,
        budget=budget,
        generator=generator(0, "test"),
        num_resamples=settings.pop("num_resamples", 300),
        **settings,
    )


def test_a_configuration_passes_against_itself():
    found = check(sample(), sample())
    assert (found.verdict, found.exit_code) == ("pass", 0)
    assert (found.num_rows, found.num_positive, found.num_benign) == (600, 200, 400)
    assert (found.num_newly_flagged, found.num_no_longer_flagged, found.largest_change) == (0, 0, 0.0)
    assert len(found.reasons) == 3
    assert found.notes == ()


def test_small_noise_passes_and_its_flips_are_counted():
    random = generator(1, "noise")
    candidate = changed(sample(), lambda z, row: z + 0.01 * float(torch.randn((), generator=random)))
    found = check(sample(), candidate)
    assert found.verdict == "pass"
    assert 0 < found.mean_change < found.largest_change < 0.02
    before, after = ([row.score >= 0.75 for row in rows] for rows in (sample(), candidate))
    assert found.num_newly_flagged == sum(b > a for a, b in zip(before, after, strict=True))
    assert found.num_no_longer_flagged == sum(b < a for a, b in zip(before, after, strict=True))


def test_scores_that_all_rise_make_the_threshold_stale():
    found = check(sample(), changed(sample(), lambda z, row: z + 2.0))
    assert (found.verdict, found.exit_code) == ("threshold stale", 10)
    assert "over the budget of 1.00%" in found.reasons[0]
    assert found.changes["auroc"].change == 0.0
    assert found.fpr_bounds.low > 0.01


def test_scores_that_all_fall_make_the_threshold_stale_by_recall():
    found = check(sample(), changed(sample(), lambda z, row: z - 2.0))
    assert (found.verdict, found.exit_code) == ("threshold stale", 10)
    assert "recall at the threshold fell by" in found.reasons[0]
    assert found.changes["recall"].high < -0.05


def test_a_lost_ranking_is_a_degraded_scorer_also_where_the_threshold_is_stale():
    random = generator(2, "noise")
    found = check(sample(), changed(sample(), lambda z, row: z + 4 * float(torch.randn((), generator=random))))
    assert (found.verdict, found.exit_code) == ("scorer degraded", 11)
    assert found.changes["auroc"].high < -0.02
    assert any("false-positive rate" in reason for reason in found.reasons)


def test_a_scorer_that_says_the_same_of_all_texts_is_degraded():
    assert check(sample(), changed(sample(), lambda z, row: -5.0)).verdict == "scorer degraded"


def test_a_response_without_a_score_is_a_degraded_scorer():
    candidate = [dataclasses.replace(row, score=NAN) if row.id == "t7" else row for row in sample()]
    found = check(sample(), candidate)
    assert found.verdict == "scorer degraded"
    assert "1 of 600 responses have no score" in found.reasons
    assert found.num_unscored == 1


@pytest.mark.parametrize(
    ("num_positive", "num_benign", "words"),
    [(58, 400, "59 are the fewest"), (200, 298, "299 are the fewest"), (20, 400, "20 documents of one label")],
)
def test_too_few_documents_are_inconclusive_and_it_says_how_many_can_do(num_positive, num_benign, words):
    rows = sample(num_positive, num_benign)
    found = check(rows, rows)
    assert (found.verdict, found.exit_code) == ("inconclusive", 12)
    assert any(words in reason for reason in found.reasons)


def test_as_few_documents_as_it_names_do():
    assert check(sample(59, 299), sample(59, 299)).verdict == "pass"


def test_many_rows_of_few_documents_do_not_pass_for_many_documents():
    rows = [dataclasses.replace(row, group=f"g{i % 40}") for i, row in enumerate(sample())]
    found = check(rows, rows)
    assert found.verdict == "inconclusive"
    assert {change.num_groups for change in found.changes.values()} == {40}


def test_one_document_over_the_threshold_is_no_rate_however_many_rows_it_has():
    rows = sample(200, 1200)
    rows = [dataclasses.replace(row, group=f"g{i % 40}") for i, row in enumerate(rows)]
    loud = [dataclasses.replace(row, score=0.999) if row.label < 0.5 and row.group == "g3" else row for row in rows]
    found = check(loud, loud)
    assert found.changes["fpr"].candidate > 0.02
    assert found.fpr_bounds is not None and found.fpr_bounds.low < 0.01
    assert not any("false-positive rate is" in reason for reason in found.reasons)


def test_wider_tolerances_pass_what_narrow_ones_leave_open():
    rows = sample(40, 60)
    assert check(rows, rows, budget=0.05).verdict == "inconclusive"
    assert check(rows, rows, budget=0.05, tolerances=Tolerances(0.02, 0.1)).verdict == "pass"


def test_without_labels_false_positives_and_flips_alone_are_judged_and_it_says_so():
    rows = [dataclasses.replace(row, label=NAN) for row in sample(0, 400)]
    found = check(rows, rows)
    assert (found.verdict, found.num_benign, set(found.changes)) == ("pass", 400, {"fpr", "flipped"})
    assert "no row is labelled" in found.notes[0]
    assert "ranking and recall are NOT judged" in found.notes[1]
    assert check(rows, changed(rows, lambda z, row: z + 3)).verdict == "threshold stale"


def test_a_head_that_falls_silent_on_unlabelled_texts_does_not_pass():
    rows = [dataclasses.replace(row, label=NAN) for row in sample(20, 400)]
    found = check(rows, changed(rows, lambda z, row: -5.0))
    assert found.verdict == "inconclusive"
    assert "decisions flipped" in found.reasons[0]


def test_without_a_benign_row_nothing_passes():
    assert check(sample(200, 0), sample(200, 0)).verdict == "inconclusive"


def test_a_reference_over_the_budget_is_named_as_such():
    found = check(sample(), sample(), threshold=0.1)
    assert found.verdict == "threshold stale"
    assert "the reference's is" in found.reasons[0]


def test_unlabelled_rows_count_among_flips_only():
    extra = [dataclasses.replace(row, id=f"x{row.id}", label=NAN) for row in sample(5, 0)]
    lower = changed(extra, lambda z, row: -9.0)
    found = check([*sample(), *extra], [*sample(), *lower])
    assert found.verdict == "pass"
    assert found.num_no_longer_flagged == sum(row.score >= 0.75 for row in extra)
    assert "5 of 605 rows have no label" in found.notes[0]


def test_the_figures_are_those_counted_by_hand():
    labels = [1.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0]
    before = [0.9, 0.8, 0.7, 0.2, 0.6, 0.1, 0.1, 0.1, 0.3]
    after = [0.9, 0.4, 0.7, 0.2, 0.6, 0.8, 0.1, 0.1, 0.3]
    found = check(texts(before, labels), texts(after, labels), threshold=0.5)
    assert found.changes["recall"][:3] == pytest.approx((0.75, 0.5, -0.25))
    assert found.changes["fpr"][:3] == pytest.approx((0.2, 0.4, 0.2))
    assert found.changes["auroc"].candidate == auroc(torch.tensor(after), torch.tensor(labels))
    assert (found.num_newly_flagged, found.num_no_longer_flagged) == (1, 1)
    assert found.largest_change == pytest.approx(0.7)
    assert found.mean_change == pytest.approx(1.1 / 9)
    assert found.fpr_bounds == clopper_pearson(2, 5, 0.9)
    assert found.changes["fpr"].high >= clopper_pearson_upper(1, 5)


def test_the_bounds_of_no_flip_are_exact():
    change = check(sample(100, 300), sample(100, 300)).changes["recall"]
    assert (change.low, change.high) == pytest.approx((-(1 - 0.05**0.01), 1 - 0.05**0.01))


def test_the_bounds_of_a_loss_hold_the_true_one_about_as_often_as_they_say():
    """Each positive is lost with 8 %: the upper bound of the loss is below that in at most 5 % of samples."""
    random, missed = generator(3, "coverage"), 0
    for _ in range(100):
        lost = torch.rand(80, generator=random) < 0.08
        before, labels = [0.9] * 80 + [0.1] * 2, [1.0] * 80 + [0.0] * 2
        after = [0.2 if gone else 0.9 for gone in lost.tolist()] + [0.1] * 2
        change = check(texts(before, labels), texts(after, labels), threshold=0.5, num_resamples=60).changes["recall"]
        missed += change.low > -0.08
    assert missed <= 10  # 5 are expected; 10 or fewer with 99 %


@given(seed=st.integers(0, 1000), shift=st.floats(-1, 1))
@settings(deadline=None, max_examples=8)
def test_the_order_of_rows_changes_no_figure_and_bounds_hold_their_figure(seed, shift):
    rows = sample(40, 60)
    candidate = changed(rows, lambda z, row: z + shift)
    order = torch.randperm(len(rows), generator=generator(seed, "order")).tolist()
    there, back = check(rows, candidate, num_resamples=40), check(rows, [candidate[i] for i in order], num_resamples=40)
    assert there == back
    for name in ("recall", "fpr"):
        change = there.changes[name]
        assert change.low <= change.change <= change.high


def test_a_drift_is_plain_json():
    plain = json.loads(json.dumps(check(sample(), sample()).to_dict(), allow_nan=False))
    assert plain["verdict"] == "pass"
    assert plain["exit_code"] == 0
    assert plain["changes"]["auroc"]["change"] == 0.0


def test_two_sets_of_texts_that_differ_are_refused():
    rows = sample(5, 5)
    with pytest.raises(TextError, match="10 and 9 texts, 't9' in one of them only"):
        check(rows, rows[:-1])
    with pytest.raises(TextError, match="some id twice"):
        check(rows, [*rows, rows[0]])
    with pytest.raises(TextError, match="'t0' has another label"):
        check(rows, [dataclasses.replace(rows[0], label=0.0), *rows[1:]])
    with pytest.raises(SettingError, match="no scored texts"):
        check([], [])


@pytest.mark.parametrize(("threshold", "budget"), [(NAN, 0.01), (0.5, 0.0), (0.5, 1.0)])
def test_a_threshold_or_budget_that_is_none_is_refused(threshold, budget):
    with pytest.raises(SettingError):
        check(sample(5, 5), sample(5, 5), threshold=threshold, budget=budget)


def test_a_reference_without_scores_is_refused():
    rows = sample(5, 5)
    with pytest.raises(SettingError, match="score the reference again"):
        check([dataclasses.replace(rows[0], score=NAN), *rows[1:]], rows)
