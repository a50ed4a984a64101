"""What decoding together gains over one answer at a time, and what `hold` and `flag` cost in a batch.

    python benchmarks/batching.py [--quick] [--seed 0] [--json PATH] [--pair demo:qwen-coder] [--sizes 1 4 8 16]

The arms of a table run at the same time, a forward pass or a round of each in turn, so that a slow moment of the
machine meets them all; greedy, the same prompts, to the same number of tokens. Takes about an hour on two cores,
`--quick` about a minute (the small demo model, which has no draft).
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from shown import targets_table

from pilotfish.actions import Policy, Rule
from pilotfish.cli.terminal import quieten_transformers, table
from pilotfish.engines import Batch, EmbeddedEngine, GenerationStream, Request
from pilotfish.engines.tax import CODE_PROMPTS, PROSE_PROMPTS, Arm, Ratio, random_bank, ratio, time_in_turn
from pilotfish.models import load_pair
from pilotfish.runs import generator, run_card, write_json

PROMPTS = (*CODE_PROMPTS, *PROSE_PROMPTS)
ALONE, TOGETHER = "one at a time", "together"
POLICIES = {
    "observe": Policy(),
    "flag": Policy(rules=(Rule(metric="random_0", threshold=0.5, scope="answer"),)),
    "hold": Policy(hold=True),
}
LEAST = {"flag": 0.99, "hold": 0.97}
"""Speed over that of observe."""
POLICY_SIZE = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a smoke run of about a minute")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="also write targets, rows and the run's card here")
    parser.add_argument("--pair")
    parser.add_argument("--sizes", type=int, nargs="*", default=[1, 4, 8, 16])
    parser.add_argument("--pairs", type=int, help="repetitions of each table")
    parser.add_argument("--tokens", type=int, help="of each answer")
    args = parser.parse_args()
    quieten_transformers()
    name = args.pair or ("demo:smollm2" if args.quick else "demo:qwen-coder")
    num_pairs = args.pairs or (2 if args.quick else 20)
    num_tokens = args.tokens or (8 if args.quick else 48)
    pair = load_pair(name)
    engine = EmbeddedEngine(
        pair, [random_bank(pair, num_heads=8, num_sites=3, generator=generator(args.seed, "heads"))]
    )
    rows = []
    for size in args.sizes:
        arms = {ALONE: _arm(engine, size, num_tokens, 1), TOGETHER: _arm(engine, size, num_tokens, size)}
        rows += _timed(f"{size} answers", arms, num_pairs, args.seed)
    policies = {label: _arm(engine, POLICY_SIZE, num_tokens, POLICY_SIZE, policy) for label, policy in POLICIES.items()}
    rows += _timed(f"{POLICY_SIZE} together", policies, num_pairs, args.seed)
    targets = [_target(row) for row in rows]
    if args.json is not None:
        settings = {"quick": args.quick, "pair": name, "num_pairs": num_pairs, "num_tokens": num_tokens}
        card = run_card("benchmarks/batching.py", settings, args.seed)
        write_json(args.json, {"targets": targets, "rows": rows, "card": card})
    cells = [[row["name"], str(Ratio(**row["speed"])), str(Ratio(**row["speed_cpu"]))] for row in rows]
    print(table([f"speed with {name}", "wall time", "CPU time"], cells) + "\n")
    print(targets_table(targets))


def _arm(
    engine: EmbeddedEngine, num_answers: int, num_tokens: int, max_streams: int, policy: Policy = POLICIES["observe"]
) -> Arm:
    """Answers prompts, the given one first, so many at a time; yields the tokens so far after each step."""
    request = Request(max_new_tokens=num_tokens, policy=policy)

    def arm(prompt: str) -> Iterator[int]:
        first = PROMPTS.index(prompt)
        streams = [engine.stream(PROMPTS[(first + i) % len(PROMPTS)], request) for i in range(num_answers)]
        batch, queue = Batch(max_streams=max_streams), list(streams)
        while queue or len(batch):
            while queue and not batch.is_full:
                batch.join(queue.pop())
            batch.step()
            yield _num_tokens(streams)

    return arm


def _num_tokens(streams: Sequence[GenerationStream]) -> int:
    return sum(len(stream.generation.committed) for stream in streams)


def _timed(what: str, arms: dict[str, Arm], num_pairs: int, seed: int) -> list[dict[str, Any]]:
    """Each arm's speed over the first's."""
    timings = time_in_turn(arms, PROMPTS, num_pairs=num_pairs, what=what)
    baseline, *others = arms
    rows = []
    for arm in others:
        random = generator(seed, f"{what} {arm}")
        wall, cpu = (ratio(timings[baseline], timings[arm], generator=random, cpu=cpu) for cpu in (False, True))
        tokens = {label: sum(timing.num_tokens for timing in timings[label]) for label in (baseline, arm)}
        cpu_ms = {label: 1e3 * sum(t.cpu_s for t in timings[label]) / tokens[label] for label in (baseline, arm)}
        named = {"name": f"{what}: {arm} / {baseline}", "arm": arm, "cpu_ms_per_token": cpu_ms}
        rows.append({**named, "speed": wall._asdict(), "speed_cpu": cpu._asdict()})
    return rows


def _target(row: dict[str, Any]) -> dict[str, Any]:
    """Of the CPU time, which other programs of the machine touch least."""
    speed, least = Ratio(**row["speed_cpu"]), LEAST.get(row["arm"], 1.0)
    found = {"value": speed.value, "low": speed.low, "high": speed.high}
    return {"name": f"{row['name']}, CPU time", **found, "target": f">= {least}", "met": speed.value >= least}


if __name__ == "__main__":
    main()
