"""Low-rank adapters: nothing changes before they are trained, and merging only moves where the change stands."""

import pytest
import torch
from conftest import random_ids

from pilotfish.errors import SettingError
from pilotfish.models import FAMILIES, tiny_model
from pilotfish.runs import generator
from pilotfish.scores.adapter import AdapterConfig, adapted

IDS = random_ids(2, 20)


def trained(model, config, seed=0):
    """Adapters that have moved a little."""
    made = adapted(model, config, generator=generator(seed, "adapter"))
    random = generator(seed, "moved")
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=random))
    return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", list(FAMILIES))
def test_untrained_adapters_change_no_bit(family, dtype):
    model = tiny_model(family, seed=0).to(dtype)
    made = adapted(model, AdapterConfig(rank=4, depth=1.0), generator=generator(0, "adapter"))
    assert torch.equal(made.model(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize("family", list(FAMILIES))
def test_merged_weights_say_what_the_adapters_said(family):
    model = tiny_model(family, seed=0)
    made = trained(model, AdapterConfig(rank=4))
    before, apart = model(IDS).logits, made.model(IDS).logits
    merged = made.merged()
    together = merged(IDS).logits
    assert (apart - before).abs().max() > 0.1
    assert (together - apart).abs().max() < 1e-3
    assert type(merged) is type(model)
    assert not any("lora" in name for name, _ in merged.named_parameters())
    assert torch.equal(model(IDS).logits, before), "the original is as it was"


def test_the_original_keeps_every_bit_its_gradients_and_its_storage():
    model = tiny_model("llama", seed=0)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    made = trained(model, AdapterConfig(rank=2))
    merged = made.merged()
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())
    shared = {name: value.data_ptr() for name, value in model.named_parameters()}
    alike = {name for name, value in merged.named_parameters() if value.data_ptr() == shared[name]}
    assert "model.layers.0.mlp.up_proj.weight" in alike, "what is not tuned is not copied"
    assert "model.layers.2.mlp.up_proj.weight" not in alike


def test_only_the_named_maps_of_the_upper_blocks_are_tuned():
    made = adapted(
        tiny_model("llama", seed=0),
        AdapterConfig(rank=2, depth=0.3, modules=("q_proj", "v_proj")),
        generator=generator(0, "a"),
    )
    tuned = {name.split(".lora_")[0] for name, p in made.model.named_parameters() if p.requires_grad}
    assert tuned == {"model.layers.2.self_attn.q_proj", "model.layers.2.self_attn.v_proj"}
    assert {p.dtype for p in made.parameters()} == {torch.float32}


def test_adapters_beside_bfloat16_weights_are_float32():
    made = adapted(tiny_model("llama", seed=0).bfloat16(), AdapterConfig(rank=2), generator=generator(0, "a"))
    assert {p.dtype for p in made.parameters()} == {torch.float32}
    assert made.merged().dtype == torch.bfloat16


def test_the_start_is_drawn_from_the_generator_alone():
    model = tiny_model("llama", seed=0)
    state = torch.random.get_rng_state()
    one, two, other = (
        adapted(model, AdapterConfig(rank=2), generator=generator(seed, "a")).parameters()[0] for seed in (0, 0, 1)
    )
    assert torch.equal(one, two)
    assert not torch.equal(one, other)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_an_adapter_that_is_not_finite_is_not_merged():
    made = adapted(tiny_model("llama", seed=0), AdapterConfig(rank=2), generator=generator(0, "a"))
    with torch.no_grad():
        made.parameters()[1].fill_(float("nan"))
    with pytest.raises(SettingError, match=r"not finite.*smaller learning rate"):
        made.merged()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rank": 0}, "rank 0 and alpha 32.0 are not allowed"),
        ({"alpha": 0.0}, "rank 16 and alpha 0.0 are not allowed"),
        ({"depth": 0.0}, r"depth 0.0 is outside \(0, 1\]"),
    ],
)
def test_settings_out_of_range_are_refused(changes, words):
    with pytest.raises(SettingError, match=words):
        AdapterConfig(**changes)


def test_a_map_that_is_not_there_is_refused_with_those_that_are():
    with pytest.raises(SettingError, match="called 'query'; there are down_proj, gate_proj, k_proj"):
        adapted(tiny_model("llama", seed=0), AdapterConfig(modules=("query",)), generator=generator(0, "a"))
