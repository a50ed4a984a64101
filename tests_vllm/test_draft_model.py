"""A draft model is read: every token has its score in the step that brings it, in every way that vLLM can bring it."""

from __future__ import annotations

import time

import pytest
import torch
from kit import BLOCKS, LENGTH, expected, finished, generate, policy, running, scheduler_of, tap_of

from pilotfish.actions import Rule

TEXT = "The cat and the dog return to the house. def f(x): return x == 1. "


def test_scores_are_those_of_one_pass_over_the_same_text(models, drafting):
    for (completion,) in generate(drafting, [TEXT, "def f", TEXT[5:]]):
        record = finished(completion)
        assert record.counts == {"": len(record.generation.tokens)}
        torch.testing.assert_close(running(record), expected(models, record), atol=1e-4, rtol=0)


def test_some_drafted_tokens_are_accepted_and_some_are_not(drafting):
    ((completion,),) = generate(drafting, [TEXT], max_tokens=40)
    origins = [token.origin for token in finished(completion).generation.committed]
    rounds = finished(completion).generation.committed[-1].round
    assert "draft" in origins and rounds > len(origins) / 4


def test_a_prompt_longer_than_a_step_is_scored_chunk_by_chunk(models, drafting):
    ((completion,),) = generate(drafting, [list(range(3, 133))], max_tokens=4)
    record = finished(completion)
    assert record.counts == {"": 134}
    torch.testing.assert_close(running(record), expected(models, record), atol=1e-4, rtol=0)


def test_a_cached_prefix_has_the_very_scores_of_the_fresh_one(models, drafting):
    drafting.reset_prefix_cache()
    prompt = list(range(7, 87))
    ((first,),) = generate(drafting, [prompt], max_tokens=1)
    ((again,),) = generate(drafting, [[*prompt, 9, 8, 7]], max_tokens=1)
    one, other = running(finished(first)), running(finished(again))
    assert torch.equal(one[:64], other[:64])
    torch.testing.assert_close(other, expected(models, finished(again)), atol=1e-4, rtol=0)


def test_the_prefix_was_indeed_cached(drafting):
    drafting.reset_prefix_cache()
    seen = []
    tap = tap_of(drafting)
    plain, tap.cached = tap.cached, lambda *given: seen.append(plain(*given)) or seen[-1]
    try:
        generate(drafting, [list(range(9, 89))], max_tokens=1)
        generate(drafting, [list(range(9, 89))], max_tokens=1)
    finally:
        tap.cached = plain
    assert [len(rows.position) for rows in seen if rows is not None] == [64]


def test_requests_that_were_preempted_are_scored_once_and_right(models, drafting, monkeypatch):
    drafting.reset_prefix_cache()
    preempted = []
    plain = scheduler_of(drafting)._preempt_request

    def preempt(request, *rest, **more):
        preempted.append(request.request_id)
        plain(request, *rest, **more)

    monkeypatch.setattr(scheduler_of(drafting), "_preempt_request", preempt)
    prompts = [list(range(start, start + 60)) for start in (3, 20, 40, 60, 80, 100)]
    outputs = generate(drafting, prompts, max_tokens=60, ignore_eos=True)
    assert preempted, f"{BLOCKS} blocks hold all of it"
    for (completion,) in outputs:
        record = finished(completion)
        assert record.counts == {"": 120}
        torch.testing.assert_close(running(record), expected(models, record), atol=1e-4, rtol=0)


def test_several_answers_to_one_prompt_have_scores_of_their_own(models, drafting):
    ((*completions,),) = generate(drafting, [TEXT], n=3, temperature=1.0, seed=1, max_tokens=12)
    records = [finished(completion) for completion in completions]
    assert len({tuple(token.id for token in record.generation.committed) for record in records}) == 3
    for record in records:
        torch.testing.assert_close(running(record), expected(models, record), atol=1e-4, rtol=0)


