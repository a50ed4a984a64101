from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from pilotfish.core import STREAMS, Site
from pilotfish.errors import SettingError, UnknownFamily
from pilotfish.models import FAMILIES, evenly_spaced_sites, family_of, num_layers, site_module, tiny_model

IDS = torch.arange(24)[None]


def hidden(output: object) -> Tensor:
    return output[0] if isinstance(output, tuple) else output  # type: ignore[return-value]


def activations(model: nn.Module, layer: int) -> dict[str, Tensor]:
    """What one forward pass puts at each stream of a layer, and at `final`."""
    seen: dict[str, Tensor] = {}
    handles = [
        site_module(model, Site(layer, "resid_pre")).register_forward_pre_hook(
            lambda _, args, kwargs: seen.update(resid_pre=args[0] if args else kwargs["hidden_states"]),
            with_kwargs=True,
        )
    ]
    for site in (*(Site(layer, stream) for stream in ("resid_post", "attn_out", "mlp_out")), Site(-1, "final")):
        handles.append(
            site_module(model, site).register_forward_hook(
                lambda _module, _args, output, name=site.stream: seen.update({name: hidden(output)})
            )
        )
    with torch.no_grad():
        model(IDS)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layer", [0, 2])
def test_attention_and_mlp_are_what_a_block_adds_to_the_residual_stream(family: str, layer: int) -> None:
    seen = activations(tiny_model(family, seed=1), layer)
    assert set(seen) == set(STREAMS)
    torch.testing.assert_close(seen["resid_pre"] + seen["attn_out"] + seen["mlp_out"], seen["resid_post"])


@pytest.mark.parametrize("family", FAMILIES)
def test_the_residual_stream_of_a_block_is_the_next_ones_input_and_ends_in_the_final_norm(family: str) -> None:
    model = tiny_model(family, seed=2)
    first, second, last = (activations(model, layer) for layer in range(3))
    assert torch.equal(first["resid_post"], second["resid_pre"])
    assert torch.equal(second["resid_post"], last["resid_pre"])
    norm = site_module(model, Site(-1, "final"))
    torch.testing.assert_close(norm(last["resid_post"]), last["final"])
    logits = model(IDS).logits
    torch.testing.assert_close(model.get_output_embeddings()(last["final"]), logits)


def test_a_site_beyond_the_last_layer_is_refused() -> None:
    model = tiny_model("llama", seed=0)
    assert num_layers(model) == 3
    with pytest.raises(SettingError, match=r"3\.mlp_out is outside the model: it has 3 layers, 0 to 2"):
        site_module(model, Site(3, "mlp_out"))


def test_an_architecture_without_a_row_is_refused_and_the_known_ones_are_named() -> None:
    stranger = nn.Linear(2, 2)
    stranger.config = SimpleNamespace(model_type="mamba")  # type: ignore[assignment]
    with pytest.raises(UnknownFamily, match=r"'mamba' has no row.*llama, qwen2.*Add a row"):
        family_of(stranger)


def test_evenly_spaced_sites_end_with_the_final_norm() -> None:
    model = tiny_model("gpt2", seed=0, num_layers=6)
    assert evenly_spaced_sites(model, 1) == (Site(-1, "final"),)
    assert [str(site) for site in evenly_spaced_sites(model, 3)] == ["1.resid_post", "3.resid_post", "final"]
    with pytest.raises(SettingError, match="give 1 to 6"):
        evenly_spaced_sites(model, 7)
