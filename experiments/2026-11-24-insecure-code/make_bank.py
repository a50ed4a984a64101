"""Makes the `insecure_code` bank that ships for Qwen2.5-Coder-0.5B from SVEN, CyberSecEval and HaluEval.

Where the data is to be had, and what each set gives, stands in docs/data.md. The test texts are SVEN's own validation
half. Its training half shares 43 repositories with it, so every training text whose repository (or a copy of whose
text) stands in the test half is left out.

    python experiments/2026-11-24-insecure-code/make_bank.py --data FOLDER
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from pilotfish.core import Conversation
from pilotfish.models import load_model
from pilotfish.runs import generator
from pilotfish.scores import RecipeConfig, build_bank
from pilotfish.texts import read_cyberseceval, read_halueval_benign, read_sven, split

METRIC = "insecure_code"
READER = "demo:qwen-coder-0.5b"
NUM_CYBERSECEVAL = 400
"""Rows drawn from CyberSecEval: all of them are insecure, and their requests look unlike SVEN's."""
NUM_BENIGN = 600
SHIPPED = Path(__file__).parents[2] / "src/pilotfish/heads/shipped"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with sven/, cyberseceval/ and halueval/")
    parser.add_argument(
        "--out", type=Path, default=SHIPPED / "qwen2.5-coder-0.5b-insecure-code", help="folder of the bank"
    )
    parser.add_argument("--work", type=Path, default=Path("out/insecure-code"), help="folder of the recordings")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    reader = load_model(READER)
    splits, benign = texts(args.data, args.seed)
    bank = build_bank(
        splits, benign, reader, metric=METRIC, config=RecipeConfig(), work_folder=args.work, seed=args.seed
    )
    bank.save(args.out)
    for name, measured in bank.card.metrics.items():
        print(f"{name:55} {measured.value:.3f} [{measured.low:.3f}, {measured.high:.3f}]  n = {measured.n}")
    for name, measured in bank.card.baselines.items():
        print(f"{name:55} {measured.value:.3f} [{measured.low:.3f}, {measured.high:.3f}]  n = {measured.n}")
    print(bank.card.thresholds)
    print("better than words:", bank.card.better_than_words)


def texts(data: Path, seed: int) -> tuple[dict[str, list[Conversation]], list[Conversation]]:
    """The splits and the benign responses."""
    test = read_sven(data / "sven", "val")
    insecure = drawn(read_cyberseceval(data / "cyberseceval" / "instruct.json"), NUM_CYBERSECEVAL, seed, "cyberseceval")
    pool = [*apart_from(test, [*read_sven(data / "sven", "train"), *insecure])]
    benign = drawn(read_halueval_benign(data / "halueval" / "general_data.jsonl"), NUM_BENIGN, seed, "benign")
    return {**split(pool, {"train": 0.85, "validation": 0.15}, seed=seed), "test": test}, benign


def drawn(rows: list[Conversation], count: int, seed: int, name: str) -> list[Conversation]:
    order = torch.randperm(len(rows), generator=generator(seed, name))
    return [rows[i] for i in order[:count].tolist()]


def apart_from(test: list[Conversation], rows: list[Conversation]) -> list[Conversation]:
    """The rows that share no repository, and no copied text, with the test rows."""
    groups = {row.group for row in test}
    contents = {_document(row) for row in test}
    copied = {row.group for row in rows if _document(row) in contents}
    return [row for row in rows if row.group not in groups | copied]


def _document(row: Conversation) -> str:
    return " ".join(row.messages[-1].content.split())


if __name__ == "__main__":
    main()
