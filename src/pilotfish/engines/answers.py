"""Prompts in; the target's own answers as token ids, and how many drafted tokens it accepts on the way, out."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from pilotfish.core import Conversation, Message
from pilotfish.engines.batch import LARGEST, Batch
from pilotfish.engines.drafting import Drafting
from pilotfish.engines.embedded import EmbeddedEngine, GenerationStream
from pilotfish.engines.records import Generation
from pilotfish.engines.request import Request
from pilotfish.engines.speculate import Sampling
from pilotfish.errors import GenerationError, SettingError, TextError
from pilotfish.models import Pair
from pilotfish.runs import progress
from pilotfish.scores.distillation import Answer
from pilotfish.scores.metrics import Estimate, bootstrap_by_group, mean_of
from pilotfish.texts.journal import Journal


def target_answers(
    pair: Pair, prompts: Sequence[Conversation], *, request: Request | None = None, journal: Path | None = None
) -> list[Answer]:
    """Lets the target answer prompts: the texts on which acceptance counts, and on which a draft should learn it.

    Args:
        prompts: Conversations, of which everything before the last assistant message is the prompt. An empty one, or
            one that does not fit the models, is left out.
        request: How to sample; by default at temperature 1, 64 tokens at most. Each answer has a seed of its own, made
            from the request's.
        journal: Answers are kept here as they come; what stands there for these models, prompt and request is not
            sampled again.

    Raises:
        SettingError: there are no prompts.
        TextError: the journal is damaged; or no prompt fits the models.
    """
    if not prompts:
        raise SettingError("there are no prompts; give at least one")
    engine = EmbeddedEngine(pair)
    request = request or Request(max_new_tokens=64, sampling=Sampling(temperature=1.0))
    answers = []
    with ExitStack() as stack:
        kept = stack.enter_context(Journal(journal)) if journal is not None else None
        known = {row["key"]: row for row in kept.rows} if kept is not None else {}
        parts = [prompts[first : first + LARGEST] for first in range(0, len(prompts), LARGEST)]
        for some in progress(parts, "answers, by batch", total=len(parts)):
            asked = {_key(pair, prompt, own): (prompt, own) for prompt in some for own in [_seeded(request, prompt)]}
            new = {key: asked[key] for key in asked if key not in known}
            for key, row in zip(new, _sampled(engine, list(new.values())), strict=True):
                known[key] = {"key": key, **row}
                if kept is not None:
                    kept.append(known[key])
            for key, (prompt, _) in asked.items():
                ids = known[key]["ids"]
                if ids:
                    is_answer = torch.arange(len(ids)) >= known[key]["num_prompt"]
                    answers.append(Answer(prompt.id, prompt.group, tuple(ids), is_answer))
    if not answers:
        raise TextError(f"none of the {len(prompts)} prompts can be answered; give some with text that fit the models")
    return answers


def engine_acceptance(
    pair: Pair,
    prompts: Sequence[Conversation],
    *,
    request: Request | None = None,
    generator: torch.Generator,
    num_resamples: int = 1000,
) -> Estimate:
    """Share of drafted tokens that the engine accepts, one drafted a round, with a 95 % interval by prompt's group.

    At temperature 1 and with one drafted token a round this estimates the same as `scores.acceptance` says beforehand,
    at the positions that come up. Longer drafts are rejected from the first miss on, so their share is lower.

    Raises:
        SettingError: the pair has no draft, or fewer than two groups of prompts had a token drafted.
    """
    if pair.draft is None:
        raise SettingError(f"{pair.target_identity.name} has no draft; name one of its family")
    engine = EmbeddedEngine(pair, drafting=Drafting(length=1))
    request = request or Request(max_new_tokens=64, sampling=Sampling(temperature=1.0))
    groups: list[str] = []
    accepted: list[int] = []
    for prompt in progress(prompts, "speculating", total=len(prompts)):
        stream = _stream(engine, prompt, _seeded(request, prompt))
        if stream is None:
            continue
        for _ in stream:
            pass
        rounds = stream.generation.rounds
        groups += [prompt.group] * len(rounds)
        accepted += [item.num_accepted for item in rounds]
    return bootstrap_by_group(mean_of(accepted), groups, generator=generator, num_resamples=num_resamples)


def _sampled(engine: EmbeddedEngine, asked: Sequence[tuple[Conversation, Request]]) -> list[dict[str, Any]]:
    """The rows of the journal, from passes that the answers share."""
    streams = [_stream(engine, prompt, request) for prompt, request in asked]
    batch = Batch()
    for stream in streams:
        if stream is not None:
            batch.join(stream)
    while len(batch):
        for progressed in batch.step():
            if progressed.error is not None:
                raise progressed.error
    return [_row(stream.generation if stream is not None else None) for stream in streams]


def _row(generation: Generation | None) -> dict[str, Any]:
    if generation is None:
        return {"ids": [], "num_prompt": 0}
    return {"ids": [token.id for token in generation.tokens], "num_prompt": generation.num_prompt_tokens}


def _stream(engine: EmbeddedEngine, prompt: Conversation, request: Request) -> GenerationStream | None:
    try:
        return engine.stream(_messages(prompt), request)
    except GenerationError:  # nothing is computed yet: the prompt is empty or too long
        return None


def _messages(prompt: Conversation) -> tuple[Message, ...]:
    """What stands before the last answer."""
    answers = [index for index, message in enumerate(prompt.messages) if message.role == "assistant"]
    return prompt.messages[: answers[-1]] if answers else prompt.messages


def _seeded(request: Request, prompt: Conversation) -> Request:
    """The request with a seed that depends on which answer it is for, not on which were sampled before."""
    digest = hashlib.sha256(f"{request.seed}/{prompt.id}".encode("utf-8", "surrogatepass")).digest()
    return replace(request, seed=int.from_bytes(digest[:4], "little"))


def _key(pair: Pair, prompt: Conversation, request: Request) -> str:
    """Of an answer in the journal: anything that could change it gives another."""
    models = [identity.weights for identity in (pair.target_identity, pair.draft_identity) if identity]
    said = [[message.role, message.content] for message in _messages(prompt)]
    sampling = [request.max_new_tokens, repr(request.sampling), request.stop, request.seed]
    return hashlib.sha256(json.dumps([models, said, sampling]).encode()).hexdigest()[:32]
