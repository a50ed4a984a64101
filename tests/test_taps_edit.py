"""Edits write what they say, where they say, and leave nothing behind."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from conftest import hooks_of, random_ids
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from pilotfish.core import STREAMS, Site
from pilotfish.errors import SettingError
from pilotfish.models import FAMILIES, site_module, tiny_model
from pilotfish.taps import Ablate, Add, Detach, Edit, Replace, Scale, When, edited, tapped

MID = Site(1, "resid_post")
FINAL = Site(-1, "final")
SITES = (*(Site(1, stream) for stream in STREAMS if stream != "final"), FINAL)
MODELS = {family: tiny_model(family, seed=0) for family in FAMILIES}
LLAMA = MODELS["llama"]
AXIS = torch.eye(32)[0]
ONES = torch.ones(32)


def random(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def values_of(model: PreTrainedModel, ids: Tensor, *edits: Edit, site: Site = MID, **call: Any) -> Tensor:
    with torch.no_grad(), edited(model, edits), tapped(model, [site]) as taps:
        model(ids, **call)
        return taps[site]


def places_written(values: Tensor) -> list[list[int]]:
    """Columns of each row that `Replace(ONES)` wrote."""
    return [row.nonzero().flatten().tolist() for row in (values == 1).all(-1)]


def when_written(**when: Any) -> Edit:
    return Edit(MID, Replace(ONES), When(**when))


# Ops


@pytest.mark.parametrize(
    ("op", "expected"),
    [
        (Add(torch.tensor([1.0, -1.0])), [4.0, 3.0]),
        (Add(torch.tensor([1.0, -1.0]), scale=0.5), [3.5, 3.5]),
        (Ablate(torch.tensor([2.0, 0.0])), [0.0, 4.0]),
        (Ablate(torch.tensor([1.0, 1.0])), [-0.5, 0.5]),
        (Replace(torch.tensor([7.0, 8.0])), [7.0, 8.0]),
        (Scale(-2.0), [-6.0, -8.0]),
        (Detach(), [3.0, 4.0]),
        (Detach(torch.tensor([True, False])), [3.0, 4.0]),
    ],
)
def test_an_op_gives_its_hand_value(op: Any, expected: list[float]) -> None:
    torch.testing.assert_close(op.apply(torch.tensor([[[3.0, 4.0]]])), torch.tensor([[expected]]))


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**31), length=st.floats(1e-3, 1e3))
def test_an_ablated_direction_is_gone_whatever_its_length_and_the_rest_stays(seed: int, length: float) -> None:
    hidden, direction, other = random(2, 3, 8, seed=seed), random(8, seed=seed + 1), random(8, seed=seed + 2)
    other -= (other @ direction) / (direction @ direction) * direction
    ablated = Ablate(length * direction).apply(hidden)
    torch.testing.assert_close(ablated @ (direction / direction.norm()), torch.zeros(2, 3), rtol=0, atol=1e-5)
    torch.testing.assert_close(ablated @ other, hidden @ other, rtol=1e-4, atol=1e-4)


def test_ablation_in_bfloat16_is_as_exact_as_that_dtype_allows() -> None:
    hidden, direction = random(1, 4, 32).bfloat16(), random(32, seed=2).bfloat16()
    exact = Ablate(direction.double()).apply(hidden.double())
    model = copy.deepcopy(LLAMA).bfloat16()
    after = values_of(model, random_ids(1, 4), Edit(FINAL, Ablate(direction)), site=FINAL)
    before = values_of(model, random_ids(1, 4), site=FINAL)
    assert after.dtype == torch.bfloat16
    assert torch.equal(Ablate(direction).apply(hidden).bfloat16(), exact.bfloat16())
    assert torch.equal(after, Ablate(direction.double()).apply(before.double()).bfloat16())


# Where the model meets the edit


@pytest.mark.parametrize("site", SITES, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_an_edit_at_any_site_of_any_family_is_what_the_rest_of_the_model_reads(family: str, site: Site) -> None:
    model, ids = MODELS[family], random_ids(2, 5)
    plain = values_of(model, ids, site=site)
    with torch.no_grad():
        logits = model(ids).logits
        with edited(model, [Edit(site, Add(AXIS, 3.0))]):
            changed = model(ids).logits
    assert torch.equal(values_of(model, ids, Edit(site, Add(AXIS, 3.0)), site=site), plain + 3.0 * AXIS)
    assert not torch.allclose(changed, logits, atol=1e-3)
    assert torch.equal(model(ids).logits, logits)


def test_an_edit_of_the_last_block_moves_the_logits_as_the_formula_says() -> None:
    ids, vector = random_ids(1, 5), random(32)
    stream = values_of(LLAMA, ids, site=Site(2, "resid_post"))
    with torch.no_grad(), edited(LLAMA, [Edit(Site(2, "resid_post"), Add(vector, 2.0))]):
        logits = LLAMA(ids).logits
    torch.testing.assert_close(logits, LLAMA.lm_head(LLAMA.model.norm(stream + 2.0 * vector)))


def test_edits_of_one_site_apply_in_the_order_given() -> None:
    ids = random_ids(1, 3)
    add, double = Edit(MID, Add(AXIS)), Edit(MID, Scale(2.0))
    plain = values_of(LLAMA, ids)
    assert torch.equal(values_of(LLAMA, ids, add, double), 2 * (plain + AXIS))
    assert torch.equal(values_of(LLAMA, ids, double, add), 2 * plain + AXIS)


def test_a_tap_around_an_edit_reads_what_was_there_before_it() -> None:
    ids = random_ids(1, 3)
    plain = values_of(LLAMA, ids)
    with torch.no_grad(), tapped(LLAMA, [MID]) as outer, edited(LLAMA, [Edit(MID, Scale(0.0))]):
        LLAMA(ids)
        assert torch.equal(outer[MID], plain)


def test_an_input_given_as_a_keyword_is_edited_like_a_positional_one() -> None:
    model, ids, site = copy.deepcopy(LLAMA), random_ids(1, 3), Site(1, "resid_pre")
    edit = Edit(site, Add(AXIS))
    as_positional = values_of(model, ids, edit)
    model.model.layers[1].register_forward_pre_hook(
        lambda _, args, kwargs: ((), {**kwargs, "hidden_states": args[0]}), with_kwargs=True
    )
    assert torch.equal(values_of(model, ids, edit), as_positional)


def test_a_call_of_the_base_model_is_edited_too() -> None:
    ids = random_ids(1, 3)
    with torch.no_grad(), edited(LLAMA, [Edit(FINAL, Replace(ONES), When(positions=(1, 2)))]):
        states = LLAMA.model(ids).last_hidden_state
    assert places_written(states) == [[1]]


def test_gradients_reach_the_added_vector() -> None:
    vector = torch.zeros(32, requires_grad=True)
    with edited(LLAMA, [Edit(MID, Add(vector, 2.0))]):
        LLAMA(random_ids(1, 3)).logits.sum().backward()
    assert vector.grad is not None and vector.grad.abs().sum() > 0
    LLAMA.zero_grad()


# When


def test_rows_positions_and_both_choose_their_crossing() -> None:
    ids = random_ids(3, 6)
    assert places_written(values_of(LLAMA, ids, when_written())) == [list(range(6))] * 3
    assert places_written(values_of(LLAMA, ids, when_written(rows=(0, 2)))) == [list(range(6)), [], list(range(6))]
    assert places_written(values_of(LLAMA, ids, when_written(positions=(2, 4)))) == [[2, 3]] * 3
    assert places_written(values_of(LLAMA, ids, when_written(positions=(5, 99), rows=(1,)))) == [[], [5], []]


def test_what_an_edit_does_not_choose_keeps_its_bits() -> None:
    ids = random_ids(2, 6)
    plain = values_of(LLAMA, ids)
    written = values_of(LLAMA, ids, Edit(MID, Ablate(random(32)), When(positions=(4, 5), rows=(1,))))
    assert torch.equal(written[0], plain[0])
    assert torch.equal(written[1, [0, 1, 2, 3, 5]], plain[1, [0, 1, 2, 3, 5]])
    assert not torch.equal(written[1, 4], plain[1, 4])


@pytest.mark.parametrize("family", FAMILIES)
def test_positions_count_from_the_first_token_that_is_not_padding(family: str) -> None:
    ids = random_ids(3, 6)
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]])
    written = values_of(MODELS[family], ids, when_written(positions=(1, 4)), attention_mask=mask)
    assert places_written(written) == [[1, 2, 3], [3, 4, 5], [1, 2]]


def test_padding_itself_is_at_no_position() -> None:
    mask = torch.tensor([[0, 0, 1, 1]])
    assert places_written(values_of(LLAMA, random_ids(1, 4), when_written(positions=(0, 99)), attention_mask=mask)) == [
        [2, 3]
    ]


@pytest.mark.parametrize("chunks", [[1] * 7, [3, 1, 3]], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_positions_are_absolute_under_a_cache_with_left_padding(family: str, chunks: list[int]) -> None:
    model, ids = MODELS[family], random_ids(2, 7)
    mask = torch.tensor([[1] * 7, [0, 0] + [1] * 5])
    places = (mask.cumsum(-1) - 1).clamp(min=0)
    cache = DynamicCache(config=model.config)
    parts, start = [], 0
    for size in chunks:
        end = start + size
        call = {"attention_mask": mask[:, :end], "position_ids": places[:, start:end], "past_key_values": cache}
        parts.append(values_of(model, ids[:, start:end], when_written(positions=(2, 5)), use_cache=True, **call))
        start = end
    assert places_written(torch.cat(parts, 1)) == [[2, 3, 4], [4, 5, 6]]


def test_positions_are_absolute_under_a_cache_without_a_mask() -> None:
    ids, cache = random_ids(1, 6), DynamicCache(config=LLAMA.config)
    parts = [
        values_of(LLAMA, ids[:, i : i + 2], when_written(positions=(1, 3)), past_key_values=cache, use_cache=True)
        for i in (0, 2, 4)
    ]
    assert places_written(torch.cat(parts, 1)) == [[1, 2]]


@pytest.mark.parametrize(
    ("phase", "expected"),
    [("prompt", [True, False, False]), ("generation", [False, True, True]), ("both", [True, True, True])],
)
@pytest.mark.parametrize("family", FAMILIES)
def test_phases_of_generate(family: str, phase: Any, expected: list[bool]) -> None:
    model, written = MODELS[family], []
    with torch.no_grad(), edited(model, [when_written(phase=phase)]):
        hook = site_module(model, MID).register_forward_hook(
            lambda _, args, output: written.append(bool((output == 1).all()))
        )
        model.generate(random_ids(2, 4), max_new_tokens=3, min_new_tokens=3, do_sample=False)
        hook.remove()
    assert written == expected


def test_phases_without_a_cache_follow_the_length_of_the_prompt() -> None:
    ids = random_ids(2, 6)
    for phase, expected in (("prompt", [0, 1, 2, 3]), ("generation", [4, 5])):
        with torch.no_grad(), edited(LLAMA, [when_written(phase=phase)], prompt_length=4), tapped(LLAMA, [MID]) as taps:
            LLAMA(ids, use_cache=False)
            assert places_written(taps[MID]) == [expected] * 2


def test_a_prompt_in_chunks_is_prompt_to_its_given_end() -> None:
    ids, cache, columns = random_ids(1, 6), DynamicCache(config=LLAMA.config), []
    with torch.no_grad(), edited(LLAMA, [when_written(phase="prompt")], prompt_length=4), tapped(LLAMA, [MID]) as taps:
        for start in (0, 3):  # the second chunk holds the prompt's last token and two generated ones
            LLAMA(ids[:, start : start + 3], past_key_values=cache, use_cache=True)
            columns += places_written(taps[MID])
    assert columns == [[0, 1, 2], [0]]


def test_generation_under_an_edit_is_that_of_a_model_with_the_vector_as_a_bias() -> None:
    """The reference: the same vector in the last block's own output bias, where gpt2 has one."""
    model, vector, ids = MODELS["gpt2"], random(32), random_ids(2, 4)
    biased = copy.deepcopy(model)
    with torch.no_grad():
        biased.transformer.h[1].mlp.c_proj.bias.add_(4.0 * vector)
    greedy = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    with torch.no_grad(), edited(model, [Edit(MID, Add(vector, 4.0))]):
        steered = model.generate(ids, **greedy)
    assert torch.equal(steered, biased.generate(ids, **greedy))
    assert not torch.equal(steered, model.generate(ids, **greedy))


