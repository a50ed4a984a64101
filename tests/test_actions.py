"""Verdicts are plain data from plain data."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pilotfish.actions import Policy, Rule, decide
from pilotfish.core import PENDING, Site, TokenScore
from pilotfish.errors import SettingError

STOP = Policy(rules=(Rule(metric="m", action="stop"),))
FLAG = Policy(rules=(Rule(metric="m", action="flag", scope="answer"),))
LIMITS = {"m": 0.5}


def test_a_score_at_the_threshold_is_enough():
    (verdict,) = decide(STOP, 7, {"m": TokenScore.scored(0.5)}, LIMITS, in_prompt=False)
    assert (verdict.position, verdict.action, verdict.score, verdict.threshold) == (7, "stop", 0.5, 0.5)
    assert verdict.reason == "m 0.500 reached the threshold 0.500"
    assert decide(STOP, 7, {"m": TokenScore.scored(0.4999)}, LIMITS, in_prompt=False) == ()


def test_a_threshold_is_held_against_the_text_so_far_and_not_the_token_alone():
    late = {"m": TokenScore.scored(0.1, running=0.8)}
    (verdict,) = decide(STOP, 3, late, LIMITS, in_prompt=False)
    assert (verdict.score, verdict.reason) == (0.8, "m 0.800 reached the threshold 0.500")
    assert decide(STOP, 3, {"m": TokenScore.scored(0.9, running=0.2)}, LIMITS, in_prompt=False) == ()
    assert TokenScore.scored(0.3).running == 0.3, "where a head looks at single tokens, they are one"


@pytest.mark.parametrize("running", [float("nan"), -0.1, 1.1, float("inf")])
def test_a_text_so_far_without_a_probability_leaves_the_token_unscored(running):
    score = TokenScore.scored(0.2, running=running)
    assert (score.state, score.value, score.running) == ("unscored", None, None)
    assert [verdict.action for verdict in decide(STOP, 0, {"m": score}, LIMITS, in_prompt=False)] == ["stop"]


@given(value=st.floats(allow_nan=True, allow_infinity=True))
def test_no_number_that_is_not_a_probability_passes_a_gate(value):
    score = TokenScore.scored(value)
    verdicts = decide(STOP, 0, {"m": score}, {"m": 1.0}, in_prompt=False)
    if 0.0 <= value < 1.0:
        assert verdicts == ()
    else:
        assert verdicts[0].action == "stop"


def test_a_gate_stops_on_a_missing_score_a_missing_head_and_a_missing_threshold():
    for scores, limits in (
        ({"m": TokenScore.unscored("broken")}, LIMITS),
        ({}, LIMITS),
        ({"m": TokenScore.scored(0.1)}, {}),
    ):
        assert [verdict.action for verdict in decide(STOP, 0, scores, limits, in_prompt=False)] == ["stop"]
        assert decide(FLAG, 0, scores, limits, in_prompt=False) == ()


def test_a_rules_own_threshold_goes_before_the_banks():
    policy = Policy(rules=(Rule(metric="m", threshold=0.9),))
    assert decide(policy, 0, {"m": TokenScore.scored(0.8)}, LIMITS, in_prompt=True) == ()


def test_scope_says_which_tokens():
    over = {"m": TokenScore.scored(0.9)}
    assert decide(FLAG, 0, over, LIMITS, in_prompt=True) == ()
    assert len(decide(FLAG, 0, over, LIMITS, in_prompt=False)) == 1


def test_a_gating_verdict_comes_before_a_flag():
    policy = Policy(rules=(Rule(metric="a", action="flag"), Rule(metric="b", action="stop")))
    scores = {"a": TokenScore.scored(1.0), "b": TokenScore.scored(1.0)}
    assert [v.metric for v in decide(policy, 0, scores, {"a": 0.5, "b": 0.5}, in_prompt=False)] == ["b", "a"]


def test_a_gate_implies_hold():
    assert STOP.holds
    assert not FLAG.holds
    assert Policy(hold=True).holds


def test_a_pending_token_is_never_judged():
    with pytest.raises(AssertionError, match="pending"):
        decide(STOP, 0, {"m": PENDING}, LIMITS, in_prompt=False)


def test_policies_that_cannot_be_carried_out_are_refused():
    with pytest.raises(SettingError, match="two rules"):
        Policy(rules=(Rule(metric="m"), Rule(metric="m", action="stop")))
    with pytest.raises(SettingError, match=r"outside \[0, 1\]"):
        Rule(metric="m", threshold=1.5)
    with pytest.raises(SettingError, match="not calibrated; give a threshold"):
        STOP.check(["m"], {"m"})
    with pytest.raises(SettingError, match="there are none: no bank is loaded"):
        STOP.check([], set())


def test_a_site_reads_back_and_bad_ones_say_what_is_allowed():
    for site in (Site(3, "resid_post"), Site(-1, "final"), Site(0, "mlp_out")):
        assert Site.parse(str(site)) == site
    for text in ("final.3", "x.resid_pre", "3"):
        with pytest.raises(SettingError):
            Site.parse(text)
    with pytest.raises(SettingError, match="`final` has layer -1"):
        Site(2, "final")
