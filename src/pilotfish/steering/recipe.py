"""Contrasts in; a calibrated direction, and what it is worth beside a prompt, out: the whole way in one call."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from pilotfish.core import Site
from pilotfish.errors import SettingError, TextError
from pilotfish.models import LoadedModel, num_layers
from pilotfish.runs import generator
from pilotfish.steering.calibrate import Budget, Calibration, CalibrationConfig, Candidate, best, calibrate
from pilotfish.steering.card import Kind
from pilotfish.steering.direction import Direction
from pilotfish.steering.dose import Steering
from pilotfish.steering.evaluate import (
    NO_STEERING,
    Answered,
    Arm,
    Measure,
    Row,
    Verdict,
    against_prompt,
    answer,
    compare,
    differ_in_one_token,
    few_shot,
    margins,
    prompt_ids,
    random_like,
    shuffled,
)
from pilotfish.steering.extract import ExtractConfig, extract
from pilotfish.steering.meters import Behaviour
from pilotfish.steering.rollouts import Decoding
from pilotfish.taps import Edit, When
from pilotfish.texts import Contrast

MIN_CONTRASTS = 10
SHARES = {"train": 0.6, "choose": 0.2, "test": 0.2}
"""Read the direction; choose dose and layer; report."""
MARGIN, PROBABILITY = "margin, nats a token", "probability of the positive answer"


@dataclass(frozen=True, slots=True, kw_only=True)
class RecipeConfig:
    """How a direction is made and judged."""

    name: str
    """What adding it should bring about."""
    instruction: str = ""
    """The system message that it is held against, beside a few examples."""
    kind: Kind = "add"
    when: When = field(default_factory=When)
    budget: Budget | None = field(default_factory=Budget)
    """Of every vector; None spends the mean KL of the instruction or the few-shot prompt, whichever does more."""
    extract: ExtractConfig = field(default_factory=ExtractConfig)
    sites: tuple[Site, ...] = ()
    """Where to try; by default `num_sites` outputs of blocks, evenly spaced from 1/4 to 4/5 of the depth."""
    num_sites: int = 4
    num_prompts: int = 8
    """Prompts, of the contrasts that choose, that the dose is found on."""
    num_shots: int = 4
    """Examples in the few-shot prompt."""
    decoding: Decoding = field(default_factory=lambda: Decoding(max_new_tokens=24))
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.num_sites, self.num_prompts, self.num_shots) < 1:
            raise SettingError(
                f"num_sites {self.num_sites}, num_prompts {self.num_prompts} and num_shots {self.num_shots} must be at "
                "least 1"
            )


class Steered(NamedTuple):
    """What came of it."""

    direction: Direction
    """At the best site, its dose and kind on its card."""
    calibration: Calibration
    """Of that direction; here and below a curve has the mean margin of the choosing contrasts as behaviour."""
    candidates: tuple[Candidate, ...]
    """Every site that was tried, best first."""
    by_prompt: dict[str, float]
    """That margin under each prompt, by the name of its arm."""
    rows: tuple[Row, ...]
    """All arms on the contrasts put aside: their margins and, where answers differ in one token, the probability."""
    answers: dict[str, Answered]
    """What each arm wrote to the first prompts put aside, with its damage; empty where there are no prompts."""
    verdict: Verdict
    arms: tuple[Arm, ...]
    """As they were compared, for further measures."""
    unspent: dict[str, str]
    """By null direction: why it does not spend the budget; empty where both do."""


def steer(contrasts: Sequence[Contrast], loaded: LoadedModel, *, config: RecipeConfig) -> Steered:
    """Reads a direction, finds the dose that spends the budget at several sites, takes the site where the positive
    answer gains most, and holds it against prompts and null directions on contrasts put aside.

    Raises:
        TextError: there are too few contrasts, or too few independent ones.
    """
    differ_in_one_token(loaded, contrasts)  # refuses those that differ in none, before anything is run
    parts = divided(contrasts, seed=config.seed)
    sites = config.sites or _sites(num_layers(loaded.model), config.num_sites)
    read = extract(parts["train"], loaded, name=config.name, sites=sites, config=config.extract)
    prompts = _prompts(loaded, parts["choose"], config.num_prompts)
    shown = _prompt_arms(parts["train"], config)
    by_prompt = {arm.name: float(margins(loaded, arm, parts["choose"]).mean()) for arm in shown}
    stronger = max(shown, key=lambda arm: by_prompt[arm.name])
    if config.budget is None:
        config = replace(config, budget=_spent_by(stronger, loaded, parts["choose"], config))

    def effect(edits: Sequence[Edit], _: object = None) -> float:
        return float(margins(loaded, Arm(name="choosing", edits=tuple(edits)), parts["choose"]).mean())

    def calibrated(site: Site, tolerance: float = 0.05) -> Calibration:
        return _calibrated(read[site], prompts, loaded, config, tolerance=tolerance, behaviour=effect)

    if len(sites) == 1:
        ranked = best([calibrated(sites[0])], effect, loaded.model)
        final = ranked[0].calibration
    else:
        ranked = best([calibrated(site, 0.15) for site in sites], effect, loaded.model)
        final = calibrated(_site(ranked[0].calibration))
    site = _site(final)
    mixed = shuffled(parts["train"], generator=generator(config.seed, "shuffled labels"))
    nulls = {
        "random direction": random_like(read[site], generator=generator(config.seed, "random direction")),
        "shuffled labels": extract(mixed, loaded, name="shuffled", sites=[site], config=config.extract)[site],
    }
    arms = [Arm(name=NO_STEERING), Arm(name="vector", edits=final.edits(loaded.model)), *shown]
    unspent: dict[str, str] = {}
    for name, null in nulls.items():
        dosed = _calibrated(null, prompts, loaded, config)
        arms.append(Arm(name=name, edits=dosed.edits(loaded.model)))
        unspent |= {name: dosed.reason} if dosed.reason else {}
    return _judged(loaded, parts["test"], arms, (ranked, final, by_prompt, unspent), config, rival=stronger.name)


def divided(contrasts: Sequence[Contrast], *, seed: int) -> dict[str, list[Contrast]]:
    """Three parts that share no group: to read directions from, to choose with, to report on.

    Raises:
        TextError: there are fewer than ten groups.
    """
    groups = sorted({item.group for item in contrasts})
    if len(groups) < MIN_CONTRASTS:
        raise TextError(
            f"{len(contrasts)} contrasts of {len(groups)} groups are too few to read, choose and report on; give "
            f"{MIN_CONTRASTS} independent ones or more, better 50"
        )
    order = torch.randperm(len(groups), generator=generator(seed, "contrasts")).tolist()
    parts: dict[str, list[Contrast]] = {}
    start = 0.0
    for name, share in SHARES.items():
        chosen = {groups[i] for i in order[round(start * len(groups)) : round((start + share) * len(groups))]}
        parts[name] = [item for item in contrasts if item.group in chosen]
        start += share
    return parts


def _judged(
    loaded: LoadedModel,
    test: Sequence[Contrast],
    arms: Sequence[Arm],
    chosen: tuple[list[Candidate], Calibration, dict[str, float], dict[str, str]],
    config: RecipeConfig,
    *,
    rival: str,
) -> Steered:
    ranked, final, by_prompt, unspent = chosen
    measured: dict[str, Float[Tensor, " item"]] = {}

    def margin(arm: Arm) -> Float[Tensor, " item"]:
        measured[arm.name] = margins(loaded, arm, test)
        return measured[arm.name]

    groups = [item.group for item in test]
    random = generator(config.seed, "intervals")
    measures: dict[str, Measure] = {MARGIN: margin}
    if differ_in_one_token(loaded, test):
        measures[PROBABILITY] = lambda arm: measured[arm.name].sigmoid()
    rows = compare(arms, measures, groups=dict.fromkeys(measures, groups), generator=random)
    prompts = {arm.name: measured[arm.name] for arm in arms if arm.instruction or arm.examples or arm.prefix}
    verdict = against_prompt(measured["vector"], prompts, groups, best=rival, generator=random)
    asked = [item.prompt for item in test if item.prompt][: config.num_prompts]
    answers = {
        arm.name: answer(loaded, arm, asked, decoding=config.decoding, generator=generator(config.seed, "answers"))
        for arm in (arms if asked else ())
    }
    direction = final.steering.directions[0].with_dose(final.dose, config.kind)
    return Steered(direction, final, tuple(ranked), by_prompt, tuple(rows), answers, verdict, tuple(arms), unspent)


def _calibrated(
    direction: Direction,
    prompts: Sequence[Sequence[int]],
    loaded: LoadedModel,
    config: RecipeConfig,
    *,
    tolerance: float = 0.05,
    behaviour: Behaviour | None = None,
) -> Calibration:
    how = CalibrationConfig(decoding=config.decoding, tolerance=tolerance, seed=config.seed)
    steering = Steering(directions=(direction,), kind=config.kind, when=config.when)
    return calibrate(loaded.model, steering, prompts, budget=config.budget, config=how, behaviour=behaviour)


def _prompt_arms(contrasts: Sequence[Contrast], config: RecipeConfig) -> list[Arm]:
    told = [Arm(name="prompt", instruction=config.instruction)] if config.instruction else []
    return [*told, few_shot(contrasts[: config.num_shots])]


def _spent_by(arm: Arm, loaded: LoadedModel, contrasts: Sequence[Contrast], config: RecipeConfig) -> Budget:
    """What a prompt costs along its own answers.

    Raises:
        SettingError: the contrasts have no prompts to answer.
    """
    asked = [item.prompt for item in contrasts if item.prompt][: config.num_prompts]
    if not asked:
        raise SettingError("contrasts without prompts have no answers to take a budget from; give one in nats")
    found = answer(loaded, arm, asked, decoding=config.decoding, generator=generator(config.seed, "budget"))
    return Budget(meter="kl_mean", limit=max(found.kl_mean, 1e-3))


def _prompts(loaded: LoadedModel, contrasts: Sequence[Contrast], count: int) -> list[list[int]]:
    """Token ids of what is asked; where nothing is, the first half of each negative answer is gone on with."""
    prompts = []
    for item in contrasts[:count]:
        if item.prompt:
            prompts.append(prompt_ids(loaded, Arm(name=NO_STEERING), item.prompt))
        else:
            ids = list(loaded.tokenizer(item.negative)["input_ids"])
            if len(ids) < 3:
                raise TextError(
                    f"contrast {item.id!r} has no prompt, and its negative answer is too short to go on from; give "
                    "prompts, or longer answers"
                )
            prompts.append(ids[: math.ceil(len(ids) / 2)])
    return prompts


def _site(calibration: Calibration) -> Site:
    return calibration.steering.directions[0].site


def _sites(depth: int, count: int) -> tuple[Site, ...]:
    first, last = depth // 4, max(depth // 4, round(0.8 * depth) - 1)
    layers = [round(first + (last - first) * i / max(1, count - 1)) for i in range(count)]
    return tuple(Site(layer, "resid_post") for layer in dict.fromkeys(layers))
