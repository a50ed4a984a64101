"""MELBO climbs its own formula, stays on its sphere and, when asked, at right angles."""

from __future__ import annotations

import pytest
import torch
from conftest import random_ids
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pilotfish.core import Site
from pilotfish.discovery import MelboConfig, Slice, linear, melbo
from pilotfish.discovery.melbo import objective
from pilotfish.errors import SettingError
from pilotfish.models import FAMILIES, tiny_model

PROMPTS = (random_ids(1, 7)[0].tolist(), random_ids(1, 5)[0].tolist())
SOURCE, TARGET = Site(0, "resid_post"), Site(2, "resid_post")
LLAMA = Slice(tiny_model("llama", seed=0), SOURCE, TARGET, PROMPTS)


def stream(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_the_objective_by_hand() -> None:
    """Two prompts, the first with two tokens: lengths 5 and 13, then 3."""
    changes = torch.tensor([[[3.0, 4.0], [5.0, 12.0], [0.0, 3.0]]])
    index = torch.tensor([0, 0, 1])
    cases = {
        (2.0, 1.0): 25 + 169 + 9,
        (4.0, 1.0): 625 + 28561 + 81,
        (2.0, 2.0): 194**0.5 + 3,
        (4.0, 4.0): 29186**0.25 + 3,
    }
    for (power, root), expected in cases.items():
        found = objective(changes, index, num_prompts=2, power=power, root=root)
        torch.testing.assert_close(found, torch.tensor([float(expected)]))


def test_the_norm_is_over_hidden_units_which_differs_from_that_over_tokens_unless_p_is_2() -> None:
    changes = torch.randn(1, 3, 8, generator=stream())
    index = torch.zeros(3, dtype=torch.long)
    for power, same in ((2.0, True), (4.0, False)):
        ours = objective(changes, index, num_prompts=1, power=power, root=1.0)
        over_tokens = changes.norm(dim=1).pow(power).sum(-1)
        assert torch.allclose(ours, over_tokens) is same


@pytest.mark.parametrize("family", FAMILIES)
def test_vectors_change_the_target_more_than_random_ones(family: str) -> None:
    response = Slice(tiny_model(family, seed=0), SOURCE, TARGET, PROMPTS)
    config = MelboConfig(num_vectors=3, radius=0.5, steps=10, learning_rate=0.05, batch=3)
    start = melbo(
        response, MelboConfig(num_vectors=3, radius=0.5, steps=1, learning_rate=1e-6, batch=3), generator=stream()
    )
    found = melbo(response, config, generator=stream())
    assert found.gains.mean() > 1.2 * start.gains.mean()


def test_a_small_radius_leads_to_the_top_singular_vector_of_the_changes() -> None:
    """At p = 2, q = 1 and R near 0 the objective is a quadratic form: its top eigenvector is the answer."""
    one = Slice(tiny_model("llama", seed=0), SOURCE, TARGET, PROMPTS[:1], last=1)
    config = MelboConfig(num_vectors=1, radius=1e-2, steps=40, learning_rate=0.05)
    found = melbo(one, config, generator=stream()).vectors / config.radius
    best = linear(one, 1, generator=stream())
    gain = float(one.jvp(found).norm())
    assert gain > 0.98 * float(best.strengths[0])


@pytest.mark.parametrize(("batch", "orthogonal"), [(6, True), (2, True), (1, True), (6, False), (4, False)])
def test_vectors_have_their_length_and_their_right_angles(batch: int, orthogonal: bool) -> None:
    config = MelboConfig(num_vectors=6, radius=2.0, steps=3, learning_rate=0.05, batch=batch, orthogonal=orthogonal)
    found = melbo(LLAMA, config, generator=stream())
    cosines = found.vectors @ found.vectors.T / 4.0
    assert found.gains.shape == (6,)
    torch.testing.assert_close(cosines.diagonal(), torch.ones(6))
    others = float((cosines - torch.eye(6)).abs().max())
    assert (others < 1e-5) is orthogonal


def test_without_orthogonality_a_vector_does_not_depend_on_its_batch() -> None:
    def found(batch: int) -> Tensor:
        config = MelboConfig(num_vectors=4, radius=1.0, steps=5, batch=batch, orthogonal=False)
        return melbo(LLAMA, config, generator=stream()).vectors

    torch.testing.assert_close(found(4), found(2), rtol=1e-4, atol=1e-5)


def test_the_first_vector_does_not_feel_its_juniors() -> None:
    def first(count: int) -> Tensor:
        config = MelboConfig(num_vectors=count, radius=1.0, steps=5, batch=4)
        return melbo(LLAMA, config, generator=stream()).vectors[0]

    torch.testing.assert_close(first(4), first(1), rtol=1e-4, atol=1e-5)


@settings(max_examples=25, deadline=None)
@given(st.floats(0.1, 10.0), st.sampled_from([2.0, 3.0, 4.0]), st.booleans())
def test_the_objective_scales_with_the_change(scale: float, power: float, rooted: bool) -> None:
    changes = torch.randn(2, 4, 3, generator=stream(), dtype=torch.float64)
    index = torch.tensor([0, 0, 1, 1])
    root = power if rooted else 1.0
    one, many = (objective(factor * changes, index, num_prompts=2, power=power, root=root) for factor in (1.0, scale))
    torch.testing.assert_close(many, one * scale ** (power / root))


def test_settings_that_make_no_sense_are_refused() -> None:
    with pytest.raises(SettingError, match="power and root at least 1"):
        MelboConfig(power=0.5)
    with pytest.raises(SettingError, match="do not fit into 32 dimensions"):
        melbo(LLAMA, MelboConfig(num_vectors=33), generator=stream())
