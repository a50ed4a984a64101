"""Forms by hand, against the formula token by token in float64, and piece by piece as an engine reads."""

from __future__ import annotations

import itertools

import pytest
import torch
from conftest import seeded_head
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pilotfish.core import Site
from pilotfish.errors import SettingError
from pilotfish.heads import Form, HeadBank
from pilotfish.models import Identity

SITES = (Site(-1, "final"),)
SIZE = 6
IDENTITY = Identity(name="tiny", weights="w" * 64, tokenizer="t" * 64, hidden_size=SIZE, num_layers=1, vocab_size=9)
FORMS = st.sampled_from(["linear", "mlp", "attention", "multimax"]).flatmap(
    lambda kind: st.builds(
        Form, kind=st.just(kind), width=st.integers(1, 2 if kind == "linear" else 3), window=st.integers(1, 6)
    )
)
NONE = torch.zeros(0)


def random(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def drawn(form: Form, seed: int, num_tokens: int) -> tuple[Tensor, Tensor]:
    """Channels and outputs."""
    draw = random(seed)
    return 2 * torch.randn(num_tokens, form.num_channels, generator=draw), torch.randn(form.num_outputs, generator=draw)


def by_the_formula(form: Form, channels: Tensor, outputs: Tensor) -> tuple[list[float], list[float]]:
    """Logits of tokens and of the response so far, one token after the other."""
    wide, out = channels.double(), outputs.double()
    tokens, evidence = wide[:, 0], wide[:, -1]
    if form.kind == "mlp":
        tokens, evidence = (
            wide.clamp_min(0) @ out[i * form.width : (i + 1) * form.width] + out[2 * form.width + i] for i in (0, 1)
        )
    running = []
    for end in range(1, len(wide) + 1):
        seen = slice(max(0, end - form.window), end)
        if form.kind in ("linear", "mlp"):
            num_missing = form.window - len(evidence[seen])
            running.append(float((evidence[seen].sum() + num_missing * out[-1]) / form.window))
        elif form.kind == "multimax":
            running.append(sum(float(wide[seen, 1 + j].max()) for j in range(form.width)))
        else:
            heads = [
                (wide[seen, 1 + j].exp() * wide[seen, 1 + form.width + j]).sum() / wide[seen, 1 + j].exp().sum()
                for j in range(form.width)
            ]
            running.append(float(sum(heads)))
    return tokens.tolist(), running


def test_a_linear_form_by_hand():
    channels = torch.tensor([[1.0, 10.0], [2.0, 20.0], [3.0, 60.0]])
    two, prior = Form(window=2), torch.tensor([-4.0])
    assert two.tokens(channels, prior).tolist() == [1.0, 2.0, 3.0]
    assert two.running(channels, prior).tolist() == [(10 - 4) / 2, 15.0, 40.0], "the first window holds one token"
    assert Form(width=1, window=2).running(channels[:, :1], prior).tolist() == [(1 - 4) / 2, 1.5, 2.5]
    assert Form(window=4).running(channels, prior).tolist() == [(10 - 12) / 4, (30 - 8) / 4, (90 - 4) / 4]


def test_a_first_token_alone_hardly_moves_the_response_from_its_prior():
    channels, prior = torch.zeros(40, 2), torch.tensor([-3.0])
    channels[0, 1] = 8.0
    running = Form().running(channels, prior).tolist()
    assert running[0] == (8.0 + 15 * -3.0) / 16
    assert running[1] == (8.0 + 0.0 + 14 * -3.0) / 16
    assert running[15] == 8.0 / 16, "the window is full"
    assert running[16] == 0.0


def test_an_mlp_form_by_hand():
    channels = torch.tensor([[1.0, -5.0], [-1.0, 2.0], [3.0, 1.0]])
    outputs = torch.tensor([1.0, 10.0, 2.0, -1.0, 0.5, 0.25, -1.25])  # token row, response row, their biases, prior
    form = Form(kind="mlp", width=2, window=2)
    assert form.tokens(channels, outputs).tolist() == [1.5, 20.5, 13.5]
    assert form.running(channels, outputs).tolist() == [(2.25 - 1.25) / 2, (2.25 - 1.75) / 2, (-1.75 + 5.25) / 2]


def test_an_attention_form_by_hand():
    channels = torch.tensor([[7.0, 0.0, 4.0], [8.0, 100.0, -2.0], [9.0, 100.0, 6.0], [1.0, 0.0, 5.0]])
    form = Form(kind="attention", width=1, window=2)
    assert form.tokens(channels, NONE).tolist() == [7.0, 8.0, 9.0, 1.0]
    assert form.running(channels, NONE).tolist() == [4.0, -2.0, 2.0, 6.0]


def test_a_multimax_form_by_hand():
    channels = torch.tensor([[7.0, 5.0, -1.0], [8.0, 1.0, -4.0], [9.0, 2.0, -9.0], [1.0, 0.0, 3.0]])
    form = Form(kind="multimax", window=2)
    assert form.tokens(channels, NONE).tolist() == [7.0, 8.0, 9.0, 1.0]
    assert form.running(channels, NONE).tolist() == [4.0, 4.0, 2.0 - 4.0, 2.0 + 3.0], "the peak of 5 is forgotten"


@given(form=FORMS, seed=st.integers(0, 1000), num_tokens=st.integers(1, 12))
@settings(max_examples=40, deadline=None)
def test_every_form_is_its_formula(form, seed, num_tokens):
    channels, outputs = drawn(form, seed, num_tokens)
    tokens, running = by_the_formula(form, channels, outputs)
    assert form.tokens(channels, outputs).tolist() == pytest.approx(tokens, abs=1e-5)
    assert form.running(channels, outputs).tolist() == pytest.approx(running, abs=1e-5)


@given(form=FORMS, seed=st.integers(0, 1000), num_heads=st.integers(1, 4))
@settings(max_examples=40, deadline=None)
def test_heads_side_by_side_are_what_each_is_alone(form, seed, num_heads):
    apart = [drawn(form, seed + i, 8) for i in range(num_heads)]
    channels, outputs = (
        torch.stack(parts, dim=dim) for parts, dim in zip(zip(*apart, strict=True), (1, 0), strict=True)
    )
    for read in (form.tokens, form.running):
        together = read(channels, outputs)
        assert together.shape == (8, num_heads)
        for index, (own, out) in enumerate(apart):
            torch.testing.assert_close(together[:, index], read(own, out))


@given(form=FORMS, seed=st.integers(0, 1000), num_tokens=st.integers(2, 12), data=st.data())
@settings(max_examples=40, deadline=None)
def test_a_logit_depends_on_the_window_up_to_its_token_and_on_nothing_else(form, seed, num_tokens, data):
    channels, outputs = drawn(form, seed, num_tokens)
    at = data.draw(st.integers(0, num_tokens - 1))
    outside = torch.ones(num_tokens, dtype=torch.bool)
    outside[max(0, at - form.window + 1) : at + 1] = False
    changed = channels.clone()
    changed[outside] = data.draw(st.sampled_from([0.0, 1e4, torch.nan]))
    assert torch.equal(form.running(changed, outputs)[at], form.running(channels, outputs)[at])
    assert torch.equal(form.tokens(changed, outputs)[at], form.tokens(channels, outputs)[at])


@given(form=FORMS, seed=st.integers(0, 1000), num_tokens=st.integers(1, 12), data=st.data())
@settings(max_examples=40, deadline=None)
def test_a_gap_in_the_channels_leaves_no_number_while_the_window_holds_it(form, seed, num_tokens, data):
    channels, outputs = drawn(form, seed, num_tokens)
    gap = data.draw(st.integers(0, num_tokens - 1))
    channels[gap] = torch.nan
    missing = form.running(channels, outputs).isnan().tolist()
    assert missing == [gap <= at < gap + form.window for at in range(num_tokens)]


@given(forms=st.lists(FORMS, min_size=1, max_size=4), seed=st.integers(0, 1000), data=st.data())
@settings(max_examples=40, deadline=None)
def test_a_text_read_in_pieces_scores_what_it_scores_in_one_go(forms, seed, data):
    draw = random(seed)
    bank = HeadBank([seeded_head(f"m{i}", SITES, SIZE, form, draw) for i, form in enumerate(forms)], IDENTITY)
    sizes = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=6))
    channels = bank.channels(3 * torch.randn(sum(sizes), SIZE, generator=draw))
    whole = bank.score(channels, len(channels))
    for end, size in zip(itertools.accumulate(sizes), sizes, strict=True):
        kept = channels[max(0, end - size - bank.window + 1) : end]  # what an engine with no more memory has
        part = bank.score(kept, size)
        torch.testing.assert_close(part.tokens, whole.tokens[end - size : end], atol=1e-6, rtol=0)
        torch.testing.assert_close(part.running, whole.running[end - size : end], atol=1e-6, rtol=0)


