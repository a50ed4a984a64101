"""The engine on a tiny pair: same text as the target alone, every committed token scored once, nothing leaks."""

from __future__ import annotations

import pytest
import torch
from conftest import seeded_bank, windowed_bank
from hypothesis import given, settings
from hypothesis import strategies as st

from pilotfish.actions import Policy, Rule
from pilotfish.core import Message
from pilotfish.engines import (
    Drafting,
    EmbeddedEngine,
    Request,
    RoundEvent,
    Sampling,
    ScoreEvent,
    TokenEvent,
)
from pilotfish.engines.reader import CachedModel
from pilotfish.errors import BankMismatch, GenerationError, SettingError
from pilotfish.heads import HeadBank
from pilotfish.models import Pair, tiny_model, tiny_pair
from pilotfish.scores import score_tokens

PROMPT = "def add(a, b):"
DRAFTINGS = [*(Drafting(length=k) for k in (0, 1, 2, 3, 5)), Drafting(), Drafting(step_cost=0.2)]


def ids_of(generation) -> list[int]:
    return [token.id for token in generation.committed]


def alone(pair: Pair, generation, max_new_tokens: int) -> list[int]:
    """transformers' own greedy decoding of the same prompt."""
    prompt = torch.tensor([[token.id for token in generation.tokens[: generation.num_prompt_tokens]]])
    output = pair.target.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=sorted(pair.eos_ids),
        pad_token_id=min(pair.eos_ids),
    )
    return output[0, prompt.shape[1] :].tolist()


def offline(pair: Pair, bank: HeadBank, generation, reader: str = "draft") -> torch.Tensor:
    """Of tokens, then running."""
    model = pair.draft if reader == "draft" else pair.target
    ids = [token.id for token in generation.tokens]
    return torch.stack(score_tokens(model, bank, ids, boundary=generation.num_prompt_tokens))


def online(generation, metrics) -> torch.Tensor:
    return torch.tensor(
        [
            [[getattr(token.scores[metric], kind) for metric in metrics] for token in generation.tokens]
            for kind in ("value", "running")
        ]
    )


@pytest.mark.parametrize("drafting", DRAFTINGS, ids=str)
def test_greedy_output_is_the_targets_own_token_for_token(pair, bank, drafting):
    engine = EmbeddedEngine(pair, [bank], drafting=drafting)
    generation = engine.generate(PROMPT, Request(max_new_tokens=40))
    assert ids_of(generation) == alone(pair, generation, 40)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma3_text", "gpt2", "gpt_neox"])
def test_every_family_speculates_losslessly(family):
    base = tiny_pair(seed=0)
    target, draft = (tiny_model(family, seed=seed) for seed in (0, 0))
    with torch.no_grad():
        for index, weight in enumerate(draft.parameters()):
            noise = torch.Generator().manual_seed(index)
            weight += 0.02 * torch.randn(weight.shape, generator=noise)
    pair = Pair(target, draft, base.tokenizer, base.target_identity, base.draft_identity)
    engine = EmbeddedEngine(pair, drafting=Drafting(length=3))
    generation = engine.generate(PROMPT, Request(max_new_tokens=60))
    assert ids_of(generation) == alone(pair, generation, 60)


def test_some_drafts_are_accepted_and_some_are_not_so_the_tests_here_mean_something(pair):
    generation = EmbeddedEngine(pair, drafting=Drafting(length=3)).generate(PROMPT, Request(max_new_tokens=60))
    assert 0.1 < generation.acceptance < 0.95
    assert {token.origin for token in generation.committed} == {"draft", "target"}


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=1.0), Sampling(temperature=0.8, top_p=0.9)])
@pytest.mark.parametrize("hold", [False, True])
def test_a_bank_changes_no_token(pair, bank, sampling, hold):
    request = Request(max_new_tokens=40, sampling=sampling, seed=5)
    watched = Request(max_new_tokens=40, sampling=sampling, seed=5, policy=Policy(hold=hold))
    plain = EmbeddedEngine(pair).generate(PROMPT, request)
    monitored = EmbeddedEngine(pair, [bank]).generate(PROMPT, watched)
    assert ids_of(plain) == ids_of(monitored)
    assert plain.answer == monitored.answer


