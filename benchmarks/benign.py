"""What a larger sample of benign responses buys: recall at the same promise.

    python benchmarks/benign.py --data FOLDER --banks out/heads/banks/smollm2-refusal-seed0 … [--sizes 299 500 1000]

The banks are what `benchmarks/heads.py` wrote, of one reader; their scored.json has the held-out texts. The benign
responses are those of HaluEval that no head has learnt from. A draw sets the threshold on so many of them, and the
others say what is flagged of responses that did not.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from tasks import BUDGET, more_benign
from torch import Tensor

from pilotfish.cli.terminal import quieten_transformers, table
from pilotfish.heads import HeadBank
from pilotfish.models import load_model
from pilotfish.runs import generator, run_card, write_json
from pilotfish.scores import read_scored, threshold_at_budget
from pilotfish.scores.fitted import Reading
from pilotfish.scores.limit import response_scores
from pilotfish.scores.prepared import prepare
from pilotfish.scores.scored import SCORED_FILE

MAX_TOKENS = 256
SIZES = (299, 500, 1000, 1500)
NUM_DRAWS = 200


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the public sets, see docs/data.md")
    parser.add_argument("--banks", type=Path, nargs="+", required=True, help="folders, all of one reader")
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="benign responses that set the threshold")
    parser.add_argument("--budget", type=float, default=BUDGET)
    parser.add_argument("--work", type=Path, default=Path("out/heads/recordings"), help="folder of the recordings")
    parser.add_argument("--seed", type=int, default=0, help="of the draws")
    parser.add_argument("--json", type=Path, help="also write the rows and the run's card here")
    args = parser.parse_args()
    quieten_transformers()
    banks = {folder: HeadBank.load(folder) for folder in args.banks}
    reader = load_model(next(iter(banks.values())).identity.name)
    pool = more_benign(args.data)
    if max(args.sizes) >= len(pool):
        parser.error(f"there are {len(pool)} benign responses; give --sizes below that, so that some are left")
    rows = []
    for folder, bank in banks.items():
        (metric,) = bank.metrics
        texts = prepare(pool, reader, metric, MAX_TOKENS, keeps_unlabelled=True)
        scores = response_scores(bank, texts, Reading(reader, bank.sites, args.work))[:, 0]
        rows += [at_size(folder, scores, size, args.budget, args.seed) for size in args.sizes]
    show(rows)
    if args.json is not None:
        settings = {key: str(value) for key, value in vars(args).items()}
        write_json(args.json, {"rows": rows, "card": run_card("benchmarks/benign.py", settings, args.seed)})


def at_size(folder: Path, scores: Float[Tensor, " response"], size: int, budget: float, seed: int) -> dict[str, Any]:
    """Means over draws of what the threshold finds and flags, with the 5th and the 95th of a hundred."""
    held_out = [text for text in read_scored(folder / SCORED_FILE).by_scorer["head"] if text.label == text.label]
    positive, negative = (
        torch.tensor([text.score for text in held_out if (text.label >= 0.5) == wanted]) for wanted in (True, False)
    )
    random = generator(seed, f"benign {size}")
    figures: dict[str, list[float]] = {"recall": [], "fpr": [], "flagged": []}
    for _ in range(NUM_DRAWS):
        order = torch.randperm(len(scores), generator=random)
        threshold = threshold_at_budget(scores[order[:size]], budget).threshold
        for name, values in (("recall", positive), ("fpr", negative), ("flagged", scores[order[size:]])):
            figures[name].append(float((values >= threshold).double().mean()))
    return {"bank": folder.name, "size": size} | {name: spread(values) for name, values in figures.items()}


def spread(values: Sequence[float]) -> dict[str, float]:
    low, high = torch.tensor(values).double().quantile(torch.tensor([0.05, 0.95]).double()).tolist()
    return {"value": sum(values) / len(values), "low": low, "high": high}


def show(rows: Sequence[dict[str, Any]]) -> None:
    names = ("recall", "fpr", "flagged")
    cells = []
    for row in rows:
        found = ["{value:.3f} [{low:.3f}, {high:.3f}]".format(**row[name]) for name in names]
        cells.append([row["bank"], str(row["size"]), *found])
    head = ["bank", "benign", "found", "held-out negatives flagged", "other benign flagged"]
    print(table(head, cells))


if __name__ == "__main__":
    main()
