"""One request's scores as steps bring them: each position once, holes declared, rules judged. Without vLLM."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pilotfish.actions import Policy, Rule
from pilotfish.errors import SettingError
from pilotfish.vllm.track import AFTER_HOLE, FIRST, LAST, NOT_READ, Charge, Track
from pilotfish.vllm.wire import Miss, News, StepScores, no_scores

CHARGE = Charge(policy=Policy(), metrics=("m",), thresholds={"m": 0.5}, reader="draft")
STOP = replace(CHARGE, policy=Policy(rules=(Rule(metric="m", action="stop", scope="answer"),)))
PROMPT = [10, 11, 12]


def rows(start: int, tokens: list[int], score: float = 0.1) -> np.ndarray:
    """Rows of consecutive positions; each token's score is `score`."""
    return np.array([[0, start + i, token, score, score] for i, token in enumerate(tokens)], dtype=np.float32)


def after_prompt(charge: Charge = CHARGE) -> Track:
    track = Track(charge, len(PROMPT))
    track.take(rows(0, [*PROMPT, 20]), [*PROMPT, 20])
    return track


def test_the_first_delivery_of_a_position_holds():
    track = after_prompt()
    track.take(rows(3, [20, 21], 0.9), [21])
    news = track.told(0)
    assert news.scores[:, 0].tolist() == pytest.approx([0.1, 0.1, 0.1, 0.1, 0.9])


def test_a_row_that_read_another_token_is_left_for_the_next_step():
    track = Track(CHARGE, 4)
    track.take(rows(0, [10, 11, 99]), [10, 11, 12, 13])
    assert track.num_settled == 2
    track.take(rows(2, [12, 13, 20]), [12, 13, 20])
    assert track.num_settled == 5 and track.told(0).misses == []


def test_a_hole_spoils_what_follows_until_it_is_read():
    track = after_prompt()
    track.settle(7)
    track.take(rows(6, [23, 24]), [24])
    assert track.told(0).misses == [Miss(4, 7, NOT_READ), Miss(7, 8, AFTER_HOLE)]
    track.take(rows(0, [*PROMPT, 20, 21, 22, 23, 24, 25]), [25])
    assert track.told(0).misses == []


def test_a_step_without_the_drafter_that_brought_one_token_leaves_no_hole():
    track = after_prompt()
    track.settle(5)
    track.take(rows(4, [21, 22]), [22])
    assert track.told(0).misses == [Miss(4, 5, NOT_READ)]


def test_a_failed_head_spoils_only_its_own_step():
    track = after_prompt()
    track.take(no_scores(1).table, [21, 22], "head failed")
    track.settle(6, "head failed")
    track.take(rows(5, [22, 23]), [23])
    assert track.told(0).misses == [Miss(4, 6, "head failed")]


def test_a_shifted_drafter_never_reads_the_first_token_and_that_spoils_nothing():
    track = Track(replace(CHARGE, shift=1), 3)
    track.take(rows(1, [11, 12, 20]), [*PROMPT, 20])
    assert track.told(0).misses == [Miss(0, 1, FIRST)] and track.num_settled == 4


def test_where_scores_lag_the_last_token_is_missed_when_the_request_ends():
    track = Track(replace(CHARGE, reader="target", lags=True), 3)
    track.take(rows(0, PROMPT), [*PROMPT, 20])
    track.settle(3)
    track.finish(4)
    assert track.told(0).misses == [Miss(3, 4, LAST)]


def test_surplus_tokens_are_taken_back_with_what_was_said_of_them():
    charge = replace(CHARGE, policy=Policy(rules=(Rule(metric="m", action="flag"),)))
    track = after_prompt(charge)
    track.take(rows(4, [21, 22, 23], 0.9), [21, 22, 23])
    track.finish(5)
    news = track.told(2)
    assert len(news.scores) == 5 and [verdict.position for verdict in news.verdicts] == [4]


