"""A head by hand, what a pass over a text gives, and the banks that ship."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
import torch
from conftest import seeded_bank

from pilotfish.core import Site
from pilotfish.errors import ArtefactError, SettingError
from pilotfish.heads import Form, Head, HeadBank, linear_head, load_bank, shipped_banks, shipped_folders
from pilotfish.heads.shipped import SHIPPED
from pilotfish.models import Pair
from pilotfish.scores import score_tokens
from pilotfish.taps import tapped

FINAL = Site(-1, "final")


def test_a_logit_is_the_weighted_sum_and_rescaling_acts_on_the_logit():
    head = linear_head("m", (Site(0, "resid_post"), FINAL), torch.tensor([1.0, -2.0, 0.5, 4.0]), 0.25)
    features = torch.tensor([[1.0, 1.0, 2.0, 0.0], [0.0, 0.0, 0.0, 1.0]])
    assert head.hidden_size == 2
    for which in ("token", "response"):
        assert head.logits(features, which).tolist() == [0.25, 4.25]
        assert head.logits(features.bfloat16(), which).tolist() == [0.25, 4.25]
        assert head.rescaled(which, 2.0, -1.0).logits(features).tolist() == [-0.5, 7.5]
    assert head.logits(features).tolist() == [0.25, 4.25], "rescaling leaves the head as it was"


def test_a_head_of_two_channels_reads_the_token_off_one_and_the_response_off_the_other():
    weight, bias = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([0.5, -1.0])
    head = Head("m", (FINAL,), weight, bias, Form(window=2), torch.tensor([-2.0]))
    features = torch.tensor([[1.0, 1.0], [3.0, 4.0], [5.0, 0.0]])
    assert head.channels(features).tolist() == [[1.5, 1.0], [3.5, 7.0], [5.5, -1.0]]
    assert head.logits(features).tolist() == [1.5, 3.5, 5.5]
    assert head.logits(features, "response").tolist() == [(1.0 - 2.0) / 2, 4.0, 3.0]
    with pytest.raises(AssertionError, match="keeps the order"):
        head.rescaled("token", -1.0, 0.0)


@pytest.mark.parametrize(
    ("weight", "bias", "sites", "words"),
    [
        (torch.tensor([1.0, math.nan]), 0.0, (FINAL,), "not finite; fit it again"),
        (torch.tensor([1.0, math.inf]), 0.0, (FINAL,), "not finite"),
        (torch.ones(2), math.nan, (FINAL,), "not finite"),
        (torch.ones(2), -math.inf, (FINAL,), "not finite"),
        (torch.ones(3), 0.0, (FINAL, Site(0, "resid_post")), r"shape \(1, 3\), \(1,\), \(1,\) for 2 sites"),
        (torch.ones(0), 0.0, (FINAL,), r"shape \(1, 0\)"),
        (torch.ones(2), 0.0, (), "name one or more, once"),
        (torch.ones(2), 0.0, (FINAL, FINAL), "name one or more, once"),
    ],
)
def test_a_head_that_cannot_work_is_refused(weight, bias, sites, words):
    with pytest.raises(ArtefactError, match=words):
        linear_head("m", sites, weight, bias)


@pytest.mark.parametrize(
    ("form", "shapes"),
    [
        (Form(), ((1, 4), (1,), (1,))),
        (Form(), ((2, 4), (2,), (0,))),
        (Form(width=1), ((2, 4), (2,), (1,))),
        (Form(kind="attention", width=1), ((2, 4), (2,), (0,))),
        (Form(kind="mlp", width=2), ((2, 4), (2,), (6,))),
        (Form(kind="multimax"), ((3, 4), (3,), (1,))),
    ],
    ids=str,
)
def test_weights_that_do_not_fill_the_form_are_refused_with_their_shapes(form, shapes):
    weight, bias, outputs = (torch.zeros(shape) for shape in shapes)
    with pytest.raises(ArtefactError, match=f"1 sites and {form.num_channels} channels") as caught:
        Head("m", (FINAL,), weight, bias, form, outputs)
    assert ", ".join(map(str, shapes)) in str(caught.value)


def test_an_output_layer_that_is_not_finite_is_refused():
    outputs = torch.tensor([0.0, math.nan, 0.0, 0.0, 0.0])
    with pytest.raises(ArtefactError, match="not finite"):
        Head("m", (FINAL,), torch.zeros(1, 4), torch.zeros(1), Form(kind="mlp", width=1), outputs)


def test_one_pass_over_a_text_gives_the_sigmoid_of_each_heads_logits(pair: Pair, windowed: HeadBank):
    ids = [5, 6, 7, 8, 9, 10]
    scores = score_tokens(pair.draft, windowed, ids)
    with torch.inference_mode(), tapped(pair.draft, windowed.sites) as taps:
        pair.draft(torch.tensor([ids]), use_cache=False)
        for column, head in enumerate(windowed.heads):
            features = torch.cat([taps[site][0] for site in head.sites], dim=-1)
            assert torch.allclose(scores.tokens[:, column], head.logits(features).sigmoid(), atol=1e-6)
            assert torch.allclose(scores.running[:, column], head.logits(features, "response").sigmoid(), atol=1e-6)


def test_the_scores_of_a_token_do_not_depend_on_what_follows(pair: Pair, windowed: HeadBank):
    ids = [5, 6, 7, 8, 9, 10]
    for whole, part in zip(
        score_tokens(pair.draft, windowed, ids), score_tokens(pair.draft, windowed, ids[:3]), strict=True
    ):
        assert torch.allclose(whole[:3], part, atol=1e-6)


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


def test_each_bank_that_ships_is_taken_for_its_own_reader_alone():
    shipped = [load_bank(path) for path in SHIPPED.iterdir()]
    for bank in shipped:
        found = {load_bank(path).identity.weights for path in shipped_folders(bank.identity)}
        assert found == {bank.identity.weights}
    assert len({bank.identity.weights for bank in shipped}) == 2


def test_a_name_finds_a_bank_that_ships_unless_a_folder_has_it(pair: Pair, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = Path("smollm2-135m-refusal")
    assert load_bank(name).metrics == ("refusal",)
    mine = seeded_bank(pair, reader="draft")
    mine.save(name)
    assert load_bank(name).metrics == mine.metrics
    with pytest.raises(
        ArtefactError, match=r"no folder refusla, and no bank .* ships; .* those that ship are .*refusal"
    ):
        load_bank(Path("refusla"))


def test_a_damaged_shipped_bank_is_no_silent_absence(pair: Pair, tmp_path):
    folder = seeded_bank(pair, reader="draft").save(tmp_path / "bank")
    (folder / "heads.safetensors").write_bytes(b"cut")
    with pytest.raises(ArtefactError, match="SHA-256"):
        shipped_banks(pair.draft_identity, tmp_path)
