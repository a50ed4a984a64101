"""Benign texts in; from which score on a head flags, and what that promises, out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from pilotfish.core import Conversation
from pilotfish.errors import SettingError
from pilotfish.heads import HeadBank, Measured, ThresholdCard
from pilotfish.runs import generator, run_card
from pilotfish.scores import lexical
from pilotfish.scores.calibration import num_benign_needed, threshold_at_budget
from pilotfish.scores.evaluation import AT_THRESHOLD, evaluate
from pilotfish.scores.fitted import Reading
from pilotfish.scores.prepared import Text, prepare
from pilotfish.scores.scored import Scored
from pilotfish.texts import joined_groups, num_documents


def check_num_benign(benign: Sequence[Conversation], budget: float) -> None:
    """Raises `SettingError` where they are too few to show the budget, even with none of them flagged."""
    needed, count = num_benign_needed(budget), num_documents(benign)
    if count < needed:
        raise SettingError(
            f"{len(benign)} benign responses of {count} documents cannot show a false-positive budget of {budget:g}; "
            f"give {needed} documents or more, or a larger budget"
        )


def limit(benign: Sequence[Text], scores: Float[Tensor, " text"], budget: float) -> ThresholdCard:
    """The smallest threshold whose share of benign documents flagged is shown to be within the budget.

    Args:
        scores: Of the responses, probabilities.

    Raises:
        SettingError: as `threshold_at_budget`.
    """
    rows = [text.conversation for text in benign]
    documents = joined_groups(rows)
    found = threshold_at_budget(scores, budget, groups=[documents[row.group] for row in rows])
    is_answered = any(message.role == "assistant" for row in rows for message in row.messages)
    scope: Literal["answer", "prompt"] = "answer" if is_answered else "prompt"
    return ThresholdCard(
        **found._asdict(),
        benign_source=", ".join(sorted({row.source or "unnamed" for row in rows})),
        scope=scope,
        median_tokens=int(torch.tensor([int(text.is_response.sum()) for text in benign]).median()),
    )


def with_limits(
    bank: HeadBank,
    benign: Sequence[Conversation],
    reading: Reading,
    *,
    budget: float,
    max_tokens: int,
    held_out: Scored | None = None,
    seed: int = 0,
) -> HeadBank:
    """The same heads, flagging from where these benign texts allow it; what was measured at the old threshold goes.

    Args:
        budget: Share of benign documents that each head may flag.
        reading: At the bank's sites.
        held_out: The texts that a head of the bank was measured on: what its threshold finds is measured again on them.

    Raises:
        SettingError: too few benign texts, or a head that gives many of them probability 1.
        BankMismatch: the bank was made for another reader.
        ArtefactError: a recording in the work folder is damaged.
    """
    bank.check(reading.model.identity)
    texts = prepare(benign, reading.model, bank.metrics[0], max_tokens, keeps_unlabelled=True)
    check_num_benign([text.conversation for text in texts], budget)
    shelf = reading.of(texts)
    runs = (bank.score_text(shelf.features(text.tokens.id), boundary=text.boundary).running for text in texts)
    scores = torch.stack([run[text.is_response].amax(0) for text, run in zip(texts, runs, strict=True)])
    limits = {metric: limit(texts, scores[:, i], budget) for i, metric in enumerate(bank.metrics)}
    kept = {name: found for name, found in bank.card.metrics.items() if not _hangs_on_threshold(name)}
    if held_out is not None and held_out.metric in limits:
        kept |= _at_threshold(held_out, limits[held_out.metric].threshold, seed)
    run = run_card("threshold", {"budget": budget, "max_tokens": max_tokens}, seed)
    card = replace(bank.card, thresholds=limits, metrics=kept, run={**bank.card.run, "threshold": run})
    return HeadBank(bank.heads, bank.identity, card=card)


def _hangs_on_threshold(name: str) -> bool:
    return name.rsplit("/", 1)[-1] in (*AT_THRESHOLD, *lexical.FIGURES)


def _at_threshold(held_out: Scored, threshold: float, seed: int) -> dict[str, Measured]:
    head, words = held_out.by_scorer.get("head", []), held_out.by_scorer.get("words")
    found = evaluate(head, threshold=threshold, generator=generator(seed, "bootstrap"))
    found = {name: figure for name, figure in found.items() if name in AT_THRESHOLD}
    if words is not None:
        found |= lexical.lexical_control(head, words, threshold=threshold, generator=generator(seed, "bootstrap"))
    return {f"{held_out.metric}/{name}": Measured(**figure._asdict()) for name, figure in found.items()}
