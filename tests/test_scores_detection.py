"""When a span is found, and what is out by then: by hand, as properties, and at the edges."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pilotfish.errors import SettingError
from pilotfish.runs import generator
from pilotfish.scores import ScoredText, bootstrap_by_group, detect, false_stops_per_1000
from pilotfish.scores.detection import FIGURES, exact_hit_rate, lag_quantile, leaked_mean, share_detected

NAN = math.nan
TOKENS = st.lists(st.tuples(st.sampled_from([0.0, 1.0, NAN]), st.integers(0, 4).map(lambda n: n / 4)), max_size=25)


def text(labels, scores) -> ScoredText:
    return ScoredText(
        id="a",
        group="a",
        prompt="",
        label=NAN,
        score=0.0,
        token_labels=torch.tensor(labels),
        token_scores=None if scores is None else torch.tensor(scores),
    )


LABELS = [NAN, 0.0, 0.0, 1.0, 1.0, 1.0, 0.0, 0.0]
FOUND = detect(text(LABELS, [0.9, 0.0, 0.0, 0.2, 0.6, 0.1, 0.0, 0.0]), 0.6)
LATE = detect(text(LABELS, [0.0, 0.0, 0.0, 0.2, 0.3, 0.1, 0.0, 0.7]), 0.6)
EARLY = detect(text(LABELS, [0.0, 0.8, 0.0, 0.2, 0.3, 0.1, 0.0, 0.0]), 0.6)
EARLY_AND_FOUND = detect(text(LABELS, [0.0, 0.8, 0.0, 0.9, 0.3, 0.1, 0.0, 0.0]), 0.6)
MISSED = detect(text(LABELS, [0.9, 0.0, 0.0, 0.2, 0.3, 0.1, 0.0, 0.0]), 0.6)
ALL = [FOUND, LATE, EARLY, EARLY_AND_FOUND, MISSED]


def test_detections_are_those_counted_by_hand():
    #                          onset, first flag, lag, exact hit, leaked, tokens
    assert FOUND == (3, 4, 1, True, 2, 8), "the flag of the unlabelled first token does not count"
    assert LATE == (3, 7, 4, False, 3, 8)
    assert EARLY == (3, 1, None, False, 0, 8), "the answer was stopped, but not for its span"
    assert EARLY_AND_FOUND == (3, 1, 0, False, 0, 8)
    assert MISSED == (3, None, None, False, 3, 8)
    assert detect(text([0.0, 0.0], [0.1, 0.7]), 0.6) == (None, 1, None, False, 0, 2)
    assert detect(text([], []), 0.6) == (None, None, None, False, 0, 0)


def test_figures_are_those_counted_by_hand():
    rows = torch.arange(5)
    assert share_detected(ALL)(rows) == 3 / 5
    assert exact_hit_rate(ALL)(rows) == 1 / 5
    assert leaked_mean(ALL)(rows) == 8 / 5
    # lags in order: 0, 1, 4, missed, missed; from onset to the end there are 5 tokens
    assert [lag_quantile(ALL, share)(rows) for share in (0.2, 0.5, 0.6, 0.61, 0.9)] == [0, 4, 4, 5, 5]
    assert lag_quantile(ALL, 0.5)(torch.tensor([0, 0, 4])) == 1
    assert lag_quantile([MISSED, EARLY], 0.5)(torch.arange(2)) == 5


def test_a_missed_short_text_is_later_than_a_detected_long_one():
    short = detect(text([1.0, 1.0], [0.0, 0.0]), 0.5)
    long = detect(text([1.0] * 30, [0.0] * 20 + [0.9] * 10), 0.5)
    assert lag_quantile([short, long], 0.5)(torch.arange(2)) == 20
    assert lag_quantile([short, long], 0.9)(torch.arange(2)) == 30


@pytest.mark.parametrize(("held", "leaked"), [(0, 2), (1, 1), (2, 0), (100, 0)])
def test_what_the_server_holds_back_does_not_leak(held, leaked):
    scores = [0.9, 0.0, 0.0, 0.2, 0.6, 0.1, 0.0, 0.0]
    assert detect(text(LABELS, scores), 0.6, held=held).num_leaked == leaked


def test_holding_does_not_help_where_nothing_is_flagged():
    assert detect(text(LABELS, [0.0] * 8), 0.6, held=100).num_leaked == 3


@given(tokens=TOKENS, threshold=st.sampled_from([0.25, 0.5, 1.0]), held=st.integers(0, 3))
@settings(deadline=None)
def test_a_detection_is_that_of_a_server_reading_token_by_token(tokens, threshold, held):
    labels, scores = ([pair[i] for pair in tokens] for i in (0, 1))
    positives = [i for i, label in enumerate(labels) if label == 1.0]
    out, stop = [], None
    for place, (label, score) in enumerate(tokens):
        out.append(place)
        if not math.isnan(label) and score >= threshold:
            stop = place
            out = out[: max(0, len(out) - held)]
            break
    found = detect(text(labels, scores), threshold, held=held)
    assert found.first_flag == stop
    assert found.num_leaked == len(set(out) & set(positives))
    assert found.is_exact_hit == (stop in positives)
    if found.is_exact_hit:
        assert found.lag == stop - positives[0]
    if found.lag is not None:
        assert scores[found.onset + found.lag] >= threshold
        assert found.lag < found.num_tokens - found.onset


@given(tokens=TOKENS)
@settings(deadline=None)
def test_a_lower_threshold_is_never_later_and_leaks_no_more(tokens):
    labels, scores = ([pair[i] for pair in tokens] for i in (0, 1))
    low, high = (detect(text(labels, scores), threshold) for threshold in (0.25, 0.75))
    assert low.num_leaked <= high.num_leaked
    assert high.lag is None or (low.lag is not None and low.lag <= high.lag)


def test_every_figure_has_an_interval_over_groups():
    groups = ["a", "b", "c", "d", "d"]
    for make in FIGURES.values():
        found = bootstrap_by_group(make(ALL), groups, generator=generator(0, "draws"), num_resamples=50)
        assert found.low <= found.value <= found.high
        assert math.isfinite(found.high)


def test_a_text_without_scores_is_refused():
    with pytest.raises(SettingError, match="no token scores"):
        detect(text([1.0], None), 0.5)
    with pytest.raises(SettingError, match="NaN"):
        detect(text([0.0, 1.0], [0.1, NAN]), 0.5)
    with pytest.raises(SettingError, match="-1 held"):
        detect(text([1.0], [0.1]), 0.5, held=-1)


def test_an_unlabelled_token_needs_no_score():
    assert detect(text([NAN, 1.0], [NAN, 0.7]), 0.5).lag == 0


def test_false_stops_by_hand_with_the_exact_bounds():
    scores = torch.cat([torch.full((95,), 0.1), torch.full((5,), 0.9)])
    found = false_stops_per_1000(scores, 0.9 - 1e-6)
    assert found == pytest.approx((50.0, 16.43, 112.83, 100), abs=0.01)
    none = false_stops_per_1000(scores, 0.95)
    assert none == pytest.approx((0.0, 0.0, 1000 * (1 - 0.025 ** (1 / 100)), 100))


@pytest.mark.parametrize("scores", [[], [0.5, NAN]])
def test_false_stops_of_nothing_are_refused(scores):
    with pytest.raises(SettingError, match="benign responses with"):
        false_stops_per_1000(torch.tensor(scores), 0.5)