def test_surplus_tokens_of_the_last_step_are_not_told_of(drafting):
    for num_tokens in range(1, 9):
        ((completion,),) = generate(drafting, [TEXT], max_tokens=num_tokens)
        record = finished(completion)
        assert len(record.generation.committed) == len(completion.token_ids) == num_tokens
        assert record.counts[""] == record.generation.num_prompt_tokens + num_tokens


def test_a_stop_string_cuts_the_record_where_it_cuts_the_text(drafting):
    ((whole,),) = generate(drafting, [TEXT], max_tokens=24)
    word = whole.text[8:11]
    ((cut,),) = generate(drafting, [TEXT], max_tokens=24, stop=[word])
    record = finished(cut)
    assert cut.text == whole.text[: whole.text.index(word)]
    assert [token.id for token in record.generation.committed] == list(cut.token_ids)
    assert record.generation.answer == cut.text


def test_near_the_longest_length_tokens_are_declared_unscored(drafting):
    """The drafter stops there; its later states would stand on tokens that it never read."""
    drafting.reset_prefix_cache()
    ((completion,),) = generate(drafting, [list(range(3, 133))], max_tokens=LENGTH, ignore_eos=True)
    record = finished(completion)
    num_missed = record.counts.total() - record.counts[""]
    assert 1 <= num_missed <= 7 and record.counts.total() == LENGTH
    assert running(record)[-num_missed:].isnan().all() and not running(record)[:-num_missed].isnan().any()


def test_a_request_beside_a_long_one_is_not_scored_on_states_that_never_read_its_tokens(models, drafting):
    drafting.reset_prefix_cache()
    long, short = list(range(3, 146)), list(range(50, 70))
    (_, (beside,)) = generate(drafting, [long, short], max_tokens=40, ignore_eos=True)
    record = finished(beside)
    found, wanted = running(record), expected(models, record)
    known = ~found.isnan()
    assert not known.all(), "the long request did not turn the drafter off"
    torch.testing.assert_close(found[known], wanted[known], atol=1e-4, rtol=0)


def test_what_a_hole_left_in_the_prefix_cache_is_not_read_as_a_score(models, drafting):
    drafting.reset_prefix_cache()
    long, short = list(range(3, 146)), list(range(50, 70))
    (_, (beside,)) = generate(drafting, [long, short], max_tokens=60, ignore_eos=True)
    ids = [token.id for token in finished(beside).generation.tokens]
    ((again,),) = generate(drafting, [ids], max_tokens=4)
    record = finished(again)
    found, wanted = running(record), expected(models, record)
    known = ~found.isnan()
    torch.testing.assert_close(found[known], wanted[known], atol=1e-4, rtol=0)


@pytest.mark.parametrize("where", ["exception", "nan"])
def test_a_head_that_fails_leaves_tokens_unscored_and_the_engine_goes_on(drafting, monkeypatch, where):
    drafting.reset_prefix_cache()
    bank = tap_of(drafting).bank
    plain, calls = bank.channels, []

    def broken(features):
        calls.append(len(features))
        if len(calls) != 3:
            return plain(features)
        if where == "exception":
            raise RuntimeError("injected")
        return plain(features) * float("nan")

    monkeypatch.setattr(bank, "channels", broken)
    ((completion,),) = generate(drafting, [TEXT], max_tokens=24)
    record = finished(completion)
    assert len(completion.token_ids) == 24
    assert record.counts.total() == record.generation.num_prompt_tokens + 24
    assert record.counts.total() > record.counts[""]
    ((after,),) = generate(drafting, ["def g"], max_tokens=4)
    assert finished(after).counts[""] == finished(after).counts.total()