def test_sampled_text_depends_on_the_seed_alone(pair):
    engine = EmbeddedEngine(pair, drafting=Drafting(length=2))
    runs = [
        engine.generate(PROMPT, Request(max_new_tokens=24, sampling=Sampling(temperature=1.0), seed=seed))
        for seed in (1, 1, 2)
    ]
    assert ids_of(runs[0]) == ids_of(runs[1]) != ids_of(runs[2])


@given(
    prompt=st.text(min_size=1, max_size=30).filter(lambda text: text.strip()),
    drafting=st.sampled_from(DRAFTINGS),
    temperature=st.sampled_from([0.0, 0.7, 1.5]),
    max_new_tokens=st.integers(1, 40),
    hold=st.booleans(),
    stop=st.lists(st.text(min_size=1, max_size=2), max_size=2),
    seed=st.integers(0, 1000),
)
@settings(max_examples=40, deadline=None)
def test_every_committed_token_is_scored_once_with_the_score_of_one_offline_pass(
    pair, windowed, prompt, drafting, temperature, max_new_tokens, hold, stop, seed
):
    engine = EmbeddedEngine(pair, [windowed], drafting=drafting)
    sampling = Sampling(temperature=temperature)
    request = Request(
        max_new_tokens=max_new_tokens, sampling=sampling, policy=Policy(hold=hold), stop=tuple(stop), seed=seed
    )
    stream = engine.stream(prompt, request)
    events = list(stream)
    generation = stream.generation
    assert generation.misses().total() == 0
    assert torch.allclose(online(generation, windowed.metrics), offline(pair, windowed, generation), atol=1e-5)
    emitted = [event.token.position for event in events if isinstance(event, TokenEvent)]
    assert emitted == list(range(generation.num_prompt_tokens, len(generation.tokens)))
    at_once = [
        event.token.position for event in events if isinstance(event, TokenEvent) and event.scores["linear 4"].value
    ]
    later = [event.token.position for event in events if isinstance(event, ScoreEvent)]
    assert sorted(at_once + later) == list(range(len(generation.tokens)))
    if hold:
        assert at_once == emitted


def test_a_drafted_token_counts_as_look_ahead_until_it_is_accepted(pair, windowed):
    engine = EmbeddedEngine(pair, [windowed], drafting=Drafting(length=4))
    stream = engine.stream(PROMPT, Request(max_new_tokens=40))
    rounds = [event.round for event in stream if isinstance(event, RoundEvent)]
    tokens = stream.generation.tokens
    ids = [token.id for token in tokens]
    rejected = 0
    for item in rounds:
        for index, drafted in enumerate(item.drafted):
            if drafted.scores is None:
                assert index == len(item.drafted) - 1, "only the last drafted token is unread"
                continue
            text = ids[: item.start] + [token.id for token in item.drafted[: index + 1]]
            expected = score_tokens(pair.draft, windowed, text, boundary=stream.generation.num_prompt_tokens)
            for kind, values in (("value", expected.tokens), ("running", expected.running)):
                found = [getattr(drafted.scores[metric], kind) for metric in windowed.metrics]
                assert found == pytest.approx(values[-1].tolist(), abs=1e-5)
            rejected += not drafted.is_accepted
    assert rejected > 0


def test_stop_lets_out_no_token_at_or_after_the_first_one_over_the_threshold(pair, bank):
    free = EmbeddedEngine(pair, [bank]).generate(PROMPT, Request(max_new_tokens=40))
    answer = online(free, bank.metrics)[1, free.num_prompt_tokens :, 0]
    for threshold in answer.sort().values[[5, 20, 35]].tolist():
        for drafting in DRAFTINGS:
            engine = EmbeddedEngine(pair, [bank], drafting=drafting)
            rule = Rule(metric="wide", action="stop", threshold=threshold, scope="answer")
            stream = engine.stream(PROMPT, Request(max_new_tokens=40, policy=Policy(rules=(rule,))))
            left = [event.token.id for event in stream if isinstance(event, TokenEvent)]
            first = int((answer >= threshold - 1e-5).nonzero()[0])
            assert left == ids_of(free)[:first]
            assert stream.generation.finish_reason == "content_filter"
            assert stream.generation.verdicts[-1].position == free.num_prompt_tokens + first
            assert stream.generation.misses().total() == 0


def test_a_prompt_over_the_threshold_is_stopped_before_the_target_runs(pair, bank):
    rule = Rule(metric="wide", action="stop", threshold=0.0, scope="prompt")
    calls = []
    hook = pair.target.register_forward_pre_hook(lambda *_: calls.append(1))
    try:
        generation = EmbeddedEngine(pair, [bank]).generate(PROMPT, Request(policy=Policy(rules=(rule,))))
    finally:
        hook.remove()
    assert (generation.answer, generation.finish_reason, calls) == ("", "content_filter", [])


