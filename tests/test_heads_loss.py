"""Each loss by hand, and what its gradient pushes on."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pilotfish.heads.loss import contrast_loss, response_loss, segment_variance, span_loss, token_loss


def column(*values: float) -> Tensor:
    return torch.tensor(values)[:, None]


def cross_entropy(logit: float, label: float) -> float:
    """Written out."""
    p = 1 / (1 + math.exp(-logit))
    return -label * math.log(p) - (1 - label) * math.log(1 - p)


def test_the_token_loss_is_a_mean_in_which_positives_weigh_more():
    logits, labels = column(1.0, -2.0, 0.5), torch.tensor([1.0, 0.0, 1.0])
    by_hand = (3 * cross_entropy(1, 1) + cross_entropy(-2, 0) + 3 * cross_entropy(0.5, 1)) / 3
    assert token_loss(logits, labels, 3.0).tolist() == pytest.approx([by_hand])
    soft = token_loss(column(1.0), torch.tensor([0.25]), 3.0)
    assert soft.tolist() == pytest.approx([1.5 * cross_entropy(1, 0.25)]), "a soft label weighs in between"


def test_the_span_loss_takes_the_highest_token_of_each_run_of_equal_labels():
    logits, labels = column(-1.0, 3.0, 0.5, -0.5, 2.0), torch.tensor([1.0, 1.0, 0.0, 0.0, 1.0])
    by_hand = (cross_entropy(3, 1) + cross_entropy(0.5, 0) + cross_entropy(2, 1)) / 3
    assert span_loss(logits, labels).tolist() == pytest.approx([by_hand])
    assert span_loss(column(-1.0, 3.0), torch.ones(2)).tolist() == pytest.approx([cross_entropy(3, 1)])


@given(runs=st.lists(st.integers(1, 4), min_size=1, max_size=6), first=st.sampled_from([0.0, 1.0]))
@settings(max_examples=30, deadline=None)
def test_the_span_loss_counts_runs_and_not_tokens(runs, first):
    labels = torch.cat([torch.full((size,), abs(first - i % 2)) for i, size in enumerate(runs)])
    logits = column(*(2.0 * label - 1.0 for label in labels.tolist()))
    assert span_loss(logits, labels).tolist() == pytest.approx([cross_entropy(1, 1)])
    logits[-1] = 1.0 - 2.0 * labels[-1] if runs[-1] == 1 else logits[-1]
    wrong = cross_entropy(-1, 1) - cross_entropy(1, 1)
    expected = cross_entropy(1, 1) + (wrong / len(runs) if runs[-1] == 1 else 0.0)
    assert span_loss(logits, labels).tolist() == pytest.approx([expected])


def test_the_response_loss_is_weighted_by_the_softmax_of_the_running_logits():
    running = [0.0, 2.0, 1.0]
    for label in (0.0, 1.0):
        for temperature in (1.0, 0.5):
            weights = [math.exp(z / temperature) for z in running]
            by_hand = sum(w * cross_entropy(z, label) for w, z in zip(weights, running, strict=True)) / sum(weights)
            found = response_loss(column(*running), label, temperature=temperature, top_k=None)
            assert found.tolist() == pytest.approx([by_hand])


def test_at_a_low_temperature_a_response_loses_what_its_highest_token_loses():
    found = response_loss(column(-3.0, 2.0, -1.0), 1.0, temperature=1e-3, top_k=None)
    assert found.tolist() == pytest.approx([cross_entropy(2, 1)])


def test_top_k_is_the_loss_of_the_mean_of_the_k_highest():
    running = column(5.0, -1.0, 2.0, 3.0)
    two = response_loss(running, 1.0, temperature=1.0, top_k=2)
    assert two.tolist() == pytest.approx([cross_entropy(4, 1)])
    more_than_there_are = response_loss(running, 0.0, temperature=1.0, top_k=9)
    assert more_than_there_are.tolist() == pytest.approx([cross_entropy(9 / 4, 0)])


def test_the_contrast_is_softplus_of_how_far_the_negative_lies_above():
    assert contrast_loss(column(3.0), column(1.0, 1.0)).tolist() == pytest.approx([math.log1p(math.exp(-2))])
    weights = [math.exp(z) for z in (0.0, 2.0)]
    negative = 2 * weights[1] / sum(weights)
    found = contrast_loss(column(0.5), column(0.0, 2.0))
    assert found.tolist() == pytest.approx([math.log1p(math.exp(negative - 0.5))])


@given(shift=st.floats(-20, 20))
@settings(max_examples=20, deadline=None)
def test_what_twins_share_does_not_change_their_contrast(shift):
    positive, negative = column(1.0, 2.0, 0.0), column(0.5, -1.0)
    torch.testing.assert_close(
        contrast_loss(positive + shift, negative + shift), contrast_loss(positive, negative), atol=1e-5, rtol=1e-4
    )


def test_the_segment_variance_is_that_of_a_population():
    assert segment_variance(column(1.0, 2.0, 6.0)).tolist() == pytest.approx([(4 + 1 + 9) / 3])
    assert segment_variance(column(4.0)).tolist() == [0.0], "a response of one token is even"


LOSSES = {
    "token": lambda z: token_loss(z, torch.tensor([1.0, 0.0, 0.0, 1.0]), 2.0),
    "span": lambda z: span_loss(z, torch.tensor([1.0, 0.0, 0.0, 1.0])),
    "response": lambda z: response_loss(z, 1.0, temperature=0.7, top_k=None),
    "top k": lambda z: response_loss(z, 0.0, temperature=1.0, top_k=2),
    "contrast": lambda z: contrast_loss(z[:2], z[2:]),
    "variance": segment_variance,
}


@pytest.mark.parametrize("name", LOSSES)
def test_every_candidate_has_its_own_loss_and_gradient(name):
    loss = LOSSES[name]
    logits = torch.randn(4, 3, generator=torch.Generator().manual_seed(0), requires_grad=True)
    found = loss(logits)
    torch.testing.assert_close(found, torch.cat([loss(logits[:, [i]]) for i in range(3)]))
    (gradient,) = torch.autograd.grad(found[1], logits)
    assert bool(gradient[:, 1].any()) and not bool(gradient[:, [0, 2]].any())
