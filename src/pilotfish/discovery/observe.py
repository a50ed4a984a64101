"""Vectors and prompts in; what the model writes, says next and sets monitors off with under each vector, out.

Vectors go side by side in one batch, each added to its own rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from pilotfish.core import Site
from pilotfish.errors import SettingError, TextError
from pilotfish.heads import HeadBank
from pilotfish.runs import progress
from pilotfish.steering.rollouts import Decoding, Sampled, rollouts
from pilotfish.taps import Add, Edit, When, edited, tapped


class NextToken(NamedTuple):
    """A token whose chance to begin the answer changes, over prompts."""

    token_id: int
    before: float
    after: float
    """Probabilities, mean over prompts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Observed:
    """What one vector does to the model's answers."""

    answers: tuple[tuple[int, ...], ...]
    """Token ids of the greedy answer to each prompt."""
    kl: float
    """KL divergence of the steered model from the plain one, mean over the tokens of the steered answers; nats."""
    surprise: float
    """Nats a token that the plain model is surprised by the steered answers: low for text that it could have written
    itself, high for word salad.
    """
    repeats: float
    """Share of three-token stretches that stood in the answer before, mean over prompts."""
    rising: tuple[NextToken, ...]
    """First tokens that become likelier, most first."""
    falling: tuple[NextToken, ...]
    monitors: Mapping[str, float]
    """Of each metric, the highest probability that the response holds it, mean over prompts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ObserveConfig:
    max_new_tokens: int = 24
    """Length of the answers."""
    num_tokens: int = 6
    """First tokens that are named, each way."""
    rows_at_once: int = 16
    """Answers of one batch."""

    def __post_init__(self) -> None:
        if min(self.max_new_tokens, self.num_tokens, self.rows_at_once) < 1:
            raise SettingError(f"{self} is outside what is allowed: all of it is at least 1")


@torch.inference_mode()
def observe(
    model: PreTrainedModel,
    site: Site,
    vectors: Float[Tensor, "vector hidden"],
    prompts: Sequence[Sequence[int]],
    *,
    eos_ids: frozenset[int] = frozenset(),
    banks: Sequence[HeadBank] = (),
    config: ObserveConfig | None = None,
) -> list[Observed]:
    """Adds each vector, at the length it has, to every token of every prompt and of its answer.

    A row of zeros is the plain model.

    Raises:
        TextError: there are no prompts, or one is empty.
    """
    config = config or ObserveConfig()
    if not prompts or not all(prompts):
        raise TextError("there is no prompt, or an empty one; give each at least one token")
    plain_first = torch.cat([_first_probabilities(model, prompt) for prompt in prompts])
    size = max(1, config.rows_at_once // len(prompts))
    found: list[Observed] = []
    chunks = torch.split(vectors, size)
    for chunk in progress(chunks, "vectors observed", total=len(chunks)):
        edits = _side_by_side(site, chunk, len(prompts))
        rows = [prompt for _ in chunk for prompt in prompts]
        decoding = Decoding(
            max_new_tokens=config.max_new_tokens, temperature=0.0, eos_ids=eos_ids, batch_size=len(rows)
        )
        answers = rollouts(model, rows, edits, decoding=decoding, generator=torch.Generator())  # greedy: draws nothing
        read = _read(model, answers, edits, banks)
        for start in range(0, len(rows), len(prompts)):
            mine = slice(start, start + len(prompts))
            found.append(_observed(answers[mine], read[mine], plain_first, config.num_tokens))
    return found


def repeated_share(tokens: Sequence[int], *, length: int = 3) -> float:
    """The share of stretches of `length` tokens that stood in the text before; 0 for a text that is too short."""
    stretches = [tuple(tokens[i : i + length]) for i in range(len(tokens) - length + 1)]
    return 1 - len(set(stretches)) / len(stretches) if stretches else 0.0


class _Reading(NamedTuple):
    """Of one answer."""

    kl: Tensor
    """A token each."""
    surprise: Tensor
    first: Tensor
    """Steered probabilities of the first token."""
    monitors: dict[str, float]


def _side_by_side(site: Site, vectors: Tensor, num_prompts: int) -> list[Edit]:
    return [
        Edit(site, Add(vector), When(rows=tuple(range(i * num_prompts, (i + 1) * num_prompts))))
        for i, vector in enumerate(vectors)
        if bool(vector.any())
    ]


def _first_probabilities(model: PreTrainedModel, prompt: Sequence[int]) -> Float[Tensor, "1 vocab"]:
    logits: Tensor = model(torch.tensor([list(prompt)], device=model.device), use_cache=False).logits[:, -1]
    return logits.float().softmax(-1)


def _read(
    model: PreTrainedModel, answers: Sequence[Sampled], edits: Sequence[Edit], banks: Sequence[HeadBank]
) -> list[_Reading]:
    """One pass over prompts and answers with the edits, one without; prompts end in one column."""
    width = max(len(answer.prompt_ids) for answer in answers)
    length = max(len(answer.answer_ids) for answer in answers)
    ids, mask = (torch.zeros(len(answers), width + length, dtype=torch.long) for _ in range(2))
    for row, (prompt, answer) in enumerate(answers):
        ids[row, width - len(prompt) : width + len(answer)] = torch.tensor([*prompt, *answer])
        mask[row, width - len(prompt) : width + len(answer)] = 1
    places = (mask.cumsum(-1) - 1).clamp_min(0)
    given: dict[str, Any] = {
        "input_ids": ids.to(model.device),
        "attention_mask": mask.to(model.device),
        "position_ids": places.to(model.device),
        "use_cache": False,
        "logits_to_keep": length + 1,
    }
    sites = tuple(dict.fromkeys(site for bank in banks for site in bank.sites))
    with edited(model, edits), tapped(model, sites) as taps:
        steered = model(**given).logits
        monitors = [_monitors(banks, taps, row, (width, answer)) for row, answer in enumerate(answers)]
    plain = model(**given).logits
    return [
        _reading(steered[row], plain[row], torch.tensor(answer.answer_ids, device=model.device), monitors[row])
        for row, answer in enumerate(answers)
    ]


def _reading(steered: Tensor, plain: Tensor, answer: Tensor, monitors: dict[str, float]) -> _Reading:
    log_p = steered[: len(answer)].float().log_softmax(-1)
    log_q = plain[: len(answer)].float().log_softmax(-1)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1).clamp_min(0.0)
    return _Reading(kl, -log_q.gather(-1, answer[:, None])[:, 0], log_p[0].exp(), monitors)


def _monitors(banks: Sequence[HeadBank], taps: Any, row: int, where: tuple[int, Sampled]) -> dict[str, float]:
    width, (prompt, answer) = where
    found: dict[str, float] = {}
    for bank in banks:
        features = bank.features(taps, row)[width - len(prompt) : width + len(answer)]
        highest = bank.score_text(features, boundary=len(prompt)).running[len(prompt) :].amax(0)
        found |= dict(zip(bank.metrics, highest.tolist(), strict=True))
    return found


def _observed(answers: Sequence[Sampled], read: Sequence[_Reading], plain_first: Tensor, num_tokens: int) -> Observed:
    before, after = plain_first.mean(0), torch.stack([one.first for one in read]).mean(0)
    moved = after - before
    most, least = moved.topk(num_tokens).indices, (-moved).topk(num_tokens).indices

    def named(tokens: Tensor, way: int) -> tuple[NextToken, ...]:
        return tuple(
            NextToken(token, float(before[token]), float(after[token]))
            for token in tokens.tolist()
            if way * float(moved[token]) > 1e-4
        )

    return Observed(
        answers=tuple(answer.answer_ids for answer in answers),
        kl=float(torch.cat([one.kl for one in read]).mean()),
        surprise=float(torch.cat([one.surprise for one in read]).mean()),
        repeats=sum(repeated_share(answer.answer_ids) for answer in answers) / len(answers),
        rising=named(most, 1),
        falling=named(least, -1),
        monitors={metric: sum(one.monitors[metric] for one in read) / len(read) for metric in read[0].monitors},
    )
