"""Every op along every way to decode: a cache, padding, beams, assistance, our speculation, our batch.

`test_taps_decoding` draws edits at random on every family; here each op meets each path, under every phase and a gate.
The reference is one pass over the whole text.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_taps_decoding import DRAFTS, MODELS, OPS, TOLERANCE, assert_greedy, generated, reference, tokens, vector
from transformers import DynamicCache

from pilotfish.core import Site
from pilotfish.engines import Drafting, EmbeddedEngine, Request, generate_together
from pilotfish.models import Pair
from pilotfish.taps import Edit, ProjectionGate, When, edited

LLAMA, DRAFT = MODELS["llama"], DRAFTS["llama"]
SITE = Site(1, "resid_post")
WHEN = (
    When(phase="generation"),
    When(phase="prompt"),
    When(positions=(2, 8), gate=ProjectionGate(SITE, vector(5), 0.3)),
)
PROMPT = tokens(1, 6)
QUESTIONS = ("def add(a, b):", "x")


def through_a_cache(edits: list[Edit], pair: Pair) -> None:
    row, cache, parts, start = tokens(2, 12), DynamicCache(), [], 0
    with torch.no_grad(), edited(LLAMA, edits, prompt_length=5):
        for size in (3, 1, 4, 1, 3):
            batch = torch.tensor([row[start : start + size]])
            parts.append(LLAMA(batch, past_key_values=cache, use_cache=True).logits[0])
            start += size
    torch.testing.assert_close(torch.cat(parts), reference(LLAMA, row, edits, 5), **TOLERANCE)


def padded_in_a_batch(edits: list[Edit], pair: Pair) -> None:
    prompts = [PROMPT, tokens(3, 4)]
    with edited(LLAMA, edits, prompt_length=6):
        out = generated(LLAMA, prompts)
    for index, prompt in enumerate(prompts):
        answer = out.sequences[index, 6:].tolist()
        expected = reference(LLAMA, prompt + answer[:-1], edits, len(prompt))[-5:]
        torch.testing.assert_close(torch.stack(out.logits, 1)[index], expected, **TOLERANCE)


def under_beams(edits: list[Edit], pair: Pair) -> None:
    with edited(LLAMA, edits, prompt_length=6):
        out = generated(LLAMA, [PROMPT], num_beams=3, length_penalty=0.0, output_scores=True)
    answer = out.sequences[0, 6:].tolist()
    log_probs = reference(LLAMA, PROMPT + answer[:-1], edits, 6)[-5:].log_softmax(-1)
    score = log_probs.gather(-1, torch.tensor(answer).unsqueeze(-1)).sum()
    torch.testing.assert_close(out.sequences_scores[0], score, rtol=1e-3, atol=1e-3)


def with_an_assistant(edits: list[Edit], pair: Pair) -> None:
    with edited(LLAMA, edits, prompt_length=6):
        out = generated(LLAMA, [PROMPT], assistant_model=DRAFT, output_logits=False)
    assert_greedy(LLAMA, PROMPT, out.sequences[0, 6:].tolist(), edits)


def under_our_speculation(edits: list[Edit], pair: Pair) -> None:
    engine = EmbeddedEngine(pair, drafting=Drafting(length=3))
    found = engine.generate(QUESTIONS[0], Request(max_new_tokens=6, edits={"steered": edits}))
    ids = [token.id for token in found.tokens]
    assert any(len(each.drafted) for each in found.rounds)
    assert_greedy(pair.target, ids[: found.num_prompt_tokens], ids[found.num_prompt_tokens :], edits)


def in_our_batch(edits: list[Edit], pair: Pair) -> None:
    """Beside one with another edit."""
    engine = EmbeddedEngine(pair, drafting=Drafting(length=2))
    each = (edits, [Edit(SITE, OPS["add"](vector(9)))])
    requests = [Request(max_new_tokens=4, edits={"steered": own}) for own in each]
    for found, own in zip(generate_together(engine, QUESTIONS, requests), each, strict=True):
        ids = [token.id for token in found.tokens]
        assert_greedy(pair.target, ids[: found.num_prompt_tokens], ids[found.num_prompt_tokens :], own)


PATHS = (
    through_a_cache,
    padded_in_a_batch,
    under_beams,
    with_an_assistant,
    under_our_speculation,
    in_our_batch,
)


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.__name__)
@pytest.mark.parametrize("op", sorted(OPS))
def test_every_op_is_exact_along_every_path(op: str, path: Callable[[list[Edit], Pair], None], pair: Pair) -> None:
    for when in WHEN:
        path([Edit(SITE, OPS[op](vector(7)), when)], pair)


def test_every_op_changes_what_is_written_so_that_these_tests_can_fail(pair: Pair) -> None:
    for op, make in OPS.items():
        for when in WHEN:
            edits: list[Any] = [Edit(SITE, make(vector(7)), when)]
            assert not torch.allclose(reference(LLAMA, PROMPT, edits, 3), reference(LLAMA, PROMPT, [], 3)), op
