"""Prompts and two instructions in; the target's own answers out, labelled by which instruction it was given."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from pilotfish.core import Conversation, Message
from pilotfish.engines.embedded import EmbeddedEngine
from pilotfish.engines.request import Request
from pilotfish.engines.speculate import Sampling
from pilotfish.errors import GenerationError, SettingError
from pilotfish.models import Pair
from pilotfish.runs import progress
from pilotfish.texts.conversations import as_text
from pilotfish.texts.journal import Journal


class Contrast(Iterator[Conversation]):
    """Iterate it for conversations, two a prompt; `counts` holds what was kept, dropped and read from the journal."""

    def __init__(self, rows: Iterator[Conversation], counts: Counter[str]) -> None:
        self._rows, self.counts = rows, counts

    def __next__(self) -> Conversation:
        return next(self._rows)


def contrastive(
    target: EmbeddedEngine | Pair,
    prompts: Sequence[str | Conversation],
    *,
    do: str,
    dont: str,
    metric: str,
    request: Request | None = None,
    journal: Path | None = None,
) -> Contrast:
    """Lets the target answer each prompt twice, told to do a thing and told not to; nothing runs until iterated.

    The conversations hold the prompt *without* the instruction, so that a head must read the answer, and the label of
    the response: 1 when told to do it, 0 when told not to. Both answers of a prompt share its group. What the target
    was told is not always what it did: the labels are as good as the target is obedient. A prompt with an answer that
    is empty or cut at the longest length is dropped with both its answers, for otherwise the prompt or the length would
    give the label away.

    Args:
        prompts: Texts, or conversations, of which everything before the last assistant message is the prompt.
        do: System message under which the target should do the thing.
        dont: The same for not doing it; best as long and as particular as `do`.
        request: How to sample. By default temperature 0.7, 256 tokens. Each answer has a seed of its own, made from the
            request's.
        journal: Answers are kept here as they come; what stands there for this target, prompt and request is not
            sampled again.

    Raises:
        SettingError: an instruction or the metric's name is empty, both instructions are the same, or there are no
            prompts.
        TextError: the journal is damaged.
    """
    if not do.strip() or not dont.strip() or not metric.strip() or do.strip() == dont.strip():
        raise SettingError("the metric's name and two different instructions are needed: to do the thing, not to do it")
    if not prompts:
        raise SettingError("there are no prompts; give at least one")
    engine = target if isinstance(target, EmbeddedEngine) else EmbeddedEngine(target)
    request = request or Request(sampling=Sampling(temperature=0.7))
    counts: Counter[str] = Counter()
    asked = {row.id: row for row in map(_prompt, prompts)}
    counts["repeated prompts"] = len(prompts) - len(asked)
    sides = (_Side("do", do.strip(), 1.0), _Side("dont", dont.strip(), 0.0))
    return Contrast(_run(engine, list(asked.values()), (metric, sides), (request, journal), counts), counts)


class _Side(NamedTuple):
    name: str
    instruction: str
    label: float


def _run(
    engine: EmbeddedEngine,
    prompts: Sequence[Conversation],
    wanted: tuple[str, Sequence[_Side]],
    how: tuple[Request, Path | None],
    counts: Counter[str],
) -> Iterator[Conversation]:
    (metric, sides), (request, path) = wanted, how
    with ExitStack() as stack:
        journal = stack.enter_context(Journal(path)) if path is not None else None
        kept = {
            as_text(row, "key", str(path)): (as_text(row, "answer", str(path)), as_text(row, "problem", str(path)))
            for row in (journal.rows if journal else ())
        }
        for prompt in progress(prompts, "answers", total=len(prompts)):
            answers = []
            for side in sides:
                messages, own = _instructed(prompt, side), _seeded(request, prompt, side)
                key = _key(engine, prompt, messages, own)
                if key in kept:
                    counts["from the journal"] += 1
                else:
                    kept[key] = _answer(engine, messages, own)
                    counts["sampled"] += 1
                    if journal is not None:
                        journal.append({"key": key, "answer": kept[key][0], "problem": kept[key][1]})
                answer, problem = kept[key]
                if problem:
                    counts[problem] += 1
                    break
                answers.append(answer)
            else:
                counts["prompts kept"] += 1
                for side, answer in zip(sides, answers, strict=True):
                    yield replace(
                        prompt,
                        id=f"{prompt.id}/{side.name}",
                        messages=(*prompt.messages, Message("assistant", answer)),
                        labels={metric: side.label},
                    )


def _answer(engine: EmbeddedEngine, messages: Sequence[Message], request: Request) -> tuple[str, str]:
    """An answer, and why it cannot be used; empty when it can."""
    try:
        generation = engine.generate(messages, request)
    except GenerationError:  # raised before anything is computed: the prompt does not fit
        return "", "too long a prompt"
    problem = "" if generation.answer.strip() else "empty answer"
    return generation.answer, "truncated answer" if generation.finish_reason == "length" else problem


def _prompt(given: str | Conversation) -> Conversation:
    """A conversation of what stands before the answer."""
    if isinstance(given, str):
        identifier = hashlib.sha256(given.encode("utf-8", "surrogatepass")).hexdigest()[:16]
        return Conversation(identifier, identifier, (Message("user", given),))
    answers = [index for index, message in enumerate(given.messages) if message.role == "assistant"]
    return replace(given, messages=given.messages[: answers[-1]] if answers else given.messages, spans=(), labels={})


def _instructed(prompt: Conversation, side: _Side) -> tuple[Message, ...]:
    """The instruction follows the prompt's own system message where there is one: templates take but one."""
    first, *rest = prompt.messages
    if first.role == "system":
        return (Message("system", f"{first.content}\n\n{side.instruction}"), *rest)
    return (Message("system", side.instruction), first, *rest)


def _seeded(request: Request, prompt: Conversation, side: _Side) -> Request:
    """The request with a seed that depends on which answer it is for, not on which were sampled before."""
    digest = hashlib.sha256(f"{request.seed}/{prompt.id}/{side.name}".encode("utf-8", "surrogatepass")).digest()
    return replace(request, seed=int.from_bytes(digest[:4], "little"))


def _key(engine: EmbeddedEngine, prompt: Conversation, messages: Sequence[Message], request: Request) -> str:
    """Of an answer in the journal: anything that could change it gives another."""
    pair = engine.pair
    models = [identity.weights for identity in (pair.target_identity, pair.draft_identity) if identity]
    said = [[message.role, message.content] for message in messages]
    sampling = [request.max_new_tokens, repr(request.sampling), request.stop, request.seed]
    return hashlib.sha256(json.dumps([prompt.id, models, said, sampling]).encode()).hexdigest()[:32]
