"""What steering vectors are worth: every table with no steering, a prompt, examples, and null directions at equal KL.

    python benchmarks/steering.py --data FOLDER [--models demo:qwen-coder-0.5b demo:smollm2] [--quick]

Four tables a model: the A/B sets of anthropics/evals; open answers (in French, refusing); the wedding experiment of
Turner et al. (arXiv 2308.10248), where the vector is held against prepending its word; and acceptance as a damage meter
against KL and perplexity. Side effects beside them: unrelated perplexity, repetition, GSM8K. Last, what an active edit
costs in generation, paired token by token.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from scipy.stats import spearmanr
from steering_tasks import EVALS, QUESTIONS, QUICK_EVALS, OpenTask, balanced_evals, open_tasks
from transformers import DynamicCache

from pilotfish.cli.terminal import quieten_transformers, table
from pilotfish.core import Site
from pilotfish.models import LoadedModel, Pair, load_model, num_layers
from pilotfish.runs import generator, run_card, write_json
from pilotfish.scores import Estimate
from pilotfish.scores.metrics import bootstrap_by_group
from pilotfish.steering import (
    Arm,
    Budget,
    CalibrationConfig,
    Decoding,
    ExtractConfig,
    RecipeConfig,
    Row,
    Steered,
    Steering,
    activation_addition,
    against_prompt,
    answer,
    calibrate,
    compare,
    extract,
    random_like,
    steer,
    text_losses,
)
from pilotfish.steering.behaviours import is_number, last_number, repetition
from pilotfish.steering.evaluate import NO_STEERING, prompt_ids
from pilotfish.steering.recipe import PROBABILITY
from pilotfish.taps import Add, Edit, When, edited
from pilotfish.texts import read_actadd_essays
from pilotfish.texts.conversations import as_text, json_lines

PIECE = 400
"""Characters of the pieces that essays are cut into: the items of perplexity."""
NUM_TIMED = 96

Target = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the public sets, see docs/data.md")
    parser.add_argument("--models", nargs="+", default=["demo:qwen-coder-0.5b", "demo:smollm2"])
    parser.add_argument("--quick", action="store_true", help="a smoke run: the smallest model, one set, few items")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="also write targets, rows and the run's card here")
    args = parser.parse_args()
    quieten_transformers()
    rows: list[dict[str, Any]] = []
    targets: list[Target] = []
    for name in ["demo:smollm2"] if args.quick else args.models:
        benchmark = Benchmark(load_model(name), args.data, quick=args.quick, seed=args.seed)
        found = [*benchmark.evals(), *benchmark.open_answers(), *benchmark.wedding()]
        targets += [{**target, "model": name} for target in (*benchmark.meters(), benchmark.overhead())]
        rows += [{**row, "model": name} for row in found]
        rows += [{**row, "model": name, "task": "damage meters"} for row in benchmark.points]
    show_targets(targets)
    if args.json is not None:
        settings = {key: str(value) for key, value in vars(args).items()}
        card = run_card("benchmarks/steering.py", settings, args.seed)
        write_json(args.json, {"targets": targets, "rows": rows, "card": card})


class Benchmark:
    """All tables of one model."""

    def __init__(self, loaded: LoadedModel, data: Path, *, quick: bool, seed: int) -> None:
        self.loaded, self.data, self.quick, self.seed = loaded, data, quick, seed
        self.points: list[dict[str, Any]] = []
        essays = read_actadd_essays(data / "actadd")
        self.pieces = {name: pieces(text)[: 2 if quick else None] for name, text in essays.items()}
        self.unrelated = [
            piece for name in ("macedonia", "banana_bread") for piece in self.pieces[name][: 1 if quick else None]
        ]
        self.problems = gsm8k(data / "gsm8k" / "test.jsonl", 2 if quick else 20)
        ends = Pair(loaded.model, None, loaded.tokenizer, loaded.identity, None).eos_ids
        self.decoding = Decoding(max_new_tokens=6 if quick else 40, temperature=0.0, eos_ids=ends)

    def config(self, name: str, instruction: str, *, letters: bool) -> RecipeConfig:
        """Vectors spend what the instruction does: equal KL."""
        return RecipeConfig(
            name=name,
            instruction=instruction,
            budget=None,
            extract=ExtractConfig(tokens="letter" if letters else "answer"),
            num_sites=1 if self.quick else 4,
            num_prompts=2 if self.quick else 8,
            num_shots=1 if self.quick else 4,
            decoding=replace(self.decoding, max_new_tokens=4 if self.quick else 24, temperature=1.0),
            seed=self.seed,
        )

    def evals(self) -> list[dict[str, Any]]:
        found = []
        for name in QUICK_EVALS if self.quick else EVALS:
            random = generator(self.seed, name)
            contrasts = balanced_evals(self.data, name, 16 if self.quick else 150, generator=random)
            steered = steer(contrasts, self.loaded, config=self.config(name, EVALS[name], letters=True))
            effects = [row for row in steered.rows if row.measure == PROBABILITY]
            found += self.report(name, steered, effects, f"By margin: {steered.verdict.sentence}")
        return found

    def open_answers(self) -> list[dict[str, Any]]:
        found = []
        for task in open_tasks()[: 1 if self.quick else None]:
            config = self.config(task.name, task.instruction, letters=False)
            steered = steer(task.contrasts[: 12 if self.quick else None], self.loaded, config=config)
            found += self.report(task.name, steered, *self.answered(task, steered))
        return found

    def answered(self, task: OpenTask, steered: Steered) -> tuple[list[Row], str]:
        """Plain questions, scored by what is written; with the verdict on that, not on given answers."""
        asked = list(QUESTIONS[-4 if self.quick else -16 :])
        measure, values = self.scored(asked, [task.score] * len(asked)), {}

        def behaviour(arm: Arm) -> torch.Tensor:
            values[arm.name] = measure(arm)
            return values[arm.name]

        random = generator(self.seed, task.name)
        rows = compare(steered.arms, {"behaviour": behaviour}, generator=random)
        prompts = {arm.name: values[arm.name] for arm in steered.arms if arm.instruction or arm.examples}
        return rows, against_prompt(values["vector"], prompts, asked, generator=random).sentence

    def scored(self, asked: list[str], scores: Sequence[Any], *, max_new_tokens: int | None = None) -> Any:
        decoding = replace(self.decoding, max_new_tokens=max_new_tokens or self.decoding.max_new_tokens)

        def measure(arm: Arm) -> torch.Tensor:
            texts = answer(self.loaded, arm, asked, decoding=decoding, generator=generator(self.seed, "open")).texts
            values = [score(text) for score, text in zip(scores, texts, strict=True)]
            return torch.tensor(values, dtype=torch.float64)

        return measure

    def report(self, task: str, steered: Steered, effects: list[Row], verdict: str) -> list[dict[str, Any]]:
        """One table: effect, damage and side effects of every arm."""
        numbers = [is_number(number) for _, number in self.problems]
        sides = compare(
            steered.arms,
            {
                "unrelated loss": lambda arm: text_losses(self.loaded, arm, self.unrelated),
                "repetition": self.scored(list(QUESTIONS[:4]), [repetition] * 4),
                "GSM8K": self.scored(
                    [problem for problem, _ in self.problems], numbers, max_new_tokens=4 if self.quick else 160
                ),
            },
            generator=generator(self.seed, f"{task}, side effects"),
        )
        by_arm: dict[str, list[Row]] = {}
        for row in (*effects, *sides):
            by_arm.setdefault(row.arm, []).append(row)
        cells = []
        for arm, rows in by_arm.items():
            effect, *others = rows
            damage = [f"{figure:.3f}" for figure in steered.answers[arm].damage.values()]
            changed = cell(effect.change, "+") if effect.change else ""
            side = [f"{(row.change or row.value).value:{'+' if row.change else ''}.3f}" for row in others]
            cells.append([arm, cell(effect.value), changed, *damage, *side])
        head = [task, "effect", "change", "KL mean", "KL p95", "acceptance", *(row.measure for row in others)]
        print(f"\n{table(head, cells)}\n{steered.direction.site}, dose {steered.calibration.dose:.3g}; ", end="")
        print(
            f"{steered.calibration.reason or steered.calibration.budget}. {verdict}",
            flush=True,
        )
        return [
            {
                "task": task,
                "arm": row.arm,
                "measure": row.measure,
                "value": row.value._asdict(),
                "change": row.change._asdict() if row.change else None,
                "damage": steered.answers[row.arm].damage,
            }
            for row in (*effects, *sides)
        ]

    def wedding(self) -> list[dict[str, Any]]:
        """Perplexity of related and unrelated text under ` weddings` less a space, beside the word put before it."""
        site = Site(max(1, num_layers(self.loaded.model) // 3), "resid_pre")
        vectors = activation_addition(" weddings", " ", self.loaded, name="weddings", site=site)
        random = generator(self.seed, "wedding")
        nulls = [random_like(vector, generator=random) if vector.norm else vector for vector in vectors]
        arms = [Arm(name=NO_STEERING)]
        for dose in (1.0,) if self.quick else (0.5, 1.0, 2.0, 4.0):
            arms += [Arm(name=f"vector x {dose:g}", edits=self.in_front(vectors, dose))]
        arms += [Arm(name="random x 1", edits=self.in_front(nulls, 1.0)), Arm(name="the word", prefix=" weddings")]
        measures = {
            name: lambda arm, name=name: text_losses(self.loaded, arm, self.pieces[name])
            for name in ("wedding", "shipping", "macedonia", "banana_bread")
        }
        rows = compare(arms, measures, generator=random)
        cells = [[arm.name, *(ratio(row) for row in rows if row.arm == arm.name)] for arm in arms[1:]]
        print(
            f"\n{table(['perplexity / no steering', *measures], cells)}\nAt {site}, first positions of each piece.",
            flush=True,
        )
        return [
            {"task": "wedding", "arm": row.arm, "text": row.measure, "log_ratio": row.change._asdict()}
            for row in rows
            if row.change
        ]

    def in_front(self, vectors: Sequence[Any], dose: float) -> tuple[Edit, ...]:
        """The n-th vector at the n-th token."""
        when = [When(positions=(n, n + 1)) for n in range(len(vectors))]
        return tuple(vector.to_edit(dose, when=when[n], model=self.loaded.model) for n, vector in enumerate(vectors))

    def meters(self) -> list[Target]:
        """Rank correlation of 1 - acceptance with KL and with the loss of unrelated text, over doses and directions."""
        prompts = [
            prompt_ids(self.loaded, Arm(name="plain"), question) for question in QUESTIONS[: 2 if self.quick else 8]
        ]
        depth = num_layers(self.loaded.model)
        contrasts = open_tasks()[0].contrasts[: 10 if self.quick else None]
        config = self.config("french", "", letters=False)
        base = steer_direction(self.loaded, contrasts, config, Site(depth // 2, "resid_post"))
        count = 2 if self.quick else 6
        directions = [base, *(random_like(base, generator=generator(self.seed, f"null {i}")) for i in range(count - 1))]
        texts = self.unrelated[: 2 if self.quick else 8]
        for index, direction in enumerate(directions):
            found = calibrate(
                self.loaded.model,
                Steering(directions=(direction,)),
                prompts,
                budget=Budget(meter="kl_mean", limit=2.0),
                config=CalibrationConfig(decoding=config.decoding, tolerance=0.3, seed=self.seed),
                behaviour=lambda edits, _: (
                    -float(text_losses(self.loaded, Arm(name="x", edits=tuple(edits)), texts).mean())
                ),
            )
            self.points += [
                {
                    "direction": index,
                    "relative": one.relative,
                    "damage": 1 - one.acceptance,
                    "kl": one.kl_mean,
                    "loss": -(one.behaviour or 0.0),
                }
                for one in found.curve
                if one.dose
            ]
        return [self.correlated("kl", "KL"), self.correlated("loss", "loss of unrelated text")]

    def correlated(self, other: str, name: str) -> Target:
        """Spearman over all points; the interval resamples directions."""

        def statistic(rows: torch.Tensor) -> float:
            chosen = [self.points[row] for row in rows.tolist()]
            return float(spearmanr([one["damage"] for one in chosen], [one[other] for one in chosen]).statistic)

        groups = [str(point["direction"]) for point in self.points]
        found = bootstrap_by_group(statistic, groups, generator=generator(self.seed, other))
        return target(f"rank correlation of 1 - acceptance with {name}", found, 0.8, found.low >= 0.8)

    def overhead(self) -> Target:
        """CPU time of a generated token with one active edit over that without, taken in turn."""
        model, site = self.loaded.model, Site(num_layers(self.loaded.model) // 2, "resid_post")
        vector = torch.ones(model.config.hidden_size, dtype=model.dtype, device=model.device)
        edits = [Edit(site, Add(vector, 1e-3))]
        caches = (DynamicCache(), DynamicCache())
        ids = torch.tensor([prompt_ids(self.loaded, Arm(name="plain"), QUESTIONS[0])], device=model.device)
        ratios = []
        with torch.inference_mode():
            for step in range(32 if self.quick else NUM_TIMED):
                seconds = [0.0, 0.0]
                for which in (0, 1) if step % 2 else (1, 0):  # the order in turn, so that warmth favours neither
                    with edited(model, edits if which else []):
                        begin = time.process_time()
                        model(ids, past_key_values=caches[which], use_cache=True, logits_to_keep=1)
                        seconds[which] = time.process_time() - begin
                if step:
                    ratios.append(seconds[1] / seconds[0])
                ids = ids[:, -1:]
        median = torch.tensor(ratios, dtype=torch.float64)
        found = bootstrap_by_group(
            lambda rows: float(median[rows].quantile(0.5)),
            [str(i) for i in range(len(ratios))],
            generator=generator(self.seed, "overhead"),
        )
        return target("time of a token with an active edit / without", found, 1.02, found.value <= 1.02)


def steer_direction(loaded: LoadedModel, contrasts: Sequence[Any], config: RecipeConfig, site: Site) -> Any:
    return extract(contrasts, loaded, name=config.name, sites=[site], config=config.extract)[site]


def gsm8k(path: Path, count: int) -> list[tuple[str, float]]:
    """The first problems of a file of GSM8K, with their numbers."""
    problems = []
    for number, row in json_lines(path):
        expected = last_number(as_text(row, "answer", f"{path}:{number}"))
        assert expected is not None, "every answer of GSM8K ends in a number"
        problems.append((as_text(row, "question", f"{path}:{number}"), expected))
        if len(problems) == count:
            break
    return problems


def pieces(text: str) -> list[str]:
    """A text cut at white space into pieces of about equal length."""
    words, found = text.split(), [""]
    for word in words:
        if len(found[-1]) + len(word) > PIECE:
            found.append("")
        found[-1] += f"{word} "
    return [piece.strip() for piece in found if len(piece) > PIECE // 2]


def ratio(row: Row) -> str:
    assert row.change is not None, "only rows beside no steering have a ratio"
    value, low, high = torch.tensor(row.change[:3], dtype=torch.float64).exp().tolist()
    return f"{value:.3f} [{low:.3f}, {high:.3f}]"


def cell(found: Estimate, sign: str = "") -> str:
    return f"{found.value:{sign}.3f} [{found.low:{sign}.3f}, {found.high:{sign}.3f}]"


def target(name: str, found: Estimate, limit: float, met: bool) -> Target:
    return {"name": name, "value": found.value, "low": found.low, "high": found.high, "target": limit, "met": met}


def show_targets(targets: Sequence[Target]) -> None:
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
