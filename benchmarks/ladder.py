"""How fast heads get better with the size of their reader: the same head, fitted on the same texts, on each reader.

    python benchmarks/ladder.py --data FOLDER [--metrics refusal toxicity] [--readers demo:smollm2 …] [--texts 400]

Readers differ in tokenizer, so responses and characters are compared, never tokens, and only characters that every
reader has read. Differences and the slope per factor of ten of parameters are paired: one bootstrap by source document
draws for all readers. No reader of about 270M parameters is to be had as a demo model, so that rung is missing. On two
cores the 1.5B reader takes about a quarter of an hour for the default texts; recordings are kept below `--work`.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from heads import cell
from tasks import Task, drawn, tasks
from torch import Tensor

from pilotfish.cli.terminal import quieten_transformers, table
from pilotfish.core import Conversation
from pilotfish.heads import FitConfig
from pilotfish.models import evenly_spaced_sites, load_model
from pilotfish.runs import generator, run_card, write_json
from pilotfish.scores import Estimate, Reading, bootstrap_by_group, character_scores, fit_head, labelled_spans
from pilotfish.scores.metrics import Statistic, auroc_of_draws, has_both_labels
from pilotfish.scores.prepared import prepare
from pilotfish.scores.recipe import form_for

READERS = ("demo:smollm2", "demo:qwen-coder-0.5b", "demo:qwen-coder-1.5b")
MISSING = "a reader of about 270M parameters"
SHARES = {"train": 0.5, "validation": 0.15, "test": 0.35}
NUM_SITES = 5


class Rung(NamedTuple):
    """What one reader's head says of the test texts."""

    reader: str
    num_parameters: int
    responses: dict[str, float]
    """By id of the text."""
    characters: dict[str, np.ndarray]
    """What each character of the last message scores; -inf where it was not read."""


class Truth(NamedTuple):
    groups: dict[str, str]
    labels: dict[str, float]
    """Of responses; NaN where there is none."""
    is_span: dict[str, np.ndarray]
    """Of the characters of the last message, where spans are labelled."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the public sets, see docs/data.md")
    parser.add_argument("--metrics", nargs="+", default=["refusal", "toxicity"], help="one or more")
    parser.add_argument("--readers", nargs="+", default=READERS, help="models that read, two or more")
    parser.add_argument("--texts", type=int, default=400, help="of each metric, the same for all readers")
    parser.add_argument("--quick", action="store_true", help="60 texts and the two smallest readers: about a minute")
    parser.add_argument("--seed", type=int, default=0, help="of splits, draws and fit")
    parser.add_argument("--work", type=Path, default=Path("out/heads/recordings"), help="folder of the recordings")
    parser.add_argument("--json", type=Path, help="also write targets, rows and the run's card here")
    args = parser.parse_args()
    if args.quick:
        args.texts, args.readers = 60, args.readers[:2]
    quieten_transformers()
    rows: list[dict[str, Any]] = []
    targets: list[dict[str, Any]] = []
    for metric in args.metrics:
        task = tasks(args.data, args.seed)[metric]()
        splits = capped(task.splits, args.texts)
        truth, rungs = None, []
        for name in args.readers:
            rung, truth = climb(name, splits, task, args.work, args.seed)
            rungs.append(rung)
        assert truth is not None, "there is a reader"
        found = compared(rungs, truth, args.seed)
        rows += [{"metric": metric, **row} for row in found]
        targets += [target for row in found if (target := asked(metric, row)) is not None]
    settings = {key: str(value) for key, value in vars(args).items()} | {"missing": MISSING}
    if args.json is not None:
        card = run_card("benchmarks/ladder.py", settings, args.seed)
        write_json(args.json, {"targets": targets, "rows": rows, "card": card})
    show(rows)


def capped(splits: Mapping[str, Sequence[Conversation]], count: int) -> dict[str, list[Conversation]]:
    """About so many texts in all, whole groups."""
    return {
        name: drawn(splits[name], round(share * count), f"ladder {name}", by_group=True)
        for name, share in SHARES.items()
    }


def climb(
    name: str, splits: Mapping[str, Sequence[Conversation]], task: Task, work: Path, seed: int
) -> tuple[Rung, Truth]:
    """One reader, which is dropped again; what is true of the texts is the same whoever reads them."""
    reader = load_model(name)
    texts = {part: prepare(rows, reader, task.metric, task.max_tokens) for part, rows in splits.items()}
    reading = Reading(reader, evenly_spaced_sites(reader.model, NUM_SITES), work)
    config = FitConfig(form=form_for(texts, task.metric, FitConfig().form))
    head = fit_head(texts, reading, metric=task.metric, config=config, seed=seed)
    found = {text.id: text for text in head.scored(texts["test"])}
    characters, is_span = {}, {}
    for spans in labelled_spans(texts["test"], task.metric, reader.tokenizer):
        text, content = spans.text, spans.text.conversation.messages[-1].content
        start = text.tokens.text.rindex(content.strip())
        chosen = slice(start, start + len(content.strip()))
        scores = found[text.tokens.id].token_scores
        assert scores is not None, "a head scores tokens"
        characters[text.tokens.id] = character_scores(text, scores)[chosen]
        is_span[text.tokens.id] = spans.is_span[chosen]
    truth = Truth(
        {text.tokens.id: text.tokens.group for text in texts["test"]},
        {text.tokens.id: text.label for text in texts["test"]},
        is_span,
    )
    responses = {key: text.score for key, text in found.items()}
    return Rung(name, reader.model.num_parameters(), responses, characters), truth


def compared(rungs: Sequence[Rung], truth: Truth, seed: int) -> list[dict[str, Any]]:
    """Each reader's figures, what the largest one has over each other, and the slope; drawn together."""
    rungs = sorted(rungs, key=lambda rung: rung.num_parameters)
    sizes = [math.log10(rung.num_parameters) for rung in rungs]
    rows = []
    for figure, (items, labels, groups) in {
        "auroc_response": _responses(rungs, truth),
        "auroc_character": _characters(rungs, truth),
    }.items():
        if not has_both_labels(labels):
            continue
        of = [auroc_of_draws(scores, labels) for scores in items]

        def estimate(statistic: Statistic, groups: Sequence[str] = groups) -> Estimate:
            return bootstrap_by_group(statistic, groups, generator=generator(seed, "bootstrap"))

        for rung, statistic in zip(rungs, of, strict=True):
            rows.append(_row(figure, rung.reader, estimate(statistic), rung.num_parameters))
        for rung, statistic in zip(rungs[:-1], of[:-1], strict=True):
            difference = estimate(_minus(of[-1], statistic))
            rows.append(_row(figure, f"{rungs[-1].reader} minus {rung.reader}", difference, None))
        rows.append(_row(figure, "slope per factor of ten", estimate(_slope(sizes, of)), None))
    return rows


