"""Acceptance is lossless: shown by enumeration, not by example."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pilotfish.engines.drafting import Drafting, DraftLength
from pilotfish.engines.speculate import (
    Sampling,
    accept_greedy,
    accept_sampled,
    distribution,
    keep_probability,
    residual,
)
from pilotfish.errors import SettingError

VOCAB = 4


def tiny_language(seed: int, sharpness: float) -> dict[tuple[int, ...], torch.Tensor]:
    """Logits after every text of up to three tokens over four words: a whole language model, small enough to
    enumerate.
    """
    random = torch.Generator().manual_seed(seed)
    texts = [text for length in range(4) for text in itertools.product(range(VOCAB), repeat=length)]
    return {text: sharpness * torch.randn(VOCAB, generator=random) for text in texts}


def enumerate_one_round(target, draft, sampling, k) -> dict[tuple[int, ...], float]:
    """Exact distribution of what one round of speculation commits, every draft and every acceptance weighed by its
    probability.
    """
    outcome: dict[tuple[int, ...], float] = {}
    for drafted in itertools.product(range(VOCAB), repeat=k):
        q = [distribution(draft[drafted[:i]][None], sampling)[0].double() for i in range(k)]
        p = [distribution(target[drafted[:i]][None], sampling)[0].double() for i in range(k + 1)]
        weight = 1.0
        for i, token in enumerate(drafted):
            weight *= float(q[i][token])
        for i, token in enumerate(drafted):
            keep = float(keep_probability(p[i], q[i])[token])
            for other, chance in enumerate(residual(p[i], q[i]).tolist()):
                key = (*drafted[:i], other)
                outcome[key] = outcome.get(key, 0.0) + weight * (1 - keep) * chance
            weight *= keep
        for other, chance in enumerate(p[k].tolist()):
            key = (*drafted, other)
            outcome[key] = outcome.get(key, 0.0) + weight * chance
    return outcome


SAMPLINGS = [
    Sampling(),
    Sampling(temperature=1.0),
    Sampling(temperature=0.6),
    Sampling(temperature=1.3, top_k=2),
    Sampling(temperature=0.9, top_p=0.7),
    Sampling(temperature=0.8, top_k=3, top_p=0.8),
]


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
@pytest.mark.parametrize("k", [1, 2, 3])
def test_what_a_round_commits_is_distributed_as_the_target_alone(sampling, k):
    target, draft = tiny_language(1, 1.5), tiny_language(2, 1.0)
    outcome = enumerate_one_round(target, draft, sampling, k)
    assert sum(outcome.values()) == pytest.approx(1.0, abs=1e-6)
    for text in itertools.product(range(VOCAB), repeat=k + 1):
        chance_alone = 1.0
        for i, token in enumerate(text):
            chance_alone *= float(distribution(target[text[:i]][None], sampling)[0, token])
        committed = 0.0  # a shorter commitment goes on with the target's own next tokens, whatever later rounds draft
        for length in range(1, k + 2):
            chance = outcome.get(text[:length], 0.0)
            for i in range(length, k + 1):
                chance *= float(distribution(target[text[:i]][None], sampling)[0, text[i]])
            committed += chance
        assert committed == pytest.approx(chance_alone, abs=1e-6)


def test_the_enumeration_notices_an_acceptance_rule_that_is_not_lossless():
    target, draft = tiny_language(1, 1.5), tiny_language(2, 1.0)
    sampling = Sampling(temperature=1.0)
    p, q = (distribution(model[()][None], sampling)[0].double() for model in (target, draft))
    always_kept = q
    kept = q * keep_probability(p, q)
    exact = kept + (1 - kept.sum()) * residual(p, q)
    assert torch.allclose(exact, p, atol=1e-6)
    assert not torch.allclose(always_kept, p, atol=1e-2)


def test_the_sampler_follows_the_enumerated_distribution():
    target, draft = tiny_language(3, 1.5), tiny_language(4, 1.0)
    sampling = Sampling(temperature=1.0)
    p = torch.stack([distribution(target[text][None], sampling)[0] for text in [(), (2,)]])
    q = distribution(draft[()][None], sampling)
    random = torch.Generator().manual_seed(0)
    counts = torch.zeros(VOCAB)
    num_draws = 20_000
    for _ in range(num_draws):
        drafted = int(torch.multinomial(q[0], 1, generator=random))
        target_rows = torch.stack([p[0], distribution(target[(drafted,)][None], sampling)[0]])
        accepted = accept_sampled([drafted], q, target_rows, generator=random)
        counts[drafted if accepted.num_accepted else accepted.next_token] += 1
    assert torch.allclose(counts / num_draws, p[0], atol=4 * 0.5 / num_draws**0.5)


def test_greedy_acceptance_keeps_the_prefix_that_the_target_would_choose():
    logits = torch.tensor([[0.0, 1, 0, 0], [0, 0, 1, 0], [1, 0, 0, 0]])
    assert accept_greedy([1, 2], logits) == (2, 0)
    assert accept_greedy([1, 3], logits) == (1, 2)
    assert accept_greedy([0, 2], logits) == (0, 1)
    assert accept_greedy([], logits[:1]) == (0, 1)


@given(
    seed=st.integers(0, 10_000),
    temperature=st.floats(0.05, 3.0),
    top_k=st.none() | st.integers(1, 12),
    top_p=st.none() | st.floats(0.01, 1.0),
)
@settings(max_examples=60, deadline=None)
def test_a_warped_distribution_sums_to_one_and_keeps_the_likeliest_token(seed, temperature, top_k, top_p):
    logits = torch.randn(3, 10, generator=torch.Generator().manual_seed(seed))
    probs = distribution(logits, Sampling(temperature=temperature, top_k=top_k, top_p=top_p))
    assert torch.allclose(probs.sum(-1), torch.ones(3), atol=1e-5)
    assert (probs.gather(-1, logits.argmax(-1, keepdim=True)) > 0).all()
    if top_k is not None:
        assert ((probs > 0).sum(-1) <= top_k).all()


def test_top_p_keeps_the_token_that_reaches_the_mass():
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    kept = distribution(logits, Sampling(temperature=1.0, top_p=0.7))[0]
    assert torch.allclose(kept, torch.tensor([0.625, 0.375, 0, 0]), atol=1e-6)


@pytest.mark.parametrize(
    "bad", [{"temperature": -1.0}, {"temperature": float("inf")}, {"top_k": 0}, {"top_p": 0.0}, {"top_p": 1.5}]
)
def test_a_sampling_setting_outside_its_range_is_refused_with_the_range(bad):
    with pytest.raises(SettingError, match="is not allowed; give"):
        Sampling(**bad)


def test_a_fixed_length_drafts_exactly_that_many():
    length = DraftLength(Drafting(length=3), 0.3)
    assert [length.wants_more(n, 0.01) for n in range(5)] == [True, True, True, False, False]


def test_speculation_pauses_when_nothing_is_accepted_and_is_tried_again_ever_later():
    length = DraftLength(Drafting(), 0.35)
    pauses = []
    for _ in range(300):
        pauses.append(length.is_paused)
        length.observe(0 if length.is_paused else 1, 0)
    runs = [len(list(group)) for paused, group in itertools.groupby(pauses) if paused]
    assert runs[:2] == [24, 48]
    assert sum(pauses) > 0.9 * len(pauses)


def test_a_good_draft_is_never_paused_and_drafts_long():
    length = DraftLength(Drafting(max_length=8), 0.35)
    for _ in range(20):
        assert not length.is_paused
        length.observe(4, 4)
    assert length.wants_more(7, 0.9)
    assert not length.wants_more(8, 1.0)
    assert not length.wants_more(3, 0.2)
