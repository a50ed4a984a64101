"""Prompts and edits in; what the edited model goes on to write, out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from pilotfish.errors import SettingError
from pilotfish.runs import generator as seeded
from pilotfish.runs import progress
from pilotfish.taps import Edit, edited


class Sampled(NamedTuple):
    prompt_ids: tuple[int, ...]
    answer_ids: tuple[int, ...]
    """With the end token, where the answer came to one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoding:
    """How answers are written."""

    max_new_tokens: int = 32
    temperature: float = 1.0
    """0 takes the likeliest token."""
    eos_ids: frozenset[int] | None = None
    """Tokens that end an answer; None takes those that the model's own configuration names."""
    batch_size: int = 8
    """Answers written side by side."""

    def __post_init__(self) -> None:
        if min(self.max_new_tokens, self.batch_size) < 1 or not 0.0 <= self.temperature < math.inf:
            raise SettingError(
                f"max_new_tokens {self.max_new_tokens} and batch_size {self.batch_size} must be at least 1, "
                f"temperature {self.temperature} 0 or more"
            )


@torch.inference_mode()
def rollouts(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    edits: Sequence[Edit] = (),
    *,
    decoding: Decoding,
    generator: torch.Generator,
) -> list[Sampled]:
    """Samples one answer a prompt.

    Prompts of a batch are padded on the left. Rows of an edit's `when` count in each batch.

    Raises:
        SettingError: a prompt is empty, or the model's output is not finite.
    """
    if not all(prompts):
        raise SettingError("a prompt is empty; give each at least one token")
    sampled: list[Sampled] = []
    ends = _own_ends(model) if decoding.eos_ids is None else decoding.eos_ids
    size = decoding.batch_size
    batches = [prompts[start : start + size] for start in range(0, len(prompts), size)]
    for batch, random in zip(
        progress(batches, "answers", total=len(batches)), _apart(generator, len(batches)), strict=True
    ):
        with edited(model, edits, prompt_length=max(map(len, batch))):
            answers = _answers(model, batch, decoding, ends, random)
        sampled += [Sampled(tuple(prompt), answer) for prompt, answer in zip(batch, answers, strict=True)]
    return sampled


def _own_ends(model: PreTrainedModel) -> frozenset[int]:
    configured = model.generation_config.eos_token_id if model.generation_config else model.config.eos_token_id
    return frozenset(configured if isinstance(configured, list) else [] if configured is None else [configured])


def _apart(generator: torch.Generator, count: int) -> list[torch.Generator]:
    """One a batch, so that an answer that ends early moves no number of the next batch."""
    if count < 2:
        return [generator] * count
    seeds = torch.randint(2**62, (count,), generator=generator).tolist()
    return [seeded(seed, "a batch of answers") for seed in seeds]


def _answers(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    decoding: Decoding,
    ends: frozenset[int],
    generator: torch.Generator,
) -> list[tuple[int, ...]]:
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(prompt)) + list(prompt) for prompt in prompts], device=model.device)
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=model.device)
    cache = DynamicCache()  # full layers even for sliding-window models
    answers: list[list[int]] = [[] for _ in prompts]
    is_open = [True] * len(prompts)
    for _ in range(decoding.max_new_tokens):
        places = (mask.cumsum(-1) - 1).clamp_min(0)[:, -ids.shape[1] :]
        logits = model(
            ids, attention_mask=mask, position_ids=places, past_key_values=cache, use_cache=True, logits_to_keep=1
        ).logits[:, -1]
        ids = _drawn(logits, decoding.temperature, generator).unsqueeze(-1)
        for row, token in enumerate(ids[:, 0].tolist()):
            if is_open[row]:
                answers[row].append(token)
                is_open[row] = token not in ends
        if not any(is_open):
            break
        mask = torch.cat([mask, mask.new_ones(len(prompts), 1)], dim=1)
    return [tuple(answer) for answer in answers]


def _drawn(
    logits: Float[Tensor, "batch vocab"], temperature: float, generator: torch.Generator
) -> Int[Tensor, " batch"]:
    if temperature == 0:
        return logits.float().argmax(-1)
    probabilities = (logits.float() / temperature).softmax(-1)
    if not bool(probabilities.isfinite().all()):
        raise SettingError("the model's output is not finite; is an edit far too strong, or are weights damaged?")
    drawn: Tensor = torch.multinomial(probabilities.cpu(), 1, generator=generator)[:, 0]
    return drawn.to(logits.device)