class _Items(NamedTuple):
    scores: list[Tensor]
    """One a rung, of the same items."""
    labels: Tensor
    groups: list[str]


def _responses(rungs: Sequence[Rung], truth: Truth) -> _Items:
    ids = [key for key, label in truth.labels.items() if not math.isnan(label)]
    ids = [key for key in ids if all(key in rung.responses for rung in rungs)]
    scores = [torch.tensor([rung.responses[key] for key in ids], dtype=torch.float64) for rung in rungs]
    labels = torch.tensor([truth.labels[key] for key in ids], dtype=torch.float64)
    return _Items(scores, labels, [truth.groups[key] for key in ids])


def _characters(rungs: Sequence[Rung], truth: Truth) -> _Items:
    """Those that every reader has read."""
    ids = [key for key in truth.is_span if all(key in rung.characters for rung in rungs)]
    read = {key: np.all([rung.characters[key] > -np.inf for rung in rungs], axis=0) for key in ids}
    empty = [np.empty(0)]  # so that no ids is no error
    scores = [np.concatenate(empty + [rung.characters[key][read[key]] for key in ids]) for rung in rungs]
    labels = np.concatenate(empty + [truth.is_span[key][read[key]].astype(float) for key in ids])
    groups = [truth.groups[key] for key in ids for _ in range(int(read[key].sum()))]
    return _Items([torch.from_numpy(each) for each in scores], torch.from_numpy(labels), groups)


def _minus(ours: Statistic, theirs: Statistic) -> Statistic:
    return lambda rows: ours(rows) - theirs(rows)


def _slope(sizes: Sequence[float], of: Sequence[Statistic]) -> Statistic:
    """Of the least-squares line through the figures; NaN with one size."""
    centred = np.array(sizes) - np.mean(sizes)
    spread = float((centred**2).sum())
    return lambda rows: float(centred @ [each(rows) for each in of] / spread) if spread else math.nan


def _row(figure: str, what: str, found: Estimate, num_parameters: int | None) -> dict[str, Any]:
    return {"figure": figure, "what": what, **found._asdict(), "num_parameters": num_parameters}


def asked(metric: str, row: dict[str, Any]) -> dict[str, Any] | None:
    """The draft's head is to be within 0.03 AUROC of the same head on the 1.5B target."""
    if row["what"] != "demo:qwen-coder-1.5b minus demo:qwen-coder-0.5b":
        return None
    found = {key: row[key] for key in ("value", "low", "high")}
    name = f"{metric}/{row['figure']}: {row['what']}"
    return {"name": name, **found, "target": "<= 0.03", "met": row["value"] <= 0.03}


def show(rows: Sequence[dict[str, Any]]) -> None:
    for metric in dict.fromkeys(row["metric"] for row in rows):
        cells = [
            [
                f"{row['figure']}: {row['what']}",
                "" if row["num_parameters"] is None else f"{row['num_parameters'] / 1e6:.0f}M",
                cell(Estimate(row["value"], row["low"], row["high"], row["n"]), "" if row["num_parameters"] else "+"),
            ]
            for row in rows
            if row["metric"] == metric
        ]
        print(f"\n{metric} (missing: {MISSING})")
        print(table(["", "parameters", "found, 95 % interval"], cells))


if __name__ == "__main__":
    main()
