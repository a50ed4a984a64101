"""A slice is the model between two sites, in every family: its values are those of the edited model, its derivatives
those of finite differences."""

from __future__ import annotations

import pytest
import torch
from conftest import hooks_of, random_ids
from torch import Tensor
from transformers import PreTrainedModel

from pilotfish.core import Site
from pilotfish.discovery import Response, Slice
from pilotfish.errors import SettingError, TextError
from pilotfish.models import FAMILIES, tiny_model
from pilotfish.taps import Add, Edit, edited, tapped

MODELS = {family: tiny_model(family, seed=0, num_layers=4) for family in FAMILIES}
PROMPTS = (random_ids(1, 7)[0].tolist(), random_ids(1, 5)[0].tolist()[1:], random_ids(1, 9)[0].tolist())
SOURCE, TARGET, FINAL = Site(1, "resid_pre"), Site(2, "resid_post"), Site(-1, "final")
SPANS = (
    (SOURCE, TARGET),
    (Site(0, "resid_post"), Site(3, "resid_pre")),
    (Site(1, "attn_out"), Site(2, "mlp_out")),
    (Site(1, "mlp_out"), FINAL),
    (Site(2, "resid_pre"), Site(2, "attn_out")),
    (Site(3, "resid_post"), FINAL),
)


def vectors(count: int, seed: int = 3, scale: float = 1.0) -> Tensor:
    drawn = torch.randn(count, 32, generator=torch.Generator().manual_seed(seed))
    return scale * torch.nn.functional.normalize(drawn, dim=-1)


def by_editing(model: PreTrainedModel, span: tuple[Site, Site], theta: Tensor) -> list[Tensor]:
    """The changes of each prompt's tokens by running the whole model with and without the edit."""
    source, target = span
    changes = []
    for prompt in PROMPTS:
        read = []
        for edits in ([], [Edit(source, Add(theta))]):
            with torch.no_grad(), edited(model, edits), tapped(model, [target]) as taps:
                model(torch.tensor([prompt]), use_cache=False)
                read.append(taps[target][0])
        changes.append(read[1] - read[0])
    return changes


@pytest.mark.parametrize("span", SPANS, ids=lambda span: f"{span[0]}-{span[1]}")
@pytest.mark.parametrize("family", FAMILIES)
def test_a_slice_says_what_the_edited_model_does(family: str, span: tuple[Site, Site]) -> None:
    model, theta = MODELS[family], vectors(2)
    expected = [by_editing(model, span, row) for row in theta]
    for last in (2, None):
        found = Slice(model, *span, PROMPTS, last=last).change(theta)
        means = [torch.cat([rows[0 if last is None else -last :] for rows in changes]).mean(0) for changes in expected]
        torch.testing.assert_close(found, torch.stack(means), rtol=1e-4, atol=1e-5)
    assert hooks_of(model) == []


@pytest.mark.parametrize("family", FAMILIES)
def test_first_derivatives_are_those_of_finite_differences(family: str) -> None:
    response = Slice(MODELS[family], SOURCE, TARGET, PROMPTS)
    tangent, base, step = vectors(4), vectors(4, seed=5), 1e-2
    for at in (torch.zeros_like(base), base):
        differences = (response.change(at + step * tangent) - response.change(at - step * tangent)) / (2 * step)
        torch.testing.assert_close(response.jvp(tangent, at=at), differences, rtol=2e-2, atol=2e-3)
    torch.testing.assert_close(response.jvp(tangent), response.jvp(tangent, at=torch.zeros_like(base)))


