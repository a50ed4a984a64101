"""Whether the monitor inside vLLM holds for a long time: 64 requests at once, aborts, and too little room.

    .venv-vllm/bin/python benchmarks/vllm_soak.py [--quick] [--seed 0] [--json PATH] [--minutes 10] [--at-once 64]

SmolLM2-135M verifies, a draft made of it by leaving out every third layer drafts, six heads read the draft. KV blocks
are too few for all requests at once, so that vLLM pre-empts; one request in eight is aborted on its way. Prompts share
beginnings, so the prefix cache is used. Of every answer that ends it is checked that each token is scored or declared
missed (conservation). Every tenth or so is compared with one pass of transformers over the same ids: a score of
another request, or of another place, would be far off (cross-talk). The memory's slope is that of the process's
resident size over the second half of the run.
"""

from __future__ import annotations

import argparse
import gc
import os
import tempfile
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from shown import targets_table
from vllm_tax import models_of

from pilotfish.cli.terminal import quieten_transformers, table
from pilotfish.engines.tax import CODE_PROMPTS, PROSE_PROMPTS
from pilotfish.heads import HeadBank
from pilotfish.models import LoadedModel, load_model
from pilotfish.runs import run_card, write_json
from pilotfish.scores import score_tokens
from pilotfish.taps import tapped

BLOCK, LONGEST = 32, 256
BLOCKS_A_REQUEST = 2.5
"""That there is room for: the longest takes eight."""
BOUND = 0.05
"""Of a probability in bfloat16, where passes of different lengths round differently."""
SLOPE_MB = 1.0
"""A minute."""