@pytest.mark.parametrize("gate", ["hold", "stop"])
def test_under_a_gate_a_head_that_fails_ends_the_answer_before_the_first_unscored_token(drafting, monkeypatch, gate):
    drafting.reset_prefix_cache()
    bank = tap_of(drafting).bank
    plain, calls = bank.channels, []

    def broken(features):
        calls.append(len(features))
        if len(calls) == 3:
            raise RuntimeError("injected")
        return plain(features)

    rules = (Rule(metric="last", action="stop", threshold=1.0),) if gate == "stop" else ()
    with policy(drafting, *rules, hold=gate == "hold"):
        ((whole,),) = generate(drafting, [TEXT], max_tokens=24)
        drafting.reset_prefix_cache()
        monkeypatch.setattr(bank, "channels", broken)
        ((completion,),) = generate(drafting, [TEXT], max_tokens=24)
    record = finished(completion)
    assert 0 < len(completion.token_ids) < 24 and whole.text.startswith(completion.text)
    assert completion.stop_reason.startswith("monitor:")
    assert record.generation.finish_reason == "content_filter" and record.generation.answer == completion.text
    emitted = [token for token in record.generation.committed if token.is_emitted]
    assert all(score.state == "scored" for token in emitted for score in token.scores.values())


@pytest.mark.parametrize("include", [False, True])
def test_a_stop_on_score_lets_nothing_of_the_offending_token_out(models, drafting, include):
    ((whole,),) = generate(drafting, [TEXT], max_tokens=24)
    record = finished(whole)
    first = record.generation.num_prompt_tokens
    scores = running(record)[first:, 3]
    at = int(scores.argmax())
    rule = Rule(metric="last", action="stop", threshold=float(scores[at]) - 1e-3, scope="answer")
    at = int((scores >= rule.threshold).nonzero()[0])
    with policy(drafting, rule):
        ((cut,),) = generate(drafting, [TEXT], max_tokens=24, include_stop_str_in_output=include)
    stopped = finished(cut)
    assert list(cut.token_ids) == list(whole.token_ids)[:at]
    assert cut.text == models.tokenizer.decode(whole.token_ids[:at], skip_special_tokens=True)
    (verdict,) = stopped.generation.verdicts
    assert verdict.action == "stop" and verdict.position == first + at
    withheld = stopped.generation.tokens[-1]
    assert withheld.id == whole.token_ids[at] and not withheld.is_emitted
    assert withheld.scores["last"].running == pytest.approx(float(scores[at]), abs=1e-4)


@pytest.mark.parametrize("include", [False, True])
@pytest.mark.parametrize("num_surplus", [0, 1])
def test_a_stop_string_that_completes_in_the_step_of_a_stop_on_score_ends_the_answer(drafting, num_surplus, include):
    """An answer ends at its stop string; the offending token comes after that, and nothing is said of it."""
    prompt, whole, end, stop, threshold = _stop_string_before_a_stop(drafting, num_surplus)
    rule = Rule(metric="last", action="stop", threshold=threshold, scope="answer")
    with policy(drafting, rule):
        ((alone,),) = generate(drafting, [prompt], max_tokens=24)
        ((cut,),) = generate(drafting, [prompt], max_tokens=24, stop=[stop], include_stop_str_in_output=include)
    assert len(alone.token_ids) == end + num_surplus and alone.stop_reason == "monitor:last"
    upto = whole.text[: whole.text.index(stop)]
    assert cut.text == (upto + stop if include else upto) and cut.stop_reason == stop
    record = finished(cut)
    assert record.generation.answer.startswith(upto) and not record.stopped_by and not record.generation.verdicts
    assert [token.id for token in record.generation.committed] == list(cut.token_ids) == list(whole.token_ids)[:end]
    assert record.counts == {"": len(record.generation.tokens)}


