"""The claims on real weights, which are fetched once; few tokens, since each costs a tenth of a second."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from pilotfish.actions import Policy
from pilotfish.engines import Drafting, EmbeddedEngine, Request, Sampling
from pilotfish.heads import shipped_banks
from pilotfish.models import Pair, load_model, load_pair
from pilotfish.scores import score_tokens

pytestmark = pytest.mark.slow

PROMPT = "Write a short C function that copies a user's name into a char buffer[16] with strcpy. Only code."
NUM_TOKENS = 40
TIE = 0.25
"""Logits this close may swap between a pass of one token and one of five: from 16 to 32, bfloat16 steps by 0.125."""
BF16_BOUND = 0.05
"""How far a probability may move between ways of computing one bfloat16 pass."""


@pytest.fixture(scope="module")
def real() -> Iterator[Pair]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield load_pair("demo:qwen-coder")
    torch.set_num_threads(before)  # other tests compare bits with a process of their own


@pytest.fixture(scope="module")
def engine(real) -> EmbeddedEngine:
    return EmbeddedEngine(real, shipped_banks(real.draft_identity))


@pytest.fixture(scope="module")
def generation(engine):
    return engine.generate(PROMPT, Request(max_new_tokens=NUM_TOKENS))


def test_greedy_output_is_the_targets_own_up_to_ties_of_bfloat16(real, generation):
    ids = [token.id for token in generation.tokens]
    first = generation.num_prompt_tokens
    with torch.inference_mode():
        logits = real.target(torch.tensor([ids]), use_cache=False).logits[0, first - 1 : -1].float()
    chosen = logits.gather(1, torch.tensor(ids[first:])[:, None])[:, 0]
    behind = logits.max(1).values - chosen
    assert behind.max() <= TIE, f"token {int(behind.argmax())} is {float(behind.max()):.3f} behind the target's choice"
    assert (behind == 0).float().mean() > 0.9


def test_a_bank_changes_no_token_and_hold_neither(real, engine, generation):
    plain = EmbeddedEngine(real).generate(PROMPT, Request(max_new_tokens=NUM_TOKENS))
    held = engine.generate(PROMPT, Request(max_new_tokens=NUM_TOKENS, policy=Policy(hold=True)))
    expected = [token.id for token in generation.tokens]
    assert [token.id for token in plain.tokens] == expected == [token.id for token in held.tokens]


def test_committed_tokens_are_scored_in_passes_that_ran_anyway(generation):
    assert generation.misses().total() == 0
    assert generation.num_taxed_reads == 0
    assert generation.acceptance > 0.5
    assert {token.scores.reader for token in generation.tokens} == {"draft"}


def distance(generation, bank, model) -> float:
    """How far a score lies from that of one offline pass at most, of tokens and running."""
    ids = [token.id for token in generation.tokens]
    offline = score_tokens(model, bank, ids, boundary=generation.num_prompt_tokens)
    return max(
        abs(getattr(token.scores[metric], kind) - float(expected[token.position, column]))
        for kind, expected in (("value", offline.tokens), ("running", offline.running))
        for token in generation.tokens
        for column, metric in enumerate(bank.metrics)
    )


def test_online_scores_are_those_of_one_offline_pass_up_to_bfloat16(real, engine, generation):
    bank = engine.banks["draft"]
    assert distance(generation, bank, real.draft) <= BF16_BOUND


def test_in_float32_online_scores_are_those_of_one_offline_pass_to_five_digits():
    loaded = load_model("demo:qwen-coder-0.5b", dtype="float32")
    twin = Pair(loaded.model, loaded.model, loaded.tokenizer, loaded.identity, loaded.identity)
    bank = shipped_banks(loaded.identity)[0]
    engine = EmbeddedEngine(twin, [bank], drafting=Drafting(length=3))
    request = Request(max_new_tokens=16, sampling=Sampling(temperature=1.0), seed=3)
    generation = engine.generate("Write a haiku.", request)
    assert distance(generation, bank, loaded.model) <= 1e-5
