"""What tuning a draft for its heads costs in acceptance, over the weight that mixes the two losses.

    python benchmarks/joint.py --data FOLDER [--metric insecure_code] [--weights 0 0.25 0.5 0.75 1] [--seed 0]
                               [--json PATH] [--plot PATH.svg]

For the untuned draft, and for one tuned with each weight, the recipe fits a head anew and measures it on the test
split; acceptance is measured on answers of the target to prompts that no tuning has seen. Comparisons are paired: one
bootstrap by document, or by prompt, draws for both drafts. Interrupted, the same command goes on: answers, what the
target said, activations and finished drafts are kept below `--work`.

With the default sizes, on two cores to itself: about 10 minutes for the answers, 7 for reading the target once, then
for each weight about 20 to tune and 7 to judge: two and a half hours for five weights and the untuned draft. `--quick`
takes about two minutes; its figures mean nothing.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from heads import cell
from tasks import Task, benign, drawn, tasks

from pilotfish.cli.terminal import quieten_transformers, table
from pilotfish.cli.tune import TOP_K
from pilotfish.core import Conversation
from pilotfish.engines import Request, Sampling, engine_acceptance, target_answers
from pilotfish.models import LoadedModel, Pair, load_pair
from pilotfish.reports.scatter import Axis, Point, Reading, scatter_svg
from pilotfish.runs import generator, run_card, write_json, write_text
from pilotfish.scores import (
    AnswerAcceptance,
    Estimate,
    JointConfig,
    Lessons,
    RecipeConfig,
    RivalConfig,
    ScoredText,
    TargetRecording,
    acceptance,
    acceptance_loss,
    build_bank,
    compare,
    evaluate,
    read_acceptance,
    tuned_draft,
)
from pilotfish.scores.joint import draft_of

BASE = "no tuning"
GAIN, LOSS = 0.03, 0.01
"""What is asked: AUROC that is won, and the relative loss of acceptance that it may cost."""
PLOTTED = ("auroc_token", "auroc_response")
"""Whichever the metric has first."""
ORDINARY = 0.3
"""Share of the training and validation texts."""
MAX_TOKENS = 256
BUDGET = 0.05
"""Of the recipe's threshold, which is not looked at here: fewer benign texts will do."""


class Sizes(NamedTuple):
    """Texts of each part, answers, and steps."""

    train: int = 200
    validation: int = 80
    test: int = 160
    benign: int = 80
    answers: int = 100
    held_out: int = 60
    answer_tokens: int = 48
    steps: int = JointConfig().steps
    checked: int = 12


QUICK = Sizes(24, 12, 16, 60, 4, 4, 12, 3, 2)


class Judged(NamedTuple):
    """One draft, as the recipe and the answers see it."""

    name: str
    scored: list[ScoredText]
    figures: Mapping[str, Estimate]
    read: list[AnswerAcceptance]
    engine: Estimate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the public sets, see docs/data.md")
    parser.add_argument("--metric", default="insecure_code")
    parser.add_argument("--pair", default="demo:qwen-coder", help="target, or demo pair")
    parser.add_argument("--draft", help="draft, where the pair does not name its own")
    parser.add_argument("--weights", nargs="+", type=float, default=[0.0, 0.25, 0.5, 0.75, 1.0], help="of distilling")
    parser.add_argument("--learning-rate", type=float, default=JointConfig().learning_rate, help="of the adapters")
    parser.add_argument("--steps", type=int, default=Sizes().steps, help="of tuning")
    parser.add_argument("--quick", action="store_true", help="a smoke run with one weight: its figures mean nothing")
    parser.add_argument("--seed", type=int, default=0, help="of splits, draws, tuning and fit")
    parser.add_argument("--work", type=Path, default=Path("out/joint"), help="folder of all that is kept")
    parser.add_argument("--json", type=Path, help="also write targets, rows and the run's card here")
    parser.add_argument("--plot", type=Path, default=Path("out/joint.svg"), help="the plot to write")
    args = parser.parse_args()
    quieten_transformers()
    sizes = QUICK if args.quick else Sizes(steps=args.steps)
    weights = [0.5] if args.quick else args.weights
    pair = load_pair(args.pair, draft=args.draft)
    task = tasks(args.data, args.seed)[args.metric]()
    bench = Bench(pair, task, sizes, {row.id for row in benign(args.data)}, args.work, args.seed)
    judged = [bench.judge(BASE, draft_of(pair))]
    for weight in weights:
        joint = JointConfig(distill=weight, steps=sizes.steps, learning_rate=args.learning_rate)
        judged.append(bench.judge(f"{weight:g}", bench.tuned(joint)))
        print(show([bench.row(judged[0], each) for each in judged]) + "\n", flush=True)
    rows = [bench.row(judged[0], each) for each in judged]
    targets = targets_of(rows[1:], args.metric)
    if args.json is not None:
        settings = {key: str(value) for key, value in vars(args).items()} | {"sizes": sizes._asdict()}
        card = run_card("benchmarks/joint.py", settings, args.seed)
        write_json(args.json, {"targets": targets, "rows": rows, "card": card})
    write_text(args.plot, plot(rows, args.metric))
    print(show(rows) + f"\n\nThe plot: {args.plot}\n")
    cells = [[t["name"], cell(Estimate(**_ends(t), n=0), "+"), t["target"], str(t["met"])] for t in targets]
    print(table(["target", "found, 95 % interval", "asked", "met"], cells))


