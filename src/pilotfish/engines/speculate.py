"""Accept or reject drafted tokens so that the output follows the target alone; pure functions, no model.

Source: Leviathan et al. 2023 (arXiv 2211.17192), algorithm 1; Chen et al. 2023 (arXiv 2302.01318). A drafted token x
is kept with probability min(1, p(x) / q(x)); the first one that is not is replaced by a draw from max(0, p - q),
normalised. Here p and q are the distributions *after* temperature, top-k and top-p, so that the output follows the
warped target exactly.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from pilotfish.errors import SettingError


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How the next token is chosen."""

    temperature: float = 0.0
    """0 picks the likeliest token; larger is more random."""
    top_k: int | None = None
    """Keep the k likeliest tokens."""
    top_p: float | None = None
    """Keep the smallest set of likeliest tokens whose probability reaches this, in (0, 1]."""

    def __post_init__(self) -> None:
        if not 0.0 <= self.temperature < float("inf"):
            raise SettingError(f"temperature {self.temperature} is not allowed; give 0 (greedy) or a positive number")
        if self.top_k is not None and self.top_k < 1:
            raise SettingError(f"top_k {self.top_k} is not allowed; give at least 1, or leave it out")
        if self.top_p is not None and not 0.0 < self.top_p <= 1.0:
            raise SettingError(f"top_p {self.top_p} is not allowed; give a number in (0, 1], or leave it out")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0


class Acceptance(NamedTuple):
    num_accepted: int
    """Length of the prefix of the draft that stands."""
    next_token: int
    """The target's own token after that prefix: a correction, or a bonus when the whole draft stands."""


def distribution(logits: Float[Tensor, "token vocab"], sampling: Sampling) -> Float[Tensor, "token vocab"]:
    """Probabilities after temperature, then top-k, then top-p; float32. Greedy gives a one-hot row, the first token
    winning a tie.
    """
    if sampling.greedy:
        return torch.nn.functional.one_hot(
            torch.tensor(likeliest(logits), device=logits.device), logits.shape[-1]
        ).float()
    warped = logits.float() / sampling.temperature
    if sampling.top_k is not None and sampling.top_k < warped.shape[-1]:
        kth = warped.topk(sampling.top_k, dim=-1).values[:, -1:]
        warped = warped.masked_fill(warped < kth, float("-inf"))
    probs = warped.softmax(-1)
    if sampling.top_p is not None and sampling.top_p < 1.0:
        ordered, order = probs.sort(dim=-1, descending=True)
        outside = ordered.cumsum(-1) - ordered >= sampling.top_p  # the token that reaches top_p stays inside
        probs = probs.masked_fill(torch.zeros_like(outside).scatter(-1, order, outside), 0.0)
        probs = probs / probs.sum(-1, keepdim=True)
    return probs


def likeliest(logits: Float[Tensor, "token vocab"]) -> list[int]:
    """The greedy choice of each row, the first token winning a tie.

    In float32, because a CPU's argmax takes three times as long in bfloat16.
    """
    choices: list[int] = logits.float().argmax(-1).tolist()
    return choices


def keep_probability(target: Float[Tensor, " vocab"], draft: Float[Tensor, " vocab"]) -> Float[Tensor, " vocab"]:
    """Probability that each token, had it been drafted, is kept; a token that the draft cannot propose has 1."""
    return torch.where(draft > 0, target / draft.clamp_min(torch.finfo(draft.dtype).tiny), 1.0).clamp(max=1.0)


def residual(target: Float[Tensor, " vocab"], draft: Float[Tensor, " vocab"]) -> Float[Tensor, " vocab"]:
    """The distribution that replaces a rejected token. Where draft and target agree exactly, none is ever rejected:
    the target's own.
    """
    left = (target - draft).clamp_min(0.0)
    total = left.sum()
    return left / total if total > 0 else target


def accept(
    drafted: Sequence[int],
    draft_probs: Sequence[Float[Tensor, " vocab"]],
    target_logits: Float[Tensor, "token vocab"],
    sampling: Sampling,
    *,
    generator: torch.Generator,
) -> Acceptance:
    """Greedy or sampled, as asked; `draft_probs` are not looked at when greedy."""
    if sampling.greedy:
        return accept_greedy(drafted, target_logits)
    target = distribution(target_logits, sampling)
    draft = torch.stack(list(draft_probs)) if draft_probs else target[:0]
    return accept_sampled(drafted, draft, target, generator=generator)


def accept_greedy(drafted: Sequence[int], target_logits: Float[Tensor, "token vocab"]) -> Acceptance:
    """Keeps the drafted tokens that are the target's own choice.

    Args:
        drafted: k token ids.
        target_logits: k + 1 rows, row i after the committed text and the first i drafted tokens.
    """
    assert target_logits.shape[0] == len(drafted) + 1, "one row of logits a drafted token, and one more"
    choices = likeliest(target_logits)
    matches = [token == choice for token, choice in zip(drafted, choices, strict=False)]
    num_accepted = matches.index(False) if False in matches else len(drafted)
    return Acceptance(num_accepted, choices[num_accepted])


def accept_sampled(
    drafted: Sequence[int],
    draft_probs: Float[Tensor, "token vocab"],
    target_probs: Float[Tensor, "token_and_next vocab"],
    *,
    generator: torch.Generator,
) -> Acceptance:
    """Keeps a prefix of the draft such that the output is distributed as the target's own.

    Args:
        drafted: k token ids, token i drawn from `draft_probs[i]`.
        draft_probs: the k distributions that they were drawn from.
        target_probs: k + 1 distributions, row i after the committed text and the first i drafted tokens.
    """
    assert target_probs.shape[0] == len(drafted) + 1 == draft_probs.shape[0] + 1, (
        "one target row a drafted token, and one more"
    )
    for index, token in enumerate(drafted):
        p, q = target_probs[index], draft_probs[index]
        if torch.rand((), generator=generator) >= keep_probability(p, q)[token].cpu():
            return Acceptance(index, sample(residual(p, q), generator=generator))
    return Acceptance(len(drafted), sample(target_probs[-1], generator=generator))


def sample(probs: Float[Tensor, " vocab"], *, generator: torch.Generator) -> int:
    """Draws one token id; the draw is made on the CPU so that a seed means the same on every device."""
    return int(torch.multinomial(probs.cpu(), 1, generator=generator))
