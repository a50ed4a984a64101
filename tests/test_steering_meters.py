"""The meters: KL, acceptance and agreement a token, along what the steered model writes."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from conftest import hooks_of, random_ids
from hypothesis import given, settings
from hypothesis import strategies as st
from test_steering_dose import MID, direction
from torch import Tensor
from transformers import PreTrainedModel

from pilotfish.errors import SettingError
from pilotfish.models import FAMILIES, Pair, tiny_model
from pilotfish.steering import Decoding, Sampled, Steering, divergence, divergences, meters, rollouts
from pilotfish.steering.meters import answer_logits, by_length
from pilotfish.taps import Add, Edit, ProjectionGate, When, edited

PROMPTS = [[5, 9, 20, 31], [7], [40, 2, 11]]


def strong(pair: Pair, **when: Any) -> list[Edit]:
    return [Edit(MID, Add(direction(pair).vector, 2.0), When(**when))]


def written(pair: Pair, edits: Any = (), *, seed: int = 0, **decoding: Any) -> list[Sampled]:
    random = torch.Generator().manual_seed(seed)
    how = Decoding(**({"max_new_tokens": 6} | decoding))
    return rollouts(pair.target, PROMPTS, edits, decoding=how, generator=random)


def alone(model: PreTrainedModel, sampled: Sampled, edits: Any = ()) -> Tensor:
    """Logits of one text in one pass, nothing padded."""
    prompt, answer = sampled
    with torch.no_grad(), edited(model, edits, prompt_length=len(prompt)):
        logits: Tensor = model(torch.tensor([[*prompt, *answer[:-1]]]), use_cache=False).logits
    return logits[0, len(prompt) - 1 :]


def random_logits(seed: int, spread: float) -> Tensor:
    return spread * torch.randn(5, 11, generator=torch.Generator().manual_seed(seed))


def test_two_coins_have_their_hand_values() -> None:
    p, q = torch.tensor([[0.75, 0.25]]).log(), torch.tensor([[0.25, 0.75]]).log()
    found = divergence(p, q)
    assert float(found.kl) == pytest.approx(0.75 * math.log(3) - 0.25 * math.log(3))
    assert float(found.acceptance) == pytest.approx(0.5)
    assert found.agrees.tolist() == [False]


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**31), spread=st.floats(0, 5), nearness=st.floats(0, 5))
def test_acceptance_is_one_less_half_the_distance_and_kept_in_bounds_by_kl(
    seed: int, spread: float, nearness: float
) -> None:
    p = random_logits(seed, spread)
    q = p + random_logits(seed + 1, nearness)
    found = divergence(p, q)
    half = 0.5 * (p.double().softmax(-1) - q.double().softmax(-1)).abs().sum(-1)
    torch.testing.assert_close(found.acceptance, 1 - half, rtol=0, atol=1e-5)
    assert (found.kl >= 0).all()
    assert (found.acceptance >= 1 - (found.kl / 2).sqrt() - 1e-3).all()  # Pinsker
    assert (found.acceptance >= 0.5 * (-found.kl).exp() - 1e-5).all()  # Bretagnolle and Huber


def test_a_model_beside_itself_has_no_divergence_whatever_its_logits_are_shifted_by() -> None:
    logits = random_logits(1, 3.0)
    found = divergence(logits, logits + 4.0)
    torch.testing.assert_close(found.kl, torch.zeros(5, dtype=torch.float64), rtol=0, atol=1e-5)
    torch.testing.assert_close(found.acceptance, torch.ones(5, dtype=torch.float64), rtol=0, atol=1e-5)
    assert found.agrees.all()


def test_logits_of_an_answer_are_those_that_its_tokens_were_drawn_from(pair: Pair) -> None:
    edits = strong(pair, phase="generation")
    for sampled in written(pair, edits, temperature=0.0):
        (logits,) = answer_logits(pair.target, [sampled], edits)
        likeliest = logits.argmax(-1)
        assert likeliest.tolist() == list(sampled.answer_ids)


@pytest.mark.parametrize("batch_tokens", [1, 30, 1000])
@pytest.mark.parametrize("shared", [0, 80])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_read_in_batches_are_those_of_each_text_alone(family: str, shared: int, batch_tokens: int) -> None:
    """Whatever the edits' scope, and whether or not what the texts share is read before the rest."""
    model = tiny_model(family, seed=0)
    vector, axis = torch.randn(2, model.config.hidden_size, generator=torch.Generator().manual_seed(1))
    beginning = random_ids(1, 80)[0, :shared].tolist()
    answers = [
        Sampled((*beginning, *prompt), answer)
        for prompt, answer in (((5, 9, 20, 31, 8), (4, 7, 1)), ((7,), (3,)), ((40, 2), (6, 2, 9, 1, 12, 3)))
    ]
    scopes = [
        When(phase="generation"),
        When(phase="prompt"),
        When(positions=(1, 4)),
        When(positions=(shared + 1, shared + 4)),
        When(gate=ProjectionGate(MID, axis, 0.0)),
    ]
    for when in scopes:
        edits = [Edit(MID, Add(vector, 2.0), when)]
        together = list(answer_logits(model, answers, edits, batch_tokens=batch_tokens))
        assert not hooks_of(model)
        for sampled, found in zip(answers, together, strict=True):
            torch.testing.assert_close(found, alone(model, sampled, edits), rtol=1e-4, atol=1e-4)


def test_between_two_batches_the_model_is_unedited(pair: Pair) -> None:
    answers = [Sampled((5, 9), (4,)), Sampled((7, 2, 1), (3, 8))]
    logits = answer_logits(pair.target, answers, strong(pair), batch_tokens=1)
    next(logits)
    assert not hooks_of(pair.target)


