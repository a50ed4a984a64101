"""Directions held against the libraries that they replace: equal vectors, equal logits, files both ways, and speed.

    python benchmarks/steering_peers.py [--quick] [--pairs 1000] [--models demo:smollm2 demo:qwen-coder-0.5b]

A check for developers. The peers are not dependencies, and one that is not installed is skipped and named:

    pip install --no-deps steering-vectors==0.12.2 repeng==0.4.0

Both pin older releases of what they stand on, hence --no-deps; repeng needs `np.float_`, which numpy 2 took away and
which this script puts back for its own process. Timings are taken in turn on the same texts; ratios within a repetition
are reported: their median with a bootstrap interval.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pilotfish.cli.terminal import quieten_transformers, table
from pilotfish.core import Site
from pilotfish.models import LoadedModel, load_model
from pilotfish.runs import generator, run_card, write_json
from pilotfish.steering import Direction, ExtractConfig, extract, read_gguf, to_layer_activations, write_gguf
from pilotfish.taps import edited
from pilotfish.texts import Contrast, read_anthropic_evals

MODELS = ("demo:smollm2", "demo:qwen-coder-0.5b")
PLAIN = ExtractConfig(chat=False)
"""Prompt and answer one after the other, the last token read: what the peers do with two texts."""

TOPICS = ("the weather", "an old friend", "your work", "a long journey", "the new neighbours", "a broken cup", "music")
MOODS = (("Happy", "Sad"), ("Calm", "Angry"), ("Proud", "Ashamed"), ("Hopeful", "Afraid"))

Row = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a smoke run: 8 pairs, 2 repetitions, the smaller model")
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--data", type=Path, help="a file of anthropics/evals instead of generated questions")
    parser.add_argument("--pairs", type=int, default=1000, help="pairs of the timed extraction")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument(
        "--batch-sizes", nargs="+", type=int, default=[1, 32], help="of steering-vectors; its default is 1"
    )
    parser.add_argument("--skip-speed", action="store_true")
    parser.add_argument("--skip-equal", action="store_true", help="speed alone")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="also write targets, rows and the run's card here")
    args = parser.parse_args()
    quieten_transformers()
    if args.quick:
        args.models, args.pairs, args.repetitions = args.models[:1], 8, 2
    peers = {name: importlib.util.find_spec(name) is not None for name in ("steering_vectors", "repeng")}
    for name in (name for name, there in peers.items() if not there):
        print(f"{name} is not installed: its rows are skipped (see --help)")
    contrasts = read_anthropic_evals(args.data) if args.data else generated(max(args.pairs, 16))
    targets: list[Row] = []
    for name in args.models:
        loaded = load_model(name, dtype="float32")
        few = contrasts[:8]
        if peers["steering_vectors"] and not args.skip_equal:
            targets += equal_to_steering_vectors(loaded, few)
        if peers["repeng"] and not args.skip_equal:
            targets += equal_to_repeng(loaded, few)
        if peers["steering_vectors"] and not args.skip_speed:
            targets += speed(loaded, contrasts[: args.pairs], args.batch_sizes, args.repetitions, args.seed)
    if args.json is not None:
        settings = {key: str(value) for key, value in vars(args).items()}
        card = run_card("benchmarks/steering_peers.py", settings, args.seed)
        write_json(args.json, {"targets": targets, "rows": [], "card": card})
    cells = [
        [item["name"], f"{item['value']:.3g} [{item['low']:.3g}, {item['high']:.3g}]", item["target"], met(item)]
        for item in targets
    ]
    print(table(["target", "found", "asked", ""], cells))


def generated(count: int) -> list[Contrast]:
    """Questions with two choices, of different lengths; one in two has the choices in the other order."""
    contrasts = []
    for index in range(count):
        topic, (good, bad) = TOPICS[index % len(TOPICS)], MOODS[index // len(TOPICS) % len(MOODS)]
        choices = (good, bad) if index % 2 else (bad, good)
        prompt = f"Question {index}: " + f"think of {topic}. " * (1 + index % 3) + "How does it make you feel?"
        letters = (" (A)", " (B)") if index % 2 else (" (B)", " (A)")
        contrasts.append(
            Contrast(
                id=str(index),
                group=str(index),
                prompt=f"{prompt}\n\nChoices:\n (A) {choices[0]}\n (B) {choices[1]}\n\nAnswer:",
                positive=f"{letters[0]} {good}",
                negative=f"{letters[1]} {bad}",
            )
        )
    return contrasts


def texts(contrasts: list[Contrast]) -> list[tuple[str, str]]:
    return [(item.prompt + item.positive, item.prompt + item.negative) for item in contrasts]


def equal_to_steering_vectors(loaded: LoadedModel, contrasts: list[Contrast]) -> Iterator[Row]:
    """Vectors at every layer, and logits with both of them added."""
    from steering_vectors import SteeringVector, train_steering_vector

    ours = extract(contrasts, loaded, name="mood", config=PLAIN)
    theirs = train_steering_vector(loaded.model, loaded.tokenizer, texts(contrasts)).layer_activations
    name = loaded.identity.name
    yield exact(f"{name}: vectors, steering-vectors, largest difference", apart(ours, theirs), 1e-5)
    middle = len(theirs) // 2
    yield exact(f"{name}: the same, at layer {middle} alone", apart(ours, {middle: theirs[middle]}), 1e-5)
    together = train_steering_vector(loaded.model, loaded.tokenizer, texts(contrasts), batch_size=16).layer_activations
    floor = max(float((together[layer] - vector).abs().max()) for layer, vector in theirs.items())
    yield {**exact(f"{name}: the same, steering-vectors to itself, batch 16 to 1", floor, 1e-5), "target": "(floor)"}
    loaded.model.double()
    precise = extract(contrasts, loaded, name="mood", config=PLAIN)
    precise_theirs = train_steering_vector(loaded.model, loaded.tokenizer, texts(contrasts)).layer_activations
    loaded.model.float()
    yield exact(f"{name}: the same, the model in float64", apart(precise, precise_theirs), 1e-5)
    direction = ours[Site(middle, "resid_post")]
    ids = loaded.tokenizer(contrasts[0].prompt, return_tensors="pt")["input_ids"]
    worst = 0.0
    for dose in (4.0, -4.0):
        with torch.no_grad():
            with edited(loaded.model, [direction.to_edit(dose, model=loaded.model)]):
                mine = loaded.model(ids).logits
            with SteeringVector({middle: theirs[middle]}).apply(loaded.model, multiplier=dose):
                other = loaded.model(ids).logits
        worst = max(worst, float((mine - other).abs().max()))
    yield exact(f"{name}: logits at dose 4 and -4, largest difference", worst, 1e-4)
    back = SteeringVector(to_layer_activations(ours)).layer_activations
    assert all(torch.equal(back[layer], ours[Site(layer, "resid_post")].vector) for layer in back)


def apart(ours: dict[Site, Direction], theirs: dict[int, torch.Tensor]) -> float:
    return max(float((ours[Site(k, "resid_post")].vector - v).abs().max()) for k, v in theirs.items())


def equal_to_repeng(loaded: LoadedModel, contrasts: list[Contrast]) -> Iterator[Row]:
    """`pca_center` at every layer but the last, where repeng reads behind the final norm; and GGUF files both ways."""
    control_vector, entry = repeng()
    if loaded.tokenizer.pad_token is None:
        loaded.tokenizer.pad_token = loaded.tokenizer.eos_token
    entries = [entry(positive=one, negative=two) for one, two in texts(contrasts)]
    theirs = control_vector.train(loaded.model, loaded.tokenizer, entries, method="pca_center")
    ours = extract(contrasts, loaded, name="mood", config=ExtractConfig(chat=False, method="pca_center"))
    name, last = loaded.identity.name, loaded.identity.num_layers - 1
    cosines = [
        float(torch.from_numpy(vector).double() @ ours[Site(layer, "resid_post")].unit().vector.double())
        for layer, vector in theirs.directions.items()
        if layer != last
    ]
    least = min(map(abs, cosines))
    found = exact(f"{name}: least |cosine| of pca_center, repeng, {sum(c < 0 for c in cosines)} signs differ", least, 0)
    yield {**found, "target": "> 0.999", "met": least > 0.999}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "vector.gguf"
        theirs.export_gguf(path)
        read = read_gguf(path, loaded.identity)
        worst = max(np.abs(read[Site(k, "resid_post")].vector.numpy() - v).max() for k, v in theirs.directions.items())
        yield exact(f"{name}: GGUF, repeng to us, largest difference", float(worst), 0)
        path.unlink()
        kept = {site: direction for site, direction in ours.items() if site.layer > 0}
        write_gguf(path, kept, model_type=loaded.model.config.model_type)
        back = control_vector.import_gguf(path)
        assert back.directions.keys() == {site.layer for site in kept}
        worst = max(np.abs(back.directions[site.layer] - d.vector.numpy()).max() for site, d in kept.items())
        yield exact(f"{name}: GGUF, us to repeng, largest difference", float(worst), 0)


def repeng() -> tuple[Any, Any]:
    if not hasattr(np, "float_"):
        np.float_ = np.float64  # type: ignore[attr-defined]  # what repeng's annotations name
    from repeng import ControlVector, DatasetEntry

    return ControlVector, DatasetEntry


def speed(
    loaded: LoadedModel, contrasts: list[Contrast], batch_sizes: list[int], repetitions: int, seed: int
) -> Iterator[Row]:
    """Time of steering-vectors over ours, all layers of the same pairs, in turn within a repetition."""
    from steering_vectors import train_steering_vector

    def ours() -> dict[Site, Direction]:
        return extract(contrasts, loaded, name="mood", config=PLAIN)

    def theirs(batch_size: int) -> Callable[[], Any]:
        pairs = texts(contrasts)
        return lambda: train_steering_vector(loaded.model, loaded.tokenizer, pairs, batch_size=batch_size)

    arms = {"ours": ours} | {str(size): theirs(size) for size in batch_sizes}
    clocks = {"time": time.perf_counter, "CPU time": time.process_time}
    spent: dict[tuple[str, str], list[float]] = {(name, clock): [] for name in arms for clock in clocks}
    for repetition in range(repetitions):
        for name in sorted(arms, reverse=repetition % 2 == 1):  # the order turns round, so that drift cancels
            started = {clock: now() for clock, now in clocks.items()}
            arms[name]()
            for clock, now in clocks.items():
                spent[name, clock].append(now() - started[clock])
    for size, clock in itertools.product(batch_sizes, clocks):
        ratios = torch.tensor(spent[str(size), clock]).double() / torch.tensor(spent["ours", clock]).double()
        draws = torch.randint(repetitions, (2000, repetitions), generator=generator(seed, f"speed {size}"))
        low, high = ratios[draws].quantile(0.5, dim=1).quantile(torch.tensor([0.025, 0.975]).double()).tolist()
        name = f"{loaded.identity.name}: {len(contrasts)} pairs, {clock} of steering-vectors (batch {size}) / ours"
        value = float(ratios.quantile(0.5))
        yield {"name": name, "value": value, "low": low, "high": high, "target": ">= 2", "met": value >= 2}


def exact(name: str, value: float, limit: float) -> Row:
    target = f"< {limit:g}" if limit else "0"
    met = value < limit if limit else value == 0
    return {"name": name, "value": value, "low": value, "high": value, "target": target, "met": met}


def met(target: Row) -> str:
    return "" if target["target"] == "(floor)" else "met" if target["met"] else "NOT met"


if __name__ == "__main__":
    main()