class Bench:
    """A pair and a task; everything is made once and kept."""

    def __init__(self, pair: Pair, whole: Task, sizes: Sizes, ordinary: set[str], work: Path, seed: int) -> None:
        """`ordinary`: ids of the ordinary texts, which training has half of and the threshold the other half."""
        self.pair, self.sizes, self.work, self.seed = pair, sizes, work, seed
        self.task = smaller(whole, sizes, ordinary)
        taught = [row for row in whole.splits["train"] if row.id in ordinary] or whole.splits["train"]
        self.request = Request(max_new_tokens=sizes.answer_tokens, sampling=Sampling(temperature=1.0), seed=seed)
        self.held_out_prompts = self.task.benign[: sizes.held_out]
        learned = self._answers(taught[: sizes.answers])
        self.lessons = Lessons(whole.metric, self.task.splits, learned)
        self.held_out = self._answers(self.held_out_prompts)
        self.recorded = TargetRecording(pair, work / "target", top_k=min(TOP_K, pair.vocab_size))
        self.recorded.fill(self.held_out)

    def _answers(self, prompts: Sequence[Conversation]) -> list[Any]:
        return target_answers(self.pair, prompts, request=self.request, journal=self.work / "answers.jsonl")

    def tuned(self, joint: JointConfig) -> LoadedModel:
        name = f"{self.task.metric}-{joint.distill:g}-lr{joint.learning_rate:g}-steps{joint.steps}-seed{self.seed}"
        return tuned_draft(
            self.pair, self.lessons, self.work / "drafts" / name, config=joint, work_folder=self.work, seed=self.seed
        )

    def judge(self, name: str, draft: LoadedModel) -> Judged:
        recipe = RecipeConfig(max_tokens=self.task.max_tokens, budget=BUDGET, rivals=RivalConfig(names=()))
        built = build_bank(
            self.task.splits,
            self.task.benign,
            draft,
            metric=self.task.metric,
            config=recipe,
            work_folder=self.work,
            seed=self.seed,
        )
        scored = built.scored["head"]
        pair = replace(self.pair, draft=draft.model, draft_identity=draft.identity)
        prompts = self.held_out_prompts[: self.sizes.checked]
        return Judged(
            name,
            scored,
            evaluate(scored, generator=generator(self.seed, "bootstrap")),
            read_acceptance(draft.model, self.held_out, self.recorded),
            engine_acceptance(pair, prompts, request=self.request, generator=generator(self.seed, "bootstrap")),
        )

    def row(self, base: Judged, each: Judged) -> dict[str, Any]:
        def draws() -> Any:
            return generator(self.seed, "bootstrap")

        return {
            "distill": each.name,
            "figures": {k: v._asdict() for k, v in each.figures.items() if k.startswith(("auroc", "pairwise"))},
            "gains": {k: v._asdict() for k, v in compare(each.scored, base.scored, generator=draws()).items()},
            "acceptance": {k: v._asdict() for k, v in acceptance(each.read, generator=draws()).items()},
            "losses": {k: v._asdict() for k, v in acceptance_loss(base.read, each.read, generator=draws()).items()},
            "engine": each.engine._asdict(),
        }