# Nothing is left behind


@pytest.mark.parametrize("edits", [[], [Edit(site, Add(ONES, 0.0)) for site in SITES]], ids=["none", "dose 0"])
@pytest.mark.parametrize("family", FAMILIES)
def test_no_edit_and_dose_zero_are_bit_identical(family: str, edits: list[Edit]) -> None:
    model, ids = MODELS[family], random_ids(2, 5)
    with torch.no_grad():
        plain = model(ids).logits
        with edited(model, edits):
            assert torch.equal(model(ids).logits, plain)


def test_dose_zero_keeps_the_sign_of_zero() -> None:
    assert Add(torch.ones(1), 0.0).apply(torch.tensor([[[-0.0]]])).signbit().item()


def test_a_hundred_enters_and_exits_leave_model_and_hooks_as_they_were() -> None:
    model, ids = copy.deepcopy(LLAMA), random_ids(1, 4)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    edits = [Edit(site, Add(AXIS)) for site in (Site(1, "resid_pre"), FINAL)]
    with torch.no_grad():
        plain = model(ids).logits
        for _ in range(100):
            with edited(model, edits):
                pass
        with edited(model, edits):
            model(ids)
        assert torch.equal(model(ids).logits, plain)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert hooks_of(model) == []


def test_no_hook_outlives_an_error_in_the_block_in_the_pass_or_while_entering() -> None:
    model = copy.deepcopy(LLAMA)
    with pytest.raises(ZeroDivisionError), edited(model, [Edit(MID, Scale(2.0))]):
        _ = len(hooks_of(model)) / 0
    assert hooks_of(model) == []
    with pytest.raises(SettingError), edited(model, [when_written(rows=(5,))]):
        model(random_ids(1, 3))
    assert hooks_of(model) == []
    with pytest.raises(SettingError):
        edited(model, [Edit(MID, Scale(2.0)), Edit(Site(9, "resid_post"), Scale(2.0))]).__enter__()
    assert hooks_of(model) == []