def _stop_string_before_a_stop(drafting, num_surplus):
    """Of an answer two or more of whose tokens come in one step: a stop string that the first of them completes, and a
    threshold that a later one is the first to reach, with so many tokens between.
    """
    prompts = [TEXT[begin:] for begin in range(0, 60, 3)]
    for prompt, (whole,) in zip(prompts, generate(drafting, prompts, max_tokens=24), strict=True):
        record = finished(whole)
        tokens, scores = record.generation.committed, running(record)[record.generation.num_prompt_tokens :, 3]
        for end in range(1, len(tokens) - 1 - num_surplus):
            at = end + num_surplus
            upto = "".join(token.text for token in tokens[:end])
            stops = [upto[-size:] for size in range(1, 9) if whole.text.find(upto[-size:]) == len(upto) - size]
            is_one_step = tokens[end - 1].round == tokens[at].round
            is_whole = "\ufffd" not in upto  # a character whose bytes are still coming
            if (
                is_one_step
                and is_whole
                and stops
                and scores[at] > scores[:at].max() + 2e-3
                and whole.text.startswith(upto)
            ):
                return prompt, whole, end, stops[0], float(scores[at]) - 1e-3
    raise AssertionError("no answer has such a step")


def test_a_prompt_that_breaks_a_rule_gets_no_answer(drafting):
    rule = Rule(metric="last", action="stop", threshold=0.0, scope="prompt")
    with policy(drafting, rule):
        ((completion,),) = generate(drafting, [TEXT], max_tokens=24)
    assert completion.text == "" and list(completion.token_ids) == []
    assert finished(completion).generation.verdicts[0].position == 0


def test_a_flag_lets_everything_out_and_says_so(drafting):
    rule = Rule(metric="last", action="flag", threshold=0.5)
    ((whole,),) = generate(drafting, [TEXT], max_tokens=24)
    with policy(drafting, rule):
        ((flagged,),) = generate(drafting, [TEXT], max_tokens=24)
    assert flagged.token_ids == whole.token_ids
    assert {verdict.action for verdict in finished(flagged).generation.verdicts} == {"flag"}


def test_among_many_requests_with_aborts_and_preemption_each_has_its_own_scores(models, drafting):
    from vllm import SamplingParams

    drafting.reset_prefix_cache()
    llm_engine, done = drafting.llm_engine, {}
    for number in range(48):
        prompt = list(range(3 + number, 33 + number + number % 40))
        params = SamplingParams(temperature=0.0, max_tokens=10 + number % 30, ignore_eos=True)
        llm_engine.add_request(str(number), {"prompt_token_ids": prompt}, params)
    aborted, num_steps = [str(number) for number in range(0, 48, 5)], 0
    while llm_engine.has_unfinished_requests():
        num_steps += 1
        if num_steps % 4 == 0 and aborted:
            llm_engine.abort_request([aborted.pop()])
        done |= {output.request_id: output.outputs[0] for output in llm_engine.step() if output.finished}
    assert 38 <= len(done) < 48
    for number, completion in done.items():
        record = finished(completion)
        if completion.finish_reason != "abort":
            assert record.counts == {"": len(record.generation.tokens)}, number
            torch.testing.assert_close(running(record), expected(models, record), atol=1e-4, rtol=0)


def test_a_slow_head_delays_tokens_and_loses_none(drafting, monkeypatch):
    drafting.reset_prefix_cache()
    bank = tap_of(drafting).bank
    plain = bank.channels
    monkeypatch.setattr(bank, "channels", lambda features: time.sleep(0.05) or plain(features))
    with policy(drafting, hold=True):
        ((completion,),) = generate(drafting, [TEXT], max_tokens=12)
    record = finished(completion)
    assert len(completion.token_ids) == 12 and record.counts == {"": len(record.generation.tokens)}


def test_nothing_is_left_of_a_request_that_has_gone(drafting):
    import gc

    from pilotfish.vllm.record import Record
    from pilotfish.vllm.track import Track

    generate(drafting, [TEXT] * 8, max_tokens=8)
    gc.collect()
    kept = [item for item in gc.get_objects() if isinstance(item, Record | Track)]
    assert kept == []
