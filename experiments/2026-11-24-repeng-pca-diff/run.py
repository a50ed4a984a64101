"""What is left of the mean difference in repeng's two directions; prints the table of the README.

pip install --no-deps repeng==0.4.0
python experiments/2026-11-24-repeng-pca-diff/run.py [--model demo:smollm2] [--json PATH]
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pilotfish.cli.terminal import quieten_transformers, table
from pilotfish.core import Site
from pilotfish.models import LoadedModel, load_model
from pilotfish.runs import run_card, write_json
from pilotfish.steering import ExtractConfig, extract
from pilotfish.texts import Contrast

OPENINGS = (
    "I",
    "Today",
    "The weather",
    "My friends",
    "When I woke up",
    "The first thing",
    "It is",
    "We walked",
    "That song",
    "In the evening",
    "The letter said",
    "Everyone here",
    "On the train",
    "This morning the garden",
    "She told me",
    "The last page",
)
"""How the assistant's answer begins: both sides of a pair end with the same words."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo:smollm2")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    quieten_transformers()
    loaded = load_model(args.model, dtype="float32")
    sides = [tuple(text(mood, opening) for mood in ("happy", "sad")) for opening in OPENINGS]
    contrasts = [Contrast(id=str(i), group=str(i), prompt="", positive=a, negative=b) for i, (a, b) in enumerate(sides)]
    mean = extract(contrasts, loaded, name="happy", config=ExtractConfig(chat=False))
    ours = extract(contrasts, loaded, name="happy", config=ExtractConfig(chat=False, method="pca_center"))
    theirs = {method: trained(loaded, sides, method) for method in ("pca_diff", "pca_center")}
    rows = []
    for layer in sorted(theirs["pca_diff"])[:-1]:  # the last one is read behind the final norm
        site = Site(layer, "resid_post")
        row = {method: cosine(vectors[layer], mean[site].vector) for method, vectors in theirs.items()}
        rows.append({"layer": layer, **row, "ours": cosine(ours[site].vector, mean[site].vector)})
    if args.json is not None:
        card = run_card("experiments/2026-11-24-repeng-pca-diff/run.py", {"model": args.model}, 0)
        write_json(args.json, {"rows": rows, "card": card})
    columns = ("pca_diff", "pca_center", "ours")
    print(table(["layer", *columns], [[str(row["layer"]), *(f"{row[name]:+.3f}" for name in columns)] for row in rows]))
    for name in columns:
        found = torch.tensor([row[name] for row in rows], dtype=torch.float64)
        sizes, num_turned = found.abs(), int((found < 0).sum())
        print(f"{name}: |cosine| {sizes.mean():.2f}, least {sizes.min():.2f}, {num_turned} of {len(found)} below 0")


def text(mood: str, opening: str) -> str:
    return f"<|im_start|>user\nPretend to be an extremely {mood} person.<|im_end|>\n<|im_start|>assistant\n{opening}"


def trained(loaded: LoadedModel, sides: list[tuple[str, ...]], method: str) -> dict[int, Tensor]:
    if not hasattr(np, "float_"):
        np.float_ = np.float64  # type: ignore[attr-defined]  # what repeng's annotations name
    from repeng import ControlVector, DatasetEntry

    entries: list[Any] = [DatasetEntry(positive=a, negative=b) for a, b in sides]
    vectors = ControlVector.train(loaded.model, loaded.tokenizer, entries, method=method).directions
    return {layer: torch.from_numpy(vector) for layer, vector in vectors.items()}


def cosine(one: Tensor, other: Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(one.double(), other.double(), dim=0))


if __name__ == "__main__":
    main()