def test_the_shortest_text_comes_first(pair: Pair) -> None:
    assert by_length([Sampled((1, 2, 3), (4,)), Sampled((1,), (2, 3)), Sampled((1, 2), (3, 4, 5))]) == [1, 0, 2]


def test_edits_of_single_rows_have_no_meters(pair: Pair) -> None:
    with pytest.raises(SettingError, match="name no `rows`"):
        divergences(pair.target, written(pair), strong(pair, rows=(0,)))


def test_a_batch_writes_what_each_prompt_would_alone(pair: Pair) -> None:
    edits = strong(pair, phase="generation", positions=(2, 8))
    together = written(pair, edits, temperature=0.0)
    assert together == written(pair, edits, temperature=0.0, batch_size=1)
    assert [sampled.prompt_ids for sampled in together] == [tuple(prompt) for prompt in PROMPTS]


def test_an_answer_ends_with_its_end_token(pair: Pair) -> None:
    plain = written(pair, temperature=0.0)
    end = plain[0].answer_ids[2]
    for cut, whole in zip(written(pair, temperature=0.0, eos_ids=frozenset({end})), plain, strict=True):
        stop = whole.answer_ids.index(end) + 1 if end in whole.answer_ids else len(whole.answer_ids)
        assert cut.answer_ids == whole.answer_ids[:stop]


def test_the_ends_are_the_model_s_own_where_none_are_given(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    end = written(pair, temperature=0.0, eos_ids=frozenset())[0].answer_ids[1]
    monkeypatch.setattr(pair.target.generation_config, "eos_token_id", [end, 0])
    assert written(pair, temperature=0.0)[0].answer_ids[-1] == end


def test_an_answer_that_ends_early_moves_no_number_of_the_next_batch(pair: Pair) -> None:
    long = written(pair, batch_size=1, eos_ids=frozenset())
    ends = frozenset(long[0].answer_ids[:1])
    short = written(pair, batch_size=1, eos_ids=ends)
    assert len(short[0].answer_ids) == 1 < len(long[0].answer_ids)
    for cut, whole in zip(short, long, strict=True):
        assert whole.answer_ids[: len(cut.answer_ids)] == cut.answer_ids


def test_an_output_that_is_not_finite_is_refused(pair: Pair) -> None:
    hook = pair.target.lm_head.register_forward_hook(lambda module, given, logits: logits * float("nan"))
    try:
        with pytest.raises(SettingError, match="output is not finite"):
            written(pair)
    finally:
        hook.remove()


def test_the_same_seed_draws_the_same_answers_and_another_one_others(pair: Pair) -> None:
    assert written(pair, seed=1) == written(pair, seed=1) != written(pair, seed=2)


def test_without_steering_every_meter_is_at_rest(pair: Pair) -> None:
    found = meters(divergences(pair.target, written(pair), ()), dose=0.0, relative=0.0)
    assert (found.kl_mean, found.kl_p95, found.agreement) == (0.0, 0.0, 1.0)
    assert found.acceptance == pytest.approx(1.0)
    assert found.num_tokens == 18


def test_more_dose_is_more_kl_and_less_acceptance(pair: Pair) -> None:
    found = []
    for dose in (0.05, 0.3, 2.0):
        edits = Steering(directions=(direction(pair),)).edits(dose, pair.target)
        found.append(meters(divergences(pair.target, written(pair, edits), edits), dose=dose, relative=dose))
    assert found[0].kl_mean < found[1].kl_mean < found[2].kl_mean
    assert found[0].acceptance > found[1].acceptance > found[2].acceptance
    assert all(one.kl_p95 >= one.kl_mean for one in found)


def test_a_draft_takes_the_place_of_the_unsteered_model_for_acceptance_alone(pair: Pair) -> None:
    answers, edits = written(pair, strong(pair)), strong(pair)
    own, drafted = (divergences(pair.target, answers, edits, draft=draft) for draft in (None, pair.draft))
    for one, other, sampled in zip(own, drafted, answers, strict=True):
        assert torch.equal(one.kl, other.kl)
        by_hand = divergence(alone(pair.target, sampled, edits), alone(pair.draft, sampled))
        torch.testing.assert_close(other.acceptance, by_hand.acceptance, rtol=0, atol=1e-5)
        assert not torch.equal(other.acceptance, one.acceptance)


def test_a_prompt_is_measured_against_the_bare_one(pair: Pair) -> None:
    """An instruction steers like an edit: its KL is that between the two prompts, on the same answer."""
    (sampled,) = rollouts(
        pair.target, [[8, 9, 5, 1]], decoding=Decoding(max_new_tokens=4), generator=torch.Generator().manual_seed(0)
    )
    (found,) = divergences(pair.target, [sampled], (), plain_prompts=[[5, 1]])
    bare = Sampled((5, 1), sampled.answer_ids)
    by_hand = divergence(alone(pair.target, sampled), alone(pair.target, bare))
    torch.testing.assert_close(found.kl, by_hand.kl, rtol=0, atol=1e-5)
    assert (found.kl > 0).all()


def test_what_cannot_be_measured_is_refused(pair: Pair) -> None:
    with pytest.raises(SettingError, match="0 answers"):
        divergences(pair.target, [], ())
    with pytest.raises(SettingError, match="one for each"):
        divergences(pair.target, written(pair), (), plain_prompts=[[1]])
    with pytest.raises(SettingError, match="prompt is empty"):
        rollouts(pair.target, [[]], decoding=Decoding(), generator=torch.Generator())
    with pytest.raises(SettingError, match="temperature -1"):
        Decoding(temperature=-1.0)