class Soak:
    """Requests under way, and what was found of those that have ended."""

    def __init__(self, llm: Any, draft: LoadedModel, bank: HeadBank, seed: int, at_once: int) -> None:
        self._llm, self._draft, self._bank, self._at_once = llm, draft, bank, at_once
        self._random = np.random.default_rng(seed)
        self._aborts: dict[str, int] = {}
        """Of requests that will be aborted, the step at which."""
        self._open: set[str] = set()
        self._num_begun = 0
        self.counts: Counter[str] = Counter()
        self.reasons: Counter[str] = Counter()
        self.worst = 0.0
        """Largest distance of a score from that of one pass over the same ids."""
        self.least_wrong = 1.0
        """The same of the answer whose distance is least when all scores are one place off: what the check can see."""
        self.num_steps = 0
        self.memory: list[tuple[float, float]] = []
        """Seconds and resident megabytes."""

    def run(self, seconds: float) -> None:
        engine, started = self._llm.llm_engine, time.monotonic()
        self._count_preemptions()
        while (now := time.monotonic() - started) < seconds or self._open:
            while now < seconds and len(self._open) < self._at_once:
                self._begin(engine)
            due = [name for name, step in self._aborts.items() if step <= self.num_steps]
            engine.abort_request(due)
            for name in due:
                del self._aborts[name]
                self._open.discard(name)
                self.counts["aborted"] += 1
            self.num_steps += 1
            for output in engine.step():
                if output.finished and output.request_id in self._open:
                    self._open.discard(output.request_id)
                    self._aborts.pop(output.request_id, None)
                    self._check(output.outputs[0])
            self.memory.append((now, _resident_mb()))
            if self.num_steps % 50 == 0:
                print(f"{now:.0f} s: {dict(self.counts)}, {self.memory[-1][1]:.0f} MB", flush=True)

    def _begin(self, engine: Any) -> None:
        from vllm import SamplingParams

        name, random = str(self._num_begun), self._random
        texts = CODE_PROMPTS + PROSE_PROMPTS
        prompt = texts[random.integers(len(texts))] + f" Variant {random.integers(50)}." * int(random.integers(1, 6))
        longest = int(random.integers(8, 96))
        # no seed of its own: vLLM on a CPU fails where a prompt with one is read in chunks
        engine.add_request(name, prompt, SamplingParams(temperature=1.0, max_tokens=longest))
        if random.random() < 1 / 8:
            self._aborts[name] = self.num_steps + int(random.integers(1, 40))
        self._open.add(name)
        self._num_begun += 1

    def _check(self, completion: Any) -> None:
        from pilotfish.vllm.frontend import record_of

        record = record_of(completion)
        if record is None:
            self.counts["without a record"] += 1
            return
        record.finish("length")
        generation = record.generation
        num_committed = generation.num_prompt_tokens + len(completion.token_ids)
        is_whole = record.counts.total() == num_committed == len(generation.tokens)
        self.counts["finished"] += 1
        self.counts["not conserved"] += not is_whole
        self.reasons += Counter({reason: number for reason, number in record.counts.items() if reason})
        if self._random.random() < 0.1:
            self._compare(generation)

    def _compare(self, generation: Any) -> None:
        """With one pass of transformers over the same ids."""
        ids = [token.id for token in generation.tokens]
        wanted = score_tokens(self._draft.model, self._bank, ids, boundary=generation.num_prompt_tokens).running
        found = [[token.scores[metric].running for metric in self._bank.metrics] for token in generation.tokens]
        known = [index for index, row in enumerate(found) if None not in row]
        if len(known) > 1:
            scores, expected = torch.tensor([found[index] for index in known]), wanted[known]
            self.worst = max(self.worst, float((scores - expected).abs().max()))
            self.least_wrong = min(self.least_wrong, float((scores[1:] - expected[:-1]).abs().max()))
            self.counts["compared"] += 1

    def _count_preemptions(self) -> None:
        scheduler = self._llm.llm_engine.engine_core.engine_core.scheduler
        preempt = scheduler._preempt_request

        def counted(*args: Any, **kwargs: Any) -> Any:
            self.counts["preempted"] += 1
            return preempt(*args, **kwargs)

        scheduler._preempt_request = counted

    @property
    def slope_mb(self) -> float:
        """Megabytes a minute over the second half."""
        late = np.array(self.memory[len(self.memory) // 2 :])
        return float(np.polyfit(late[:, 0] / 60, late[:, 1], 1)[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--at-once", type=int, default=64, help="Requests; a slow machine takes fewer.")
    parser.add_argument("--target", default="demo:smollm2")
    parser.add_argument("--draft", help="By default the target without every third layer.")
    args = parser.parse_args()
    quieten_transformers()
    minutes = 1.0 if args.quick else args.minutes
    with tempfile.TemporaryDirectory() as name:
        models = models_of(args.target, args.draft, args.seed, Path(name))
        os.environ["PILOTFISH_VLLM"] = models["settings"]
        draft = load_model(models["draft"], device="cpu", dtype="bfloat16")
        bank = _spread(HeadBank.load(Path(name) / "bank"), draft)
        bank.save(Path(name) / "bank")
        soak = Soak(_engine(models, args.at_once), draft, bank, args.seed, args.at_once)
        soak.run(60 * minutes)
    _report(args, soak, minutes)


@torch.inference_mode()
def _spread(bank: HeadBank, draft: LoadedModel) -> HeadBank:
    """The bank's untrained heads, scaled so that their logits of a text differ from token to token."""
    ids = draft.tokenizer.encode(" ".join(CODE_PROMPTS + PROSE_PROMPTS))
    with tapped(draft.model, bank.sites) as taps:
        draft.model(torch.tensor([ids[:LONGEST]]))
        channels = bank.channels(bank.features(taps))[1:]  # a text's first token has states like no other's
    heads, begin = [], 0
    for head in bank.heads:
        own = channels[:, begin : begin + len(head.bias)]
        begin += len(head.bias)
        scale = 2.0 / own.std(dim=0)
        heads.append(replace(head, weight=head.weight * scale[:, None], bias=(head.bias - own.mean(dim=0)) * scale))
    return HeadBank(heads, bank.identity)


def _engine(models: dict[str, str], at_once: int) -> Any:
    from vllm import LLM

    spec = {"method": "draft_model", "model": models["draft"], "num_speculative_tokens": 3}
    return LLM(
        model=models["target"],
        speculative_config=spec,
        dtype="bfloat16",
        enforce_eager=True,
        max_model_len=LONGEST,
        max_num_seqs=at_once,
        max_num_batched_tokens=512,
        num_gpu_blocks_override=max(LONGEST // BLOCK + 2, int(BLOCKS_A_REQUEST * at_once)),
        block_size=BLOCK,
        disable_log_stats=True,
    )


def _resident_mb() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def _num_left() -> int:
    from pilotfish.vllm.record import Record
    from pilotfish.vllm.track import Track

    gc.collect()
    return sum(isinstance(item, Record | Track) for item in gc.get_objects())


def _report(args: argparse.Namespace, soak: Soak, minutes: float) -> None:
    counts = soak.counts
    targets = [
        _target("finished answers that are not conserved", counts["not conserved"] + counts["without a record"], 0),
        _target("largest distance of a score from one pass over the same ids", soak.worst, BOUND),
        _target("least distance where scores are one place off", soak.least_wrong, 2 * BOUND, at_least=True),
        _target("resident memory, MB a minute, second half", soak.slope_mb, SLOPE_MB),
        _target("records and tracks left of requests that have gone", _num_left(), 0),
        _target("aborted requests", counts["aborted"], 1, at_least=True),
        _target("pre-emptions", counts["preempted"], 1, at_least=True),
        _target("answers compared", counts["compared"], 1, at_least=True),
    ]
    rows = [[name, str(number)] for name, number in sorted((counts | soak.reasons).items())]
    print(
        table(
            ["what", "number"],
            [["minutes", f"{minutes:g}"], ["at once", str(args.at_once)], ["steps", str(soak.num_steps)], *rows],
        )
    )
    print(targets_table(targets))
    if args.json is not None:
        card = run_card(
            "benchmarks/vllm_soak.py", {"minutes": minutes, "at_once": args.at_once, "quick": args.quick}, args.seed
        )
        write_json(args.json, {"targets": targets, "rows": rows, "card": card})


def _target(name: str, value: float, limit: float, *, at_least: bool = False) -> dict[str, Any]:
    met = value >= limit if at_least else value <= limit
    asked = f"{'>=' if at_least else '<='} {limit:g}"
    return {"name": name, "value": float(value), "low": float(value), "high": float(value), "target": asked, "met": met}


if __name__ == "__main__":
    main()
