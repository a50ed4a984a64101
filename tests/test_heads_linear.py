"""A linear head by hand, and the banks that ship."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from conftest import seeded_bank

from pilotfish.core import Site
from pilotfish.errors import ArtefactError, SettingError
from pilotfish.heads import HeadBank, LinearHead, shipped_banks
from pilotfish.models import Pair
from pilotfish.scores import score_tokens
from pilotfish.taps import tapped

FINAL = Site(-1, "final")


def test_a_logit_is_the_weighted_sum_and_rescaling_acts_on_the_logit():
    head = LinearHead("m", (Site(0, "resid_post"), FINAL), torch.tensor([1.0, -2.0, 0.5, 4.0]), 0.25)
    features = torch.tensor([[1.0, 1.0, 2.0, 0.0], [0.0, 0.0, 0.0, 1.0]])
    assert head.hidden_size == 2
    assert head.logits(features).tolist() == [0.25, 4.25]
    assert head.logits(features.bfloat16()).tolist() == [0.25, 4.25]
    assert head.rescaled(2.0, -1.0).logits(features).tolist() == [-0.5, 7.5]


@pytest.mark.parametrize(
    ("weight", "bias", "sites", "words"),
    [
        (torch.tensor([1.0, math.nan]), 0.0, (FINAL,), "not finite; fit it again"),
        (torch.tensor([1.0, math.inf]), 0.0, (FINAL,), "not finite"),
        (torch.ones(2), math.nan, (FINAL,), "not finite"),
        (torch.ones(2), -math.inf, (FINAL,), "not finite"),
        (torch.ones(3), 0.0, (FINAL, Site(0, "resid_post")), r"shape \(3,\) for 2 sites"),
        (torch.ones(0), 0.0, (FINAL,), r"shape \(0,\)"),
        (torch.ones(2), 0.0, (), "name one or more, once"),
        (torch.ones(2), 0.0, (FINAL, FINAL), "name one or more, once"),
    ],
)
def test_a_head_that_cannot_work_is_refused(weight, bias, sites, words):
    with pytest.raises(ArtefactError, match=words):
        LinearHead("m", sites, weight, bias)


def test_one_pass_over_a_text_gives_the_sigmoid_of_each_heads_logits(pair: Pair, bank: HeadBank):
    ids = [5, 6, 7, 8, 9, 10]
    scores = score_tokens(pair.draft, bank, ids)
    with torch.inference_mode(), tapped(pair.draft, bank.sites) as taps:
        pair.draft(torch.tensor([ids]), use_cache=False)
        for column, head in enumerate(bank.heads):
            features = torch.cat([taps[site][0] for site in head.sites], dim=-1)
            assert torch.allclose(scores[:, column], head.logits(features).sigmoid(), atol=1e-6)


def test_the_score_of_a_token_does_not_depend_on_what_follows(pair: Pair, bank: HeadBank):
    ids = [5, 6, 7, 8, 9, 10]
    assert torch.allclose(score_tokens(pair.draft, bank, ids)[:3], score_tokens(pair.draft, bank, ids[:3]), atol=1e-6)


def test_a_text_without_tokens_is_refused(pair: Pair, bank: HeadBank):
    with pytest.raises(SettingError, match="no tokens"):
        score_tokens(pair.draft, bank, [])


def test_a_shipped_bank_is_found_by_the_model_it_was_made_for_and_by_no_other(pair: Pair, tmp_path):
    for reader in ("draft", "target"):
        seeded_bank(pair, reader=reader).save(tmp_path / reader)
    found = shipped_banks(pair.draft_identity, tmp_path)
    assert [bank.identity for bank in found] == [pair.draft_identity]
    renamed = dataclasses.replace(pair.draft_identity, name="another name")
    assert len(shipped_banks(renamed, tmp_path)) == 1
    assert shipped_banks(dataclasses.replace(pair.draft_identity, weights="other"), tmp_path) == []


def test_a_damaged_shipped_bank_is_no_silent_absence(pair: Pair, tmp_path):
    folder = seeded_bank(pair, reader="draft").save(tmp_path / "bank")
    (folder / "heads.safetensors").write_bytes(b"cut")
    with pytest.raises(ArtefactError, match="SHA-256"):
        shipped_banks(pair.draft_identity, tmp_path)
