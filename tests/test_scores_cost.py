"""What a head costs over a judge, by hand."""

from __future__ import annotations

import pytest
import torch
from conftest import seeded_bank
from torch.utils.flop_counter import FlopCounterMode

from pilotfish.models import LoadedModel, Pair
from pilotfish.scores import cost_over_judge, head_flops_per_token, model_flops_per_token


@pytest.fixture(scope="module")
def reader(pair: Pair) -> LoadedModel:
    return LoadedModel(pair.draft, pair.tokenizer, pair.draft_identity, "tiny")


def test_a_head_multiplies_each_hidden_unit_of_its_sites_once_a_channel(pair: Pair):
    bank = seeded_bank(pair, reader="draft")  # two channels, three sites of 32 units
    assert head_flops_per_token(bank) == 2 * 2 * 3 * 32


def test_a_model_passes_a_token_through_every_weight_but_its_embeddings(reader: LoadedModel):
    model = reader.model
    embeddings = {id(model.get_input_embeddings().weight), id(model.get_output_embeddings().weight)}
    others = sum(weight.numel() for weight in model.parameters() if id(weight) not in embeddings)
    assert model_flops_per_token(reader) == 2 * others
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:  # as torch counts a pass of one token
        model.base_model(torch.tensor([[5]]))
    matrices = sum(weight.numel() for weight in model.base_model.parameters() if weight.ndim == 2)
    matrices -= model.get_input_embeddings().weight.numel()
    assert counter.get_total_flops() == pytest.approx(2 * matrices, rel=0.02)
    assert model_flops_per_token(reader) == pytest.approx(2 * matrices, rel=0.02)


def test_the_share_is_that_of_all_texts_together(pair: Pair, reader: LoadedModel):
    bank = seeded_bank(pair, reader="draft")
    found = cost_over_judge(
        bank,
        reader,
        num_read=torch.tensor([10, 30, 20]),
        num_judged=torch.tensor([40, 40, 40]),
        groups=["a", "b", "c"],
        generator=torch.Generator().manual_seed(0),
    )
    assert found["tokens_over_judge"].value == pytest.approx(60 / 120)
    assert 10 / 40 <= found["tokens_over_judge"].low < 0.5 < found["tokens_over_judge"].high <= 30 / 40
    share = head_flops_per_token(bank) / model_flops_per_token(reader)
    assert found["cost_over_judge"].value == pytest.approx(0.5 * share)
    assert found["cost_over_judge"].n == 3
