"""What it costs to search as the published MELBO code does, and as this library does: the same vectors and steps.

The published procedure, written anew: one vector at a time, one prompt at a time, each step a pass through the whole
model up to its logits with all hidden states kept, and a pass back. Here all vectors go in one batch, what lies below
the source is computed once, and what lies above the target never. Without orthogonality both compute the same vectors.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from discovery_figures import target
from torch import Tensor

from pilotfish.core import Site
from pilotfish.discovery import MelboConfig, Slice, melbo
from pilotfish.discovery.response import unit
from pilotfish.models import load_model
from pilotfish.runs import generator
from pilotfish.taps import Add, Edit, edited

SOURCE, TARGET = Site(9, "resid_post"), Site(14, "resid_post")
LAST, LEARNING_RATE = 3, 1e-3


class Timed(NamedTuple):
    wall_s: float
    cpu_s: float
    vectors: Tensor


def speed(
    name: str, prompts: Sequence[str], *, seed: int, quick: bool
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Ratios of time, published over ours, pair by pair in turn."""
    loaded = load_model(name, dtype="float32")
    ids = [loaded.tokenizer(text)["input_ids"] for text in prompts]
    count, steps, pairs = (2, 2, 2) if quick else (4, 3, 7)
    config = MelboConfig(
        num_vectors=count, radius=30.0, orthogonal=False, batch=count, steps=steps, learning_rate=LEARNING_RATE
    )
    starts = config.radius * unit(torch.randn(count, loaded.identity.hidden_size, generator=generator(seed, "melbo")))

    def ours() -> Tensor:
        response = Slice(loaded.model, SOURCE, TARGET, ids, last=LAST)
        return melbo(response, config, generator=generator(seed, "melbo")).vectors

    def published() -> Tensor:
        return torch.stack([one_by_one(loaded.model, ids, start, config) for start in starts])

    taken: dict[str, list[Timed]] = {"published": [], "ours": []}
    for turn in range(pairs):
        arms: list[tuple[str, Callable[[], Tensor]]] = [("published", published), ("ours", ours)]
        for arm, search in arms[:: 1 if turn % 2 else -1]:
            taken[arm].append(_timed(search))
        print(f"  pair {turn}: " + ", ".join(f"{arm} {taken[arm][-1].cpu_s:.1f} s of CPU" for arm in taken), flush=True)
    alike = float((unit(taken["published"][0].vectors) * unit(taken["ours"][0].vectors)).sum(-1).min())
    rows = [
        {"part": "speed", "name": "least cosine between the two's vectors", "value": alike, "low": alike, "high": alike}
    ]
    for clock in ("cpu_s", "wall_s"):
        ratios = [getattr(a, clock) / getattr(b, clock) for a, b in zip(taken["published"], taken["ours"], strict=True)]
        rows.append({"part": "speed", "name": f"published over ours, {clock}", **_median(ratios)})
    row = rows[1]
    asked = f"speed: published over ours, {count} vectors, {steps} steps, {len(ids)} prompts"
    return rows, [target(asked, row, row["value"] >= 3.0, ">= 3")]


def one_by_one(model: Any, ids: Sequence[Sequence[int]], start: Tensor, config: MelboConfig) -> Tensor:
    """One vector of length `config.radius`, p = 2 and q = 1, as the published loop finds it."""
    rows = [torch.tensor([list(row)]) for row in ids]
    with torch.no_grad():
        plain = [_hidden(model, row) for row in rows]
    theta = (start / config.radius).clone().requires_grad_()
    optimiser = torch.optim.AdamW([theta], lr=config.learning_rate, betas=(0.9, 0.98), weight_decay=0.0, amsgrad=True)
    for _ in range(config.steps):
        optimiser.zero_grad()
        for row, before in zip(rows, plain, strict=True):
            with edited(model, [Edit(SOURCE, Add(config.radius * theta))]):
                loss = -(_hidden(model, row) - before).square().sum()
            (gradient,) = torch.autograd.grad(loss, theta)
            theta.grad = gradient if theta.grad is None else theta.grad + gradient
        with torch.no_grad():
            assert theta.grad is not None
            theta.grad -= (theta.grad @ theta) * theta
            optimiser.step()
            theta.copy_(unit(theta))
    return config.radius * theta.detach()


def _hidden(model: Any, row: Tensor) -> Tensor:
    states: Tensor = model(row, output_hidden_states=True, use_cache=False).hidden_states[TARGET.layer + 1]
    return states[0, -LAST:]


def _timed(search: Callable[[], Tensor]) -> Timed:
    wall, cpu = time.perf_counter(), time.process_time()
    vectors = search()
    return Timed(time.perf_counter() - wall, time.process_time() - cpu, vectors)


def _median(values: Sequence[float]) -> dict[str, float]:
    draw = np.random.default_rng(0)
    drawn = [float(np.median(draw.choice(values, len(values)))) for _ in range(2000)]
    low, high = np.quantile(drawn, (0.025, 0.975))
    return {"value": float(np.median(values)), "low": float(low), "high": float(high)}
