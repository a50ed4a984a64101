"""What monitoring costs: every arm in turn on the same prompts, ratios with 95 % intervals.

    python benchmarks/tax.py [--quick] [--seed 0] [--json PATH]

Takes about 45 minutes on two cores, `--quick` about a minute.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from shown import targets_table

from pilotfish.cli.terminal import quieten_transformers, table
from pilotfish.engines import Drafting, EmbeddedEngine, Request
from pilotfish.engines.reader import CachedModel
from pilotfish.engines.tax import (
    CODE_PROMPTS,
    POOR_PROMPTS,
    PROSE_PROMPTS,
    Ratio,
    TaxSetting,
    arms,
    random_bank,
    ratio,
    time_in_turn,
)
from pilotfish.heads import HeadBank
from pilotfish.models import Pair, load_pair
from pilotfish.runs import generator, run_card, write_json
from pilotfish.taps import tapped

PAIR = "demo:qwen-coder"
ALONE, PLAIN, HEADS = "target alone", "speculation", "speculation + heads"
FLUSHED = "speculation + heads, last tokens too"
FIXED, LIBRARY = "speculation, k = 4", "transformers assisted, k = 4"
KINDS = {
    "code": (CODE_PROMPTS, None),
    "prose": (PROSE_PROMPTS, (ALONE, PLAIN, HEADS, FLUSHED, FIXED, LIBRARY)),
    "poor draft": (POOR_PROMPTS, (ALONE, PLAIN, HEADS)),
}
"""Kind of prompt to the prompts and the arms that are run on it (all where None)."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a smoke run of about a minute: its figures mean nothing")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), help="kinds of prompt")
    parser.add_argument("--arms", nargs="+", help="these arms only, the first is the baseline of the rows")
    parser.add_argument("--pairs", type=int, default=20, help="repetitions of each arm")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="also write targets, rows and the run's card here")
    args = parser.parse_args()
    quieten_transformers()
    num_pairs = 2 if args.quick else args.pairs
    setting = TaxSetting(max_new_tokens=6 if args.quick else 48)
    before = _memory("VmRSS")
    pair = load_pair(PAIR)
    bank = random_bank(pair, num_heads=64, num_sites=5, generator=generator(args.seed, "heads"))
    targets = [_memory_target(pair, bank, before), _direct_cost(pair, bank, setting)]
    rows: list[dict[str, Any]] = []
    for kind in args.kinds:
        prompts, names = KINDS[kind]
        every = arms(pair, bank, setting)
        chosen = {name: every[name] for name in args.arms or names or every}
        timings = time_in_turn(chosen, prompts, num_pairs=num_pairs, what=kind)
        baseline = next(iter(chosen))
        for name, runs in timings.items():
            random = generator(args.seed, f"{kind} {name}")
            wall, cpu = (ratio(timings[baseline], runs, generator=random, cpu=cpu) for cpu in (False, True))
            rows.append({"prompts": kind, "arm": name, "speed": wall._asdict(), "speed_cpu": cpu._asdict()})
        targets += _targets(kind, timings, args.seed)
    if args.json is not None:
        card = run_card("benchmarks/tax.py", {"quick": args.quick, "num_pairs": num_pairs}, args.seed)
        write_json(args.json, {"targets": targets, "rows": rows, "card": card})
    _print(rows, targets)


ASKED: tuple[tuple[str, str, str, bool, float], ...] = (
    ("code", PLAIN, ALONE, True, 1.4),
    ("code", FIXED, LIBRARY, False, 1.0),
    ("code", HEADS, PLAIN, False, 0.99),
    ("code", FLUSHED, PLAIN, False, 0.99),
    ("prose", FIXED, LIBRARY, False, 0.97),
    ("prose", HEADS, PLAIN, False, 0.99),
    ("prose", FLUSHED, PLAIN, False, 0.99),
    ("poor draft", HEADS, PLAIN, False, 0.99),
    ("poor draft", HEADS, ALONE, False, 0.95),
)
"""Kind of prompt, arm, arm that it is held against, whether in CPU time, and the least speed over the other's."""