def test_an_edit_does_not_write_into_what_a_tap_holds() -> None:
    ids = random_ids(1, 3)
    with (
        torch.no_grad(),
        tapped(LLAMA, [Site(0, "resid_post")]) as taps,
        edited(LLAMA, [Edit(Site(1, "resid_pre"), Scale(0.0))]),
    ):
        LLAMA(ids)
        held = taps[Site(0, "resid_post")]
    assert torch.equal(held, values_of(LLAMA, ids, site=Site(0, "resid_post")))


# Detach


def gradient_at_the_embeddings(*edits: Edit) -> tuple[Tensor, Tensor]:
    """Logits, and the gradient that each token's input embedding gets from the last token's logits."""
    embeddings = LLAMA.get_input_embeddings()(random_ids(1, 5)).detach().requires_grad_()
    with edited(LLAMA, edits):
        logits = LLAMA(inputs_embeds=embeddings).logits
    (gradient,) = torch.autograd.grad(
        logits[0, -1].square().sum(), embeddings, allow_unused=True, materialize_grads=True
    )
    return logits.detach(), gradient[0]


def test_detach_cuts_every_gradient_and_changes_no_value() -> None:
    plain, flowing = gradient_at_the_embeddings()
    logits, cut = gradient_at_the_embeddings(Edit(MID, Detach()))
    assert torch.equal(logits, plain)
    assert (flowing != 0).any(-1).all()
    assert not cut.any()


