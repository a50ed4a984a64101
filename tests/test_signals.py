"""How sharply draft and target disagree: by hand, against passes made for the purpose, and as metrics of rules."""

from __future__ import annotations

import json
import math

import pytest
import torch
from test_embedded import ids_of, stubborn_pair

from pilotfish.actions import Policy, Rule, dry_run, read_recorded
from pilotfish.engines import Drafting, EmbeddedEngine, Request, Sampling
from pilotfish.engines.reader import CachedModel
from pilotfish.engines.signals import NO_DRAFT, NO_TARGET, PROMPT_TOKEN, SIGNALS, Signals, compare
from pilotfish.errors import SettingError
from pilotfish.models import Pair

PROMPT = "def add(a, b):"
DRAFTINGS = [Drafting(length=1), Drafting(length=4), Drafting(step_cost=0.05)]


def test_signals_by_hand():
    p, q = torch.tensor([[0.5, 0.3, 0.2]]), torch.tensor([[0.25, 0.6, 0.15]])
    (found,) = compare([1], p.log() + 3, q.log() - 2)
    assert found.acceptance == pytest.approx(0.5)
    assert found.distance == pytest.approx(0.3)
    expected = 0.5 * math.log(2) + 0.3 * math.log(0.5) + 0.2 * math.log(0.2 / 0.15)
    assert found.divergence == pytest.approx(expected, abs=1e-6)
    assert (found.target_surprise, found.draft_surprise) == pytest.approx((-math.log(0.3), -math.log(0.6)))
    scores = {name.removeprefix("signal."): score.value for name, score in found.scores().items()}
    assert scores == pytest.approx(
        {
            "rejection": 0.5,
            "distance": 0.3,
            "divergence": 1 - math.exp(-expected),
            "target_surprise": 0.7,
            "draft_surprise": 0.4,
        }
    )
    assert compare([0], p.log(), q.log())[0].acceptance == 1.0


def test_models_that_agree_give_no_signal_but_surprise():
    logits = torch.randn(2, 50, generator=torch.Generator().manual_seed(0))
    for found in compare([3, 4], logits, logits):
        assert found.acceptance == 1.0
        assert found.distance == pytest.approx(0.0, abs=1e-6)
        assert found.divergence == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_signals_stay_in_range_however_far_apart_the_models_are(dtype):
    target, draft = torch.zeros(1, 1000, dtype=dtype), torch.zeros(1, 1000, dtype=dtype)
    target[0, 1], draft[0, 2] = 200.0, 200.0
    (found,) = compare([1], target, draft)
    assert all(0.0 <= score.value <= 1.0 for score in found.scores().values())
    assert found.distance == pytest.approx(1.0)


def expected_signals(pair, found) -> list[Signals]:
    """From one pass of each model over the whole text."""
    ids, first = [token.id for token in found.tokens], found.num_prompt_tokens
    rows = []
    for model in (pair.target, pair.draft):
        rows.append(CachedModel(model, "target", vocab_size=pair.vocab_size).read(ids, len(ids) - first + 1)[:-1])
    return compare(ids[first:], *rows)


@pytest.mark.parametrize("drafting", DRAFTINGS, ids=str)
@pytest.mark.parametrize("policy", [Policy(), Policy(hold=True)], ids=["lag", "hold"])
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=1.0)], ids=["greedy", "sampled"])
def test_every_token_has_the_signals_of_one_offline_pass_and_no_token_changes(pair, bank, drafting, policy, sampling):
    engine = EmbeddedEngine(pair, [bank], drafting=drafting)
    asked = {"max_new_tokens": 24, "sampling": sampling, "policy": policy}
    plain = engine.generate(PROMPT, Request(**asked))
    found = engine.generate(PROMPT, Request(**asked, signals=True))
    assert ids_of(found) == ids_of(plain)
    assert all(token.signals.reason == PROMPT_TOKEN for token in found.tokens[: found.num_prompt_tokens])
    for token, expected in zip(found.committed, expected_signals(pair, found), strict=True):
        assert token.signals.reason in {"", NO_DRAFT}
        known = [(a, b) for a, b in zip(token.signals[:5], expected[:5], strict=True) if a is not None]
        assert [a for a, _ in known] == pytest.approx([b for _, b in known], abs=1e-4)
        assert len(known) == (1 if token.signals.reason else 5)
    assert sum(token.signals.reason == NO_DRAFT for token in found.committed) <= 2
    assert all(token.signals is None for token in plain.tokens)


