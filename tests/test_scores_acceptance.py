"""Expected acceptance: hand values, the exact sum of minima, and intervals by answer."""

from __future__ import annotations

import pytest
import torch

from pilotfish.errors import SettingError
from pilotfish.models import Pair
from pilotfish.runs import generator
from pilotfish.scores.acceptance import AnswerAcceptance, acceptance, acceptance_loss, read_acceptance
from pilotfish.scores.distillation import Answer, TargetRecording, next_token_logits
from pilotfish.scores.metrics import Estimate


def answers(count: int) -> list[Answer]:
    random = torch.Generator().manual_seed(3)
    return [
        Answer(f"a{i}", f"g{i}", tuple(torch.randint(250, (10,), generator=random).tolist()), torch.arange(10) >= 3)
        for i in range(count)
    ]


def read_as(*expected: list[float], agreed: list[list[bool]] | None = None) -> list[AnswerAcceptance]:
    agreed = agreed or [[True] * len(values) for values in expected]
    return [
        AnswerAcceptance(f"a{i}", f"g{i}", torch.tensor(values), torch.tensor(flags))
        for i, (values, flags) in enumerate(zip(expected, agreed, strict=True))
    ]


def found(read) -> dict[str, Estimate]:
    return acceptance(read, generator=generator(0, "bootstrap"), num_resamples=200)


def test_shares_are_of_tokens_not_of_answers():
    read = read_as([1.0, 0.5, 0.5], [0.25], agreed=[[True, False, False], [True]])
    assert found(read)["expected"].value == pytest.approx(2.25 / 4)
    assert found(read)["greedy"].value == pytest.approx(2 / 4)
    assert found(read)["expected"].n == 2
    assert found(read)["expected"].low == pytest.approx(0.25), "one draw holds the second answer twice"


def test_a_loss_is_relative_and_paired_by_answer():
    before, after = read_as([0.8, 0.8], [0.4]), read_as([0.4, 0.4], [0.2])
    loss = acceptance_loss(before, after, generator=generator(0, "bootstrap"))["expected"]
    assert loss.value == loss.low == loss.high == pytest.approx(0.5), "the same share of every answer"
    gain = acceptance_loss(after, before, generator=generator(0, "bootstrap"))["expected"]
    assert gain.value == pytest.approx(-1.0)


def test_reading_gives_the_sum_of_minima_and_the_agreement_of_the_likeliest(pair: Pair, tmp_path):
    recorded = TargetRecording(pair, tmp_path, top_k=pair.vocab_size)
    texts = answers(2)
    for text, each in zip(texts, read_acceptance(pair.draft, texts, recorded), strict=True):
        p, q = (next_token_logits(m, text, pair.vocab_size).softmax(-1) for m in (pair.target, pair.draft))
        torch.testing.assert_close(each.expected, torch.minimum(p, q).sum(-1), atol=1e-3, rtol=1e-3)
        assert each.is_agreed.tolist() == (p.argmax(-1) == q.argmax(-1)).tolist()
        assert (each.id, each.group) == (text.id, text.group)


def test_few_recorded_tokens_make_it_low_by_the_rest_at_most(pair: Pair, tmp_path):
    texts = answers(1)
    few, all_ = (TargetRecording(pair, tmp_path, top_k=k) for k in (16, pair.vocab_size))
    low, full = (read_acceptance(pair.draft, texts, recorded)[0].expected for recorded in (few, all_))
    rest = few.of(texts[0]).rest
    assert bool((low <= full + 1e-3).all())
    assert bool((low >= full - rest - 1e-3).all())


def test_the_target_as_its_own_draft_is_always_accepted(pair: Pair, tmp_path):
    recorded = TargetRecording(pair, tmp_path, top_k=pair.vocab_size)
    (each,) = read_acceptance(pair.target, answers(1), recorded)
    assert bool((each.expected > 0.998).all())
    assert bool(each.is_agreed.all())


def test_different_answers_are_not_compared():
    with pytest.raises(SettingError, match="give both the same ones"):
        acceptance_loss(read_as([0.5], [0.5]), read_as([0.5]), generator=generator(0, "b"))


def test_one_answer_has_no_interval():
    with pytest.raises(SettingError, match="two groups or more"):
        found(read_as([0.5]))
