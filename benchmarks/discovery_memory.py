"""What a search takes beyond the model and the slice, against the memory that the slice was given; Linux alone.

Each search runs in a process of its own, since memory that an earlier one freed would hide what a later one takes.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from discovery_figures import target

from pilotfish.core import Site
from pilotfish.discovery import MelboConfig, Slice, exponential, melbo, quadratic
from pilotfish.discovery.response import random_units
from pilotfish.models import load_model
from pilotfish.runs import generator

SOURCE, END = Site(10, "resid_pre"), Site(14, "resid_post")
RADIUS, NUM_VECTORS = 30.0, 64


def memory(
    name: str, prompts: Sequence[str], *, seed: int, quick: bool
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Peak of the resident memory during each search, minus what was resident before it, over the budget."""
    rows, targets = [], []
    for method in ("melbo",) if quick else tuple(SEARCHES):
        for mebibytes in (256,) if quick else (128, 512):
            with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as alone:
                share = alone.submit(taken, name, prompts, method, mebibytes * 2**20, seed).result()
            title = f"memory: {method} with {mebibytes} MiB, share of it taken"
            rows.append({"part": "memory", "name": title, "value": share, "low": share, "high": share})
            targets.append(target(title, rows[-1], share <= 1.0, "<= 1"))
            print(f"  {title}: {share:.2f}", flush=True)
    return rows, targets


def taken(name: str, prompts: Sequence[str], method: str, memory_bytes: int, seed: int) -> float:
    """The share of `memory_bytes` that one search takes at its peak."""
    loaded = load_model(name, dtype="float32")
    for parameter in loaded.model.parameters():
        parameter.data = parameter.data.clone()  # from the file into memory, so that reading it is not counted
    ids = [loaded.tokenizer(text)["input_ids"] for text in prompts]
    response = Slice(loaded.model, SOURCE, END, ids, memory_bytes=memory_bytes)
    response.change(random_units(response, 1, generator=generator(seed, "warm")))
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the peak begins anew
    before = _resident("VmRSS")
    SEARCHES[method](response, generator(seed, method))
    return (_resident("VmHWM") - before) / memory_bytes


def _exponential(response: Slice, stream: torch.Generator) -> None:
    start = random_units(response, NUM_VECTORS, generator=stream)
    exponential(response, NUM_VECTORS, generator=stream, radius=RADIUS, iterations=2, start=start)


def _melbo(response: Slice, stream: torch.Generator) -> None:
    config = MelboConfig(num_vectors=NUM_VECTORS, batch=NUM_VECTORS, radius=RADIUS, steps=2)
    melbo(response, config, generator=stream)


def _quadratic(response: Slice, stream: torch.Generator) -> None:
    quadratic(response, NUM_VECTORS, generator=stream, radius=RADIUS, iterations=1)


SEARCHES: dict[str, Callable[[Slice, torch.Generator], None]] = {
    "exponential": _exponential,
    "melbo": _melbo,
    "quadratic": _quadratic,
}


def _resident(field: str) -> int:
    """Bytes."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    line = next(line for line in status.splitlines() if line.startswith(field))
    return 1024 * int(line.split()[1])