def test_flag_reports_and_goes_on(pair, bank):
    rule = Rule(metric="wide", action="flag", threshold=0.5, scope="answer")
    generation = EmbeddedEngine(pair, [bank]).generate(PROMPT, Request(max_new_tokens=40, policy=Policy(rules=(rule,))))
    over = [token.position for token in generation.committed if token.scores["wide"].value >= 0.5]
    assert over
    assert [verdict.position for verdict in generation.verdicts] == over
    assert generation.finish_reason == "length"


class BrokenBank(HeadBank):
    """A real bank whose matmul goes wrong from the n-th call on."""

    def break_with(self, what, after):
        self.what, self.calls_left = what, after
        return self

    def channels(self, features):
        self.calls_left -= 1
        if self.calls_left >= 0:
            return super().channels(features)
        if self.what == "raise":
            raise RuntimeError("injected")
        if self.what == "shape":
            return super().channels(features)[:0]
        return super().channels(features) * float("nan")


@pytest.mark.parametrize("what", ["raise", "shape", "nan"])
@pytest.mark.parametrize("after", [0, 1, 4])
def test_a_head_that_fails_leaves_unscored_tokens_that_observe_counts_and_stop_stops_on(pair, what, after):
    def broken():
        whole = seeded_bank(pair, reader="draft")
        return BrokenBank(whole.heads, pair.draft_identity, thresholds=whole.thresholds).break_with(what, after)

    observed = EmbeddedEngine(pair, [broken()]).generate(PROMPT, Request(max_new_tokens=30))
    misses = observed.misses()
    assert misses.total() > 0
    assert all("injected" in m or "rows of features" in m or "not a probability" in m for m in misses)
    assert ids_of(observed) == ids_of(EmbeddedEngine(pair).generate(PROMPT, Request(max_new_tokens=30)))
    never = Rule(metric="wide", action="stop", threshold=1.0)
    stopped = EmbeddedEngine(pair, [broken()]).generate(
        PROMPT, Request(max_new_tokens=30, policy=Policy(rules=(never,)))
    )
    assert stopped.finish_reason == "content_filter"
    assert all(token.scores["wide"].value is not None for token in stopped.committed if token.is_emitted)
    assert "unscored" in stopped.verdicts[0].reason


def test_without_a_draft_the_heads_read_the_target_and_the_output_says_so(pair):
    single = Pair(pair.target, None, pair.tokenizer, pair.target_identity, None)
    bank = seeded_bank(pair, reader="target")
    generation = EmbeddedEngine(single, [bank]).generate(PROMPT, Request(max_new_tokens=20))
    assert {token.scores["wide"].reader for token in generation.tokens} == {"target"}
    assert dict(generation.misses()) == {"the last tokens: reading them would cost one more pass": 1}
    scored = generation.tokens[:-1]
    expected = offline(single, bank, generation, "target")[0, :-1, 0]
    assert [token.scores["wide"].value for token in scored] == pytest.approx(expected.tolist(), abs=1e-5)
    held = EmbeddedEngine(single, [bank]).generate(PROMPT, Request(max_new_tokens=20, policy=Policy(hold=True)))
    assert held.misses().total() == 0
    assert ids_of(held) == ids_of(generation)


def stubborn_pair() -> Pair:
    """A draft that shares nothing with its target, so speculation cannot pay."""
    base = tiny_pair(seed=0)
    other = tiny_pair(seed=99)
    return Pair(base.target, other.draft, base.tokenizer, base.target_identity, other.draft_identity)


def test_where_speculation_does_not_pay_the_heads_move_to_the_target():
    pair = stubborn_pair()
    banks = [seeded_bank(pair, reader="draft"), seeded_bank(pair, reader="target")]
    generation = EmbeddedEngine(pair, banks).generate(PROMPT, Request(max_new_tokens=60))
    readers = [token.scores["wide"].reader for token in generation.committed[:-1]]
    assert generation.tokens[0].scores["wide"].reader == "draft"
    assert "target" in readers
    assert any("target's own states" in note for note in generation.notes)
    assert generation.num_taxed_reads == 0
    assert ids_of(generation) == alone(pair, generation, 60)


