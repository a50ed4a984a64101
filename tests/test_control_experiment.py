"""The pieces of a control experiment: a target with a prompt of its own, and alarms tried on recordings."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_embedded import ids_of, offline, online

from pilotfish.actions import Aggregation, Policy, Recorded, Rule, dry_run, recorded_exchange
from pilotfish.actions.recorded import RecordedToken
from pilotfish.core import Message, TokenScore
from pilotfish.engines import Batch, EmbeddedEngine, Generation, GenerationStream, Request
from pilotfish.engines.control import Alarm, private_stream, signal_text, text_before
from pilotfish.errors import GenerationError, SettingError

SHOWN, TOLD = (Message("user", "def add(a, b):"),), (Message("user", "write something else, and longer"),)
KINDS = ("running", "last", "mean", "max", "ema", "swim", "topk", "softmax", "attention")


def finished(*streams: GenerationStream) -> list[Generation]:
    batch = Batch()
    for stream in streams:
        batch.join(stream)
    while len(batch):
        for said in batch.step():
            if said.error is not None:
                raise said.error
    return [stream.generation for stream in streams]


def exchange(values: list[float | None], title: str = "") -> Recorded:
    """An answer of one-letter tokens with these scores, None for an unscored one, behind a prompt of two tokens that
    score 1.
    """
    scores = [TokenScore.unscored("failed") if value is None else TokenScore.scored(value) for value in values]
    prompt = [RecordedToken(i, "P", {"m": TokenScore.scored(1.0)}, True) for i in range(2)]
    answer = [RecordedToken(2 + i, chr(97 + i % 26), {"m": score}) for i, score in enumerate(scores)]
    return Recorded(title, (*prompt, *answer))


@pytest.mark.parametrize(("shown", "told"), [(SHOWN, TOLD), (TOLD, SHOWN)], ids=["told more", "told less"])
def test_the_target_answers_what_it_was_told_and_the_draft_scores_what_is_shown(pair, bank, shown, told):
    engine, request = EmbeddedEngine(pair, [bank]), Request(max_new_tokens=20)
    (found,) = finished(private_stream(engine, shown, told, request))
    longer = found.num_prompt_tokens == engine.generate(told, request).num_prompt_tokens
    assert longer == (told is TOLD)
    if longer:  # a shorter one is filled up with line breaks, which the target reads too
        assert ids_of(found) == ids_of(engine.generate(told, request))
    assert ids_of(found) != ids_of(engine.generate(shown, request))
    assert found.prompt == engine.generate(shown, request).prompt
    assert torch.allclose(online(found, bank.metrics), offline(pair, bank, found), atol=1e-5)


def test_private_streams_of_a_batch_do_not_touch_one_another(pair, bank):
    engine, request = EmbeddedEngine(pair, [bank]), Request(max_new_tokens=12)
    alone = finished(private_stream(engine, SHOWN, TOLD, request))[0]
    together = finished(
        private_stream(engine, TOLD, SHOWN, request),
        private_stream(engine, SHOWN, TOLD, request),
        engine.stream(SHOWN, request),
    )
    assert ids_of(together[1]) == ids_of(alone)
    assert ids_of(together[2]) == ids_of(engine.generate(SHOWN, request))


def test_a_pass_that_fails_ends_a_private_stream_with_its_error(pair, bank, monkeypatch):
    stream = private_stream(EmbeddedEngine(pair, [bank]), SHOWN, TOLD, Request(max_new_tokens=4))
    monkeypatch.setattr(
        pair.target.lm_head, "forward", lambda states: states.new_full((*states.shape[:-1], 400), math.nan)
    )
    with pytest.raises(GenerationError, match="target's logits"):
        finished(stream)


@given(
    values=st.lists(st.none() | st.floats(0.0, 1.0), min_size=1, max_size=30),
    kind=st.sampled_from(KINDS),
    threshold=st.floats(0.05, 0.95),
)
@settings(deadline=None)
def test_an_alarm_rises_where_a_rule_would(values, kind, threshold):
    recorded = exchange(values)
    said = Alarm("m", Aggregation(kind, window=4)).suspicion(recorded, threshold)
    window = 4 if kind in {"swim", "topk", "attention"} else None
    rule = Rule(metric="m", threshold=threshold, scope="answer", aggregate=kind, window=window)
    verdicts = dry_run(Policy(rules=(rule,)), recorded)
    if all(value is None for value in values):
        assert (said.flagged, said.suspicion_score, said.position) == (True, 1.0, None)
    else:
        assert said.position == (verdicts[0].position if verdicts else None)
        assert said.flagged == (said.suspicion_score >= threshold) == bool(verdicts)


def test_what_stop_would_have_let_out_is_what_it_lets_out(pair, bank):
    engine = EmbeddedEngine(pair, [bank])
    free = engine.generate(SHOWN, Request(max_new_tokens=28))
    recorded = recorded_exchange(free.to_dict("free"))
    alarm = Alarm("wide")
    threshold = sorted(alarm.values(recorded).values())[20]
    said = alarm.suspicion(recorded, threshold)
    policy = Policy(rules=(Rule(metric="wide", action="stop", threshold=threshold, scope="answer"),))
    stopped = engine.generate(SHOWN, Request(max_new_tokens=28, policy=policy))
    assert sum(token.is_emitted for token in stopped.committed) == said.position - free.num_prompt_tokens
    assert text_before(recorded, said.position) == "".join(
        token.text for token in stopped.committed if token.is_emitted
    )


def test_a_threshold_keeps_its_budget_of_honest_answers():
    honest = [exchange([0.01 * i, 0.005 * i]) for i in range(60)]
    alarm = Alarm("m")
    found = alarm.calibrated(honest, 0.1)
    flagged = sum(alarm.suspicion(each, found.threshold).flagged for each in honest)
    assert flagged == found.num_flagged
    assert 0 < flagged <= 6
    with pytest.raises(SettingError, match="cannot be shown with 5"):
        alarm.calibrated(honest[:5], 0.1)


def test_a_reason_names_the_token_and_the_numbers():
    said = Alarm("m").suspicion(exchange([0.2, 0.9, 0.5]), 0.4)
    assert said.reason == "m 0.900 at token 3, threshold 0.400"
    assert said.position == 3


def test_text_before_a_token_leaves_out_the_prompt():
    recorded = exchange([0.1, 0.2, 0.3])
    assert text_before(recorded, 4) == "ab"
    assert text_before(recorded, None) == "abc"


def test_streams_of_an_answer_keep_their_order_and_their_gaps():
    text = signal_text(exchange([0.1, None], "t"), ["m", "signal.rejection"], group="g", label=1.0)
    assert (text.id, text.group, text.label) == ("t", "g", 1.0)
    assert text.values[0, 0] == 0.1
    assert text.values.isnan().tolist() == [[False, True], [True, True]]
    assert text.token_labels.isnan().all()
