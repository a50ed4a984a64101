"""What a tap reads is what transformers computes, wherever the padding stands and however the passes are cut."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import hooks_of, random_ids
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from pilotfish.core import STREAMS, Site
from pilotfish.errors import SettingError, UnknownFamily
from pilotfish.models import FAMILIES, num_layers, site_module, tiny_model
from pilotfish.taps import tapped

FINAL = Site(-1, "final")
SITES = (*(Site(layer, stream) for layer in range(3) for stream in STREAMS if stream != "final"), FINAL)
MODELS = {family: tiny_model(family, seed=0) for family in FAMILIES}


def values_of(model: PreTrainedModel, ids: Tensor, **call: Any) -> dict[Site, Tensor]:
    with torch.no_grad(), tapped(model, SITES) as taps:
        model(ids, **call)
        return dict(taps)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_residual_stream_and_the_final_norm_are_bitwise_those_of_transformers(family: str) -> None:
    model, ids = MODELS[family], random_ids(2, 9)
    taps = values_of(model, ids)
    with torch.no_grad():
        theirs = model(ids, output_hidden_states=True).hidden_states
    assert len(theirs) == num_layers(model) + 1
    for layer in range(3):
        assert torch.equal(taps[Site(layer, "resid_pre")], theirs[layer])
    for layer in range(2):
        assert torch.equal(taps[Site(layer, "resid_post")], theirs[layer + 1])
    assert torch.equal(taps[FINAL], theirs[-1])  # their last state is after the final norm, and so is ours
    last_block = taps[Site(2, "resid_post")]
    assert not torch.allclose(last_block, theirs[-1])
    assert torch.equal(site_module(model, FINAL)(last_block), theirs[-1])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_block_adds_its_attention_and_mlp_outputs_to_the_stream(family: str) -> None:
    taps = values_of(MODELS[family], random_ids(2, 9))
    for layer in range(3):
        parts = [taps[Site(layer, stream)] for stream in ("resid_pre", "attn_out", "mlp_out")]
        torch.testing.assert_close(sum(parts), taps[Site(layer, "resid_post")])


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
def test_padding_on_either_side_leaves_the_text_as_it_is_alone(family: str, side: str) -> None:
    model, ids = MODELS[family], random_ids(2, 9)
    mask = torch.ones_like(ids)
    text = slice(4, None) if side == "left" else slice(None, 5)
    mask[1] = 0
    mask[1, text] = 1
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    together = values_of(model, ids, attention_mask=mask, position_ids=positions)
    alone = values_of(model, ids[1:, text])
    for site in SITES:
        assert together[site].shape == (2, 9, 32)
        torch.testing.assert_close(together[site][1:, text], alone[site], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_one_token_at_a_time_on_a_cache_gives_what_one_pass_gives(family: str) -> None:
    model, ids = MODELS[family], random_ids(2, 7)
    whole = values_of(model, ids)
    cache = DynamicCache(config=model.config)
    steps = [values_of(model, ids[:, i : i + 1], past_key_values=cache, use_cache=True) for i in range(7)]
    for site in SITES:
        assert steps[0][site].shape == (2, 1, 32)
        torch.testing.assert_close(torch.cat([step[site] for step in steps], 1), whole[site], rtol=1e-5, atol=1e-5)


def test_generate_leaves_the_state_that_made_its_last_token() -> None:
    model, ids = MODELS["llama"], random_ids(1, 5)
    with torch.no_grad(), tapped(model, [FINAL]) as taps:
        text = model.generate(ids, max_new_tokens=4, min_new_tokens=4, do_sample=False)
        assert taps[FINAL].shape == (1, 1, 32)
        assert model.lm_head(taps[FINAL])[0, -1].argmax() == text[0, -1]


class Tupled(nn.Module):
    """A module whose output stands first in a tuple, as that of blocks in some versions of transformers."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, hidden: Tensor) -> tuple[Tensor, str]:
        return self.inner(hidden), "more"


def test_a_tuple_reads_as_its_first_and_a_keyword_input_as_a_positional_one() -> None:
    model, ids = tiny_model("llama", seed=0), random_ids(1, 6)
    before = values_of(model, ids)
    block = model.model.layers[1]
    block.register_forward_pre_hook(
        lambda _, args, kwargs: ((), {**kwargs, "hidden_states": args[0]}), with_kwargs=True
    )
    block.mlp = Tupled(block.mlp)
    with tapped(model, [Site(1, "resid_pre"), Site(1, "mlp_out")]) as taps:
        with pytest.raises(TypeError):  # the block itself cannot add a tuple
            model(ids)
        for site in taps.sites:
            assert torch.equal(taps[site], before[site])


def test_taps_hold_the_last_pass_detached_until_cleared() -> None:
    model = MODELS["llama"]
    with tapped(model, [FINAL]) as taps:
        assert len(taps) == 0
        model(random_ids(1, 3))
        first = taps[FINAL]
        model(random_ids(2, 4))
        assert taps[FINAL].shape == (2, 4, 32)
        assert not taps[FINAL].requires_grad and first.shape == (1, 3, 32)
        taps.clear()
        assert list(taps) == []
        with pytest.raises(KeyError):
            taps[FINAL]


def test_taps_keep_the_dtype_of_the_model() -> None:
    model = tiny_model("llama", seed=0).to(torch.bfloat16)
    assert {value.dtype for value in values_of(model, random_ids(1, 3)).values()} == {torch.bfloat16}


def test_no_hook_outlives_the_block_whether_it_ends_well_or_raises() -> None:
    model = tiny_model("gpt2", seed=0)
    with tapped(model, SITES):
        assert len(hooks_of(model)) == len(SITES)
    assert hooks_of(model) == []
    with pytest.raises(ZeroDivisionError), tapped(model, SITES):
        raise ZeroDivisionError
    assert hooks_of(model) == []


def test_no_hook_stays_when_entering_raises() -> None:
    model = tiny_model("llama", seed=0)
    with pytest.raises(SettingError, match=r"9\.resid_post is outside the model: it has 3 layers, 0 to 2"):
        tapped(model, [FINAL, Site(9, "resid_post")]).__enter__()
    assert hooks_of(model) == []


def test_a_site_named_twice_and_a_model_without_a_row_are_refused() -> None:
    with pytest.raises(SettingError, match="named twice in final, final; name each once"):
        tapped(MODELS["llama"], [FINAL, FINAL]).__enter__()
    with pytest.raises(UnknownFamily, match=r"'Linear' has no row.*Add a row"):
        tapped(nn.Linear(2, 2), [FINAL]).__enter__()