@pytest.mark.parametrize("hold", [False, True])
def test_where_only_the_draft_has_heads_a_pause_is_read_at_a_cost_that_is_counted(hold):
    pair = stubborn_pair()
    bank = windowed_bank(pair)
    request = Request(max_new_tokens=60, policy=Policy(hold=hold))
    generation = EmbeddedEngine(pair, [bank]).generate(PROMPT, request)
    assert generation.misses().total() == 0
    assert generation.num_taxed_reads >= (20 if hold else 1)
    assert any("costs extra" in note for note in generation.notes)
    assert torch.allclose(online(generation, bank.metrics), offline(pair, bank, generation), atol=1e-5)


def test_two_interleaved_streams_do_not_touch_each_other(pair, bank):
    engine = EmbeddedEngine(pair, [bank])
    prompts = ("first text", "another one, longer")
    apart = [engine.generate(prompt, Request(max_new_tokens=24)) for prompt in prompts]
    streams = [engine.stream(prompt, Request(max_new_tokens=24)) for prompt in prompts]
    alive = list(streams)
    while alive:
        alive = [stream for stream in alive if next(stream, None) is not None]
    for stream, expected in zip(streams, apart, strict=True):
        assert ids_of(stream.generation) == ids_of(expected)
        assert torch.equal(online(stream.generation, bank.metrics), online(expected, bank.metrics))


def test_a_stop_string_ends_the_answer_before_it(pair, bank):
    engine = EmbeddedEngine(pair, [bank])
    whole = engine.generate(PROMPT, Request(max_new_tokens=40)).answer
    word = whole[12:14]
    cut = engine.generate(PROMPT, Request(max_new_tokens=40, stop=(word,)))
    assert cut.answer == whole[: whole.index(word)]
    assert cut.finish_reason == "stop_string"


def test_the_last_token_of_a_long_prompt_is_read_in_chunks_with_the_same_scores(pair, windowed, monkeypatch):
    engine = EmbeddedEngine(pair, [windowed])
    whole = engine.generate("word " * 30, Request(max_new_tokens=8))
    monkeypatch.setattr("pilotfish.engines.reader.CHUNK", 16)
    chunked = engine.generate("word " * 30, Request(max_new_tokens=8))
    assert ids_of(chunked) == ids_of(whole)
    assert torch.allclose(online(chunked, windowed.metrics), online(whole, windowed.metrics), atol=1e-5)


def test_what_the_engine_refuses_it_says_how_to_mend(pair, bank):
    engine = EmbeddedEngine(pair, [bank])
    with pytest.raises(GenerationError, match="prompt is empty; give"):
        engine.stream("  ")
    with pytest.raises(GenerationError, match=r"together at most .* fit these models\. Shorten"):
        engine.stream("word " * 100_000)
    with pytest.raises(SettingError, match="no head scores it; there are wide, narrow"):
        engine.stream("x", Request(policy=Policy(rules=(Rule(metric="scheming"),))))
    with pytest.raises(SettingError, match="no bank is loaded; give a bank"):
        EmbeddedEngine(pair).stream("x", Request(policy=Policy(hold=True)))
    with pytest.raises(SettingError, match="give at least 1"):
        Request(max_new_tokens=0)
    with pytest.raises(SettingError, match="empty stop string"):
        Request(stop=("",))
    with pytest.raises(BankMismatch, match="fits no model of this pair"):
        EmbeddedEngine(tiny_pair(seed=7), [bank])
    with pytest.raises(SettingError, match=r"one a metric; given were .*'wide', 'narrow', 'wide', 'narrow'"):
        EmbeddedEngine(pair, [bank, bank])


def test_banks_of_one_model_are_read_in_one_go(pair, bank, windowed):
    together, *alone = (
        EmbeddedEngine(pair, banks).generate(PROMPT, Request(max_new_tokens=20))
        for banks in ([bank, windowed], [bank], [windowed])
    )
    expected = torch.cat([online(alone[0], bank.metrics), online(alone[1], windowed.metrics)], dim=-1)
    assert torch.allclose(online(together, [*bank.metrics, *windowed.metrics]), expected, atol=1e-6)


def test_several_turns_are_one_prompt(pair, bank):
    messages = (
        Message("system", "Be brief."),
        Message("user", "Hi"),
        Message("assistant", "Hello"),
        Message("user", "Bye"),
    )
    generation = EmbeddedEngine(pair, [bank]).generate(messages, Request(max_new_tokens=4))
    assert all(message.content in generation.prompt for message in messages)


