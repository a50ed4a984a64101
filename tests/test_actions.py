"""Verdicts are plain data from plain data."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pilotfish.actions import Aggregation, Policy, Reasoning, Rule, Watch
from pilotfish.actions.aggregate import WINDOWS
from pilotfish.actions.watch import PROMPT, REASONING, REPLY
from pilotfish.core import PENDING, Site, TokenScore
from pilotfish.errors import SettingError

STOP = Policy(rules=(Rule(metric="m", action="stop"),))
FLAG = Policy(rules=(Rule(metric="m", action="flag", scope="answer"),))
LIMITS = {"m": 0.5}
PROBABILITIES = st.lists(st.floats(0.0, 1.0), min_size=1, max_size=40)


def decide(policy, position, scores, limits, *, in_prompt):
    """What a policy says of a token that comes first."""
    return Watch(policy).judge(position, scores, limits, parts=PROMPT if in_prompt else REPLY)


def judged(policy, values, *, parts=REPLY):
    """The verdicts on tokens whose own and running score are one."""
    watch = Watch(policy)
    return [watch.judge(i, {"m": TokenScore.scored(value)}, LIMITS, parts=parts) for i, value in enumerate(values)]


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


def test_a_gate_stays_up_until_the_score_falls_under_its_release():
    rule = Rule(metric="m", threshold=0.8, release=0.4)
    found = [bool(each) for each in judged(Policy(rules=(rule,)), [0.5, 0.8, 0.5, 0.4, 0.39, 0.7, 0.9])]
    assert found == [False, True, True, True, False, False, True]


def test_without_a_release_the_threshold_is_one():
    assert [bool(each) for each in judged(FLAG, [0.5, 0.49, 0.6])] == [True, False, True]


def test_a_gate_may_wait_for_several_tokens_in_a_row():
    rule = Rule(metric="m", threshold=0.5, min_tokens=3)
    found = [bool(each) for each in judged(Policy(rules=(rule,)), [0.9, 0.9, 0.1, 0.9, 0.9, 0.9, 0.9, 0.2])]
    assert found == [False, False, False, False, False, True, True, False]


def test_one_metric_may_be_flagged_early_and_stopped_late():
    policy = Policy(rules=(Rule(metric="m", threshold=0.5), Rule(metric="m", action="stop", threshold=0.9)))
    assert [[v.action for v in each] for each in judged(policy, [0.6, 0.95])] == [["flag"], ["stop", "flag"]]


@pytest.mark.parametrize(
    ("unscored", "action", "expected"),
    [
        ("auto", "flag", []),
        ("auto", "hold", ["stop"]),
        ("auto", "stop", ["stop"]),
        ("auto", "redact", ["stop"]),
        ("auto", "resample", ["stop"]),
        ("auto", "defer", ["stop"]),
        ("auto", "escalate", ["stop"]),
        ("pass", "stop", []),
        ("flag", "stop", ["flag"]),
        ("stop", "flag", ["stop"]),
    ],
)
def test_an_unscored_token_does_what_the_rule_says_and_stops_every_gate_where_it_says_nothing(
    unscored, action, expected
):
    policy = Policy(rules=(Rule(metric="m", action=action, scope="answer", unscored=unscored),))
    verdicts = decide(policy, 0, {"m": TokenScore.unscored("broken")}, LIMITS, in_prompt=False)
    assert [verdict.action for verdict in verdicts] == expected


@pytest.mark.parametrize("unscored", ["pass", "flag"])
def test_an_unscored_token_that_may_pass_does_not_pass_a_gate_that_is_up(unscored):
    watch = Watch(Policy(rules=(Rule(metric="m", action="redact", scope="answer", unscored=unscored),)))
    watch.judge(0, {"m": TokenScore.scored(0.9)}, LIMITS, parts=REPLY)
    (verdict,) = watch.judge(1, {"m": TokenScore.unscored("broken")}, LIMITS, parts=REPLY)
    assert (verdict.action, verdict.reason) == ("redact", "m unscored (broken) while the gate is up")


def test_under_hold_a_missing_score_of_any_metric_stops_and_one_that_may_be_missing_does_not():
    missing = {"m": TokenScore.scored(0.1), "n": TokenScore.unscored("broken")}
    (verdict,) = decide(Policy(hold=True), 3, missing, {}, in_prompt=False)
    assert (verdict.action, verdict.metric, verdict.rule) == ("stop", "n", None)
    lenient = Policy(hold=True, rules=(Rule(metric="n", action="observe", unscored="pass"),))
    assert decide(lenient, 3, missing, {}, in_prompt=False) == ()


def test_what_the_rules_remember_can_be_put_back():
    policy = Policy(rules=(Rule(metric="m", threshold=0.6, release=0.2, min_tokens=2, aggregate="ema", rate=0.5),))
    watch = Watch(policy)
    for value in (0.9, 0.3):
        watch.judge(0, {"m": TokenScore.scored(value)}, LIMITS, parts=REPLY)
    kept = watch.gates
    first = [watch.judge(0, {"m": TokenScore.scored(v)}, LIMITS, parts=REPLY) for v in (0.99, 0.99, 0.1)]
    watch.gates = kept
    assert [watch.judge(0, {"m": TokenScore.scored(v)}, LIMITS, parts=REPLY) for v in (0.99, 0.99, 0.1)] == first
    assert any(first)


def test_drafted_tokens_are_judged_as_if_they_followed_and_leave_no_trace():
    policy = Policy(rules=(Rule(metric="m", threshold=0.7, aggregate="mean", look_ahead=True), Rule(metric="n")))
    watch = Watch(policy)
    watch.judge(0, {"m": TokenScore.scored(0.5)}, {"n": 0.5}, parts=REPLY)
    before = watch.gates
    drafted = [{"m": TokenScore.scored(value), "n": TokenScore.scored(0.9)} for value in (0.6, 0.95, 0.99)]
    (verdict,) = watch.foresee(1, drafted, {"n": 0.5}, parts=REPLY)
    assert (verdict.metric, verdict.position, verdict.is_early, verdict.rule) == ("m", 2, True, 0)
    assert watch.gates == before


# Aggregators.


def over(kind, values, **options):
    memory, found = (), []
    for value in values:
        memory, result = Aggregation(kind, **options).step(memory, value)
        found.append(result)
    return found


def odds(value):
    return math.log(value / (1 - value))


def chance(value):
    return 1 / (1 + math.exp(-value))


VALUES = [0.2, 0.9, 0.6, 0.3]
ODDS = [odds(value) for value in VALUES]


def test_aggregators_by_hand():
    assert over("last", VALUES) == VALUES
    assert over("max", VALUES) == [0.2, 0.9, 0.9, 0.9]
    assert over("mean", VALUES)[-1] == pytest.approx(chance(sum(ODDS) / 4))
    assert over("ema", VALUES, rate=0.5)[2] == pytest.approx(chance(0.25 * ODDS[0] + 0.25 * ODDS[1] + 0.5 * ODDS[2]))
    assert over("swim", VALUES, window=2)[-1] == pytest.approx(chance((ODDS[2] + ODDS[3]) / 2))
    assert over("topk", VALUES, window=3, top=2)[-1] == pytest.approx(chance((ODDS[1] + ODDS[2]) / 2))
    for kind, since in (("softmax", 0), ("attention", 1)):
        weights = [math.exp(value) for value in ODDS[since:]]
        expected = sum(w * v for w, v in zip(weights, ODDS[since:], strict=True)) / sum(weights)
        assert over(kind, VALUES, window=3)[-1] == pytest.approx(chance(expected))


def test_the_default_is_the_heads_own_score_of_the_text_so_far():
    late = {"m": TokenScore.scored(0.1, running=0.8)}
    assert len(decide(FLAG, 0, late, LIMITS, in_prompt=False)) == 1
    last = Policy(rules=(Rule(metric="m", aggregate="last", threshold=0.5),))
    assert decide(last, 0, late, LIMITS, in_prompt=False) == ()


@given(values=PROBABILITIES, kind=st.sampled_from([*WINDOWS, "last", "mean", "max", "ema", "softmax"]))
def test_an_aggregate_is_a_probability_between_the_least_and_the_largest_and_keeps_little(values, kind):
    memory = ()
    for index, value in enumerate(values):
        memory, found = Aggregation(kind, window=5, top=3).step(memory, value)
        seen = values[: index + 1]
        assert min(seen) - 1e-6 <= found <= max(seen) + 1e-6
        assert len(memory) <= 5


@given(values=PROBABILITIES, kind=st.sampled_from(list(WINDOWS)), window=st.integers(1, 6))
def test_a_window_forgets_what_is_older(values, kind, window):
    assert over(kind, values, window=window)[-1] == pytest.approx(over(kind, values[-window:], window=window)[-1])


# Scopes.


def parts_of(pieces, *, inside=False):
    reasoning, found = Reasoning("inside" if inside else "start"), []
    for piece in pieces:
        reasoning, parts = reasoning.read(piece, ("<think>", "</think>"))
        found.append({REASONING: "thought", REPLY: "reply"}.get(parts, "both"))
    return found


def test_reasoning_stands_between_its_tags_at_the_beginning_of_the_answer():
    assert parts_of(["<think>", "hm", "</think>", "so"]) == ["thought", "thought", "thought", "reply"]
    assert parts_of(["hm", "</th", "ink>", "\n", "so"], inside=True) == ["thought"] * 3 + ["reply"] * 2
    assert parts_of(["so", "<think>", "hm"]) == ["reply"] * 3
    assert parts_of(["<think>", "a", "</think>", "<think>", "b"]) == ["thought"] * 3 + ["reply"] * 2


def test_a_token_that_may_be_either_is_judged_as_both():
    assert parts_of(["\n", "<th", "ink>", "hm"]) == ["both", "both", "thought", "thought"]
    assert parts_of(["<", "html>"]) == ["both", "reply"]
    assert parts_of(["<think>x</think>yes", "no"]) == ["both", "reply"]


@given(text=st.text(alphabet="<>/think ab", max_size=30), cuts=st.lists(st.integers(0, 30), max_size=6))
def test_however_a_text_is_cut_no_character_of_the_reply_escapes_the_reply(text, cuts):
    begun = text.lstrip()
    if begun.startswith("<think>"):
        inside = begun[len("<think>") :]
        reply = inside.partition("</think>")[2]
    else:
        reply = text
    bounds = sorted({0, len(text), *(cut for cut in cuts if cut <= len(text))})
    pieces = [text[a:b] for a, b in itertools.pairwise(bounds)]
    covered = "".join(piece for piece, kind in zip(pieces, parts_of(pieces), strict=True) if kind != "thought")
    assert covered.replace(" ", "").endswith(reply.replace(" ", ""))


def test_a_rule_judges_its_own_part_alone():
    for scope, expected in (("reasoning", (1, 0)), ("reply", (0, 1)), ("answer", (1, 1)), ("all", (1, 1))):
        policy = Policy(rules=(Rule(metric="m", scope=scope),))
        found = [Watch(policy).judge(0, {"m": TokenScore.scored(0.9)}, LIMITS, parts=p) for p in (REASONING, REPLY)]
        assert tuple(map(len, found)) == expected


# What is refused.


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"threshold": 1.5}, r"threshold 1.5 of the rule for 'm' is outside \[0, 1\]; give a probability"),
        ({"threshold": 0.5, "release": 0.6}, "release 0.6 .* above the threshold 0.5; give one at or below"),
        ({"release": 0.6}, "needs a threshold beside it; give both"),
        ({"aggregate": "ema"}, "threshold None .* is needed: the bank's own is for aggregate running, not for ema"),
        ({"min_tokens": 0}, "min_tokens 0 .* give 1 or more"),
        ({"rate": 0.5}, "rate 0.5 .* belongs to aggregate ema; leave it out, or change aggregate"),
        ({"aggregate": "ema", "threshold": 0.5, "rate": 0.0}, r"outside \(0, 1\]"),
        ({"window": 4}, "belongs to aggregate attention or swim or topk"),
        ({"tries": 2}, "belongs to action resample"),
        ({"action": "steer"}, "edit None .* give the name of one of the engine's edits"),
        ({"edit": "calm"}, "belongs to action steer"),
        ({"action": "redact"}, "scope 'all' .* set it to answer, reasoning or reply"),
        ({"action": "stop", "look_ahead": True}, "look_ahead True .* belongs to action flag or hold"),
        ({"metric": ""}, "name the metric"),
        ({"metric": "signal.distance", "threshold": 0.5}, "set it to answer"),
    ],
)
def test_a_rule_that_makes_no_sense_names_the_setting_and_what_is_allowed(settings, words):
    with pytest.raises(SettingError, match=words):
        Rule(**{"metric": "m", **settings})


def test_policies_that_cannot_be_carried_out_are_refused():
    with pytest.raises(SettingError, match="two rules with action flag and scope all"):
        Policy(rules=(Rule(metric="m"), Rule(metric="m", threshold=0.9)))
    with pytest.raises(SettingError, match="nothing holds; set hold to true"):
        Policy(margin=3)
    with pytest.raises(SettingError, match="not calibrated; give a threshold"):
        STOP.check(["m"], {"m"})
    with pytest.raises(SettingError, match="there are none: no bank is loaded"):
        STOP.check([], set())
    steer = Policy(rules=(Rule(metric="m", action="steer", edit="calm"),))
    with pytest.raises(SettingError, match="steers with edit 'calm'; there are angry"):
        steer.check(["m"], set(), edits=["angry"])
    defer = Policy(rules=(Rule(metric="m", action="defer", scope="answer"),))
    with pytest.raises(SettingError, match="this pair has none; load one"):
        defer.check(["m"], set(), has_draft=False)
    escalate = Policy(rules=(Rule(metric="m", action="escalate"),))
    with pytest.raises(SettingError, match="there is no judge; give the engine judge="):
        escalate.check(["m"], set())


def test_a_site_reads_back_and_bad_ones_say_what_is_allowed():
    for site in (Site(3, "resid_post"), Site(-1, "final"), Site(0, "mlp_out")):
        assert Site.parse(str(site)) == site
    for text in ("final.3", "x.resid_pre", "3"):
        with pytest.raises(SettingError):
            Site.parse(text)
    with pytest.raises(SettingError, match="`final` has layer -1"):
        Site(2, "final")
