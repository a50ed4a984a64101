"""`pilotfish bench tax`: what monitoring costs, as a table of ratios."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pilotfish.cli.session import find_banks, load
from pilotfish.cli.terminal import table
from pilotfish.cli.verbs import BenchTax
from pilotfish.engines import EmbeddedEngine
from pilotfish.engines.tax import CODE_PROMPTS, PROSE_PROMPTS, TaxSetting, arms, random_bank, ratio, time_in_turn
from pilotfish.errors import SettingError
from pilotfish.heads import HeadBank
from pilotfish.models import Pair
from pilotfish.runs import generator


def run(config: BenchTax) -> int:
    if config.num_pairs < 2:
        raise SettingError(f"{config.num_pairs} repetitions give no interval; give at least 2, better 20")
    pair = load(config)
    if config.heads:
        bank = random_bank(
            pair, num_heads=config.heads, num_sites=config.sites, generator=generator(config.seed, "heads")
        )
    else:
        banks = EmbeddedEngine(pair, find_banks(config.banks, (pair.draft_identity, pair.target_identity))).banks
        bank = next(iter(banks.values()))
    setting = TaxSetting(max_new_tokens=config.max_new_tokens)
    for kind, prompts in (("code", CODE_PROMPTS), ("prose", PROSE_PROMPTS)):
        rows = tax_table(pair, bank, prompts, setting, num_pairs=config.num_pairs, seed=config.seed)
        print(f"\n{kind}\n{table(rows['columns'], rows['rows'])}\n{rows['note']}")
    return 0


def tax_table(
    pair: Pair, bank: HeadBank, prompts: Sequence[str], setting: TaxSetting, *, num_pairs: int, seed: int
) -> dict[str, Any]:
    """Every arm's time per token over the target's alone, and what the heads add, as text cells."""
    timings = time_in_turn(arms(pair, bank, setting), prompts, num_pairs=num_pairs, what="tax")
    baseline = timings["target alone"]
    rows = []
    for name, runs in timings.items():
        random = generator(seed, name)
        rows.append(
            [
                name,
                str(ratio(runs, baseline, generator=random)),
                str(ratio(baseline, runs, generator=random)),
                str(ratio(baseline, runs, generator=random, cpu=True)),
            ]
        )
    note = (
        f"Greedy, {setting.max_new_tokens} tokens, {len(bank.metrics)} heads over {len(bank.sites)} sites, "
        f"{num_pairs} repetitions in turn; "
        "medians of ratios within a repetition, 95 % bootstrap interval."
    )
    if "speculation + heads" in timings:
        heads = ratio(timings["speculation"], timings["speculation + heads"], generator=generator(seed, "heads"))
        note = f"Speed with heads over speed without: {heads}. {note}"
    return {"columns": ["", "time / target alone", "speed-up", "speed-up, CPU time"], "rows": rows, "note": note}
