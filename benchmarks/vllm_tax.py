"""What heads cost inside vLLM: the same steps with and without them.

    .venv-vllm/bin/python benchmarks/vllm_tax.py [--quick] [--seed 0] [--json PATH] [--steps 300]
    python benchmarks/vllm_tax.py --gpu --target NAME --draft NAME [--json PATH]

Greedy answers to the same prompts, with heads and without in turn: step k of one run does the very work of step k of
the next, so steps are compared in pairs. On a CPU both arms run in one process, in which the tap, the judging and the
records are switched off and on (what stays of them when off is a few Python calls a step); SmolLM2-135M verifies, a
draft made of it by leaving out every third layer drafts. With `--gpu` each run is a process of its own, with the
plugin absent or present, CUDA graphs and asynchronous scheduling as vLLM has them. Takes about ten minutes on two quiet
cores, `--quick` about two. (A script of the name `vllm.py` would hide the package of that name.)
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from shown import targets_table

from pilotfish.cli.terminal import quieten_transformers, table
from pilotfish.engines.tax import CODE_PROMPTS, PROSE_PROMPTS, Ratio, Timing, random_bank, ratio
from pilotfish.models import Pair, identify_folder, load_model, resolve
from pilotfish.runs import generator, run_card, write_json

NUM_HEADS, NUM_SITES, NUM_DRAFTED = 6, 5, 3
SIZES = (1, 16)
ASKED_RATIO = 1.005
ASKED_HOOK_MS = {1: 0.1, 16: 0.3}
TOKENS = 64
RUNS_ON_GPU = 4


class Step(NamedTuple):
    wall_s: float
    cpu_s: float
    hook_s: float
    """In the tap alone; 0 without heads."""


class Run(NamedTuple):
    steps: list[Step]
    answers: list[list[int]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--steps", type=int, default=300, help="Pairs of steps, at least, at each batch size.")
    parser.add_argument("--gpu", action="store_true")
    parser.add_argument("--target", default="demo:smollm2")
    parser.add_argument("--draft", help="By default the target without every third layer.")
    parser.add_argument("--arm", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.arm is not None:
        _run_one_arm(args.arm)
        return
    quieten_transformers()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        models = models_of(args.target, args.draft, args.seed, folder)
        num_steps = 30 if args.quick else args.steps
        measured = _on_gpu(models, folder) if args.gpu else _on_cpu(models, folder, num_steps)
    _report(args, measured)


def models_of(target_name: str, draft_name: str | None, seed: int, folder: Path) -> dict[str, str]:
    """Folders of target and draft (by default the target without every third layer), and the path of the plugin's
    settings, with an untrained bank beside them.
    """
    target = resolve(target_name)
    if draft_name is None:
        loaded = load_model(target_name, device="cpu")
        layers = loaded.model.model.layers
        kept = [layer for index, layer in enumerate(layers) if index % 3 != 1]
        loaded.model.model.layers = torch.nn.ModuleList(kept)
        loaded.model.config.num_hidden_layers = len(kept)
        if loaded.model.config.to_dict().get("layer_types"):
            loaded.model.config.layer_types = loaded.model.config.layer_types[: len(kept)]
        for index, layer in enumerate(kept):
            layer.self_attn.layer_idx = index
        loaded.model.save_pretrained(folder / "draft")
        loaded.tokenizer.save_pretrained(folder / "draft")
        draft = folder / "draft"
    else:
        draft = resolve(draft_name)
    reader = load_model(str(draft), device="cpu")
    identity = identify_folder(draft, "draft")
    pair = Pair(reader.model, reader.model, reader.tokenizer, identity, identity)
    bank = random_bank(pair, num_heads=NUM_HEADS, num_sites=NUM_SITES, generator=generator(seed, "bank"))
    bank.save(folder / "bank")
    (folder / "settings.toml").write_text('banks = ["bank"]\nmetrics = false\n')
    return {"target": str(target), "draft": str(draft), "settings": str(folder / "settings.toml")}


def _engine(models: dict[str, str], *, is_on_gpu: bool) -> Any:
    from vllm import LLM

    options = {} if is_on_gpu else {"enforce_eager": True, "max_model_len": 512, "max_num_seqs": max(SIZES)}
    spec = {"method": "draft_model", "model": models["draft"], "num_speculative_tokens": NUM_DRAFTED}
    return LLM(
        model=models["target"], speculative_config=spec, dtype="bfloat16", enable_prefix_caching=False, **options
    )


def _run(llm: Any, size: int) -> Run:
    """One run: `size` prompts at once, step by step."""
    from vllm import SamplingParams

    engine = llm.llm_engine
    prompts = (CODE_PROMPTS + PROSE_PROMPTS) * size
    params = SamplingParams(temperature=0.0, max_tokens=TOKENS, ignore_eos=True)
    for index, prompt in enumerate(prompts[:size]):
        engine.add_request(str(index), prompt, params)
    steps, answers = [], {}
    tap = _tap(llm)
    while engine.has_unfinished_requests():
        wall, cpu = time.perf_counter(), time.process_time()
        outputs = engine.step()
        steps.append(Step(time.perf_counter() - wall, time.process_time() - cpu, tap._seconds if tap else 0.0))
        answers |= {output.request_id: list(output.outputs[0].token_ids) for output in outputs if output.finished}
    return Run(steps[1:], [answers[key] for key in sorted(answers, key=int)])  # the first one reads the prompts


def _tap(llm: Any) -> Any:
    return getattr(llm.llm_engine.model_executor.driver_worker.worker.model_runner, "pilotfish", None)


@contextlib.contextmanager
def _off(llm: Any) -> Iterator[None]:
    """The plugin's work left out: taps, judging, records."""
    from pilotfish.vllm import frontend, sites
    from pilotfish.vllm.scheduler import Judging

    tap = _tap(llm)
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    base = next(kind for kind in type(scheduler).__mro__ if kind is not Judging and not issubclass(kind, Judging))
    with contextlib.ExitStack() as stack:
        stack.enter_context(_replaced(sites, "_copy", lambda hidden, residual, buffer: None))
        stack.enter_context(_replaced(frontend, "_check_silence", lambda output: None))
        stack.enter_context(_replaced(tap, "guarded", lambda work: None))
        stack.enter_context(_replaced(tap, "forget", lambda slots: None))
        stack.enter_context(_replaced(tap, "attach", lambda output, stream: output))
        for name in ("update_from_output", "_update_request_with_output"):
            stack.enter_context(_replaced(scheduler, name, functools.partial(getattr(base, name), scheduler)))
        yield