@pytest.mark.parametrize("family", FAMILIES)
def test_backward_products_are_the_transpose_of_forward_ones(family: str) -> None:
    response = Slice(MODELS[family], SOURCE, TARGET, PROMPTS)
    tangent, cotangent, base = vectors(4), vectors(4, seed=6), vectors(4, seed=5)
    for at in (None, base):
        forward = (cotangent * response.jvp(tangent, at=at)).sum(-1)
        backward = (tangent * response.vjp(cotangent, at=at)).sum(-1)
        torch.testing.assert_close(forward, backward, rtol=1e-4, atol=1e-5)
    outward, gradient = response.climb(base)
    change = response.change(base)
    torch.testing.assert_close(outward, change / change.norm(dim=-1, keepdim=True))
    torch.testing.assert_close(gradient, response.vjp(outward, at=base), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_second_derivatives_are_symmetric_and_those_of_finite_differences(family: str) -> None:
    response = Slice(MODELS[family], SOURCE, TARGET, PROMPTS)
    first, other, cotangent, step = vectors(3), vectors(3, seed=7), vectors(3, seed=8), 5e-3
    ahead, behind = (response.jvp(first, at=sign * step * other) for sign in (1, -1))
    second = response.second(first, other)
    torch.testing.assert_close(second, (ahead - behind) / (2 * step), rtol=1e-2, atol=5e-3)
    torch.testing.assert_close(second, response.second(other, first), rtol=1e-4, atol=1e-4)
    pulled = (response.second_vjp(cotangent, first) * other).sum(-1)
    torch.testing.assert_close(pulled, (cotangent * second).sum(-1), rtol=1e-3, atol=1e-4)


def test_the_jacobian_is_the_same_from_either_side() -> None:
    model = MODELS["llama"]
    response = Slice(model, SOURCE, TARGET, PROMPTS)
    columns = response.jvp(torch.eye(32)).T
    rows = response.vjp(torch.eye(32))
    torch.testing.assert_close(columns, rows, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(response.jacobian(), columns)


def test_a_wide_function_of_few_inputs_has_its_jacobian_from_the_shorter_side() -> None:
    matrix = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(Response(lambda x: x @ matrix.T, 3, 5).jacobian(), matrix)
    torch.testing.assert_close(Response(lambda x: x @ matrix, 5, 3).jacobian(), matrix.T)


def test_neither_the_blocks_below_nor_those_above_run_again() -> None:
    model = tiny_model("llama", seed=0, num_layers=4)
    ran: list[int] = []
    for layer, block in enumerate(model.model.layers):
        block.register_forward_hook(lambda *_, layer=layer: ran.append(layer))
    response = Slice(model, SOURCE, Site(3, "resid_pre"), PROMPTS)
    assert 3 not in ran
    ran.clear()
    response.change(vectors(2))
    response.jvp(vectors(2))
    assert set(ran) == {1, 2}


def test_chunks_change_nothing_and_keep_to_the_budget() -> None:
    model, theta = MODELS["qwen2"], vectors(5)
    whole = Slice(model, SOURCE, TARGET, PROMPTS)
    tight = Slice(model, SOURCE, TARGET, PROMPTS, memory_bytes=4 * 2 * whole.bytes_per_vector)
    assert (tight.rows_per_chunk, Slice(model, SOURCE, TARGET, PROMPTS, memory_bytes=1).rows_per_chunk) == (2, 1)
    for name in ("change", "jvp", "vjp"):
        torch.testing.assert_close(getattr(tight, name)(theta), getattr(whole, name)(theta), rtol=1e-5, atol=1e-6)


def test_bytes_of_a_vector_grow_with_what_a_pass_keeps() -> None:
    model = MODELS["llama"]
    short, long = (Slice(model, SOURCE, target, PROMPTS) for target in (Site(1, "resid_post"), Site(3, "resid_post")))
    states = sum(1 for _ in PROMPTS) * 9 * 32 * 4  # one float32 state of every prompt, padding included
    assert states < short.bytes_per_vector
    assert 2 * short.bytes_per_vector < long.bytes_per_vector < 4 * short.bytes_per_vector


def test_copies_of_weights_that_autocast_makes_are_not_counted_as_a_vectors() -> None:
    one_token = [[5]]
    plain = Slice(MODELS["llama"], SOURCE, TARGET, one_token).bytes_per_vector
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = Slice(MODELS["llama"], SOURCE, TARGET, one_token).bytes_per_vector
    assert mixed < 2 * plain


def test_token_changes_are_those_of_the_last_tokens_of_each_prompt() -> None:
    response = Slice(MODELS["llama"], SOURCE, TARGET, PROMPTS, last=3)
    assert response.prompt_index.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert response.token_index.tolist() == [4, 5, 6, 1, 2, 3, 6, 7, 8]
    changes = response.token_changes(vectors(2))
    assert changes.shape == (2, 9, 32)
    torch.testing.assert_close(changes.detach().mean(1), response.change(vectors(2)))
    assert len(Slice(MODELS["llama"], SOURCE, TARGET, PROMPTS, last=5).token_index) == 5 + 4 + 5


def test_the_lengths_of_the_stream_are_those_that_a_tap_reads() -> None:
    model = MODELS["llama"]
    found = Slice(model, Site(0, "resid_post"), TARGET, PROMPTS, last=1).source_norms()
    with torch.no_grad(), tapped(model, [Site(0, "resid_post")]) as taps:
        model(torch.tensor([PROMPTS[0]]))
    torch.testing.assert_close(found[0], taps[Site(0, "resid_post")][0, -1].norm())


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"target": Site(1, "resid_pre")}, SettingError, "does not lie below target 1.resid_pre; give an earlier"),
        ({"source": FINAL}, SettingError, "does not lie below"),
        ({"target": Site(9, "resid_post")}, SettingError, "it has 4 layers"),
        ({"last": 0}, SettingError, "None for all"),
        ({"memory_bytes": 0}, SettingError, "bytes that a chunk may take"),
        ({"prompts": []}, TextError, "give at least one"),
        ({"prompts": [[1], []]}, TextError, "prompt 1 has 0 tokens"),
        ({"prompts": [[999_999]]}, TextError, "use the model's tokenizer"),
    ],
)
def test_what_cannot_be_sliced_is_refused(change: dict, error: type[Exception], words: str) -> None:
    arguments = {"source": SOURCE, "target": TARGET, "prompts": PROMPTS} | change
    with pytest.raises(error, match=words):
        Slice(MODELS["llama"], **arguments)


def test_a_model_in_training_and_vectors_of_the_wrong_shape_are_refused() -> None:
    model = tiny_model("llama", seed=0)
    response = Slice(model, SOURCE, TARGET, PROMPTS)
    with pytest.raises(SettingError, match="rows of width 32"):
        response.change(torch.zeros(2, 31))
    with pytest.raises(SettingError, match="float64"):
        response.change(torch.zeros(2, 32, dtype=torch.float64))
    with pytest.raises(SettingError, match=r"model\.eval"):
        Slice(model.train(), SOURCE, TARGET, PROMPTS)


def test_half_precision_is_warned_about(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_model("llama", seed=0).to(torch.bfloat16)
    Slice(model, SOURCE, TARGET, PROMPTS)
    assert "load it in float32" in caplog.text
