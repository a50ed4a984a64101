"""`pilotfish steer`: pairs of answers in, a calibrated vector and what it is worth beside a prompt out."""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pilotfish.cli.serve import missing_extra
from pilotfish.cli.steer_verbs import Dosing, Steer, SteerCalibrate, SteerVerify
from pilotfish.cli.terminal import table
from pilotfish.core import Message, Site
from pilotfish.errors import SettingError, TextError
from pilotfish.models import LoadedModel, Pair, load_model, load_pair
from pilotfish.reports.dose import write_dose_page
from pilotfish.runs import run_card, write_json
from pilotfish.scores import Estimate
from pilotfish.steering import (
    Arm,
    Budget,
    CalibrationConfig,
    Candidate,
    Check,
    Decoding,
    Direction,
    ExtractConfig,
    Kind,
    Meters,
    RecipeConfig,
    Steered,
    Steering,
    calibrate,
    load_directions,
    margins,
    save_directions,
    steer,
    verify,
)
from pilotfish.steering.recipe import MARGIN
from pilotfish.taps import When
from pilotfish.texts import encode, read_contrasts, render
from pilotfish.texts.conversations import read_bytes

FIGURES_FILE = "steering.json"
PAGE_FILE = "dose.html"


def run(config: Steer) -> int:
    contrasts = read_contrasts(config.pairs)
    loaded = load_model(config.model, device=config.device, dtype=config.dtype)
    recipe = RecipeConfig(
        name=config.name or config.pairs.stem,
        instruction=config.instruction,
        kind=config.kind,
        budget=None if config.match_prompt else _budget(config),
        extract=ExtractConfig(method=config.method, tokens=config.tokens),
        sites=tuple(Site(layer, "resid_post") for layer in config.layers),
        num_sites=config.num_layers,
        num_prompts=config.num_prompts,
        decoding=_decoding(config, Pair(loaded.model, None, loaded.tokenizer, loaded.identity, None)),
        seed=config.seed,
    )
    found = steer(contrasts, loaded, config=recipe)
    save_directions(config.out, {found.direction.site: found.direction})
    _write_figures(config, found)
    _print_steered(found)
    print(f"\nThe vector with its dose: {config.out}; figures in {FIGURES_FILE}, curves in {PAGE_FILE}.")
    print(f"To see that it acts on this machine: pilotfish steer verify {config.out} --model {config.model}")
    return 0


def run_calibrate(config: SteerCalibrate) -> int:
    pair = load_pair(config.pair, device=config.device, dtype=config.dtype)
    directions = load_directions(config.vector, identity=pair.target_identity)
    lines = [line.strip() for line in read_bytes(config.prompts).decode("utf-8", "replace").splitlines()]
    prompts = [_ids(pair, line) for line in lines if line][: config.num_prompts]
    if not prompts:
        raise TextError(f"{config.prompts} has no prompts; give one a line")
    loaded = LoadedModel(pair.target, pair.tokenizer, pair.target_identity, "")
    contrasts = read_contrasts(config.pairs) if config.pairs is not None else []
    rows, has_all = [], True
    for site, direction in directions.items():
        found = calibrate(
            pair.target,
            Steering(directions=(direction,), kind=config.kind),
            prompts,
            budget=_budget(config),
            config=CalibrationConfig(decoding=_decoding(config, pair), seed=config.seed),
            draft=pair.draft,
        )
        if found.dose:
            directions[site] = direction.with_dose(found.dose, config.kind)
        has_all = has_all and found.dose > 0
        effect = ""
        if contrasts:
            effect = (
                f"{float(margins(loaded, Arm(name=str(site), edits=found.edits(pair.target)), contrasts).mean()):+.3f}"
            )
        rows.append([str(site), *_meter_cells(found.meters), effect, found.reason])
    save_directions(config.vector, directions)
    print(table(["site", *METERS, "margin, nats", "the budget is not spent, for"], rows))
    print(f"\n{_budget(config)}; the doses stand on the card in {config.vector}.")
    if not has_all:
        print("Where no dose is within the budget the card keeps what it had. Allow more, or try another layer.")
    if contrasts:
        print(
            "The margin is the log probability a token of the positive answers less that of the negative ones: larger "
            "is more."
        )
    return 0 if has_all else 1


def run_verify(config: SteerVerify) -> int:
    if config.server is not None:
        return _verify_server(config, config.server)
    if config.vector is None:
        raise SettingError("there is nothing to verify; give the folder of directions, or a --server that has some")
    loaded = load_model(config.model, device=config.device, dtype=config.dtype)
    prompt = _ids(loaded, config.prompt)
    passed = True
    for site, direction in load_directions(config.vector, identity=loaded.identity).items():
        dose, kind = _dosed(config, direction)
        steering = Steering(directions=(direction,), kind=kind, when=When(phase=config.phase))
        print(f"{direction.card.name} at {site}, {kind} with dose {dose:.4g}")
        passed &= _print_checks(verify(loaded.model, steering, dose, prompt, num_tokens=config.num_tokens))
    return 0 if passed else 1


