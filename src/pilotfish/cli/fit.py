"""`pilotfish fit`: labelled conversations in, a bank and what its card says out."""

from __future__ import annotations

from pathlib import Path

from pilotfish.cli.terminal import number, said_once, table
from pilotfish.cli.verbs import Fit
from pilotfish.core import Conversation
from pilotfish.errors import TextError
from pilotfish.heads import Card
from pilotfish.models import DEMO_PAIRS, load_model
from pilotfish.reports.figures import promise_of
from pilotfish.scores import RecipeConfig, RivalConfig, build_bank, teach_ordinary, write_scored
from pilotfish.scores.ordinary import Taught
from pilotfish.scores.scored import SCORED_FILE
from pilotfish.texts import read_jsonl, split

FRACTIONS = {"train": 0.7, "validation": 0.15, "test": 0.15}
FRACTIONS_WITH_BENIGN = {"train": 0.55, "validation": 0.15, "test": 0.15, "benign": 0.15}
"""When no benign texts are given: the last part's negatives set the threshold."""


def run(config: Fit) -> int:
    splits, benign = read_splits(config.data, config.metric, config.benign, budget=config.budget, seed=config.seed)
    pair_target, pair_draft = DEMO_PAIRS.get(config.model, (None, None))
    recipe = RecipeConfig(
        num_sites=config.sites,
        max_tokens=config.max_tokens,
        budget=config.budget,
        rivals=RivalConfig(
            names=config.rivals,
            target=config.target or (pair_target if pair_draft and "target" in config.rivals else None),
            question=config.question,
        ),
    )
    reader = load_model(pair_draft or config.model, device=config.device, dtype=config.dtype)
    with said_once():  # every scorer lacks what the texts lack
        bank, scored = build_bank(
            splits, benign, reader, metric=config.metric, config=recipe, work_folder=config.work, seed=config.seed
        )
    bank.save(config.out)
    write_scored(config.out / SCORED_FILE, config.metric, scored)
    _print_card(bank.card, config.metric)
    print(f"\nThe bank: {config.out.resolve()}, with the held-out texts in {SCORED_FILE}: these are your own words.")
    print(f"To see curves, hits and misses: pilotfish report {config.out}")
    return 0


def read_splits(data: Path, metric: str, benign: Path | None, *, budget: float, seed: int) -> Taught:
    """Labelled conversations as splits that share no document, and what must not be flagged.

    Raises:
        TextError: no row has a label of the metric; or as `read_jsonl` and `split`.
    """
    rows = read_jsonl(data)
    known = sorted({span.metric for row in rows for span in row.spans} | {name for row in rows for name in row.labels})
    if metric not in known:
        raise TextError(f"{data} has no label of metric {metric!r}; it has {', '.join(known) or 'none at all'}")
    rows = [row for row in rows if metric in row.labels or any(span.metric == metric for span in row.spans)]
    if benign is not None:
        splits = split(rows, FRACTIONS, seed=seed)
        return teach_ordinary(splits, read_jsonl(benign), metric=metric, budget=budget, seed=seed)
    splits = split(rows, FRACTIONS_WITH_BENIGN, seed=seed)
    return Taught(splits, [row for row in splits.pop("benign") if _is_negative(row, metric)])


def _is_negative(row: Conversation, metric: str) -> bool:
    return row.labels.get(metric) == 0 and not any(span.metric == metric and span.value > 0 for span in row.spans)


def _print_card(card: Card, metric: str) -> None:
    rows = [
        [name, number(figure.value), f"[{number(figure.low)}, {number(figure.high)}]", str(figure.n)]
        for name, figure in {**card.metrics, **card.baselines}.items()
    ]
    print(table(["on held-out documents", "value", "95 % interval", "documents"], rows))
    print(f"\n{promise_of(card, metric)}")
    if metric in card.better_than_words:
        print("Better than TF-IDF." if card.better_than_words[metric] else "NOT shown to be better than TF-IDF.")
