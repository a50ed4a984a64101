"""`pilotfish threshold`: a bank and benign texts in, the same heads with thresholds that leave those alone out."""

from __future__ import annotations

from pathlib import Path

from pilotfish.cli.terminal import number, table
from pilotfish.cli.verbs import Threshold
from pilotfish.errors import SettingError
from pilotfish.heads import Card, HeadBank, Measured, bank_folder
from pilotfish.models import load_model
from pilotfish.reports.figures import promise_of
from pilotfish.scores import Reading, Scored, check_num_benign, read_scored, with_limits, write_scored
from pilotfish.scores.scored import SCORED_FILE
from pilotfish.texts import read_jsonl


def run(config: Threshold) -> int:
    folder = bank_folder(config.bank)
    bank = HeadBank.load(folder)
    if config.out.exists() and config.out.samefile(folder):
        raise SettingError(f"--out {config.out} is the bank itself; give another folder, so that the old one stays")
    held_out = _held_out(folder / SCORED_FILE, bank)
    benign = read_jsonl(config.benign)
    check_num_benign(benign, config.budget)
    reader = load_model(config.model or bank.identity.name, device=config.device, dtype=config.dtype)
    made = with_limits(
        bank,
        benign,
        Reading(reader, bank.sites, config.work),
        budget=config.budget,
        max_tokens=config.max_tokens,
        held_out=held_out,
        seed=config.seed,
    )
    made.save(config.out)
    (config.out / SCORED_FILE).unlink(missing_ok=True)  # another bank's
    if held_out is not None:
        write_scored(config.out / SCORED_FILE, held_out.metric, held_out.by_scorer)
    for metric in made.metrics:
        print(f"{metric}\n  before: {promise_of(bank.card, metric)}\n  now: {promise_of(made.card, metric)}")
    _print_figures(bank.card, made.card)
    for metric in made.metrics:
        if held_out is None or held_out.metric != metric:
            print(f"\nWhat the threshold of {metric!r} finds is not measured: no {SCORED_FILE} of it lies in {folder}.")
    print(f"\nThe bank: {config.out.resolve()}")
    return 0


def _held_out(path: Path, bank: HeadBank) -> Scored | None:
    if not path.exists():
        return None
    found = read_scored(path)
    if found.metric not in bank.metrics or "head" not in found.by_scorer:
        raise SettingError(
            f"{path} has the scores of {', '.join(found.by_scorer) or 'nothing'} for {found.metric!r}; the bank beside "
            f"it has heads for {', '.join(bank.metrics)}: take that file away, or give the folder that `fit` wrote"
        )
    return found


def _print_figures(before: Card, now: Card) -> None:
    """Those that the threshold moved."""
    rows = []
    for name, old in before.metrics.items():
        new = now.metrics.get(name)
        if new != old:
            rows.append([name, *map(_cell, (old, new))])
    if rows:
        print("\n" + table(["on held-out documents", "before", "now"], rows))


def _cell(found: Measured | None) -> str:
    return "not measured" if found is None else "{} [{}, {}]".format(*map(number, (found.value, found.low, found.high)))