def test_where_a_model_did_not_run_the_signal_is_declared_missing(pair, bank):
    single = Pair(pair.target, None, pair.tokenizer, pair.target_identity, None)
    alone = EmbeddedEngine(single).generate(PROMPT, Request(max_new_tokens=8, signals=True))
    assert {token.signals.reason for token in alone.committed} == {NO_DRAFT}
    assert all(token.signals.target_surprise is not None for token in alone.committed)
    paused = EmbeddedEngine(stubborn_pair()).generate(PROMPT, Request(max_new_tokens=40, signals=True))
    assert {token.signals.reason for token in paused.committed} == {"", NO_DRAFT}
    gate = Policy(rules=(Rule(metric="wide", action="defer", threshold=0.0, scope="answer"),))
    deferred = EmbeddedEngine(pair, [bank]).generate(PROMPT, Request(max_new_tokens=8, policy=gate, signals=True))
    assert {token.signals.reason for token in deferred.committed} == {NO_TARGET}
    assert all(token.signals.draft_surprise is not None for token in deferred.committed)


def test_a_rule_may_gate_on_a_signal_without_any_bank(pair):
    engine = EmbeddedEngine(pair, drafting=Drafting(length=3))
    free = engine.generate(PROMPT, Request(max_new_tokens=24, signals=True))
    values = [token.signals.scores()["signal.distance"].value for token in free.committed]
    limit = sorted(value for value in values if value is not None)[-4]
    stop = Rule(metric="signal.distance", action="stop", threshold=limit - 1e-5, scope="answer", unscored="pass")
    found = engine.generate(PROMPT, Request(max_new_tokens=24, policy=Policy(rules=(stop,))))
    first = next(i for i, value in enumerate(values) if value is not None and value >= limit - 1e-5)
    assert found.finish_reason == "content_filter"
    assert [token.id for token in found.committed if token.is_emitted] == ids_of(free)[:first]


def test_by_default_a_gate_on_a_signal_stops_where_there_is_none(pair):
    single = Pair(pair.target, None, pair.tokenizer, pair.target_identity, None)
    rule = Rule(metric="signal.divergence", action="stop", threshold=1.0, scope="answer")
    found = EmbeddedEngine(single).generate(PROMPT, Request(max_new_tokens=8, policy=Policy(rules=(rule,))))
    assert (found.answer, found.finish_reason) == ("", "content_filter")
    assert NO_DRAFT in found.verdicts[0].reason


def test_signals_are_recorded_and_a_policy_about_them_can_be_tried_on_the_recording(pair, bank, tmp_path):
    engine = EmbeddedEngine(pair, [bank], drafting=Drafting(length=3))
    rules = (Rule(metric="signal.target_surprise", threshold=0.6, scope="answer"), Rule(metric="wide", scope="answer"))
    live = engine.generate(PROMPT, Request(max_new_tokens=24, policy=Policy(rules=rules)))
    path = live.to_json(tmp_path / "one.json", "one", thresholds=bank.thresholds)
    row = json.loads(path.read_text())["tokens"][-2]
    assert set(row["signals"]) == set(Signals._fields)
    assert set(row["scores"]) | set(row["unscored"]) == {*bank.metrics, *SIGNALS}
    (recorded,) = read_recorded(path)
    assert list(dry_run(Policy(rules=rules), recorded)) == live.verdicts


def test_a_threshold_of_a_signal_must_be_given(pair):
    rule = Rule(metric="signal.distance", scope="answer")
    with pytest.raises(SettingError, match="no threshold"):
        EmbeddedEngine(pair).stream("x", Request(policy=Policy(rules=(rule,))))
    rule = Rule(metric="signal.doubt", threshold=0.5, scope="answer")
    with pytest.raises(SettingError, match=r"there are .*signal\.distance"):
        EmbeddedEngine(pair).stream("x", Request(policy=Policy(rules=(rule,))))
