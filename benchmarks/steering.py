"""What steering vectors are worth: every table with no steering, a prompt, examples, and null directions at equal KL.

    python benchmarks/steering.py --data FOLDER [--models demo:qwen-coder-0.5b demo:smollm2] [--tables NAME …]
                                  [--quick]

A model has: acceptance as a damage meter against KL and perplexity; the wedding experiment of Turner et al. (arXiv
2308.10248), where the vector is held against prepending its word; open answers (in French, refusing); A/B sets of
anthropics/evals; and what an active edit costs in generation, paired token by token. Beside the effects stand side
effects: unrelated perplexity, repetition, and for two tasks GSM8K.

Each table goes to a journal when it is finished. The same command prints what stands there and goes on with the rest;
delete the journal to begin again. Take `overhead` on a quiet machine.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from steering_tables import QUICK, Sizes, Tables

from pilotfish.cli.terminal import quieten_transformers, table
from pilotfish.models import load_model
from pilotfish.runs import run_card, write_json
from pilotfish.texts.journal import Journal

QUICK_TABLES = ("damage meters", "wedding", "answer in French", "overhead")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the public sets, see docs/data.md")
    parser.add_argument("--models", nargs="+", default=["demo:qwen-coder-0.5b", "demo:smollm2"])
    parser.add_argument("--tables", nargs="+", default=Tables.names(), choices=Tables.names(), metavar="NAME")
    parser.add_argument("--quick", action="store_true", help="a smoke run: the smallest model, few tables and items")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--journal", type=Path, default=Path("out/steering.jsonl"), help="where tables are kept")
    parser.add_argument("--json", type=Path, help="also write targets, rows and the run's card here")
    args = parser.parse_args()
    quieten_transformers()
    if args.quick:
        args.models, args.tables = ["demo:smollm2"], QUICK_TABLES
        args.journal = args.journal.with_suffix(".quick.jsonl")
        args.journal.unlink(missing_ok=True)
    with Journal(args.journal) as journal:
        found = [one for name in args.models for one in tables_of(name, args, journal)]
    targets = [{**target, "model": one["model"]} for one in found for target in one["targets"]]
    show_targets(targets)
    if args.json is not None:
        rows = [{**row, "model": one["model"]} for one in found for row in one["rows"]]
        settings = {key: str(value) for key, value in vars(args).items()}
        card = run_card("benchmarks/steering.py", settings, args.seed)
        write_json(args.json, {"targets": targets, "rows": rows, "card": card})


def tables_of(model: str, args: argparse.Namespace, journal: Journal) -> list[dict[str, Any]]:
    """The tables of one model, each printed as soon as it is there."""
    kept = {row["table"]: row for row in journal.rows if (row["model"], row["seed"]) == (model, args.seed)}
    made: Tables | None = None
    found = []
    for name in args.tables:
        if name not in kept:
            sizes = QUICK if args.quick else Sizes()
            made = made or Tables(load_model(model), args.data, sizes=sizes, seed=args.seed)
            kept[name] = {"model": model, "table": name, "seed": args.seed, **made.table(name)}
            journal.append(kept[name])
        print(f"\n{model}: {name} ({kept[name]['cpu_s']:.0f} CPU seconds)\n{kept[name]['text']}", flush=True)
        found.append(kept[name])
    return found


def show_targets(targets: Sequence[dict[str, Any]]) -> None:
    cells = [
        [
            f"{one['model']}: {one['name']}",
            f"{one['value']:.3f} [{one['low']:.3f}, {one['high']:.3f}]",
            f"{one['target']}",
            "yes" if one["met"] else "NO",
        ]
        for one in targets
    ]
    print(f"\n{table(['', 'found, 95 % interval', 'target', 'met'], cells)}")


if __name__ == "__main__":
    main()