def test_detach_cuts_the_masked_tokens_alone() -> None:
    plain, _ = gradient_at_the_embeddings()
    # Cut the input of the first block: there, each token's stream is its own embedding and nothing else.
    site = Site(0, "resid_pre")
    mask = torch.tensor([[True, False, True, False, False]]).unsqueeze(-1)
    for edits in ([Edit(site, Detach(mask))], [Edit(site, Detach(), When(positions=(i, i + 1))) for i in (0, 2)]):
        logits, cut = gradient_at_the_embeddings(*edits)
        assert torch.equal(logits, plain)
        assert (cut != 0).any(-1).tolist() == [False, True, False, True, True]


def test_detach_cuts_the_masked_dimensions_alone() -> None:
    _, flowing = gradient_at_the_embeddings()
    mask = torch.arange(32) < 10
    _, cut = gradient_at_the_embeddings(Edit(Site(0, "resid_pre"), Detach(mask)))
    assert not cut[:, mask].any()
    assert torch.equal(cut[:, ~mask], flowing[:, ~mask])


def test_a_masked_detach_adds_its_part_and_the_rest_to_the_whole_gradient() -> None:
    """Cut one half of the dimensions, then the other: the two gradients add up, deep inside the model too."""
    mask = torch.arange(32) % 2 == 0
    whole, even, odd = (
        gradient_at_the_embeddings(*edits)[1] for edits in ([], [Edit(MID, Detach(mask))], [Edit(MID, Detach(~mask))])
    )
    torch.testing.assert_close(even + odd, whole, rtol=1e-4, atol=1e-4)


