"""A model and the public sets in; the tables of `steering.py` out, one at a time: text, rows and targets of each."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from scipy.stats import spearmanr
from steering_tasks import ASKED, EVALS, QUESTIONS, OpenTask, balanced_evals, gsm8k, open_tasks, pieces
from torch import Tensor
from transformers import DynamicCache

from pilotfish.cli.terminal import table
from pilotfish.core import Site
from pilotfish.models import LoadedModel, Pair, num_layers
from pilotfish.runs import generator
from pilotfish.scores import Estimate
from pilotfish.scores.metrics import bootstrap_by_group
from pilotfish.steering import (
    Arm,
    Budget,
    CalibrationConfig,
    Decoding,
    Direction,
    ExtractConfig,
    RecipeConfig,
    Row,
    Steered,
    Steering,
    activation_addition,
    against_prompt,
    calibrate,
    compare,
    extract,
    random_like,
    rollouts,
    steer,
    text_losses,
)
from pilotfish.steering.behaviours import is_number, repetition
from pilotfish.steering.evaluate import NO_STEERING, Measure, prompt_ids
from pilotfish.steering.recipe import PROBABILITY
from pilotfish.taps import Add, Edit, When, edited
from pilotfish.texts import read_actadd_essays

START = "<|endoftext|>"
NEUTRAL = "Here is a text.\n\n"
"""Before every unrelated text; after `START` alone Qwen reads a piece of an essay much worse than after nothing."""

Figures = dict[str, Any]


class Sizes(NamedTuple):
    """How much is measured."""

    contrasts: int = 100
    """Of an A/B set: three fifths to read the vector, one to choose, one to report on."""
    open_contrasts: int = 24
    open_sites: int = 3
    prompts: int = 4
    """That doses and damage are found on."""
    prompt_tokens: int = 12
    """Of each answer to those."""
    shots: int = 4
    asked: int = 20
    answer_tokens: int = 32
    problems: int = 20
    problem_tokens: int = 128
    pieces: int = 20
    """Of an essay, which has no more."""
    unrelated: int = 6
    doses: tuple[float, ...] = (0.25, 1.0)
    depths: tuple[float, ...] = (0.15, 0.33, 0.5)
    """Where ` weddings` is added, as shares of the depth."""
    directions: int = 6
    timed: int = 192


QUICK = Sizes(16, 12, 1, 2, 4, 1, 3, 6, 2, 4, 2, 2, (1.0,), (0.33,), 2, 16)


class Tables:
    """All tables of one model."""

    def __init__(self, loaded: LoadedModel, data: Path, *, sizes: Sizes, seed: int) -> None:
        self.loaded, self.data, self.sizes, self.seed = loaded, data, sizes, seed
        essays = read_actadd_essays(data / "actadd")
        self.pieces = {name: pieces(text)[: sizes.pieces] for name, text in essays.items()}
        half = -(-sizes.unrelated // 2)
        self.unrelated = [piece for name in ("macedonia", "banana_bread") for piece in self.pieces[name][:half]]
        self.problems = gsm8k(data / "gsm8k" / "test.jsonl", sizes.problems)
        self.ends = Pair(loaded.model, None, loaded.tokenizer, loaded.identity, None).eos_ids
        self._plain: dict[str, Tensor] = {}

    @staticmethod
    def names() -> list[str]:
        return ["damage meters", "wedding", *(task.name for task in open_tasks()), *EVALS, "overhead"]

    def table(self, name: str) -> Figures:
        """Makes one: `text`, `rows`, `targets`, and `cpu_s`, what it took."""
        begin = time.process_time()
        tasks = {task.name: task for task in open_tasks()}
        if name in tasks:
            found = self.open_answers(tasks[name])
        elif name in EVALS:
            found = self.evals(name)
        else:
            found = {"damage meters": self.meters, "wedding": self.wedding, "overhead": self.overhead}[name]()
        return {"targets": [], "rows": []} | found | {"cpu_s": time.process_time() - begin}

    # Behaviours: the A/B sets, and what a model writes by itself

    def evals(self, name: str) -> Figures:
        random = generator(self.seed, name)
        contrasts = balanced_evals(self.data, name, self.sizes.contrasts, generator=random)
        middle = (Site(num_layers(self.loaded.model) // 2, "resid_post"),)
        config = replace(self.config(name, EVALS[name]), extract=ExtractConfig(tokens="letter"), sites=middle)
        steered = steer(contrasts, self.loaded, config=config)
        effects = [row for row in steered.rows if row.measure == PROBABILITY]
        return self.report(name, steered, effects, f"By margin: {steered.verdict.sentence}")

    def open_answers(self, task: OpenTask) -> Figures:
        config = self.config(task.name, task.instruction)
        steered = steer(task.contrasts[: self.sizes.open_contrasts], self.loaded, config=config)
        asked, values = list(ASKED[: self.sizes.asked]), {}
        measure = self.scored(asked, [task.score] * len(asked), self.sizes.answer_tokens)

        def behaviour(arm: Arm) -> Float[Tensor, " item"]:
            values[arm.name] = measure(arm)
            return values[arm.name]

        random = generator(self.seed, task.name)
        rows = compare(steered.arms, {"behaviour": behaviour}, generator=random)
        prompts = {arm.name: values[arm.name] for arm in steered.arms if arm.instruction or arm.examples}
        best = steered.verdict.prompt
        verdict = against_prompt(values["vector"], prompts, asked, best=best, generator=random).sentence
        return self.report(task.name, steered, rows, f"By what is written: {verdict}")

    def config(self, name: str, instruction: str) -> RecipeConfig:
        """Vectors spend what the stronger prompt does: equal KL."""
        size = self.sizes
        return RecipeConfig(
            name=name,
            instruction=instruction,
            budget=None,
            extract=ExtractConfig(tokens="answer"),
            num_sites=size.open_sites,
            num_prompts=size.prompts,
            num_shots=size.shots,
            decoding=Decoding(max_new_tokens=size.prompt_tokens, eos_ids=self.ends),
            seed=self.seed,
        )

    def scored(self, asked: Sequence[str], scores: Sequence[Callable[[str], float]], num_tokens: int) -> Measure:
        """A figure of each greedy answer."""
        decoding = Decoding(max_new_tokens=num_tokens, temperature=0.0, eos_ids=self.ends, batch_size=24)

        def measure(arm: Arm) -> Float[Tensor, " item"]:
            prompts = [prompt_ids(self.loaded, arm, question) for question in asked]
            random = generator(self.seed, "open")
            sampled = rollouts(self.loaded.model, prompts, arm.edits, decoding=decoding, generator=random)
            decode = self.loaded.tokenizer.decode
            texts = [str(decode(list(one.answer_ids), skip_special_tokens=True)) for one in sampled]
            return torch.tensor([score(text) for score, text in zip(scores, texts, strict=True)], dtype=torch.float64)

        return measure

    def once(self, name: str, measure: Measure) -> Measure:
        """The same, without doing for each table anew what no steering does."""

        def known(arm: Arm) -> Float[Tensor, " item"]:
            if arm.name != NO_STEERING:
                return measure(arm)
            if name not in self._plain:
                self._plain[name] = measure(arm)
            return self._plain[name]

        return known

    def report(self, task: str, steered: Steered, effects: Sequence[Row], verdict: str) -> Figures:
        """Effect and damage of every arm, then side effects."""
        random = generator(self.seed, f"{task}, side effects")
        size = self.sizes
        measures: dict[str, Measure] = {
            "unrelated loss": lambda arm: text_losses(self.loaded, after(NEUTRAL, arm), self.unrelated),
            "repetition": self.scored(ASKED[:4], [repetition] * 4, size.answer_tokens),
        }
        measures = {name: self.once(name, measure) for name, measure in measures.items()}
        sides = compare(steered.arms, measures, generator=random)
        if task in (open_tasks()[0].name, next(iter(EVALS))):  # the dearest measure, for a few arms of two tasks
            numbers = [is_number(number) for _, number in self.problems]
            solved = self.scored([problem for problem, _ in self.problems], numbers, size.problem_tokens)
            few = [arm for arm in steered.arms if arm.name in (NO_STEERING, "prompt", "vector")]
            sides += compare(few, {"GSM8K": self.once("GSM8K", solved)}, generator=random)
        damage = {arm: answered.damage for arm, answered in steered.answers.items()}
        head = [task, "effect", "change", "KL mean", "KL p95", "acceptance"]
        cells = [
            [row.arm, cell(row.value), changed(row), *(f"{figure:.3f}" for figure in damage[row.arm].values())]
            for row in effects
        ]
        names = list(dict.fromkeys(row.measure for row in sides))
        by_arm = {arm.name: {row.measure: row for row in sides if row.arm == arm.name} for arm in steered.arms}
        beside = [
            [arm, *(changed(rows[name]) or cell(rows[name].value) if name in rows else "" for name in names)]
            for arm, rows in by_arm.items()
        ]
        spent = steered.calibration.reason or str(steered.calibration.budget)
        text = (
            f"{table(head, cells)}\n\n{table(['side effects, as changes', *names], beside)}\n"
            f"{steered.direction.site}, dose {steered.calibration.dose:.3g}; {spent}. {verdict}"
        )
        rows = [row_of(task, row) | {"damage": damage[row.arm]} for row in (*effects, *sides)]
        return {"text": text, "rows": rows}

    # Perplexity, meters and time

    def wedding(self) -> Figures:
        """Perplexity of related and unrelated text under ` weddings` less a space, beside the word put before it.

        Every text, those that the vector is read from too, begins with a token that stands for no word: these models
        have no BOS, and their first token's activations are like no other's. With it any word before a text may help
        by being there; so a word that has nothing to do with any of the texts stands beside the one that has.
        """
        depth, random = num_layers(self.loaded.model), generator(self.seed, "wedding")
        arms = [Arm(name=NO_STEERING)]
        for layer in dict.fromkeys(max(1, round(depth * share)) for share in self.sizes.depths):
            site = Site(layer, "resid_pre")
            vectors = activation_addition(f"{START} weddings", f"{START} ", self.loaded, name="weddings", site=site)
            arms += [
                Arm(name=f"vector x {dose:g} at {site}", edits=self.in_front(vectors, dose))
                for dose in self.sizes.doses
            ]
        nulls = [random_like(vector, generator=random) if vector.norm else vector for vector in vectors]
        dose = self.sizes.doses[-1]
        arms += [Arm(name=f"random x {dose:g} at {site}", edits=self.in_front(nulls, dose))]
        arms += [Arm(name="the word", prefix=" weddings"), Arm(name="another word", prefix=" tables")]

        def losses(name: str) -> Measure:
            return lambda arm: text_losses(self.loaded, after(START, arm), self.pieces[name])

        measures = {name: losses(name) for name in ("wedding", "shipping", "macedonia", "banana_bread")}
        rows = compare(arms, measures, generator=random)
        cells = [[arm.name, *(ratio(row) for row in rows if row.arm == arm.name)] for arm in arms[1:]]
        text = f"{table(['perplexity / no steering', *measures], cells)}\nVectors at the first positions of each piece."
        return {"text": text, "rows": [row_of("wedding", row) for row in rows]}

    def in_front(self, vectors: Sequence[Direction], dose: float) -> tuple[Edit, ...]:
        """The n-th vector at the n-th token."""
        when = [When(positions=(n, n + 1)) for n in range(len(vectors))]
        return tuple(vector.to_edit(dose, when=when[n], model=self.loaded.model) for n, vector in enumerate(vectors))

    def meters(self) -> Figures:
        """Rank correlation of 1 - acceptance with KL and with the loss of unrelated text, over doses and directions."""
        size, plain = self.sizes, Arm(name="plain")
        prompts = [prompt_ids(self.loaded, plain, question) for question in QUESTIONS[: size.prompts]]
        site = Site(num_layers(self.loaded.model) // 2, "resid_post")
        config = self.config("french", "")
        contrasts = open_tasks()[0].contrasts[: size.open_contrasts]
        base = extract(contrasts, self.loaded, name=config.name, sites=[site], config=config.extract)[site]
        nulls = [random_like(base, generator=generator(self.seed, f"null {i}")) for i in range(size.directions - 1)]
        points: list[Figures] = []
        for index, direction in enumerate([base, *nulls]):
            found = calibrate(
                self.loaded.model,
                Steering(directions=(direction,)),
                prompts,
                budget=Budget(meter="kl_mean", limit=2.0),
                config=CalibrationConfig(decoding=config.decoding, tolerance=0.4, seed=self.seed),
                behaviour=lambda edits, _: (
                    -float(text_losses(self.loaded, Arm(name="x", edits=tuple(edits)), self.unrelated).mean())
                ),
            )
            points += [
                {
                    "task": "damage meters",
                    "direction": index,
                    "relative": one.relative,
                    "damage": 1 - one.acceptance,
                    "kl": one.kl_mean,
                    "loss": -(one.behaviour or 0.0),
                }
                for one in found.curve
                if one.dose
            ]
        head = ["direction", "relative", "damage", "kl", "loss"]
        cells = [[str(one["direction"]), *(f"{one[name]:.3f}" for name in head[1:])] for one in points]
        head = ["direction", "relative dose", "1 - acceptance", "KL mean", "loss of unrelated text"]
        return {"text": table(head, cells), "rows": points, "targets": correlations(points, seed=self.seed)}

    def overhead(self) -> Figures:
        """CPU time of a generated token with one active edit over that without, taken in turn."""
        model, site = self.loaded.model, Site(num_layers(self.loaded.model) // 2, "resid_post")
        vector = torch.ones(model.config.hidden_size, dtype=model.dtype, device=model.device)
        edits = [Edit(site, Add(vector, 1e-3))]
        caches = (DynamicCache(), DynamicCache())
        ids = torch.tensor([prompt_ids(self.loaded, Arm(name="plain"), QUESTIONS[0])], device=model.device)
        ratios = []
        with torch.inference_mode():
            for step in range(self.sizes.timed):
                seconds = [0.0, 0.0]
                for which in (0, 1) if step % 2 else (1, 0):  # the order in turn, so that warmth favours neither
                    with edited(model, edits if which else []):
                        begin = time.process_time()
                        model(ids, past_key_values=caches[which], use_cache=True, logits_to_keep=1)
                        seconds[which] = time.process_time() - begin
                if step:
                    ratios.append(seconds[1] / seconds[0])
                ids = ids[:, -1:]
        values = torch.tensor(ratios, dtype=torch.float64)
        found = bootstrap_by_group(
            lambda rows: float(values[rows].quantile(0.5)),
            [str(i) for i in range(len(ratios))],
            generator=generator(self.seed, "overhead"),
        )
        name = "time of a token with an active edit / without"
        text = f"{name}: {cell(found)}, the median of {len(ratios)} pairs"
        return {"text": text, "targets": [target(name, found, 1.02, found.value <= 1.02)]}


def correlations(points: Sequence[Figures], *, seed: int) -> list[Figures]:
    """Spearman of 1 - acceptance with KL and with the loss of unrelated text; intervals resample directions.

    Over all points; and of what is left when the mean of each dose is taken out, since all damage rises with the dose.
    """
    groups = [str(point["direction"]) for point in points]
    spread = {name: within_dose(points, name) for name in ("damage", "kl", "loss")}
    found = []
    for other, name in (("kl", "KL"), ("loss", "loss of unrelated text")):
        for values, where in (({key: [one[key] for one in points] for key in spread}, ""), (spread, ", within a dose")):
            statistic = partial(spearman, values["damage"], values[other])
            estimate = bootstrap_by_group(statistic, groups, generator=generator(seed, other))
            name_of = f"rank correlation of 1 - acceptance with {name}{where}"
            found.append(target(name_of, estimate, 0.8, estimate.low >= 0.8))
    return found


def spearman(one: Sequence[float], other: Sequence[float], rows: Tensor) -> float:
    chosen = rows.tolist()
    return float(spearmanr([one[row] for row in chosen], [other[row] for row in chosen]).statistic)


def within_dose(points: Sequence[Figures], name: str) -> list[float]:
    """By how much, in logarithms, each value is above the mean of its dose."""
    by_dose: dict[float, list[float]] = {}
    for point in points:
        by_dose.setdefault(round(point["relative"], 6), []).append(math.log(point[name]))
    means = {dose: sum(values) / len(values) for dose, values in by_dose.items()}
    return [math.log(point[name]) - means[round(point["relative"], 6)] for point in points]


def after(said: str, arm: Arm) -> Arm:
    """The same with a text before it: else an arm that says anything gains by something being there."""
    return replace(arm, prefix=f"{said}{arm.prefix}")


def row_of(task: str, row: Row) -> Figures:
    change = row.change._asdict() if row.change else None
    return {"task": task, "arm": row.arm, "measure": row.measure, "value": row.value._asdict(), "change": change}


def ratio(row: Row) -> str:
    assert row.change is not None, "only rows beside no steering have a ratio"
    value, low, high = torch.tensor(row.change[:3], dtype=torch.float64).exp().tolist()
    return f"{value:.3f} [{low:.3f}, {high:.3f}]"


def changed(row: Row) -> str:
    return cell(row.change, "+") if row.change else ""


def cell(found: Estimate, sign: str = "") -> str:
    return f"{found.value:{sign}.3f} [{found.low:{sign}.3f}, {found.high:{sign}.3f}]"


def target(name: str, found: Estimate, limit: float, met: bool) -> Figures:
    return {"name": name, "value": found.value, "low": found.low, "high": found.high, "target": limit, "met": met}
