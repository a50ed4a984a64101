"""A tiny pair, a bank on its draft, and engines that read it: what the tests in this folder share."""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pilotfish.actions import Policy, Rule
from pilotfish.heads import Form, Head, HeadBank
from pilotfish.models import evenly_spaced_sites, identify, tiny_model, tiny_tokenizer
from pilotfish.taps import tapped
from pilotfish.vllm.frontend import record_of
from pilotfish.vllm.record import Record

HIDDEN = 128
"""Wide enough for a head size that vLLM's attention on CPUs takes."""
LINEAR = (Form(window=4), Form(width=1, window=3), Form(window=16))
MIXED = (Form(window=4), Form(kind="attention", width=2, window=3), Form(kind="mlp", width=4, window=16))
"""On a CPU loops score a bank of linear heads, tensor operations any other."""
LENGTH = 160
"""Longest sequence of the shared engine."""
BLOCKS = 14
"""KV blocks of 32 tokens that the shared engine has: a few long requests do not fit at once."""


class Models(NamedTuple):
    folder: Path
    target: PreTrainedModel
    draft: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    bank: HeadBank
    on_target: HeadBank


def make_models(folder: Path) -> Models:
    """Writes target, draft (the target with noise, so that some of its tokens are accepted) and banks to a folder."""
    tokenizer, target = tiny_tokenizer(), tiny_model("llama", seed=0, hidden=HIDDEN)
    draft, random = copy.deepcopy(target), torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in draft.parameters():
            parameter.add_(0.05 * parameter.std() * torch.randn(parameter.shape, generator=random))
    banks = []
    for name, model, forms in (("target", target, MIXED), ("draft", draft, LINEAR)):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
        bank = seeded_bank(model, tokenizer, name, forms)
        bank.save(folder / f"bank-{name}")
        banks.append(bank)
    return Models(folder, target, draft, tokenizer, banks[1], banks[0])


def seeded_bank(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str, forms: Sequence[Form] = MIXED
) -> HeadBank:
    """A head of each form on inner sites, and one of the final state alone."""
    random, sites = torch.Generator().manual_seed(2), evenly_spaced_sites(model, 3)
    heads = [_head(f"{form.kind}-{form.window}", sites, form, random) for form in forms]
    heads.append(_head("last", sites[-1:], Form(width=1, window=1), random))
    return HeadBank(heads, identify(model, tokenizer, name))


def _head(metric: str, sites: tuple[Any, ...], form: Form, random: torch.Generator) -> Head:
    width = len(sites) * HIDDEN
    weight = torch.randn(form.num_channels, width, generator=random) / width**0.5
    bias = torch.randn(form.num_channels, generator=random)
    return Head(metric, sites, weight, bias, form, torch.randn(form.num_outputs, generator=random))


def write_settings(folder: Path, text: str, name: str = "settings.toml") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def options(models: Models, **changes: Any) -> dict[str, Any]:
    """Of an engine that chunks prompts, caches prefixes and runs out of room soon."""
    settings = {
        "model": str(models.folder / "target"),
        "speculative_config": {
            "method": "draft_model",
            "model": str(models.folder / "draft"),
            "num_speculative_tokens": 3,
        },
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": LENGTH,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 64,
        "num_gpu_blocks_override": BLOCKS,
        "block_size": 32,
        "disable_log_stats": True,
    }
    return settings | changes


@contextlib.contextmanager
def engine(models: Models, settings: Path, **changes: Any) -> Iterator[Any]:
    """A monitored engine in this process."""
    from vllm import LLM
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    os.environ["PILOTFISH_VLLM"] = str(settings)
    llm = LLM(**options(models, **changes))
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        cleanup_dist_env_and_memory()


def scheduler_of(llm: Any) -> Any:
    return llm.llm_engine.engine_core.engine_core.scheduler


def tap_of(llm: Any) -> Any:
    return llm.llm_engine.model_executor.driver_worker.worker.model_runner.pilotfish


@contextlib.contextmanager
def policy(llm: Any, *rules: Rule, hold: bool = False) -> Iterator[None]:
    """Another policy for a while."""
    scheduler = scheduler_of(llm)
    before = scheduler._charge
    scheduler._charge = replace(before, policy=Policy(rules=rules, hold=hold))
    try:
        yield
    finally:
        scheduler._charge = before


def generate(llm: Any, prompts: list[str] | list[list[int]], **sampling: Any) -> list[list[Any]]:
    """The completions of each prompt; greedy unless told otherwise."""
    from vllm import SamplingParams

    params = SamplingParams(**({"temperature": 0.0, "max_tokens": 24} | sampling))
    given = [{"prompt_token_ids": prompt} if isinstance(prompt, list) else prompt for prompt in prompts]
    return [output.outputs for output in llm.generate(given, params, use_tqdm=False)]


def finished(completion: Any) -> Record:
    record = record_of(completion)
    assert record is not None, "the plugin is not at work"
    record.finish("length")
    return record


def running(record: Record) -> torch.Tensor:
    """Per token and metric the running score; NaN where there is none."""
    rows = [[score.running for score in (token.scores or {}).values()] for token in record.generation.tokens]
    return torch.tensor([[float("nan") if value is None else value for value in row] for row in rows])


def expected(models: Models, record: Record, *, reader: str = "draft") -> torch.Tensor:
    """The same from one pass of transformers over the same ids."""
    model, bank = (models.draft, models.bank) if reader == "draft" else (models.target, models.on_target)
    ids = torch.tensor([[token.id for token in record.generation.tokens]])
    with torch.inference_mode(), tapped(model, bank.sites) as taps:
        model(ids)
        scores = bank.score_text(bank.features(taps), boundary=record.generation.num_prompt_tokens)
    return scores.running