# Refusals


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Add(torch.full((32,), float("nan"))), "NaN or infinity"),
        (lambda: Add(ONES, float("inf")), r"Add\.scale is inf; give a finite number"),
        (lambda: Scale(float("nan")), r"Scale\.factor is nan"),
        (lambda: Ablate(torch.zeros(32)), "length 0 or infinity; give one"),
        (lambda: Ablate(torch.full((32,), 1e38)), "length 0 or infinity; give one"),
        (lambda: When(positions=(3, 3)), r"positions \(3, 3\) are empty.*end exclusive"),
        (lambda: When(positions=(-1, 2)), "counted from 0"),
        (lambda: When(rows=()), r"rows \(\) are empty.*None for all rows"),
        (lambda: When(rows=(0, -1)), "indices from 0"),
    ],
)
def test_an_op_or_when_that_cannot_be_is_refused(make: Any, words: str) -> None:
    with pytest.raises(SettingError, match=words):
        make()


@pytest.mark.parametrize(
    ("op", "words"),
    [
        (Add(torch.ones(31)), r"Add at 1\.resid_post got a vector.*\(31,\).*model has \(\(32,\)"),
        (Replace(ONES.bfloat16()), r"bfloat16.*float32.*\.to\(device, dtype\)"),
    ],
)
def test_a_vector_of_another_width_or_dtype_is_refused_before_any_pass(op: Any, words: str) -> None:
    with pytest.raises(SettingError, match=words):
        edited(LLAMA, [Edit(MID, op)]).__enter__()


def test_a_vector_or_mask_on_another_device_is_refused_before_any_pass() -> None:
    elsewhere = copy.deepcopy(LLAMA).to("meta")
    with pytest.raises(SettingError, match=r"Ablate.*type='cpu'.*model has.*type='meta'.*\.to\(device, dtype\)"):
        edited(elsewhere, [Edit(MID, Ablate(AXIS))]).__enter__()
    with pytest.raises(SettingError, match=r"mask on cpu; the model is on meta\. Use \.to\(meta\)"):
        edited(elsewhere, [Edit(MID, Detach(AXIS > 0))]).__enter__()


def test_what_does_not_fit_a_pass_is_refused_in_it() -> None:
    ids = random_ids(2, 5)
    with pytest.raises(
        SettingError, match=r"rows \(1, 2\) of the edit at 1\.resid_post are outside the batch: it has 2"
    ):
        values_of(LLAMA, ids, when_written(rows=(1, 2)))
    with pytest.raises(SettingError, match=r"mask of shape \(2, 4, 1\).*\(2, 5, 32\)"):
        values_of(LLAMA, ids, Edit(MID, Detach(torch.ones(2, 4, 1, dtype=torch.bool))))
    full = torch.zeros(2, 1, 5, 5)
    with pytest.raises(SettingError, match=r"attention_mask is \(2, 1, 5, 5\); give one of shape \(batch, 5\)"):
        values_of(LLAMA, ids, when_written(positions=(0, 1)), attention_mask=full)


@pytest.mark.parametrize(
    ("value", "change", "words"),
    [
        (Add(ONES), {"vector": torch.ones(1, 32)}, r"Add.*\(1, 32\).*give one vector of floats"),
        (Replace(ONES), {"vector": torch.ones(32, dtype=torch.long)}, r"int64; give one vector of floats"),
        (Detach(), {"mask": ONES}, r"mask of torch\.float32; give torch\.bool"),
        (When(), {"phase": "decode"}, "phase 'decode' is unknown; use one of prompt, generation, both"),
    ],
)
def test_a_wrong_type_is_refused_in_words_where_no_type_checker_runs(value: Any, change: Any, words: str) -> None:
    for name, wrong in change.items():
        object.__setattr__(value, name, wrong)  # around the checker of these tests, which would refuse first
    with pytest.raises(SettingError, match=words):
        value.__post_init__()


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(SettingError, match="prompt_length 0 is too small; give 1 or more"):
        edited(LLAMA, [], prompt_length=0).__enter__()