def smaller(task: Task, sizes: Sizes, ordinary: set[str]) -> Task:
    """So many texts of each part, a share of them ordinary ones, and fewer tokens of each."""
    splits = {}
    for name in ("train", "validation", "test"):
        rows, count = task.splits[name], getattr(sizes, name)
        plain = [row for row in rows if row.id in ordinary]
        num_plain = min(len(plain), round(ORDINARY * count))
        labelled = [row for row in rows if row.id not in ordinary]
        splits[name] = [*some(plain, num_plain, name), *some(labelled, count - num_plain, name)]
    return replace(task, splits=splits, benign=task.benign[: max(sizes.benign, sizes.held_out)], max_tokens=MAX_TOKENS)


def some(rows: Sequence[Conversation], count: int, name: str) -> list[Conversation]:
    """About so many rows at random, answers to one prompt of one document together, as they are held together in pairs.

    Documents are not kept whole: one repository holds hundreds of the functions.
    """
    units: dict[tuple[str, str], list[Conversation]] = {}
    for row in rows:
        units.setdefault((row.group, "\n".join(message.content for message in row.messages[:-1])), []).append(row)
    order = drawn([unit[0] for unit in units.values()], len(units), f"joint {name}")
    by_first = {unit[0].id: unit for unit in units.values()}
    chosen: list[Conversation] = []
    for first in order:
        if len(chosen) >= count:
            break
        chosen += by_first[first.id]
    return chosen


def figure_of(row: Mapping[str, Any]) -> str:
    return next(name for name in PLOTTED if name in row["figures"])


def targets_of(rows: Sequence[Mapping[str, Any]], metric: str) -> list[dict[str, Any]]:
    """For the default weight, which was fixed beforehand, and for the best one in hindsight."""
    figure = figure_of(rows[0])
    default = f"{JointConfig().distill:g}"
    kept = [row for row in rows if row["losses"]["expected"]["value"] <= LOSS]
    best = max(kept or rows, key=lambda row: row["gains"][figure]["value"])
    named = [(f"weight {default}, fixed beforehand", row) for row in rows if row["distill"] == default]
    named.append((f"best in hindsight, weight {best['distill']}", best))
    targets = []
    for words, row in named:
        gain, loss = row["gains"][figure], row["losses"]["expected"]
        met = gain["value"] >= GAIN and loss["value"] <= LOSS
        targets.append(
            {
                "name": f"{metric}: {figure} won, {words}",
                **_ends(gain),
                "target": f">= +{GAIN} at a loss <= {LOSS}",
                "met": met,
            }
        )
        targets.append(
            {
                "name": f"{metric}: acceptance lost, {words}",
                **_ends(loss),
                "target": f"<= {LOSS}",
                "met": loss["value"] <= LOSS,
            }
        )
    return targets


def _ends(found: Mapping[str, float]) -> dict[str, float]:
    return {name: found[name] for name in ("value", "low", "high")}


def show(rows: Sequence[Mapping[str, Any]]) -> str:
    figure = figure_of(rows[0])
    columns = ["distill", figure, "gain", "acceptance", "loss", "greedy", "loss, greedy", "engine"]
    cells = [
        [
            row["distill"],
            *(_cell(row[part][name], sign) for part, name, sign in (("figures", figure, ""), ("gains", figure, "+"))),
            *(
                _cell(row[part][name], sign)
                for name in ("expected", "greedy")
                for part, sign in (("acceptance", ""), ("losses", "+"))
            ),
            _cell(row["engine"]),
        ]
        for row in rows
    ]
    return table(columns, cells)


def _cell(found: Mapping[str, Any], sign: str = "") -> str:
    return cell(Estimate(**found), sign)  # type: ignore[arg-type]  # the same fields


def plot(rows: Sequence[Mapping[str, Any]], metric: str) -> str:
    figure = figure_of(rows[0])
    points = [
        Point(row["distill"], Reading(**_ends(row["acceptance"]["expected"])), Reading(**_ends(row["figures"][figure])))
        for row in rows
    ]
    limit = (1 - LOSS) * rows[0]["acceptance"]["expected"]["value"]
    return scatter_svg(
        points,
        f"{metric}: a tuned draft, by weight of distilling",
        x=Axis("share of sampled drafts accepted (dashed: 1 % lost)", limit),
        y=Axis(f"{figure} of the head", rows[0]["figures"][figure]["value"] + GAIN),
    )


if __name__ == "__main__":
    main()