def _verify_server(config: SteerVerify, url: str) -> int:
    try:
        from pilotfish.cli.steer_server import SteeringServer, verify_served
    except ModuleNotFoundError as error:
        raise missing_extra("serve", error) from error
    if config.kind is not None:
        raise SettingError("a server does what the card says; leave --kind out")
    passed = True
    with closing(SteeringServer(url, key=os.environ.get(config.key_env, ""), num_tokens=config.num_tokens)) as server:
        served = server.served["directions"]
        if config.vector is not None:
            mine = {one.sha256: f"{one.card.name} at {one.site}" for one in _loaded(config.vector)}
            for sha256 in mine.keys() - {one["sha256"] for one in served}:
                passed &= _print_checks([Check("the server has this vector", False, mine[sha256])])
            served = [one for one in served if one["sha256"] in mine]
        elif not served:
            raise SettingError(f"{url} serves no directions; start it with --directions FOLDER")
        for one in served:
            dose = one["dose"] if config.dose is None else config.dose
            print(f"{one['name']} at {one['site']}, {one['card']['kind']} with dose {dose:.4g}, on {url}")
            passed &= _print_checks(verify_served(server, one, config.prompt, dose=dose, scope=config.phase))
    return 0 if passed else 1


def _loaded(folder: Path) -> Iterable[Direction]:
    return load_directions(folder, identity=None).values()


def _print_checks(checks: Iterable[Check]) -> bool:
    """Whether all passed."""
    passed = True
    for check in checks:
        print(f"  {'ok  ' if check.passed else 'FAIL'}  {check.name}: {check.detail}")
        passed = passed and check.passed
    return passed


def _dosed(config: SteerVerify, direction: Direction) -> tuple[float, Kind]:
    """The dose and the kind of edit to verify: those of the card, or others.

    Raises:
        SettingError: there is no dose, or the card's was calibrated for another kind.
    """
    card = direction.card
    kind = config.kind or card.kind
    if config.dose is not None:
        return config.dose, kind
    if card.dose is None:
        raise SettingError(f"direction {card.name!r} at {direction.site} has no dose; calibrate it, or give --dose")
    if kind != card.kind:
        raise SettingError(
            f"the dose of direction {card.name!r} at {direction.site} was calibrated for {card.kind}, not for {kind}; "
            "leave --kind out, or give --dose with it"
        )
    return card.dose, kind


METERS = ("dose", "relative", "KL mean", "KL p95", "acceptance", "same greedy token")


def _meter_cells(found: Meters) -> list[str]:
    figures = (found.relative, found.kl_mean, found.kl_p95, found.acceptance, found.agreement)
    return [f"{found.dose:.4g}", *(f"{figure:.3f}" for figure in figures)]


def _budget(config: Dosing) -> Budget:
    return Budget(meter=config.meter, limit=config.limit)


def _decoding(config: Dosing, pair: Pair) -> Decoding:
    return Decoding(max_new_tokens=config.max_new_tokens, eos_ids=pair.eos_ids)


def _ids(model: LoadedModel | Pair, prompt: str) -> list[int]:
    return encode(
        render([Message("user", prompt)], model.tokenizer, add_generation_prompt=True), model.tokenizer
    ).token_ids


def _write_figures(config: Steer, found: Steered) -> None:
    settings = {key: str(value) for key, value in asdict(config).items()}
    figures = {
        "name": found.direction.card.name,
        "model": found.direction.card.identity.name,
        "site": str(found.direction.site),
        "kind": config.kind,
        "dose": found.calibration.dose,
        "budget": str(found.calibration.budget),
        "budget_not_spent_for": found.calibration.reason,
        "measure": MARGIN,
        "curve": [asdict(one) for one in found.calibration.curve],
        "sites": [_site_figures(one) for one in found.candidates],
        "prompts": found.by_prompt,
        "rows": [
            {"arm": row.arm, "measure": row.measure, "value": row.value._asdict()}
            | ({"change": row.change._asdict()} if row.change else {})
            for row in found.rows
        ],
        "damage": {name: answered.damage for name, answered in found.answers.items()},
        "verdict": found.verdict.sentence,
        "card": run_card("pilotfish steer", settings, config.seed),
    }
    write_json(config.out / FIGURES_FILE, figures)
    write_dose_page(config.out / PAGE_FILE, figures)


def _site_figures(candidate: Candidate) -> dict[str, Any]:
    calibration = candidate.calibration
    return {
        "site": str(calibration.steering.directions[0].site),
        "kl_mean": calibration.meters.kl_mean,
        "effect": candidate.effect,
        "curve": [asdict(one) for one in calibration.curve],
    }


def _print_steered(found: Steered) -> None:
    site, dose = found.direction.site, found.calibration.dose
    print(f"{found.direction.card.name}: best at {site}, dose {dose:.4g}; budget: {found.calibration.budget}")
    if found.calibration.reason:
        print(f"The budget is not spent: {found.calibration.reason}")
    print(table(list(METERS), [_meter_cells(one) for one in found.calibration.curve]))
    rows = []
    for row in (row for row in found.rows if row.measure == MARGIN):
        answered = found.answers.get(row.arm)
        damage = [f"{figure:.3f}" for figure in answered.damage.values()] if answered else [""] * 3
        rows.append([row.arm, _cell(row.value), _cell(row.change) if row.change else "", *damage])
    print(f"\n{table(['', MARGIN, 'change', 'KL mean', 'KL p95', 'acceptance'], rows)}")
    print(
        "\nOn pairs put aside, with 95 % intervals; the margin is log p(positive answer) less log p(negative answer), "
        "a mean over the tokens in which they differ."
    )
    for name, reason in found.unspent.items():
        print(f"The {name} does not spend the budget: {reason}")
    for name, answered in found.answers.items():
        print(f"{name} writes: {' '.join(answered.texts[0].split())}")
    print(f"\nBy margin: {found.verdict.sentence} What is written by itself can say otherwise: read it.")


def _cell(estimate: Estimate) -> str:
    return f"{estimate.value:+.3f} [{estimate.low:+.3f}, {estimate.high:+.3f}]"
