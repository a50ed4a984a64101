"""The target's own answers, where they are kept, and that expected acceptance is what the engine shows."""

from __future__ import annotations

import pytest
import torch

from pilotfish.core import Conversation, Message
from pilotfish.engines import Drafting, EmbeddedEngine, Request, Sampling, engine_acceptance, target_answers
from pilotfish.errors import SettingError, TextError
from pilotfish.models import Pair
from pilotfish.runs import generator
from pilotfish.scores import Answer, TargetRecording, read_acceptance

GREEDY = Request(max_new_tokens=6)
SAMPLED = Request(max_new_tokens=24, sampling=Sampling(temperature=1.0))


def prompt(number: int, answer: str = "never read") -> Conversation:
    messages = (Message("user", f"say {number}"), Message("assistant", answer))
    return Conversation(f"p{number}", f"g{number}", messages, labels={"m": 1.0})


def test_an_answer_is_the_prompt_and_what_the_target_says_to_it(pair: Pair):
    (answer,) = target_answers(pair, [prompt(1)], request=GREEDY)
    (other,) = target_answers(pair, [prompt(1, "another text")], request=GREEDY)
    generation = EmbeddedEngine(pair).generate("say 1", GREEDY)
    assert list(answer.token_ids) == [token.id for token in generation.tokens]
    assert int(answer.is_answer.sum()) == len(generation.committed)
    assert bool(answer.is_answer[-1]) and not bool(answer.is_answer[0])
    assert (answer.id, answer.group) == ("p1", "g1")
    assert other.token_ids == answer.token_ids, "the answer that stands in the data is not looked at"


def test_an_answer_does_not_depend_on_which_were_sampled_before(pair: Pair):
    both = target_answers(pair, [prompt(1), prompt(2)], request=SAMPLED)
    (alone,) = target_answers(pair, [prompt(2)], request=SAMPLED)
    assert both[1].token_ids == alone.token_ids
    assert both[0].token_ids[-5:] != both[1].token_ids[-5:]


def test_what_is_in_the_journal_is_not_sampled_again(pair: Pair, tmp_path):
    passes: list[int] = []
    handle = pair.target.register_forward_hook(lambda *_: passes.append(1))
    try:
        first = target_answers(pair, [prompt(1)], request=GREEDY, journal=tmp_path / "j")  # and then it was killed
        count = len(passes)
        again = target_answers(pair, [prompt(1)], request=GREEDY, journal=tmp_path / "j")
        assert len(passes) == count > 0
        target_answers(pair, [prompt(1), prompt(2)], request=GREEDY, journal=tmp_path / "j")
        both = len(passes)
        target_answers(pair, [prompt(1)], request=SAMPLED, journal=tmp_path / "j")
        assert len(passes) > both > count
    finally:
        handle.remove()
    assert [answer.token_ids for answer in first] == [answer.token_ids for answer in again]
    assert bool((first[0].is_answer == again[0].is_answer).all())


def test_prompts_that_cannot_be_answered_are_left_out(pair: Pair):
    silent = Conversation("silent", "silent", (Message("assistant", "no prompt"),))
    long = Conversation("long", "long", (Message("user", "word " * 2000),))
    assert [answer.id for answer in target_answers(pair, [silent, long, prompt(1)], request=GREEDY)] == ["p1"]
    with pytest.raises(TextError, match="none of the 2 prompts can be answered"):
        target_answers(pair, [silent, long], request=GREEDY)


def test_no_prompts_and_no_draft_are_refused(pair: Pair):
    with pytest.raises(SettingError, match="there are no prompts; give at least one"):
        target_answers(pair, [])
    alone = Pair(pair.target, None, pair.tokenizer, pair.target_identity, None)
    with pytest.raises(SettingError, match="has no draft; name one of its family"):
        engine_acceptance(alone, [prompt(1)], generator=generator(0, "b"))


def test_the_engine_accepts_what_was_expected_at_the_very_positions_where_it_drafted(pair: Pair, tmp_path):
    """Of n drafted tokens with acceptance probabilities a, sum(a) are kept, give or take sqrt(sum(a(1 - a)))."""
    engine = EmbeddedEngine(pair, drafting=Drafting(length=1))
    recorded = TargetRecording(pair, tmp_path, top_k=pair.vocab_size)
    expected, kept = [], []
    for number in range(16):
        request = Request(max_new_tokens=24, sampling=Sampling(temperature=1.0), seed=number)
        generation = engine.generate(f"say {number}", request)
        ids = tuple(token.id for token in generation.tokens)
        answer = Answer("a", "a", ids, torch.arange(len(ids)) >= generation.num_prompt_tokens)
        (read,) = read_acceptance(pair.draft, [answer], recorded)
        drafted = [item for item in generation.rounds if item.start < len(ids)]
        expected += [read.expected[item.start - generation.num_prompt_tokens] for item in drafted]
        kept += [float(item.num_accepted) for item in drafted]
    chances = torch.stack(expected).double()
    assert len(kept) > 100
    spread = float((chances * (1 - chances)).sum().sqrt())
    assert 0.3 < float(chances.mean()) < 0.95
    assert abs(sum(kept) - float(chances.sum())) < 3 * spread


def test_the_engines_own_figure_lies_where_the_expected_one_does(pair: Pair, tmp_path):
    prompts = [prompt(number) for number in range(8)]
    found = engine_acceptance(pair, prompts, request=SAMPLED, generator=generator(0, "b"), num_resamples=200)
    recorded = TargetRecording(pair, tmp_path, top_k=pair.vocab_size)
    read = read_acceptance(pair.draft, target_answers(pair, prompts, request=SAMPLED), recorded)
    mean = float(torch.cat([each.expected for each in read]).mean())
    assert found.n == 8
    assert found.low - 0.05 < mean < found.high + 0.05