@contextlib.contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = vars(owner).get(name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if before is None:
            delattr(owner, name)
        else:
            setattr(owner, name, before)


def _on_cpu(models: dict[str, str], folder: Path, num_steps: int) -> dict[int, list[tuple[Run, Run]]]:
    os.environ["PILOTFISH_VLLM"] = models["settings"]
    llm = _engine(models, is_on_gpu=False)
    measured: dict[int, list[tuple[Run, Run]]] = {}
    for size in SIZES:
        _run(llm, size)
        pairs: list[tuple[Run, Run]] = []
        while sum(len(on.steps) for on, _ in pairs) < num_steps:
            with_heads = _run(llm, size) if len(pairs) % 2 else None
            with _off(llm):
                without = _run(llm, size)
            pairs.append((with_heads or _run(llm, size), without))
            print(f"batch {size}: {sum(len(on.steps) for on, _ in pairs)} pairs of steps", flush=True)
        measured[size] = pairs
    return measured


def _on_gpu(models: dict[str, str], folder: Path) -> dict[int, list[tuple[Run, Run]]]:
    measured: dict[int, list[tuple[Run, Run]]] = {size: [] for size in SIZES}
    for number in range(RUNS_ON_GPU):
        order = ("on", "off") if number % 2 else ("off", "on")
        found = {arm: _child(models, folder / f"{number}-{arm}.json", arm) for arm in order}
        for size in SIZES:
            measured[size].append((found["on"][size], found["off"][size]))
    return measured


def _child(models: dict[str, str], path: Path, arm: str) -> dict[int, Run]:
    environment = dict(os.environ)
    environment.pop("PILOTFISH_VLLM", None)
    if arm == "on":
        environment["PILOTFISH_VLLM"] = models["settings"]
    said = json.dumps({**models, "path": str(path)})
    subprocess.run([sys.executable, __file__, "--arm", said], env=environment, check=True)
    found = json.loads(path.read_text())
    return {int(size): Run([Step(*step) for step in run[0]], run[1]) for size, run in found.items()}


def _run_one_arm(said: dict[str, str]) -> None:
    llm = _engine(said, is_on_gpu=True)
    found = {}
    for size in SIZES:
        _run(llm, size)
        found[size] = _run(llm, size)
    Path(said["path"]).write_text(json.dumps(found))


def _report(args: argparse.Namespace, measured: dict[int, list[tuple[Run, Run]]]) -> None:
    rows: list[list[str]] = []
    targets = []
    for size, pairs in measured.items():
        steps = [pair for on, off in pairs for pair in zip(on.steps, off.steps, strict=False)]
        by_wall = _ratio(steps, args.seed, cpu=False)
        by_cpu = _ratio(steps, args.seed, cpu=True)
        hook = _interval([on.hook_s * 1e3 for on, _ in steps], args.seed)
        off_ms = statistics.median(off.wall_s for _, off in steps) * 1e3
        rows.append([str(size), str(len(steps)), f"{off_ms:.2f}", str(by_wall), str(by_cpu), f"{hook.value:.3f}"])
        targets += [
            _target(f"batch {size}: step time, heads on / off", by_wall, ASKED_RATIO),
            _target(f"batch {size}: CPU time of a step, heads on / off", by_cpu, ASKED_RATIO),
            _target(f"batch {size}: milliseconds in the tap", hook, ASKED_HOOK_MS[size]),
        ]
        num_other = float(sum(on.answers != off.answers for on, off in pairs))
        differing = Ratio(num_other, num_other, num_other, len(pairs))
        targets.append(_target(f"batch {size}: runs whose tokens differ", differing, 0))
    print(table(["batch", "steps", "ms off", "wall on/off", "CPU on/off", "tap ms"], rows))
    print(targets_table(targets))
    if args.json is not None:
        card = run_card(
            "benchmarks/vllm_tax.py", {"steps": args.steps, "gpu": args.gpu, "quick": args.quick}, args.seed
        )
        write_json(args.json, {"targets": targets, "rows": rows, "card": card})


def _ratio(steps: Sequence[tuple[Step, Step]], seed: int, *, cpu: bool) -> Ratio:
    on, off = ([Timing(step.wall_s, step.cpu_s, 1) for step in side] for side in zip(*steps, strict=True))
    return ratio(on, off, generator=generator(seed, "bootstrap"), cpu=cpu)


def _interval(values: Sequence[float], seed: int) -> Ratio:
    """The median, as a ratio to one."""
    return ratio(
        [Timing(value, value, 1) for value in values],
        [Timing(1.0, 1.0, 1)] * len(values),
        generator=generator(seed, "bootstrap"),
    )


def _target(name: str, found: Ratio, asked: float) -> dict[str, Any]:
    met = found.value <= asked
    return {
        "name": name,
        "value": found.value,
        "low": found.low,
        "high": found.high,
        "target": f"<= {asked}",
        "met": met,
    }


if __name__ == "__main__":
    main()
