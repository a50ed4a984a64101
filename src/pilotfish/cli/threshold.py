"""`pilotfish threshold`: a bank and benign texts in, the same heads with thresholds that leave those alone out."""

from __future__ import annotations

from pilotfish.cli.terminal import table
from pilotfish.cli.verbs import Threshold
from pilotfish.errors import SettingError
from pilotfish.heads import Card, Measured, load_bank
from pilotfish.models import load_model
from pilotfish.reports.figures import promise_of
from pilotfish.scores import Reading, check_num_benign, read_scored, with_limits, write_scored
from pilotfish.scores.scored import SCORED_FILE
from pilotfish.texts import read_jsonl


def run(config: Threshold) -> int:
    bank = load_bank(config.bank)
    if config.out.exists() and config.bank.exists() and config.out.samefile(config.bank):
        raise SettingError(f"--out {config.out} is the bank itself; give another folder, so that the old one stays")
    benign = read_jsonl(config.benign)
    check_num_benign(benign, config.budget)
    reader = load_model(config.model or bank.identity.name, device=config.device, dtype=config.dtype)
    scored = config.bank / SCORED_FILE
    held_out = read_scored(scored) if scored.exists() else None
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
    if held_out is not None:
        write_scored(config.out / SCORED_FILE, held_out.metric, held_out.by_scorer)
    for metric in made.metrics:
        print(f"{metric}\n  before: {promise_of(bank.card, metric)}\n  now: {promise_of(made.card, metric)}")
    _print_figures(bank.card, made.card)
    if held_out is None:
        print(f"\nWhat the new threshold finds is not measured: {scored} is not there.")
    print(f"\nThe bank: {config.out.resolve()}")
    return 0


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
    return "not measured" if found is None else f"{found.value:.3f} [{found.low:.3f}, {found.high:.3f}]"