def test_a_stop_is_about_the_first_token_that_breaks_the_rule():
    track = after_prompt(STOP)
    track.take(rows(4, [21, 22, 23], 0.9), [21, 22, 23])
    assert track.stop is not None and track.stop.position == 4
    track.withheld([21])
    track.finish(4)
    news = track.told(2)
    assert len(news.scores) == 5 and news.withheld == [21] and news.stops


def test_a_stop_beyond_the_end_that_vllm_found_is_none():
    track = after_prompt(STOP)
    track.take(rows(4, [21, 22, 23], 0.9), [21, 22, 23])
    track.finish(4)
    assert track.stop is None and not track.told(2).stops


def test_a_gate_stops_on_a_token_without_a_score():
    track = after_prompt(STOP)
    track.settle(6)
    assert track.stop is not None and track.stop.position == 4 and NOT_READ in track.stop.reason


def test_a_gate_stops_on_a_value_that_is_not_a_number():
    track = after_prompt(STOP)
    track.take(rows(4, [21], float("nan")), [21])
    assert track.stop is not None and track.stop.position == 4


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_every_committed_token_is_told_of_once(data):
    """Steps of any length, with and without the drafter, failed heads, repeated positions."""
    track, ids, told = Track(CHARGE, 2), [1, 2], []
    for _ in range(data.draw(st.integers(1, 6))):
        start, new = len(ids), data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))
        before = ids[max(0, start - data.draw(st.integers(0, 3))) :]
        what = data.draw(st.sampled_from(["read", "skipped", "failed"]))
        failure = "failed" if what == "failed" else ""
        known = [*ids, *new][track.num_settled :]
        track.take(rows(start - len(before), [*before, *new]) if what == "read" else rows(0, []).reshape(0, 5), known)
        track.settle(start + len(new), failure)
        ids += new
        news = track.told(len(new) - 1)
        assert news.start == len(told)
        told += news.scores.tolist()
        missed = Counter(place for miss in news.misses for place in range(miss.start, miss.end))
        assert max(missed.values(), default=1) == 1
        assert all((place in missed) == np.isnan(told[place][0]) for place in range(news.start, len(told)))
    assert len(told) == len(ids)


def test_a_table_is_taken_apart_by_request_and_position():
    table = np.array(
        [[1, 4, 9, 0.5, 0.5], [-1, 0, 0, 0, 0], [0, 2, 7, 0.1, 0.1], [1, 3, 8, 0.2, 0.2]], dtype=np.float32
    )
    none, first, second = StepScores(table).of_requests(3)[::-1]
    assert len(none) == 0 and first[:, 1].tolist() == [3, 4] and second[:, 2].tolist() == [7]


def test_news_come_over_the_wire_as_they_were():
    track = after_prompt(STOP)
    track.settle(5)
    track.withheld([21])
    track.finish(4)
    news = track.told(1)
    again = News.unpacked(news.packed())
    assert (again.misses, again.verdicts, again.withheld) == (news.misses, news.verdicts, news.withheld)
    assert again.verdicts and np.array_equal(again.scores, news.scores, equal_nan=True)


@pytest.mark.parametrize(
    ("policy", "words"),
    [
        (Policy(rules=(Rule(metric="m", action="redact", scope="answer"),)), "cannot be carried out inside vLLM"),
        (Policy(rules=(Rule(metric="m", scope="reply"),)), "scope reply"),
        (Policy(rules=(Rule(metric="other"),)), "no head scores it"),
        (Policy(hold=True, margin=2), "margin 2"),
    ],
)
def test_a_policy_that_cannot_be_carried_out_is_refused(policy, words):
    with pytest.raises(SettingError, match=words):
        replace(CHARGE, policy=policy)


def test_a_gate_is_refused_where_scores_come_after_their_tokens():
    with pytest.raises(SettingError, match="speculative_config"):
        replace(STOP, lags=True)
