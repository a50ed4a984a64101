"""A draft and answers of the target in; the share of its drafted tokens that would be accepted, with intervals, out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformers import PreTrainedModel

from pilotfish.errors import SettingError
from pilotfish.runs import progress
from pilotfish.scores.distillation import Answer, TargetRecording, draft_log_probs, next_token_logits
from pilotfish.scores.metrics import Estimate, Statistic, bootstrap_by_group


class AnswerAcceptance(NamedTuple):
    """Of one answer, read with the target's own tokens before each position."""

    id: str
    group: str
    expected: Float[Tensor, " position"]
    """Probability in [0, 1] that a token drawn from the draft here is accepted."""
    is_agreed: Bool[Tensor, " position"]
    """Whether the draft's likeliest token is the target's."""


@torch.inference_mode()
def read_acceptance(
    draft: PreTrainedModel, answers: Sequence[Answer], recorded: TargetRecording
) -> list[AnswerAcceptance]:
    """Reads each answer once with the draft.

    A drafted token is accepted with probability sum(min(p, q)), p the target's distribution and q the draft's
    (Leviathan et al., arXiv 2211.17192, theorem 3.5), at the recording's temperature. A proposal outside the recorded
    tokens counts as rejected, so the figure is low by the target's mass outside them at most.
    """
    found = []
    for answer in progress(answers, "reading the draft"):
        target = recorded.of(answer)
        logits = next_token_logits(draft, answer, recorded.vocab_size).cpu()
        log_draft = draft_log_probs(target, logits, recorded.temperature)
        expected = torch.minimum(target.probs, log_draft.exp()).sum(-1).clamp(max=1.0)
        found.append(AnswerAcceptance(answer.id, answer.group, expected, logits.argmax(-1) == target.ids[:, 0]))
    return found


def acceptance(
    read: Sequence[AnswerAcceptance], *, generator: torch.Generator, num_resamples: int = 1000
) -> dict[str, Estimate]:
    """`expected` (sampling, at the recording's temperature) and `greedy`: shares of tokens, with 95 % intervals.

    Raises:
        SettingError: the answers are of fewer than two groups.
    """
    sums = _sums(read)
    statistics = {name: _share(sums[name], sums["tokens"]) for name in ("expected", "greedy")}
    return _estimates(statistics, read, generator, num_resamples)


def acceptance_loss(
    before: Sequence[AnswerAcceptance],
    after: Sequence[AnswerAcceptance],
    *,
    generator: torch.Generator,
    num_resamples: int = 1000,
) -> dict[str, Estimate]:
    """Share of the acceptance that another draft loses on the same answers, 1 - after / before; negative for a gain.

    Raises:
        SettingError: the two are not of the same answers, or of fewer than two groups.
    """
    if [each.id for each in before] != [each.id for each in after]:
        raise SettingError("the drafts have read different answers; give both the same ones, in the same order")
    first, second = _sums(before), _sums(after)
    statistics = {name: _loss(first[name], second[name]) for name in ("expected", "greedy")}
    return _estimates(statistics, before, generator, num_resamples)


def _estimates(
    statistics: Mapping[str, Statistic],
    read: Sequence[AnswerAcceptance],
    generator: torch.Generator,
    num_resamples: int,
) -> dict[str, Estimate]:
    """Each from the same draws of groups."""
    groups, state, found = [each.group for each in read], generator.get_state(), {}
    for name, statistic in statistics.items():
        generator.set_state(state)
        found[name] = bootstrap_by_group(statistic, groups, generator=generator, num_resamples=num_resamples)
    return found


def _sums(read: Sequence[AnswerAcceptance]) -> dict[str, Float[Tensor, " answer"]]:
    return {
        "expected": _column(float(each.expected.double().sum()) for each in read),
        "greedy": _column(float(each.is_agreed.sum()) for each in read),
        "tokens": _column(float(len(each.expected)) for each in read),
    }


def _share(sums: Float[Tensor, " answer"], counts: Float[Tensor, " answer"]) -> Statistic:
    """Of tokens, in any draw of answers."""
    return lambda rows: float(sums[rows].sum() / counts[rows].sum())


def _loss(before: Float[Tensor, " answer"], after: Float[Tensor, " answer"]) -> Statistic:
    return lambda rows: float(1 - after[rows].sum() / before[rows].sum())


def _column(values: Iterable[float]) -> Float[Tensor, " answer"]:
    return torch.tensor(list(values), dtype=torch.float64)
