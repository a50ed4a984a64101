"""A steered and an unsteered model in; how far apart they are at each token, and what that costs, out.

Four meters share the axis of doses: the relative dose (`dose.relative_dose`), the KL divergence from the unsteered
model, the acceptance of an unsteered draft, and a behaviour. KL and acceptance are taken along texts that the steered
model itself wrote: a text of the unsteered one does not show where steering leads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformers import PreTrainedModel

from pilotfish.errors import SettingError
from pilotfish.runs import progress
from pilotfish.steering.beginning import Beginning, read_beginning
from pilotfish.steering.rollouts import Sampled
from pilotfish.taps import Edit, edited

Behaviour = Callable[[Sequence[Edit], Sequence[Sampled]], float]
"""Edits, and the answers written under them, to one figure: the larger, the more of what is wanted."""


class Divergence(NamedTuple):
    """How far a steered distribution of the next token, p, is from another, q, at each token."""

    kl: Float[Tensor, " token"]
    """KL(p ‖ q) in nats, float64, 0 or more."""
    acceptance: Float[Tensor, " token"]
    """Chance that a token drafted from q is accepted by p: the sum of min(p, q), that is 1 - total variation."""
    agrees: Bool[Tensor, " token"]
    """Whether the likeliest token is the same, which is acceptance under greedy decoding."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Meters:
    """What the meters say at one dose."""

    dose: float
    relative: float
    """|c| ‖v‖ / ‖h‖."""
    kl_mean: float
    """Nats a token."""
    kl_p95: float
    """95th percentile over tokens."""
    acceptance: float
    """Of an unsteered draft when sampling at temperature 1; mean over tokens."""
    agreement: float
    """The same under greedy decoding."""
    num_tokens: int
    behaviour: float | None = None


def divergence(p: Float[Tensor, "token vocab"], q: Float[Tensor, "token vocab"]) -> Divergence:
    """Compares logits row by row.

    Acceptance is that of speculative sampling (Leviathan et al., 2023, arXiv 2211.17192, corollary 3.6). By Pinsker it
    is at least 1 - √(KL / 2).
    """
    log_p, log_q = p.float().log_softmax(-1), q.float().log_softmax(-1)
    kl = torch.nn.functional.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1, dtype=torch.float64)
    accepted = torch.minimum(log_p, log_q).exp().sum(-1, dtype=torch.float64)
    agrees = p.float().argmax(-1) == q.float().argmax(-1)
    return Divergence(kl.clamp_min(0.0).cpu(), accepted.clamp(max=1.0).cpu(), agrees.cpu())


def answer_logits(
    model: PreTrainedModel, answers: Sequence[Sampled], edits: Sequence[Edit] = (), *, batch_tokens: int = 768
) -> Iterator[Float[Tensor, "token vocab"]]:
    """The logits from which each token of an answer was drawn, answer by answer.

    What all texts begin with is read once. The rest is read in batches of neighbours, so give texts of like length one
    after the other (`by_length`). What pads a row stands after all of its tokens, so no mask is needed: under causal
    attention every state is that of the text alone.

    Args:
        batch_tokens: Of a forward pass, padding included; a longer text makes a pass of its own.

    Raises:
        SettingError: an edit names rows of a batch.
    """
    if any(edit.when.rows is not None for edit in edits):
        raise SettingError("the meters put texts into batches as it suits; give edits that name no `rows`")
    beginning = read_beginning(model, [answer.prompt_ids[:-1] for answer in answers], edits)
    for batch in _batches(answers, beginning.num_tokens, batch_tokens):
        yield from _batch_logits(model, batch, edits, beginning)


def by_length(answers: Sequence[Sampled]) -> list[int]:
    """Indices of answers, the shortest text first."""
    return sorted(range(len(answers)), key=lambda index: sum(map(len, answers[index])))


