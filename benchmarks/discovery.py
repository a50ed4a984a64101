"""Does each objective find what it says it finds, and how far does what it finds reach?

    python benchmarks/discovery.py [--quick] [--parts toy lock] [--model demo:smollm2] [--json PATH]

Its parts: toy tensors with known factors; the published synthetic task, an exponential layer, at a size for a CPU; a
slice of a real model; a lock and a backdoor in small models (`discovery_hidden`); a lock on a pretrained model
(`discovery_unlocked`); speed (`discovery_speed`); memory (`discovery_memory`). The rows named `published` are what the
released code of 2024 computes, written anew from a description of it. All figures of a part are of the same functions,
radius and starting points, so they are paired.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from discovery_figures import over_seeds, over_vectors, ratio, show, target
from discovery_hidden import backdoor, lock
from discovery_memory import memory
from discovery_speed import speed
from discovery_unlocked import lock_lora
from shown import targets_table
from torch import Tensor

from pilotfish.cli.terminal import quieten_transformers
from pilotfish.core import Site
from pilotfish.discovery import (
    MelboConfig,
    Response,
    Slice,
    calibrated_radius,
    exponential,
    linear,
    melbo,
    projected,
    quadratic,
)
from pilotfish.discovery.factors import orthonormal
from pilotfish.discovery.response import random_units, unit
from pilotfish.models import load_model
from pilotfish.runs import generator, run_card, write_json

PROMPTS = (
    "Tell me how to bake a simple loaf of bread at home.",
    "Write a short letter to the city council about the park.",
    "What is the difference between a lake and a pond?",
)
SOURCE, TARGET = Site(10, "resid_pre"), Site(14, "resid_post")
PARTS = ("toy", "synthetic", "model", "lock", "backdoor", "lock-lora", "speed", "memory")
Fit = Callable[[Response, int], Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer seeds, one prompt")
    parser.add_argument("--seed", type=int, default=0, help="the first of the seeds")
    parser.add_argument("--seeds", type=int, default=8, help="of the toy and the synthetic task")
    parser.add_argument("--organisms", type=int, default=3, help="seeds of the locks and of the backdoor")
    parser.add_argument("--model", default="demo:smollm2", help="with 15 layers or more")
    parser.add_argument("--factors", type=int, default=24, help="to be found in the model")
    parser.add_argument("--prompts", type=int, default=len(PROMPTS), help="slices of the model, one prompt each")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="all by default")
    parser.add_argument("--json", type=Path, help="also write rows, targets and the run's card here")
    args = parser.parse_args()
    if args.quick:
        args.seeds, args.prompts, args.organisms = min(args.seeds, 3), 1, 1
    quieten_transformers()
    logging.basicConfig(level=logging.WARNING)
    seeds = range(args.seed, args.seed + args.seeds)
    hidden = range(args.seed, args.seed + args.organisms)
    prompts = PROMPTS[: args.prompts]
    table = {
        "toy": lambda: toys(seeds),
        "synthetic": lambda: synthetic(seeds),
        "model": lambda: reach(args.model, prompts, args.factors, args.seed, args.quick),
        "lock": lambda: lock(hidden, quick=args.quick),
        "backdoor": lambda: backdoor(hidden, quick=args.quick),
        "lock-lora": lambda: lock_lora(hidden, quick=args.quick),
        "speed": lambda: speed(args.model, prompts, seed=args.seed, quick=args.quick),
        "memory": lambda: memory(args.model, prompts, seed=args.seed, quick=args.quick),
    }
    parts = [table[name]() for name in args.parts]
    rows = [row for found, _ in parts for row in found]
    targets = [one for _, found in parts for one in found]
    if args.json is not None:
        settings = {key: str(value) for key, value in vars(args).items()}
        card = run_card("benchmarks/discovery.py", settings, args.seed)
        write_json(args.json, {"targets": targets, "rows": rows, "card": card})
    print("\n" + targets_table(targets))


# --- toy tensors -----------------------------------------------------------------------------------------------------

TOY_SIZE, TOY_COUNT = 64, 6


def toys(seeds: Iterable[int]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """f = linear + quadratic + cubic factors, all known; and a layer of exponentials."""
    found: dict[str, list[float]] = {}
    for seed in seeds:
        ins, outs = (
            [orthonormal(_rows(TOY_COUNT, TOY_SIZE, seed, f"{side}{order}")) for order in range(3)]
            for side in ("in", "out")
        )
        sizes = torch.linspace(2.0, 1.0, TOY_COUNT, dtype=torch.float64)
        mixed, first_alone, second_alone, shouted = (
            _polynomial(ins, outs, sizes, scales) for scales in ((1, 1, 1), (1, 0, 0), (0, 1, 0), (100, 1, 100))
        )

        def stream(seed: int = seed) -> torch.Generator:
            return generator(seed, "toy")

        cases = {
            "linear, ours": (linear(mixed, TOY_COUNT, generator=stream()).inputs, ins[0]),
            "linear, published": (columns_of_vh(mixed, TOY_COUNT), ins[0]),
            "quadratic, ours": (quadratic(mixed, 2 * TOY_COUNT, generator=stream(), iterations=30).inputs, ins[1]),
            "quadratic, published": (orthogonal_iteration(mixed, 2 * TOY_COUNT, seed, 30), ins[1]),
            "quadratic, published, held against the linear factors": (
                orthogonal_iteration(mixed, TOY_COUNT, seed, 300),
                ins[0],
            ),
        }
        layer, true = exponential_layer(seed, 256, TOY_COUNT)
        fit = exponential(layer, 3 * TOY_COUNT, generator=stream(), radius=6.0, iterations=30)
        cases["exponential, ours"] = (fit.inputs, true)
        for name, (inputs, wanted) in cases.items():
            found.setdefault(name, []).append(_mean_max_cosine(wanted, inputs))
        same = {
            "linear is bit-identical without the higher orders": torch.equal(
                cases["linear, ours"][0], linear(first_alone, TOY_COUNT, generator=stream()).inputs
            ),
            "quadratic is bit-identical with 0 and 100 times the other orders": torch.equal(
                quadratic(second_alone, TOY_COUNT, generator=stream()).inputs,
                quadratic(shouted, TOY_COUNT, generator=stream()).inputs,
            ),
        }
        for name, is_same in same.items():
            found.setdefault(name, []).append(float(is_same))
    rows = [{"part": "toy", "name": name, **over_seeds(values)} for name, values in found.items()]
    show("Toy tensors: mean max cosine with the factors of the tensor that is named", rows)
    asked = {row["name"]: row for row in rows if "ours" in row["name"] or "identical" in row["name"]}
    targets = [
        target(
            f"toy: {name}",
            row,
            row["value"] >= (1.0 if "identical" in name else 0.99),
            ">= 0.99" if "ours" in name else "yes",
        )
        for name, row in asked.items()
    ]
    return rows, targets


def _polynomial(ins: list[Tensor], outs: list[Tensor], sizes: Tensor, scales: tuple[int, ...]) -> Response:
    def function(x: Tensor) -> Tensor:
        terms = [
            scale * (sizes * (x @ v.T).pow(order + 1)) @ u
            for order, (scale, v, u) in enumerate(zip(scales, ins, outs, strict=True))
        ]
        return terms[0] + terms[1] + terms[2]

    return Response(function, TOY_SIZE, TOY_SIZE, dtype=torch.float64)


# --- the synthetic task ----------------------------------------------------------------------------------------------

SIZE, NUM_TRUE, NUM_FOUND = 512, 16, 128


def exponential_layer(seed: int, size: int, num_true: int) -> tuple[Response, Tensor]:
    true, outputs = _rows(num_true, size, seed, "in"), _rows(num_true, size, seed, "out")
    return Response(lambda x: torch.expm1(x @ true.T) @ outputs, size, size, dtype=torch.float64), true


def synthetic(seeds: Iterable[int]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """16 random true factors in 512 dimensions, 128 to be found, at radius 1: after 10 and 100 rounds, the mean over
    true factors of the highest cosine, and the share with one above .99.
    """
    found: dict[str, list[float]] = {}
    for seed in seeds:
        layer, true = exponential_layer(seed, SIZE, NUM_TRUE)
        starts = {
            "published start": published_start(layer, NUM_FOUND, seed),
            "true singular vectors": linear(layer, NUM_FOUND, generator=generator(seed, "linear")).inputs,
            "random start": random_units(layer, NUM_FOUND, generator=generator(seed, "start")),
        }
        for start, inputs in starts.items():
            for basis, orthogonalise in (("QR as it comes", plain_qr), ("sense kept", orthonormal)):
                reached = inputs
                for rounds in (10, 100):
                    for _ in range(rounds if rounds == 10 else 90):
                        reached = unit(layer.climb(orthogonalise(reached))[1])
                    best = (true @ reached.T).abs().amax(1)
                    name = f"{start}, {basis}, {rounds} rounds"
                    found.setdefault(f"{name}: cosine", []).append(float(best.mean()))
                    found.setdefault(f"{name}: recovered", []).append(float((best > 0.99).double().mean()))
    rows = [{"part": "synthetic", "name": name, **over_seeds(values)} for name, values in found.items()]
    show("Exponential layer, d = 512, 16 true factors, 128 found, radius 1", rows)
    values = {row["name"]: row for row in rows}
    ours, theirs = "true singular vectors, sense kept", "published start, QR as it comes"
    targets = []
    for figure, asked in (("cosine", 0.97), ("recovered", 0.83)):
        row = values[f"{ours}, 100 rounds: {figure}"]
        targets.append(target(f"synthetic: {figure} at 100 rounds", row, row["value"] >= asked, f">= {asked}"))
    for figure in ("cosine", "recovered"):
        mine, other = (np.array(found[f"{name}, 10 rounds: {figure}"]) for name in (ours, theirs))
        row = over_seeds(list(mine - other))
        name = f"synthetic: {figure} at 10 rounds, minus the published start and QR"
        targets.append(target(name, row, row["value"] > 0, "> 0"))
    return rows, targets


# --- what the published code computes --------------------------------------------------------------------------------


def columns_of_vh(response: Response, count: int) -> Tensor:
    """The published linear objective: columns of Vh taken for right singular vectors."""
    return torch.linalg.svd(response.jacobian()).Vh[:, :count].T


def orthogonal_iteration(response: Response, count: int, seed: int, rounds: int) -> Tensor:
    """The published quadratic objective: its products are with the Jacobian at 0 alone, both ways."""
    jacobian = response.jacobian()
    inputs = random_units(response, count, generator=generator(seed, "start"))
    for _ in range(rounds):
        inputs = unit(unit(plain_qr(inputs) @ jacobian.T) @ jacobian)
    return inputs


def published_start(response: Response, count: int, seed: int) -> Tensor:
    """Columns of Vh of a 32-row random projection of the Jacobian."""
    drawn = torch.randn(32, response.num_outputs, generator=generator(seed, "projection"), dtype=response.dtype)
    return torch.linalg.svd(response.vjp(unit(drawn))).Vh[:, :count].T


def plain_qr(rows: Tensor) -> Tensor:
    """As LAPACK gives it: a row may come back with its sense reversed."""
    return torch.linalg.qr(rows.T).Q.T


# --- a real model ----------------------------------------------------------------------------------------------------


def reach(
    name: str, prompts: Iterable[str], count: int, seed: int, quick: bool
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """|J v| and |f(R v)| of what each method finds, R being calibrated on each slice; pooled over slices."""
    loaded = load_model(name, dtype="float32")
    fits = methods(count, seed, quick)
    gains: dict[str, list[Tensor]] = {}
    for prompt in prompts:
        response = Slice(loaded.model, SOURCE, TARGET, [loaded.tokenizer(prompt)["input_ids"]])
        radius = calibrated_radius(response, generator=generator(seed, "radius"))
        print(f"R {radius.value:.1f}, {radius.dose:.2f} of the stream; {prompt}", flush=True)
        jacobian = response.jacobian()
        response.jacobian = lambda jacobian=jacobian: jacobian  # type: ignore[method-assign]  # taken once for all
        for method, fit in fits.items():
            inputs = fit(response, radius.value)
            slopes, changes = response.jvp(inputs).norm(dim=-1), response.change(radius.value * inputs).norm(dim=-1)
            gains.setdefault(f"{method}: |J v|", []).append(slopes)
            gains.setdefault(f"{method}: |f(R v)|", []).append(changes)
            print(f"  {method}: {slopes.mean():.3f}  {changes.mean():.1f}  {changes.median():.1f}", flush=True)
    rows = []
    for method, values in gains.items():
        for statistic, of in (("mean", np.mean), ("median", np.median)):
            rows.append({"part": "model", "name": f"{method} {statistic}", **over_vectors(values, of)})
    show(f"{name}, {SOURCE} to {TARGET}, {count} vectors", rows)
    asked = [
        ("linear", "random", "|J v|", np.mean, 2.0),
        ("linear", "random", "|f(R v)|", np.mean, 2.0),
        ("linear", "SVD of a plain Jacobian", "|J v|", np.mean, 0.98),
        ("linear", "SVD of a plain Jacobian", "|f(R v)|", np.mean, 0.98),
        ("exponential", "linear", "|f(R v)|", np.mean, 1.8),
        ("exponential", "linear", "|f(R v)|", np.median, 1.8),
    ]
    targets = []
    for mine, other, figure, of, least in asked:
        row = ratio(gains[f"{mine}: {figure}"], gains[f"{other}: {figure}"], of)
        title = f"model: {mine} over {other}, {of.__name__} {figure}"
        targets.append(target(title, row, row["value"] >= least, f">= {least}"))
    return rows, targets


def methods(count: int, seed: int, quick: bool) -> dict[str, Callable[[Slice, float], Tensor]]:
    def stream(name: str) -> torch.Generator:
        return generator(seed, name)

    def climbed(response: Slice, radius: float, orthogonalise: Callable[[Tensor], Tensor], inputs: Tensor) -> Tensor:
        for _ in range(10):
            inputs = unit(response.climb(radius * orthogonalise(inputs))[1])
        return inputs

    def exponential_fit(response: Slice, radius: float) -> Tensor:
        return exponential(response, count, generator=stream("exponential"), radius=radius).inputs

    def quadratic_fit(response: Slice, radius: float) -> Tensor:
        rounds = 3 if quick else 10
        return quadratic(response, count, generator=stream("quadratic"), radius=radius, iterations=rounds).inputs

    def melbo_fit(response: Slice, radius: float) -> Tensor:
        steps = 10 if quick else 40
        config = MelboConfig(num_vectors=count, radius=radius, steps=steps, batch=count, learning_rate=5e-3)
        return melbo(response, config, generator=stream("melbo")).vectors / radius

    return {
        "random": lambda response, _: random_units(response, 4 * count, generator=stream("random")),
        "linear, published": lambda response, _: columns_of_vh(response, count),
        "quadratic, published": lambda response, _: orthogonal_iteration(response, count, seed, 20),
        "exponential, published": lambda response, radius: climbed(
            response, radius, plain_qr, published_start(response, count, seed)
        ),
        "SVD of a plain Jacobian": lambda response, _: plain_singular_vectors(response, count),
        "projected": lambda response, radius: (
            projected(response, min(count, 32), generator=stream("projected"), radius=radius).inputs
        ),
        "linear": lambda response, _: linear(response, count, generator=stream("linear")).inputs,
        "linear, Krylov": lambda response, _: (
            linear(response, count, generator=stream("linear"), krylov_depth=4).inputs
        ),
        "quadratic": quadratic_fit,
        "exponential": exponential_fit,
        "exponential, made orthonormal": lambda response, radius: orthonormal(exponential_fit(response, radius)),
        "melbo": melbo_fit,
    }


def plain_singular_vectors(response: Slice, count: int) -> Tensor:
    """The reference: the Jacobian row by row with autograd, none of the products of this library, NumPy's SVD."""
    theta = torch.zeros(1, response.num_inputs, requires_grad=True)
    change = response.token_changes(theta)[0].mean(0)
    rows = [torch.autograd.grad(value, theta, retain_graph=True)[0][0] for value in change]
    right = np.linalg.svd(torch.stack(rows).double().numpy())[2]
    return torch.from_numpy(right[:count]).float()


# --- factors ---------------------------------------------------------------------------------------------------------


def _rows(count: int, size: int, seed: int, name: str) -> Tensor:
    drawn = torch.randn(count, size, generator=generator(seed, f"factors/{name}"), dtype=torch.float64)
    return unit(drawn)


def _mean_max_cosine(true: Tensor, found: Tensor) -> float:
    return float((true @ found.T).abs().amax(1).mean())


if __name__ == "__main__":
    main()
