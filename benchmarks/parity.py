"""Is greedy speculation the target alone, token for token? Where it is not, how close were the two logits?

    python benchmarks/parity.py [--quick] [--seed 0] [--json PATH]

In bfloat16 a pass of one token and a pass of five round differently, so two logits that tie to within rounding may
swap; after such a place the two texts are different texts. For each prompt this prints the first place where they
part, and by how much the target itself preferred its own choice there, in each of the two ways of computing it. Takes
about seven minutes, `--quick` half a minute.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, NamedTuple

import torch

from pilotfish.cli.terminal import quieten_transformers, table
from pilotfish.engines import Drafting, EmbeddedEngine, Generation, Request
from pilotfish.engines.reader import CachedModel
from pilotfish.engines.tax import CODE_PROMPTS, PROSE_PROMPTS, random_bank
from pilotfish.models import Pair, load_pair
from pilotfish.runs import generator, progress, run_card, write_json

PAIR = "demo:qwen-coder"
TIE = 0.25
"""Largest margin that counts as a tie: two steps of bfloat16 for logits from 16 to 32."""


class Parting(NamedTuple):
    position: int
    """Tokens of the answer before the first that differs; its length where none does."""
    margin: float
    """Logit of the target alone's choice over that of speculation's, one token at a time; 0 where none differs."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one prompt of each kind, twelve tokens")
    parser.add_argument("--seed", type=int, default=0, help="of the random heads")
    parser.add_argument("--json", type=Path, help="also write targets, rows and the run's card here")
    args = parser.parse_args()
    quieten_transformers()
    pair = load_pair(PAIR)
    bank = random_bank(pair, num_heads=64, num_sites=5, generator=generator(args.seed, "heads"))
    prompts = [*CODE_PROMPTS[:1], *PROSE_PROMPTS[:1]] if args.quick else [*CODE_PROMPTS, *PROSE_PROMPTS]
    request = Request(max_new_tokens=12 if args.quick else 64)
    rows: list[dict[str, Any]] = []
    num_equal_without_bank = 0
    for prompt in progress(prompts, "prompts"):
        alone = EmbeddedEngine(pair, drafting=Drafting(length=0)).generate(prompt, request)
        plain = EmbeddedEngine(pair).generate(prompt, request)
        watched = EmbeddedEngine(pair, [bank]).generate(prompt, request)
        num_equal_without_bank += _ids(plain) == _ids(watched)
        rows.append({"prompt": prompt, "tokens": len(alone.committed), **parting(pair, alone, watched)._asdict()})
    worst = max(row["margin"] for row in rows)
    share = sum(row["position"] == row["tokens"] for row in rows) / len(rows)
    bank_share = num_equal_without_bank / len(rows)
    targets = [
        _target("answers equal with and without a bank, share", bank_share, "== 1", bank_share == 1.0),
        _target("largest margin where speculation parts from the target alone", worst, f"<= {TIE}", worst <= TIE),
        _target("answers equal to the target alone, share", share, "no target: ties decide", True),
    ]
    if args.json is not None:
        card = run_card("benchmarks/parity.py", {"quick": args.quick}, args.seed)
        write_json(args.json, {"targets": targets, "rows": rows, "card": card})
    cells = [[row["prompt"][:60], f"{row['position']} of {row['tokens']}", f"{row['margin']:.3f}"] for row in rows]
    print(table(["prompt", "equal tokens", "margin where they part"], cells) + "\n")
    print(
        table(
            ["target", "found", "asked", ""],
            [[t["name"], f"{t['value']:.3f}", t["target"], str(t["met"])] for t in targets],
        )
    )


def parting(pair: Pair, alone: Generation, other: Generation) -> Parting:
    """Where two answers to one prompt first differ, and how clear the choice was to the target, one token at a time."""
    first, second = _ids(alone), _ids(other)
    position = next(
        (i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second))
    )
    if position == max(len(first), len(second)):
        return Parting(position, 0.0)
    prompt = [token.id for token in alone.tokens[: alone.num_prompt_tokens]]
    model = CachedModel(pair.target, "target")
    logits = model.read(prompt)[0]
    for token in first[:position]:
        logits = model.read([token])[0]
    return Parting(position, float(logits[first[position]] - logits[second[position]]))


def _ids(generation: Generation) -> list[int]:
    return [token.id for token in generation.committed]


def _target(name: str, value: float, asked: str, met: bool) -> dict[str, Any]:
    return {"name": name, "value": value, "low": value, "high": value, "target": asked, "met": met}


if __name__ == "__main__":
    with torch.inference_mode():
        main()
