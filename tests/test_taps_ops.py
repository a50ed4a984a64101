"""Ops that take lengths and projections, gates, and prompts of several lengths."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import random_ids
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pilotfish.core import Site
from pilotfish.errors import SettingError
from pilotfish.models import tiny_model
from pilotfish.taps import (
    Ablate,
    AblateAdd,
    Add,
    AddKeepingNorm,
    Clamp,
    Edit,
    ProjectionGate,
    Replace,
    When,
    edited,
    tapped,
)

LLAMA = tiny_model("llama", seed=0)
MID = Site(1, "resid_post")
ONES = torch.ones(32)
AXIS = torch.eye(32)[0]


def random(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("op", "expected"),
    [
        (Ablate(torch.tensor([2.0, 0.0]), share=0.5), [1.5, 4.0]),
        (Ablate(torch.tensor([2.0, 0.0]), share=2.0), [-3.0, 4.0]),
        (AblateAdd(torch.tensor([2.0, 0.0]), scale=5.0), [10.0, 4.0]),
        (AblateAdd(torch.tensor([2.0, 0.0]), scale=0.0), [0.0, 4.0]),
        (AddKeepingNorm(torch.tensor([0.0, 4.0]), scale=-1.0), [5.0, 0.0]),
        (AddKeepingNorm(torch.tensor([-3.0, -4.0])), [0.0, 0.0]),
        (Clamp(direction=torch.tensor([9.0, 0.0]), low=4.0), [4.0, 4.0]),
        (Clamp(direction=torch.tensor([9.0, 0.0]), high=2.0), [2.0, 4.0]),
        (Clamp(direction=torch.tensor([9.0, 0.0]), low=-7.0, high=-7.0), [-7.0, 4.0]),
        (Clamp(direction=torch.tensor([-1.0, 0.0]), low=-3.5, high=0.0), [3.0, 4.0]),
    ],
)
def test_an_op_gives_its_hand_value(op: Any, expected: list[float]) -> None:
    torch.testing.assert_close(op.apply(torch.tensor([[[3.0, 4.0]]])), torch.tensor([[expected]]))


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**31), scale=st.floats(-10, 10))
def test_a_norm_preserving_add_keeps_every_length_and_points_where_the_sum_does(seed: int, scale: float) -> None:
    hidden, vector = random(2, 3, 8, seed=seed), random(8, seed=seed + 1)
    turned = AddKeepingNorm(vector, scale).apply(hidden)
    torch.testing.assert_close(turned.norm(dim=-1), hidden.norm(dim=-1), rtol=1e-4, atol=1e-5)
    cosine = torch.cosine_similarity(turned, hidden + scale * vector, dim=-1)
    torch.testing.assert_close(cosine, torch.ones(2, 3), rtol=0, atol=1e-4)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**31), low=st.floats(-3, 3), width=st.floats(0, 3), length=st.floats(1e-2, 1e2))
def test_a_clamped_projection_lies_in_its_bounds_and_nothing_else_moves(
    seed: int, low: float, width: float, length: float
) -> None:
    hidden, unit = random(2, 3, 8, seed=seed), torch.nn.functional.normalize(random(8, seed=seed + 1), dim=0)
    clamped = Clamp(direction=length * unit, low=low, high=low + width).apply(hidden)
    torch.testing.assert_close(clamped @ unit, (hidden @ unit).clamp(low, low + width), rtol=0, atol=1e-4)
    torch.testing.assert_close(Ablate(unit).apply(clamped), Ablate(unit).apply(hidden), rtol=0, atol=1e-4)
    again = Clamp(direction=length * unit, low=low, high=low + width).apply(clamped)
    torch.testing.assert_close(again, clamped, rtol=0, atol=1e-4)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**31), scale=st.floats(-10, 10))
def test_ablate_and_add_is_an_ablation_followed_by_an_addition(seed: int, scale: float) -> None:
    hidden, vector = random(2, 3, 8, seed=seed), random(8, seed=seed + 1)
    expected = Add(vector, scale).apply(Ablate(vector).apply(hidden))
    torch.testing.assert_close(AblateAdd(vector, scale).apply(hidden), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("op", [Add(ONES, 0.0), AddKeepingNorm(ONES, 0.0), Ablate(ONES, share=0.0)])
def test_dose_zero_keeps_the_very_bits(op: Any) -> None:
    hidden = torch.tensor([[[-0.0, 1e-42, 3.0]]])
    assert torch.equal(op.apply(hidden).view(torch.int32), hidden.view(torch.int32))


@pytest.mark.parametrize("make", [AddKeepingNorm, AblateAdd, lambda v: Clamp(direction=v, high=0.0), Ablate])
def test_a_vector_that_learns_gets_the_gradient_of_each_pass(make: Any) -> None:
    vector = random(32).requires_grad_()
    with edited(LLAMA, [Edit(MID, make(vector))]):
        for _ in range(2):  # a graph that was built once for both would be gone in the second
            LLAMA(random_ids(1, 3)).logits.square().sum().backward()
    assert vector.grad is not None and vector.grad.abs().sum() > 0
    LLAMA.zero_grad()


# Gates


def written(edit: Edit, **how: Any) -> list[list[int]]:
    """Columns of each row that a `Replace(ONES)` wrote."""
    with torch.no_grad(), edited(LLAMA, [edit], **how), tapped(LLAMA, [MID]) as taps:
        LLAMA(random_ids(2, 6), use_cache=False)
        return [row.nonzero().flatten().tolist() for row in (taps[MID] == 1).all(-1)]


@pytest.mark.parametrize("side", ["above", "below"])
@pytest.mark.parametrize("site", [Site(0, "resid_pre"), Site(1, "attn_out"), MID], ids=str)
def test_a_gate_opens_on_its_side_of_the_projection_at_its_own_site(side: Any, site: Site) -> None:
    with torch.no_grad(), tapped(LLAMA, [site]) as taps:
        LLAMA(random_ids(2, 6))
        along = taps[site][..., 0]
    threshold = float(along.median())
    opens = along >= threshold if side == "above" else along <= threshold
    gate = ProjectionGate(site, 7 * AXIS, threshold, side)
    assert written(Edit(MID, Replace(ONES), When(gate=gate))) == [row.nonzero().flatten().tolist() for row in opens]


def test_a_gate_reads_what_was_there_before_the_edits_of_its_site() -> None:
    gate = ProjectionGate(MID, AXIS, 1e3)
    push = Edit(MID, Add(AXIS, 1e6))
    with torch.no_grad(), edited(LLAMA, [push, Edit(MID, Replace(ONES), When(gate=gate))]):
        states = LLAMA(random_ids(1, 3), output_hidden_states=True).hidden_states[2]
    assert (states[..., 0] > 1e5).all()


def test_a_gate_that_reads_deeper_than_its_edit_is_refused() -> None:
    edit = Edit(Site(1, "mlp_out"), Replace(ONES), When(gate=ProjectionGate(MID, AXIS, 0.0)))
    with pytest.raises(SettingError, match=r"gate of the edit at 1\.mlp_out reads 1\.resid_post.*only later"):
        edited(LLAMA, [edit]).__enter__()


def test_a_gate_of_another_width_is_refused() -> None:
    edit = Edit(MID, Replace(ONES), When(gate=ProjectionGate(MID, torch.ones(31), 0.0)))
    with pytest.raises(SettingError, match="direction of 31 numbers; the model has 32"):
        edited(LLAMA, [edit]).__enter__()


# Prompts of several lengths


def test_each_row_has_its_own_end_of_the_prompt() -> None:
    lengths = {"prompt_length": [2, 5]}
    assert written(Edit(MID, Replace(ONES), When(phase="prompt")), **lengths) == [[0, 1], [0, 1, 2, 3, 4]]
    assert written(Edit(MID, Replace(ONES), When(phase="generation")), **lengths) == [[2, 3, 4, 5], [5]]


@pytest.mark.parametrize(
    ("lengths", "words"), [([1, 2, 3], "3 numbers, but this pass has 2 rows"), ([], "too small"), ([4, 0], "too small")]
)
def test_lengths_that_fit_no_batch_are_refused(lengths: list[int], words: str) -> None:
    with pytest.raises(SettingError, match=words):
        written(Edit(MID, Replace(ONES), When(phase="prompt")), prompt_length=lengths)


@pytest.mark.parametrize("bounds", [{}, {"low": 2.0, "high": 1.0}, {"low": float("inf")}, {"high": float("nan")}])
def test_bounds_that_clamp_nothing_are_refused(bounds: dict[str, float]) -> None:
    with pytest.raises(SettingError, match="finite low, a finite high or both"):
        Clamp(direction=AXIS, **bounds)


@pytest.mark.parametrize(
    "make", [AblateAdd, lambda v: Clamp(direction=v, low=0.0), lambda v: ProjectionGate(MID, v, 0.0)]
)
def test_a_direction_of_length_zero_is_refused(make: Any) -> None:
    with pytest.raises(SettingError, match="direction of length 0"):
        make(torch.zeros(32))
