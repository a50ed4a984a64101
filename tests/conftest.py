"""Small real objects that several test modules share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pilotfish.core import Site
from pilotfish.heads import Form, Head, HeadBank, linear_head
from pilotfish.models import Pair, evenly_spaced_sites, tiny_pair

torch.set_num_threads(1)  # tiny tensors: a second thread only waits


@pytest.fixture(scope="session")
def pair() -> Pair:
    """A tiny target with a draft that agrees with it now and then; float32."""
    return tiny_pair(seed=0)


@pytest.fixture(scope="session")
def bank(pair: Pair) -> HeadBank:
    """Two heads with seeded weights on the draft, one of them on fewer sites; thresholds 0.5."""
    return seeded_bank(pair, reader="draft")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A headless Chromium."""
    from browser_kit import chromium

    with chromium() as found:
        yield found


@pytest.fixture
def visit(browser: Any, server: Any) -> Iterator[Any]:
    """Begins visits to the module's server; each is held to what a page must never do."""
    from browser_kit import Visit

    visits = []

    def begin(*, url: str = server.url, **options: Any) -> Any:
        visits.append(Visit(browser, url, **options))
        return visits[-1]

    yield begin
    for each in visits:
        each.close()


@pytest.fixture(scope="session")
def windowed(pair: Pair) -> HeadBank:
    """A head of each form on the draft, with windows of several lengths."""
    return windowed_bank(pair)


def windowed_bank(pair: Pair, forms: Sequence[Form] | None = None) -> HeadBank:
    """A head of each form; by default all kinds."""
    assert pair.draft is not None and pair.draft_identity is not None
    random, sites = torch.Generator().manual_seed(2), evenly_spaced_sites(pair.draft, 3)
    heads = [
        seeded_head(f"{form.kind} {form.window}", sites, pair.draft_identity.hidden_size, form, random)
        for form in forms or WINDOWED
    ]
    return HeadBank(heads, pair.draft_identity)


WINDOWED = (
    Form(window=4),
    Form(kind="attention", width=2, window=3),
    Form(kind="mlp", width=4, window=2),
    Form(kind="multimax", window=5),
    Form(kind="attention", width=1, window=6),
    Form(width=1, window=1),
)


def seeded_head(metric: str, sites: tuple[Site, ...], size: int, form: Form, random: torch.Generator) -> Head:
    """A head of any form, for sites of `size` hidden units."""
    width = len(sites) * size
    weight = torch.randn(form.num_channels, width, generator=random) / width**0.5
    bias = torch.randn(form.num_channels, generator=random)
    return Head(metric, sites, weight, bias, form, torch.randn(form.num_outputs, generator=random))


def seeded_bank(pair: Pair, *, reader: str, threshold: float = 0.5) -> HeadBank:
    """Heads with weights large enough that scores spread over (0, 1)."""
    model, identity = (pair.draft, pair.draft_identity) if reader == "draft" else (pair.target, pair.target_identity)
    random = torch.Generator().manual_seed(1)
    sites = evenly_spaced_sites(model, 3)
    size = identity.hidden_size

    def head(metric: str, count: int) -> Head:
        weight = torch.randn(count * size, generator=random) / (count * size) ** 0.5
        return linear_head(metric, sites[-count:], weight, 0.1)

    return HeadBank([head("wide", 3), head("narrow", 1)], identity, thresholds={"wide": threshold, "narrow": threshold})


def random_ids(*shape: int) -> Tensor:
    return torch.randint(250, shape, generator=torch.Generator().manual_seed(1))


def hooks_of(model: nn.Module) -> list[Any]:
    """Every forward hook on every module of a model."""
    return [
        hook
        for module in model.modules()
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    ]