def _batches(answers: Sequence[Sampled], shared: int, batch_tokens: int) -> Iterator[list[Sampled]]:
    batch: list[Sampled] = []
    longest = 0
    for answer in answers:
        size = sum(map(len, answer)) - shared
        longest = max(longest, size)
        if batch and longest * (len(batch) + 1) > batch_tokens:
            yield batch
            batch, longest = [], size
        batch.append(answer)
    if batch:
        yield batch


@torch.inference_mode()
def _batch_logits(
    model: PreTrainedModel, batch: Sequence[Sampled], edits: Sequence[Edit], beginning: Beginning
) -> list[Float[Tensor, "token vocab"]]:
    shared = beginning.num_tokens
    rests = [[*prompt[shared:], *answer[:-1]] for prompt, answer in batch]
    ids = torch.zeros(len(batch), max(map(len, rests)), dtype=torch.long)
    for row, rest in zip(ids, rests, strict=True):
        row[: len(rest)] = torch.tensor(rest)
    lengths = [len(answer.prompt_ids) for answer in batch]
    starts = [length - 1 - shared for length in lengths]
    wanted = torch.arange(min(starts), ids.shape[1], device=model.device)
    cache = beginning.for_rows(len(batch))
    with edited(model, edits, prompt_length=lengths):
        logits: Tensor = model(
            ids.to(model.device), past_key_values=cache, use_cache=True, logits_to_keep=wanted
        ).logits
    begins = [start - min(starts) for start in starts]
    return [
        row[begin : begin + len(answer.answer_ids)] for row, begin, answer in zip(logits, begins, batch, strict=True)
    ]


def divergences(
    model: PreTrainedModel,
    answers: Sequence[Sampled],
    edits: Sequence[Edit],
    *,
    plain_prompts: Sequence[Sequence[int]] | None = None,
    draft: PreTrainedModel | None = None,
) -> list[Divergence]:
    """Of each answer: the steered model against the unsteered one.

    Args:
        answers: Best such as the steered model wrote (`rollouts` with the same edits).
        plain_prompts: What the unsteered model is given in place of each prompt: where a prompt is what steers.
        draft: Takes the unsteered model's place for `acceptance` and `agrees`: the draft that will serve.

    Raises:
        SettingError: there are no answers, or another number of plain prompts.
    """
    plain = [answer.prompt_ids for answer in answers] if plain_prompts is None else plain_prompts
    if not answers or len(plain) != len(answers):
        raise SettingError(f"{len(answers)} answers and {len(plain)} plain prompts: give one or more, and one for each")
    order = by_length(answers)
    written = [answers[index] for index in order]
    unsteered = [Sampled(tuple(plain[index]), answers[index].answer_ids) for index in order]
    logits = zip(order, answer_logits(model, written, edits), answer_logits(model, unsteered), strict=True)
    drafts = None if draft is None else answer_logits(draft, unsteered)
    found: dict[int, Divergence] = {}
    for index, p, q in progress(logits, "divergence", total=len(answers)):
        one = divergence(p, q)
        if drafts is not None:
            drafted = next(drafts)
            width = min(p.shape[-1], drafted.shape[-1])  # models of one vocabulary may pad it differently
            one = Divergence(one.kl, *divergence(p[:, :width], drafted[:, :width].to(p.device))[1:])
        found[index] = one
    return [found[index] for index in range(len(answers))]


def meters(found: Sequence[Divergence], *, dose: float, relative: float, behaviour: float | None = None) -> Meters:
    """Sums up what was found at one dose, over all tokens of all answers."""
    kl, acceptance, agrees = (torch.cat([one[index] for one in found]).double() for index in range(3))
    return Meters(
        dose=dose,
        relative=relative,
        kl_mean=float(kl.mean()),
        kl_p95=float(kl.quantile(0.95)),
        acceptance=float(acceptance.mean()),
        agreement=float(agrees.mean()),
        num_tokens=len(kl),
        behaviour=behaviour,
    )
