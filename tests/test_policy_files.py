"""Policies as files, tried on recordings: what is written comes back, what is wrong is named."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pilotfish.actions import (
    LookAhead,
    Policy,
    Recorded,
    Rule,
    dry_run,
    look_ahead,
    policy_from_dict,
    policy_to_dict,
    read_policy,
    read_recorded,
    write_policy,
)
from pilotfish.actions.aggregate import WINDOWS
from pilotfish.actions.policy import ACTIONS, REWRITING, Unscored
from pilotfish.actions.recorded import RecordedRound, RecordedToken
from pilotfish.cli import main
from pilotfish.core import TokenScore
from pilotfish.engines import Drafting, EmbeddedEngine, Request
from pilotfish.errors import ArtefactError, SettingError
from pilotfish.scores import ScoredText, write_scored

TEXTS = st.text(st.characters(codec="utf-8"), min_size=1, max_size=8)
UNITS = st.floats(0.0, 1.0)


@st.composite
def rules(draw) -> Rule:
    action = draw(st.sampled_from(ACTIONS))
    kind = draw(st.sampled_from(["running", "last", "mean", "ema", *WINDOWS]))
    options = {"threshold": draw(UNITS), "unscored": draw(st.sampled_from(get_args(Unscored)))}
    options["release"] = draw(st.none() | st.floats(0.0, options["threshold"]))
    options["scope"] = "answer" if action in REWRITING else draw(st.sampled_from(["all", "prompt", "reply"]))
    if kind in WINDOWS:
        options["window"] = draw(st.none() | st.integers(1, 50))
    if action == "steer":
        options["edit"] = draw(TEXTS)
    if action == "escalate":
        options |= {"share": draw(UNITS), "budget": draw(st.integers(0, 9))}
    if action in {"flag", "hold"}:
        options["look_ahead"] = draw(st.booleans())
    return Rule(metric=draw(TEXTS), action=action, aggregate=kind, min_tokens=draw(st.integers(1, 9)), **options)


@given(
    chosen=st.lists(
        rules().filter(lambda rule: not rule.metric.startswith("signal.")),
        max_size=3,
        unique_by=lambda rule: rule.metric,
    ),
    hold=st.booleans(),
    mark=st.text(st.characters(codec="utf-8"), max_size=5),
    tags=st.tuples(TEXTS, TEXTS),
)
@settings(deadline=None, max_examples=40)
def test_a_policy_comes_back_from_toml_and_json_as_it_was(chosen, hold, mark, tags, tmp_path_factory):
    policy = Policy(rules=tuple(chosen), hold=hold, mark=mark, reasoning_tags=tags)
    folder = tmp_path_factory.mktemp("policies")
    for name in ("policy.toml", "policy.json"):
        assert read_policy(write_policy(folder / name, policy)) == policy
    assert policy_from_dict(policy_to_dict(policy)) == policy


def test_a_file_as_a_user_writes_it(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(
        'margin = 4\n\n[[rules]]\nmetric = "insecure_code"\naction = "stop"\nthreshold = 1\n\n'
        '[[rules]]\nmetric = "signal.divergence"\nthreshold = 0.9\nscope = "reply"\naggregate = "swim"\nwindow = 8\n'
    )
    assert read_policy(path) == Policy(
        margin=4,
        rules=(
            Rule(metric="insecure_code", action="stop", threshold=1.0),
            Rule(metric="signal.divergence", threshold=0.9, scope="reply", aggregate="swim", window=8),
        ),
    )


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        ([], r"policy is \[\]; give a table with the keys rules, hold, margin"),
        ({"rule": []}, "policy has the unknown key 'rule'; known are rules, hold"),
        ({"rules": {}}, r"rules is {}; give a list of tables, in TOML under \[\[rules\]\]"),
        ({"rules": ["stop"]}, r"rules\[0\] is \"stop\"; give a table with the keys metric, action"),
        ({"rules": [{"action": "stop"}]}, r"rules\[0\] lacks the key 'metric'"),
        ({"rules": [{"metric": "m", "treshold": 0.5}]}, r"rules\[0\] has the unknown key 'treshold'; known are metric"),
        ({"rules": [{"metric": "m", "action": "halt"}]}, r"rules\[0\]: action is \"halt\"; use one of observe, flag"),
        ({"rules": [{"metric": "m", "aggregate": "median"}]}, "use one of running, last, mean"),
        ({"rules": [{"metric": "m", "threshold": "high"}]}, r"rules\[0\]: threshold is \"high\"; give a number"),
        ({"rules": [{"metric": "m", "threshold": True}]}, "threshold is true; give a number"),
        ({"rules": [{"metric": "m", "min_tokens": 2.5}]}, "min_tokens is 2.5; give a whole number"),
        ({"rules": [{"metric": 3}]}, "metric is 3; give text"),
        ({"rules": [{"metric": "m", "threshold": 7}]}, r"rules\[0\]: threshold 7.0 of the rule for 'm' is outside"),
        ({"hold": 1}, "hold is 1; give true or false"),
        ({"reasoning_tags": ["<a>"]}, "reasoning_tags is .* give a list of 2 texts"),
        ({"margin": 2}, "policy: margin 2 keeps judged tokens back, but nothing holds"),
    ],
)
def test_what_is_wrong_with_a_policy_is_named_with_what_is_allowed(raw, words):
    with pytest.raises(SettingError, match=words):
        policy_from_dict(raw)


def test_a_file_that_cannot_be_read_says_why(tmp_path):
    bad = tmp_path / "bad.toml"
    bad.write_text("hold = maybe")
    for path, words in (
        (tmp_path / "none.toml", "cannot be read: No such file"),
        (tmp_path / "mine.yaml", "ends in .toml or .json"),
        (bad, "is not TOML"),
    ):
        if path.suffix == ".yaml":
            path.write_text("")
        with pytest.raises(SettingError, match=words):
            read_policy(path)
    bad.write_bytes(b"\xff")
    with pytest.raises(SettingError, match="not UTF-8 at byte 0"):
        read_policy(bad)


# Recordings.


def recorded(*running, drafted=(), rounds=None) -> Recorded:
    """An answer with these running scores, a token a round where nothing else is said."""
    numbers = rounds or range(1, len(running) + 1)
    tokens = tuple(
        RecordedToken(i, "x", {"m": TokenScore.scored(value)}, False, number)
        for i, (value, number) in enumerate(zip(running, numbers, strict=True))
    )
    items = tuple(
        RecordedRound(number, start, tuple({"m": TokenScore.scored(value)} for value in values))
        for number, start, values in drafted
    )
    return Recorded("one", tokens, items)


def test_a_dry_run_gives_the_verdicts_of_the_live_run(pair, bank, tmp_path):
    engine = EmbeddedEngine(pair, [bank], drafting=Drafting(length=3))
    for rule in (
        Rule(metric="wide", scope="answer", threshold=0.55, release=0.5),
        Rule(metric="wide", scope="answer", threshold=0.6, aggregate="ema", rate=0.3, min_tokens=2),
        Rule(metric="narrow", action="stop", threshold=0.6, scope="answer"),
    ):
        live = engine.generate("def add(a, b):", Request(max_new_tokens=24, policy=Policy(rules=(rule,))))
        observed = engine.generate("def add(a, b):", Request(max_new_tokens=24))
        (again,) = read_recorded(observed.to_json(tmp_path / "one.json", "t", thresholds=bank.thresholds))
        found = dry_run(Policy(rules=(rule,)), again)
        assert [(v.position, v.action) for v in found] == [(v.position, v.action) for v in live.verdicts]


def test_a_dry_run_ends_at_its_first_stop_and_refuses_what_was_not_recorded():
    policy = Policy(rules=(Rule(metric="m", action="stop", threshold=0.5),))
    assert [verdict.position for verdict in dry_run(policy, recorded(0.1, 0.6, 0.9))] == [1]
    with pytest.raises(SettingError, match="no head scores it; there are m"):
        dry_run(Policy(rules=(Rule(metric="n", threshold=0.5),)), recorded(0.1))


def test_held_out_texts_can_be_tried_too(tmp_path):
    labels = torch.tensor([float("nan"), 0.0, 1.0], dtype=torch.float64)
    scores = torch.tensor([0.9, 0.2, 0.8], dtype=torch.float64)
    text = ScoredText(
        id="a", group="g", prompt="p", label=1.0, score=0.8, token_labels=labels, token_scores=scores, running=scores
    )
    write_scored(tmp_path / "scored.json", "m", {"words": [replace(text, token_scores=None)], "head": [text]})
    (found,) = read_recorded(tmp_path / "scored.json")
    policy = Policy(rules=(Rule(metric="m", threshold=0.5, scope="answer"),))
    assert [verdict.position for verdict in dry_run(policy, found)] == [2]


def test_what_is_no_recording_is_refused(tmp_path):
    path = tmp_path / "x.json"
    with pytest.raises(ArtefactError, match="cannot be read"):
        read_recorded(path)
    for content, words in (
        ("{", "is not JSON"),
        ("[1]", "holds no recorded exchange"),
        ('{"a": 1}', "KeyError: 'tokens'"),
    ):
        path.write_text(content)
        with pytest.raises(ArtefactError, match=words):
            read_recorded(path)


# Look-ahead.

RULE = Rule(metric="m", threshold=0.5)


def test_look_ahead_by_hand():
    foreseen = recorded(0.1, 0.2, 0.9, 0.9, rounds=[1, 2, 2, 2], drafted=[(2, 1, [0.2, 0.9])])
    found = look_ahead([foreseen], RULE)
    assert found == LookAhead(1, found.rises, 1, 0, 0, 0)
    (rise,) = found.rises
    assert (rise.position, rise.warned_at, rise.known_at, rise.tokens_earlier) == (2, 1, 4, 3)
    in_vain = recorded(0.1, 0.2, 0.1, drafted=[(2, 1, [0.3, 0.9])])
    assert look_ahead([in_vain], RULE) == LookAhead(1, (), 1, 1, 1, 1)
    unseen = recorded(0.1, 0.2, 0.9, drafted=[(3, 2, [0.3])])
    found = look_ahead([unseen], RULE)
    assert (found.num_foreseen, found.rises[0].tokens_earlier, found.num_warnings) == (0, 0, 0)


def test_a_gate_that_is_up_already_is_no_warning():
    again = recorded(0.9, 0.9, 0.9, drafted=[(2, 1, [0.9]), (3, 2, [0.9])])
    assert look_ahead([again], RULE).num_warnings == 0


def test_the_measured_warnings_are_those_of_a_live_run(pair, bank, tmp_path):
    engine = EmbeddedEngine(pair, [bank], drafting=Drafting(length=4))
    early = Rule(metric="wide", threshold=0.6, scope="answer", look_ahead=True)
    live = engine.generate("def add(a, b):", Request(max_new_tokens=40, policy=Policy(rules=(early,))))
    (again,) = read_recorded(live.to_json(tmp_path / "one.json"))
    found = look_ahead([again], replace(early, look_ahead=False))
    assert found.num_warnings == sum(verdict.is_early for verdict in live.verdicts) > 0
    assert found.num_warnings - found.num_false == found.num_foreseen > 0


# The commands.


def test_the_command_says_what_a_policy_does_and_what_it_would_have_done(tmp_path, capsys, pair, bank):
    path = tmp_path / "mine.toml"
    path.write_text('[[rules]]\nmetric = "wide"\naction = "stop"\nthreshold = 0.5\nscope = "answer"\n')
    assert main(["policy", "check", str(path)]) == 0
    said = capsys.readouterr().out
    assert "wide" in said
    assert "stop" in said
    engine = EmbeddedEngine(pair, [bank])
    recording = engine.generate("def add(a, b):", Request(max_new_tokens=24)).to_json(tmp_path / "one.json", "one")
    report = tmp_path / "verdicts.json"
    assert main(["policy", "dry-run", str(path), "--on", str(recording), "--json", str(report)]) == 0
    assert "1 of 1 exchanges stopped" in capsys.readouterr().out
    (row,) = json.loads(report.read_text())["exchanges"]
    assert row["verdicts"][-1]["action"] == "stop"


def test_a_wrong_policy_is_refused_in_one_line(tmp_path, capsys):
    path = tmp_path / "mine.toml"
    path.write_text('[[rules]]\nmetric = "wide"\naction = "halt"\n')
    assert main(["policy", "check", str(path)]) == 1
    said = capsys.readouterr().err
    assert 'rules[0]: action is "halt"; use one of observe, flag' in said
    assert "Traceback" not in said
