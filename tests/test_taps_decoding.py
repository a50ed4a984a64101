"""An edited text comes out the same along every way to decode it: with a cache or without, padded, in a batch, under
beams, under speculation.

The reference is one pass over the whole text without a cache, one row and no padding.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from pilotfish.core import STREAMS, Site
from pilotfish.models import FAMILIES, tiny_model
from pilotfish.taps import (
    Ablate,
    AblateAdd,
    Add,
    AddKeepingNorm,
    Clamp,
    Edit,
    ProjectionGate,
    Replace,
    Scale,
    When,
    edited,
)

MODELS = {family: tiny_model(family, seed=0) for family in FAMILIES}
DRAFTS = {family: tiny_model(family, seed=0, num_layers=2) for family in FAMILIES}
SITES = (*(Site(layer, stream) for layer in range(3) for stream in STREAMS if stream != "final"), Site(-1, "final"))
TOLERANCE = {"rtol": 1e-4, "atol": 2e-4}

OPS: dict[str, Any] = {
    "add": lambda v: Add(v, 2.0),
    "add keeping norm": lambda v: AddKeepingNorm(v, 2.0),
    "ablate": Ablate,
    "ablate half": lambda v: Ablate(v, 0.5),
    "ablate and add": lambda v: AblateAdd(v, 1.5),
    "clamp": lambda v: Clamp(direction=v, low=-0.2, high=0.1),
    "replace": Replace,
    "scale": lambda _: Scale(1.3),
}


def vector(seed: int) -> Tensor:
    return torch.randn(32, generator=torch.Generator().manual_seed(seed))


@st.composite
def plans(draw: Any) -> list[tuple[Any, ...]]:
    """One or two edits in plain words: op, site, seed of its vector, phase, first position, whether it has a gate."""
    ops, phases = st.sampled_from(sorted(OPS)), st.sampled_from(("prompt", "generation", "both"))
    start = st.none() | st.integers(0, 8)
    one = st.tuples(ops, st.sampled_from(SITES), st.integers(0, 1000), phases, start, st.booleans())
    return draw(st.lists(one, min_size=1, max_size=2))


def built(plan: list[tuple[Any, ...]], rows: tuple[int, ...] | None = None) -> list[Edit]:
    edits = []
    for op, site, seed, phase, start, is_gated in plan:
        gate = ProjectionGate(site, vector(seed + 1), 0.3) if is_gated else None
        positions = None if start is None else (start, start + 4)
        edits.append(Edit(site, OPS[op](vector(seed)), When(phase=phase, positions=positions, rows=rows, gate=gate)))
    return edits


def tokens(seed: int, length: int) -> list[int]:
    return torch.randint(250, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


@torch.no_grad()
def reference(model: PreTrainedModel, row: list[int], edits: list[Edit], prompt_length: int) -> Tensor:
    """Logits "token vocab" of one text in one pass."""
    with edited(model, edits, prompt_length=prompt_length):
        return model(torch.tensor([row]), use_cache=False).logits[0]


families = pytest.mark.parametrize("family", FAMILIES)
every_edit = settings(max_examples=10, deadline=None)


@families
@every_edit
@given(plan=plans(), seed=st.integers(0, 100), data=st.data())
def test_reading_on_top_of_a_cache_is_reading_at_once(family: str, plan: Any, seed: int, data: Any) -> None:
    """In any chunks, and with drafted tokens read and forgotten between them as speculation does."""
    model, edits, row, prompt_length = MODELS[family], built(plan), tokens(seed, 12), 5
    cache, parts, start = DynamicCache(), [], 0
    with torch.no_grad(), edited(model, edits, prompt_length=prompt_length):
        while start < len(row):
            size = data.draw(st.integers(1, len(row) - start))
            rejected = tokens(seed + 1, data.draw(st.integers(0, 2)))
            batch = torch.tensor([row[start : start + size] + rejected])
            parts.append(model(batch, past_key_values=cache, use_cache=True).logits[0, :size])
            if rejected:
                cache.crop(-len(rejected))
            start += size
    torch.testing.assert_close(torch.cat(parts), reference(model, row, edits, prompt_length), **TOLERANCE)


@families
@every_edit
@given(plan=plans(), seed=st.integers(0, 100), side=st.sampled_from(("left", "right")))
def test_a_padded_batch_is_its_rows_one_by_one(family: str, plan: Any, seed: int, side: str) -> None:
    model, edits, rows = MODELS[family], built(plan), [tokens(seed + i, length) for i, length in enumerate((9, 12, 7))]
    prompts, width = (4, 6, 3), 12
    pads = [[0] * (width - len(row)) for row in rows]
    ones = [[1] * len(row) for row in rows]
    joined = [pad + row if side == "left" else row + pad for row, pad in zip(rows, pads, strict=True)]
    mask = torch.tensor([pad + one if side == "left" else one + pad for one, pad in zip(ones, pads, strict=True)])
    ends = [prompt + (len(pad) if side == "left" else 0) for prompt, pad in zip(prompts, pads, strict=True)]
    with torch.no_grad(), edited(model, edits, prompt_length=ends):
        places = (mask.cumsum(-1) - 1).clamp_min(0)
        logits = model(torch.tensor(joined), attention_mask=mask, position_ids=places, use_cache=False).logits
    for index, row in enumerate(rows):
        real = logits[index][mask[index] == 1]
        torch.testing.assert_close(real, reference(model, row, edits, prompts[index]), **TOLERANCE)


@families
@every_edit
@given(plan=plans(), seed=st.integers(0, 100))
def test_edits_of_one_row_leave_the_others_to_the_bit(family: str, plan: Any, seed: int) -> None:
    model, edits = MODELS[family], built(plan, rows=(1,))
    ids = torch.tensor([tokens(seed + i, 8) for i in range(3)])
    with torch.no_grad():
        plain = model(ids).logits
        with edited(model, edits, prompt_length=4):
            steered = model(ids).logits
    assert torch.equal(steered[[0, 2]], plain[[0, 2]])


def generated(model: PreTrainedModel, rows: list[list[int]], **how: Any) -> Any:
    """Of prompts padded on the left, 5 tokens each whatever they are."""
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    options = {
        "do_sample": False,
        "max_new_tokens": 5,
        "min_new_tokens": 5,
        "pad_token_id": 0,
        "output_logits": True,
    } | how
    with torch.no_grad():
        return model.generate(ids, attention_mask=mask, return_dict_in_generate=True, **options)


@families
@settings(max_examples=4, deadline=None)
@given(plan=plans(), seed=st.integers(0, 100), sampled=st.booleans())
def test_generation_is_drawn_from_the_logits_of_a_recomputation(
    family: str, plan: Any, seed: int, sampled: bool
) -> None:
    model, edits, prompts = MODELS[family], built(plan), [tokens(seed, 6), tokens(seed + 1, 4)]
    with torch.random.fork_rng(devices=[]), edited(model, edits, prompt_length=6):
        out = generated(model, prompts, do_sample=sampled)
    for index, prompt in enumerate(prompts):
        answer = out.sequences[index, 6:].tolist()
        expected = reference(model, prompt + answer[:-1], edits, len(prompt))[-5:]
        torch.testing.assert_close(torch.stack(out.logits, 1)[index], expected, **TOLERANCE)


@families
@settings(max_examples=3, deadline=None)
@given(plan=plans(), seed=st.integers(0, 100))
def test_beams_have_the_scores_of_a_recomputation(family: str, plan: Any, seed: int) -> None:
    model, edits, prompts = MODELS[family], built(plan), [tokens(seed, 6), tokens(seed + 1, 4)]
    with edited(model, edits, prompt_length=6):
        out = generated(model, prompts, num_beams=3, num_return_sequences=2, length_penalty=0.0, output_scores=True)
    for index, sequence in enumerate(out.sequences):
        prompt, answer = prompts[index // 2], sequence[6:].tolist()
        log_probs = reference(model, prompt + answer[:-1], edits, len(prompt))[-5:].log_softmax(-1)
        score = log_probs.gather(-1, torch.tensor(answer).unsqueeze(-1)).sum()
        torch.testing.assert_close(out.sequences_scores[index], score, rtol=1e-3, atol=1e-3)


@families
@settings(max_examples=3, deadline=None)
@given(plan=plans(), seed=st.integers(0, 100))
def test_edits_of_one_prompts_beams_leave_the_other_prompt(family: str, plan: Any, seed: int) -> None:
    model, edits, prompts = MODELS[family], built(plan, rows=(0, 1, 2)), [tokens(seed, 6), tokens(seed + 1, 6)]
    how = {"num_beams": 3, "output_scores": True}
    with edited(model, edits, prompt_length=6):
        steered = generated(model, prompts, **how)
    plain = generated(model, prompts, **how)
    assert torch.equal(steered.sequences[1], plain.sequences[1])
    assert torch.equal(steered.sequences_scores[1], plain.sequences_scores[1])


@families
@settings(max_examples=3, deadline=None)
@given(plan=plans(), seed=st.integers(0, 100))
def test_assisted_decoding_with_an_unsteered_draft_writes_what_the_steered_target_does(
    family: str, plan: Any, seed: int
) -> None:
    model, draft, edits, prompt = MODELS[family], DRAFTS[family], built(plan), tokens(seed, 6)
    with edited(model, edits, prompt_length=6):
        out = generated(model, [prompt], assistant_model=draft, output_logits=False)
    assert_greedy(model, prompt, out.sequences[0, 6:].tolist(), edits)


def assert_greedy(model: PreTrainedModel, prompt: list[int], answer: list[int], edits: list[Edit]) -> None:
    """Every token is the likeliest of the recomputation, up to rounding."""
    assert answer
    logits = reference(model, prompt + answer[:-1], edits, len(prompt))[-len(answer) :]
    chosen = logits.gather(-1, torch.tensor(answer).unsqueeze(-1))[:, 0]
    torch.testing.assert_close(chosen, logits.amax(-1), rtol=1e-4, atol=1e-3)


def test_the_reference_notices_a_wrong_phase() -> None:
    """These tests can fail: without a prompt length, drafted tokens of the first pass count as prompt."""
    edits, prompt = [Edit(Site(1, "resid_post"), Add(vector(3), 5.0), When(phase="generation"))], tokens(1, 6)
    with torch.no_grad(), edited(MODELS["llama"], edits):
        whole = MODELS["llama"](torch.tensor([prompt]), use_cache=False).logits[0]
    assert not torch.allclose(whole, reference(MODELS["llama"], prompt, edits, 3), **TOLERANCE)