@given(form=FORMS, seed=st.integers(0, 1000), data=st.data())
@settings(max_examples=40, deadline=None)
def test_an_answer_is_judged_without_a_look_back_at_the_prompt_however_it_is_read(form, seed, data):
    draw = random(seed)
    bank = HeadBank([seeded_head("m", SITES, SIZE, form, draw)], IDENTITY)
    sizes = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=6))
    boundary = data.draw(st.integers(0, sum(sizes)))
    channels = bank.channels(3 * torch.randn(sum(sizes), SIZE, generator=draw))
    sides = [bank.score(side, len(side)).running for side in (channels[:boundary], channels[boundary:]) if len(side)]
    for end, size in zip(itertools.accumulate(sizes), sizes, strict=True):
        part = bank.score(channels[:end], size, boundary=boundary)
        torch.testing.assert_close(part.running, torch.cat(sides)[end - size : end], atol=1e-6, rtol=0)


@given(form=FORMS, seed=st.integers(0, 1000), scale=st.floats(0.01, 10), shift=st.floats(-5, 5))
@settings(max_examples=40, deadline=None)
def test_rescaling_changes_one_logit_and_leaves_the_other_unless_they_share_a_channel(form, seed, scale, shift):
    head = seeded_head("m", SITES, SIZE, form, random(seed))
    features = torch.randn(9, SIZE, generator=random(seed + 1))
    for which, other in (("token", "response"), ("response", "token")):
        changed = head.rescaled(which, scale, shift)
        expected = head.logits(features, which) * scale + shift
        torch.testing.assert_close(changed.logits(features, which), expected, atol=1e-4, rtol=1e-5)
        kept = head.logits(features, other)
        if form.shares:
            kept = kept * scale + shift
        torch.testing.assert_close(changed.logits(features, other), kept, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("form", [Form(), Form(width=1), Form(kind="mlp", width=2)], ids=str)
def test_rescaling_the_response_moves_its_prior_along(form):
    head = seeded_head("m", SITES, SIZE, form, random(0))
    prior = float(head.outputs[-1])
    assert float(head.rescaled("response", 2.0, 0.5).outputs[-1]) == pytest.approx(2 * prior + 0.5)
    moved_with_tokens = 2 * prior + 0.5 if form.shares else prior
    assert float(head.rescaled("token", 2.0, 0.5).outputs[-1]) == pytest.approx(moved_with_tokens)


def test_one_channel_and_a_window_of_one_token_make_both_logits_the_same():
    form = Form(width=1, window=1)
    channels, outputs = drawn(form, 0, 20)
    assert torch.equal(form.running(channels, outputs), form.tokens(channels, outputs))


@pytest.mark.parametrize(
    ("form", "channels", "outputs", "shares"),
    [
        (Form(), 2, 1, False),
        (Form(width=1), 1, 1, True),
        (Form(kind="mlp", width=3), 3, 9, False),
        (Form(kind="attention", width=3), 7, 0, False),
        (Form(kind="attention", width=1), 3, 0, False),
        (Form(kind="multimax", width=3), 4, 0, False),
    ],
    ids=str,
)
def test_a_form_says_how_many_numbers_it_needs(form, channels, outputs, shares):
    assert (form.num_channels, form.num_outputs, form.shares) == (channels, outputs, shares)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"width": 3}, "a head of form linear cannot have width 3; give 1 or more, for linear 1 or 2"),
        ({"kind": "mlp", "width": 0}, "a head of form mlp cannot have width 0"),
        ({"window": 0}, "window 0 is too small; give 1 or more tokens"),
    ],
    ids=str,
)
def test_a_form_that_cannot_be_is_refused(settings, words):
    with pytest.raises(SettingError, match=words):
        Form(**settings)
