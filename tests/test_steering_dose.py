"""A dose becomes edits, and its size is told in units of the stream; gates open where a head fires."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import random_ids
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pilotfish.core import Site
from pilotfish.errors import SettingError
from pilotfish.heads import Head, linear_head
from pilotfish.models import Pair
from pilotfish.steering import Direction, DirectionCard, HeadGate, Steering, dose_of, relative_dose, stream_norms
from pilotfish.taps import Add, Edit, Replace, When, edited, tapped

MID = Site(1, "resid_post")
ROWS = [random_ids(1, 9)[0].tolist(), random_ids(2, 6)[1].tolist()]
KINDS = ("add", "add_keeping_norm", "ablate", "ablate_add")


def direction(pair: Pair, site: Site = MID, *, seed: int = 1, scale: float = 1.0) -> Direction:
    vector = scale * torch.randn(32, generator=torch.Generator().manual_seed(seed))
    card = DirectionCard(name="d", identity=pair.target_identity, method="imported")
    return Direction(site=site, vector=vector, card=card)


def logits(pair: Pair, edits: Any) -> Tensor:
    with torch.no_grad(), edited(pair.target, edits):
        return pair.target(random_ids(2, 5)).logits


@pytest.mark.parametrize("kind", KINDS)
def test_dose_zero_of_every_kind_keeps_the_very_bits(pair: Pair, kind: Any) -> None:
    steering = Steering(directions=(direction(pair), direction(pair, Site(2, "mlp_out"))), kind=kind)
    assert torch.equal(logits(pair, steering.edits(0.0, pair.target)), logits(pair, ()))
    assert not torch.equal(logits(pair, steering.edits(1.0, pair.target)), logits(pair, ()))


def test_several_directions_act_at_once_each_at_its_own_site(pair: Pair) -> None:
    parts = (direction(pair), direction(pair, Site(0, "mlp_out"), seed=2))
    by_hand = [Edit(part.site, Add(part.vector, -3.0)) for part in parts]
    steering = Steering(directions=parts)
    assert torch.equal(logits(pair, steering.edits(-3.0, pair.target)), logits(pair, by_hand))


def test_the_length_of_the_stream_is_the_median_without_first_tokens(pair: Pair) -> None:
    with torch.no_grad(), tapped(pair.target, [MID]) as taps:
        lengths = []
        for row in ROWS:
            pair.target(torch.tensor([row]))
            lengths.append(taps[MID][0, 1:].norm(dim=-1))
    found = stream_norms(pair.target, [MID], ROWS)[MID]
    assert found == pytest.approx(float(torch.cat(lengths).median()), rel=1e-6)


def test_a_huge_first_token_does_not_move_the_length_of_the_stream(pair: Pair) -> None:
    plain = stream_norms(pair.target, [Site(0, "resid_pre")], ROWS)
    huge = Edit(Site(0, "resid_pre"), Replace(torch.full((32,), 1e4)), When(positions=(0, 1)))
    with edited(pair.target, [huge]):
        assert stream_norms(pair.target, [Site(0, "resid_pre")], ROWS) == plain


def test_rows_of_one_token_have_no_length_to_tell(pair: Pair) -> None:
    with pytest.raises(SettingError, match="give rows of 2 or more"):
        stream_norms(pair.target, [MID], [[3], [4]])


@settings(max_examples=30, deadline=None)
@given(relative=st.floats(1e-3, 10), length=st.floats(1e-3, 1e3), norm=st.floats(1e-2, 1e3))
def test_a_relative_dose_is_the_share_of_the_stream_that_is_added(
    pair: Pair, relative: float, length: float, norm: float
) -> None:
    one = direction(pair, scale=length)
    dose = dose_of(Steering(directions=(one,)), relative, {MID: norm})
    assert relative_dose(Steering(directions=(one,)), -dose, {MID: norm}) == pytest.approx(relative)
    assert dose * one.norm / norm == pytest.approx(relative)


def test_an_ablation_is_dosed_by_its_share(pair: Pair) -> None:
    assert relative_dose(Steering(directions=(direction(pair),), kind="ablate"), 0.5, {MID: 7.0}) == 0.5


def test_a_vector_of_zero_has_no_dose(pair: Pair) -> None:
    with pytest.raises(SettingError, match="no dose makes them act"):
        dose_of(Steering(directions=(direction(pair, scale=0.0),)), 0.1, {MID: 1.0})
    with pytest.raises(SettingError, match="give at least one"):
        Steering(directions=())


# Gates


def head(threshold_at: float = 0.0) -> Head:
    return linear_head("m", (Site(0, "resid_post"), MID), torch.arange(64.0) / 64 - 0.5, -threshold_at)


def gated(pair: Pair, gate: HeadGate) -> Tensor:
    """Which tokens a replacement under the gate wrote."""
    edit = Edit(MID, Replace(torch.ones(32)), When(gate=gate))
    with torch.no_grad(), edited(pair.target, [edit]), tapped(pair.target, [MID]) as taps:
        pair.target(random_ids(2, 8))
        return (taps[MID] == 1).all(-1)


@pytest.mark.parametrize("threshold", [0.2, 0.5, 0.9])
def test_a_head_gate_opens_where_the_heads_probability_reaches_it(pair: Pair, threshold: float) -> None:
    with torch.no_grad(), tapped(pair.target, head().sites) as taps:
        pair.target(random_ids(2, 8))
        features = torch.cat([taps[site] for site in head().sites], dim=-1)
    expected = torch.stack([head().logits(row).sigmoid() >= threshold for row in features])
    assert expected.any() and not expected.all()
    assert torch.equal(gated(pair, HeadGate(head(), threshold)), expected)


def test_a_head_gate_opens_where_the_head_gives_no_number() -> None:
    features = torch.full((1, 2, 64), math.nan)
    features[0, 1] = 0.0
    assert HeadGate(head(100.0), 0.5).opens(features).tolist() == [[True, False]]


@pytest.mark.parametrize("threshold", [0.0, 1.0, math.nan])
def test_a_gate_without_a_probability_is_refused(threshold: float) -> None:
    with pytest.raises(SettingError, match="outside \\(0, 1\\)"):
        replace(HeadGate(head(), 0.5), threshold=threshold)
