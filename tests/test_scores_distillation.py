"""The target on disk: near the exact distributions, read once, never found by what it was not made for."""

from __future__ import annotations

import logging

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pilotfish.errors import SettingError, TextError
from pilotfish.models import Pair
from pilotfish.scores.distillation import Answer, Likeliest, TargetRecording, divergence, next_token_logits


def answer(seed: int, length: int = 12, boundary: int = 4, name: str | None = None) -> Answer:
    ids = torch.randint(250, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
    return Answer(name or f"a{seed}", f"g{seed}", tuple(ids), torch.arange(length) >= boundary)


def exact(target: torch.Tensor, draft: torch.Tensor) -> torch.Tensor:
    return (target.softmax(-1) * (target.log_softmax(-1) - draft.log_softmax(-1))).sum(-1)


def test_an_answer_is_predicted_from_the_tokens_before_its_own():
    mixed = Answer("x", "x", (1, 2, 3, 4, 5), torch.tensor([True, False, False, True, True]))
    assert mixed.positions.tolist() == [2, 3], "the first token of a text is chosen by nobody"


def test_hand_value_of_the_divergence():
    """Half of a uniform pair against 1/4, 1/4 and a half that is spread: log 2 whatever the spread."""
    target = Likeliest(torch.tensor([[0, 1]]), torch.tensor([[0.5, 0.5]]), torch.tensor([0.0]))
    logits = torch.tensor([[0.25, 0.25, 0.4, 0.1]]).log()
    assert divergence(target, logits).item() == pytest.approx(torch.tensor(2.0).log().item(), abs=1e-6)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 30), st.floats(0.3, 3.0))
def test_lumping_the_rest_never_makes_the_divergence_larger_and_costs_what_lies_within_the_rest(seed, top, scale):
    random = torch.Generator().manual_seed(seed)
    target, draft = (scale * torch.randn(3, 32, generator=random) for _ in range(2))
    probs, ids = target.softmax(-1).topk(top)
    rest = (1 - probs.sum(-1)).clamp_min(0)
    found = divergence(Likeliest(ids, probs, rest), draft)
    outside = torch.ones_like(target, dtype=torch.bool).scatter(-1, ids, value=False)
    within = exact(target.masked_fill(~outside, -1e9), draft.masked_fill(~outside, -1e9))
    full = exact(target, draft)
    assert bool((found <= full + 1e-4).all())
    assert bool((found >= -1e-5).all())
    torch.testing.assert_close(found + rest * within, full, atol=2e-3, rtol=2e-3)


def test_the_recording_in_half_precision_gives_the_divergence_within_a_bound(pair: Pair, tmp_path):
    text = answer(0)
    recorded = TargetRecording(pair, tmp_path, top_k=64)
    target, draft = (next_token_logits(model, text, pair.vocab_size) for model in (pair.target, pair.draft))
    found = divergence(recorded.of(text), draft)
    rest = recorded.of(text).rest
    assert bool((rest < 0.05).all())
    torch.testing.assert_close(found, exact(target, draft), atol=0.05, rtol=0.02)
    everything = TargetRecording(pair, tmp_path, top_k=pair.vocab_size)
    torch.testing.assert_close(divergence(everything.of(text), draft), exact(target, draft), atol=2e-3, rtol=2e-3)


def test_a_temperature_flattens_both_sides(pair: Pair, tmp_path):
    text = answer(0)
    recorded = TargetRecording(pair, tmp_path, top_k=pair.vocab_size, temperature=2.0)
    target, draft = (next_token_logits(model, text, pair.vocab_size) for model in (pair.target, pair.draft))
    found = divergence(recorded.of(text), draft, temperature=2.0)
    torch.testing.assert_close(found, exact(target / 2, draft / 2), atol=2e-3, rtol=2e-3)


def test_a_recording_is_a_distribution_with_the_likeliest_first(pair: Pair, tmp_path):
    found = TargetRecording(pair, tmp_path, top_k=8).of(answer(1))
    torch.testing.assert_close(found.probs.sum(-1) + found.rest, torch.ones(8))
    assert bool((found.probs.diff(dim=-1) <= 0).all())
    logits = next_token_logits(pair.target, answer(1), pair.vocab_size)
    assert found.ids[:, 0].tolist() == logits.argmax(-1).tolist()


def calls(model: torch.nn.Module) -> list[int]:
    """Grows by one with each pass of a model."""
    made: list[int] = []
    model.register_forward_hook(lambda *_: made.append(1))
    return made


@pytest.fixture
def counted(pair: Pair):
    made: list[int] = []
    handle = pair.target.register_forward_hook(lambda *_: made.append(1))
    yield made
    handle.remove()


def test_the_target_reads_each_answer_once_also_after_an_interruption(pair: Pair, tmp_path, counted):
    texts = [answer(seed) for seed in range(4)]
    TargetRecording(pair, tmp_path).fill(texts[:2])  # and then it was killed
    assert len(counted) == 2
    recorded = TargetRecording(pair, tmp_path)
    recorded.fill(texts)
    assert len(counted) == 4
    for text in texts:
        recorded.of(text)
    recorded.fill([text._replace(id="another name", group="elsewhere") for text in texts])
    assert len(counted) == 4
    assert not list(tmp_path.glob(".*"))


def test_what_was_recorded_otherwise_is_not_found(pair: Pair, tmp_path, counted):
    text = answer(0)
    TargetRecording(pair, tmp_path).of(text)
    for other in (
        TargetRecording(pair, tmp_path, top_k=8),
        TargetRecording(pair, tmp_path, temperature=0.5),
    ):
        other.of(text)
    TargetRecording(pair, tmp_path).of(text._replace(is_answer=torch.arange(12) >= 6))
    TargetRecording(pair, tmp_path).of(text._replace(token_ids=(7, *text.token_ids[1:])))
    assert len(counted) == 5


@pytest.mark.parametrize("spoil", ["cut", "other tensors", "no distribution"])
def test_a_damaged_file_is_read_anew_and_said_so(pair: Pair, tmp_path, counted, caplog, spoil):
    from safetensors.torch import load_file, save_file

    text = answer(0)
    good = TargetRecording(pair, tmp_path).of(text)
    (path,) = tmp_path.glob("*.safetensors")
    if spoil == "cut":
        path.write_bytes(path.read_bytes()[:-100])
    elif spoil == "other tensors":
        save_file({"x": torch.zeros(2)}, path)
    else:
        save_file({**load_file(path), "rest": torch.full((8,), 0.5).half()}, path)
    with caplog.at_level(logging.WARNING):
        again = TargetRecording(pair, tmp_path).of(text)
    assert len(counted) == 2
    assert "reading the target again" in caplog.text
    assert all(torch.equal(one, two) for one, two in zip(good, again, strict=True))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"top_k": 0}, "top_k 0 is not allowed; give 1 to 316"),
        ({"top_k": 317}, "top_k 317 is not allowed; give 1 to 316"),
        ({"temperature": 0.0}, "temperature 0.0 is not allowed; give a positive number"),
    ],
)
def test_settings_out_of_range_are_refused(pair: Pair, tmp_path, options, words):
    with pytest.raises(SettingError, match=words):
        TargetRecording(pair, tmp_path, **options)


@pytest.mark.parametrize(("length", "boundary"), [(1, 0), (6, 6), (513, 4)])
def test_an_answer_that_cannot_be_read_is_refused_by_name(pair: Pair, tmp_path, length, boundary):
    with pytest.raises(TextError, match=r"'odd' has .* at most 512"):
        TargetRecording(pair, tmp_path).fill([answer(0, length, boundary, "odd")])