def _targets(kind: str, timings: dict[str, list[Any]], seed: int) -> list[dict[str, Any]]:
    """The figures that were asked for of the arms that were run, met or not."""
    found = []
    for asked_kind, arm, other, in_cpu_time, least in ASKED:
        if asked_kind == kind and {arm, other} <= timings.keys():
            random = generator(seed, f"{kind} {arm} {other}")
            speed = ratio(timings[other], timings[arm], generator=random, cpu=in_cpu_time)
            met = speed.value >= least
            if other == PLAIN:
                met = met and 0.98 <= speed.low <= speed.high <= 1.02
            clock = "CPU time" if in_cpu_time else "tokens/s"
            found.append(_target(f"{kind}: {arm} / {other}, {clock}", speed, least, met))
    return found


def _target(name: str, found: Ratio, least: float, met: bool) -> dict[str, Any]:
    return {
        "name": name,
        "value": found.value,
        "low": found.low,
        "high": found.high,
        "target": f">= {least}",
        "met": met,
    }


def _direct_cost(pair: Pair, bank: HeadBank, setting: TaxSetting) -> dict[str, Any]:
    """Share of the loop's time that goes into hooks, features, the matmul and score records."""
    spent = 0.0
    steps = {name: getattr(CachedModel, name) for name in ("_keep_features", "_score")}

    def timed(step: Any) -> Any:
        def run(*args: Any) -> Any:
            nonlocal spent
            started = time.perf_counter()
            result = step(*args)
            spent += time.perf_counter() - started
            return result

        return run

    for name, step in steps.items():
        setattr(CachedModel, name, timed(step))  # put back below
    try:
        engine = EmbeddedEngine(pair, [bank], drafting=Drafting())
        shares = []
        for prompt in CODE_PROMPTS:
            spent = 0.0
            generation = engine.generate(prompt, Request(max_new_tokens=setting.max_new_tokens))
            num_reads = 1 + sum(len(item.drafted) for item in generation.rounds)
            shares.append((spent + num_reads * _hook_seconds(pair, bank)) / generation.seconds)
    finally:
        for name, step in steps.items():
            setattr(CachedModel, name, step)
    name = "direct cost of the heads, share of the loop"
    middle = sorted(shares)[len(shares) // 2]
    return {
        "name": name,
        "value": middle,
        "low": min(shares),
        "high": max(shares),
        "target": "<= 0.003",
        "met": middle <= 0.003,
    }


def _hook_seconds(pair: Pair, bank: HeadBank, num_tries: int = 50) -> float:
    assert pair.draft is not None
    started = time.perf_counter()
    for _ in range(num_tries):
        with tapped(pair.draft, bank.sites):
            pass
    return (time.perf_counter() - started) / num_tries


def _memory_target(pair: Pair, bank: HeadBank, before: int) -> dict[str, Any]:
    """Peak resident memory of a monitored answer beyond interpreter, weights and KV cache, in MB."""
    models = [pair.target, pair.draft]
    weights = sum(p.numel() * p.element_size() for model in models if model is not None for p in model.parameters())
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    generation = EmbeddedEngine(pair, [bank]).generate(CODE_PROMPTS[0], Request(max_new_tokens=64))
    kv = sum(
        len(generation.tokens)
        * 2
        * model.config.num_hidden_layers
        * model.config.num_key_value_heads
        * (model.config.hidden_size // model.config.num_attention_heads)
        * 2
        for model in models
        if model is not None
    )
    extra = (_memory("VmHWM") - before - weights - kv) / 1e6
    name = "peak memory beyond interpreter, weights and KV, MB"
    return {"name": name, "value": extra, "low": extra, "high": extra, "target": "<= 300", "met": extra <= 300}


def _memory(field: str) -> int:
    """Bytes of this process: VmRSS now, VmHWM at its peak (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def _print(rows: list[dict[str, Any]], targets: list[dict[str, Any]]) -> None:
    cells = [
        [f"{row['prompts']}: {row['arm']}", str(Ratio(**row["speed"])), str(Ratio(**row["speed_cpu"]))] for row in rows
    ]
    print(table(["speed over the first arm", "wall time", "CPU time"], cells))
    print()
    print(targets_table(targets))


if __name__ == "__main__":
    main()
