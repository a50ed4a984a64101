"""How good the heads are: every metric, reader and seed against every baseline, on documents held out by source.

    python benchmarks/heads.py --data FOLDER [--metrics refusal …] [--readers demo:qwen-coder-0.5b …] [--seeds 0 1 2]

Builds a bank for each, writes it and its scored.json below `--out` (for `pilotfish report`), and prints the table.
Recordings are kept below `--work`, so that a second run, or another seed on the same texts, reads no text again. On two
cores the 0.5B reader reads about 400 tokens a second: about an hour for all six metrics.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from tasks import Task, tasks

from pilotfish.cli.terminal import quieten_transformers, table
from pilotfish.heads import Card, Measured
from pilotfish.models import LoadedModel, load_model
from pilotfish.runs import run_card, write_json
from pilotfish.scores import RecipeConfig, RivalConfig, build_bank, write_scored
from pilotfish.scores.scored import SCORED_FILE

READER = "demo:qwen-coder-0.5b"
FIGURES = ("auroc_token", "auroc_within", "auroc_response", "pairwise_accuracy", "tpr_response_at_1pct_fpr")
AT_THRESHOLD = ("recall_at_threshold", "fpr_at_threshold", "lag_median", "fpr_wordy_negatives")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the public sets, see docs/data.md")
    parser.add_argument("--metrics", nargs="+", help="these alone")
    parser.add_argument("--readers", nargs="+", default=[READER], help="models that read")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="of splits, draws and fit")
    parser.add_argument("--rivals", nargs="+", default=RivalConfig().names, help="baselines")
    parser.add_argument("--work", type=Path, default=Path("out/heads/recordings"), help="folder of the recordings")
    parser.add_argument("--out", type=Path, default=Path("out/heads/banks"), help="folder of the banks")
    parser.add_argument("--json", type=Path, help="also write the rows and the run's card here")
    args = parser.parse_args()
    quieten_transformers()
    rows: list[dict[str, Any]] = []
    for name in args.readers:
        reader = load_model(name)
        for seed in args.seeds:
            available = tasks(args.data, seed)
            for metric in args.metrics or available:
                folder = args.out / f"{name.removeprefix('demo:').replace('/', '-')}-{metric}-seed{seed}"
                card = build(available[metric](), reader, tuple(args.rivals), args.work, folder, seed)
                rows += [{"reader": name, "seed": seed, "metric": metric, **row} for row in figures(card, metric)]
                show([row for row in rows if row["metric"] == metric and row["reader"] == name and row["seed"] == seed])
    if args.json is not None:
        settings = {key: str(value) for key, value in vars(args).items()}
        write_json(args.json, {"rows": rows, "card": run_card("benchmarks/heads.py", settings, args.seeds[0])})


def build(task: Task, reader: LoadedModel, rivals: tuple[str, ...], work: Path, folder: Path, seed: int) -> Card:
    """One bank and its held-out texts as all have scored them, on disk."""
    config = RecipeConfig(max_tokens=task.max_tokens, rivals=RivalConfig(names=rivals))
    bank, scored = build_bank(
        task.splits, task.benign, reader, metric=task.metric, config=config, work_folder=work, seed=seed
    )
    bank.save(folder)
    write_scored(folder / SCORED_FILE, task.metric, scored)
    return bank.card


def figures(card: Card, metric: str) -> list[dict[str, Any]]:
    """The head's figures and each baseline's, with the difference where there is one."""
    rows = []
    for figure in (*FIGURES, *AT_THRESHOLD):
        found = card.metrics.get(f"{metric}/{figure}")
        if found is None:
            continue
        rows.append({"figure": figure, "scorer": "head", "found": cell(found), "head_minus": ""})
        for name, measured in card.baselines.items():
            whose = name.removeprefix(f"{metric}/{figure}/")
            if whose != name:
                difference = card.metrics.get(f"{metric}/{figure}_minus_{whose}")
                minus = "" if difference is None else cell(difference, sign="+")
                rows.append({"figure": figure, "scorer": whose, "found": cell(measured), "head_minus": minus})
    return rows


def cell(measured: Measured, sign: str = "") -> str:
    low, high = (format(end, f"{sign}.3f") for end in (measured.low, measured.high))
    return f"{format(measured.value, f'{sign}.3f')} [{low}, {high}]"


def show(rows: list[dict[str, Any]]) -> None:
    print(f"\n{rows[0]['metric']}, {rows[0]['reader']}, seed {rows[0]['seed']}")
    cells = [[f"{row['figure']}: {row['scorer']}", row["found"], row["head_minus"]] for row in rows]
    print(table(["", "found, 95 % interval", "head minus it"], cells), flush=True)


if __name__ == "__main__":
    main()