def test_an_exchange_can_be_written_as_a_report_takes_it(pair, bank):
    generation = EmbeddedEngine(pair, [bank]).generate(PROMPT, Request(max_new_tokens=20))
    record = generation.to_dict("a title", metrics=list(bank.metrics))
    assert record["stats"]["num_committed"] == record["stats"]["num_scored"] == len(record["tokens"])
    assert "".join(token["text"] for token in record["tokens"][generation.num_prompt_tokens :]).startswith(
        generation.answer[:4]
    )


def test_without_a_flush_the_last_tokens_are_declared_misses_and_nothing_else_changes(pair, bank):
    engine = EmbeddedEngine(pair, [bank], drafting=Drafting(length=3))
    whole = engine.generate(PROMPT, Request(max_new_tokens=40))
    short = engine.generate(PROMPT, Request(max_new_tokens=40, flush=False))
    num_missed = short.misses().total()
    assert num_missed in {1, 2}
    assert set(short.misses()) == {"the last tokens: reading them would cost one more pass"}
    assert ids_of(short) == ids_of(whole)
    scored = len(short.tokens) - num_missed
    assert [token.scores["wide"].value for token in short.tokens[:scored]] == pytest.approx(
        [token.scores["wide"].value for token in whole.tokens[:scored]], abs=1e-6
    )
    held = Request(max_new_tokens=40, flush=False, policy=Policy(hold=True))
    assert engine.generate(PROMPT, held).misses().total() == 0


PIECES = st.lists(st.tuples(st.lists(st.integers(0, 255), min_size=1, max_size=6), st.integers(0, 6)), max_size=8)


@given(first=st.lists(st.integers(0, 255), min_size=1, max_size=12), pieces=PIECES)
@settings(max_examples=30, deadline=None)
def test_after_any_reads_and_rollbacks_the_scores_are_those_of_the_text_that_is_left(pair, windowed, first, pieces):
    model = CachedModel(pair.draft, "draft", windowed)
    model.read(first)
    text, scores = list(first), model.take_scores()
    for ids, num_kept in pieces:
        model.read(ids)
        kept = min(num_kept, len(ids))
        scores = [*scores, *model.take_scores()[:kept]]
        text += ids[:kept]
        model.rollback(len(text))
    expected = score_tokens(pair.draft, windowed, text)
    for kind, values in (("value", expected.tokens), ("running", expected.running)):
        found = torch.tensor([[getattr(score[metric], kind) for metric in windowed.metrics] for score in scores])
        assert torch.allclose(found, values, atol=1e-5)


class FlakyBank(HeadBank):
    """A real bank that fails at some calls and then works again, before or after the channels are there."""

    def fail_at(self, calls, where):
        self.calls, self.where, self.num_calls = calls, where, 0
        return self

    def channels(self, features):
        self.num_calls += 1
        if self.where == "channels" and self.num_calls in self.calls:
            raise RuntimeError("injected")
        return super().channels(features)

    def score(self, channels, num_new, **options):
        if self.where == "score" and self.num_calls in self.calls:
            raise RuntimeError("injected")
        return super().score(channels, num_new, **options)


@pytest.mark.parametrize("where", ["channels", "score"])
@pytest.mark.parametrize("calls", [{1}, {2}, {3, 6}, {4, 5}])
def test_no_number_is_made_of_tokens_that_a_head_failed_on(pair, windowed, calls, where):
    flaky = FlakyBank(windowed.heads, pair.draft_identity).fail_at(calls, where)
    generation = EmbeddedEngine(pair, [flaky], drafting=Drafting(length=3)).generate(PROMPT, Request(max_new_tokens=40))
    expected = offline(pair, windowed, generation)
    failed = {token.position for token in generation.tokens if "injected" in token.scores["linear 4"].reason}
    assert failed
    for column, head in enumerate(windowed.heads):
        for token in generation.tokens:
            score = token.scores[head.metric]
            begin = generation.num_prompt_tokens if token.position >= generation.num_prompt_tokens else 0
            looked_at = range(max(begin, token.position - head.form.window + 1), token.position + 1)
            if failed.isdisjoint(looked_at):
                found = (score.value, score.running)
                assert found == pytest.approx(expected[:, token.position, column].tolist(), abs=1e-5)
            else:
                assert score.state == "unscored"
