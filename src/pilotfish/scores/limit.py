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
from pilotfish.heads import HeadBank, Measured, SourceCard, ThresholdCard
from pilotfish.runs import generator, run_card
from pilotfish.scores import lexical
from pilotfish.scores.calibration import clopper_pearson_upper, num_benign_needed, threshold_at_budget
from pilotfish.scores.evaluation import AT_THRESHOLD, evaluate
from pilotfish.scores.fitted import Reading
from pilotfish.scores.prepared import Text, data_cards, prepare
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
        SettingError: as `threshold_at_budget`; or some are answered and others are not.
    """
    rows = [text.conversation for text in benign]
    groups = joined_groups(rows)
    documents = [groups[row.group] for row in rows]
    found = threshold_at_budget(scores, budget, groups=documents)
    by_source = _by_source(rows, documents, (scores >= found.threshold).tolist())
    return ThresholdCard(
        **found._asdict(),
        benign_source=", ".join(by_source),
        scope=_scope(rows),
        median_tokens=int(torch.tensor([int(text.is_response.sum()) for text in benign]).median()),
        by_source=by_source,
    )


def _by_source(
    rows: Sequence[Conversation], documents: Sequence[str], is_flagged: Sequence[bool]
) -> dict[str, SourceCard]:
    found: dict[str, dict[str, bool]] = {}
    for row, document, flagged in zip(rows, documents, is_flagged, strict=True):
        of = found.setdefault(row.source or "unnamed", {})
        of[document] = of.get(document, False) or flagged
    counts = {source: (len(found[source]), sum(found[source].values())) for source in sorted(found)}
    return {
        source: SourceCard(num_benign=total, num_flagged=flagged, fpr_upper=clopper_pearson_upper(flagged, total))
        for source, (total, flagged) in counts.items()
    }


def with_limits(
    bank: HeadBank,
    benign: Sequence[Conversation],
    reading: Reading,
    *,
    budget: float,
    max_tokens: int | None = None,
    held_out: Scored | None = None,
    seed: int = 0,
) -> HeadBank:
    """The same heads, flagging from where these benign texts allow it; what was measured at the old threshold goes.

    Args:
        reading: At the bank's sites.
        budget: Share of benign documents that each head may flag.
        max_tokens: Longer texts are cut here; None reads as far as the model does.
        held_out: The texts that a head of the bank was measured on: what its threshold finds is measured again on them.

    Raises:
        SettingError: too few benign texts, one that is labelled positive, answers for a head that judges prompts or the
            other way round, or a head that gives many of them probability 1.
        BankMismatch: the bank was made for another reader.
    """
    bank.check(reading.model.identity)
    longest = max_tokens or reading.model.model.config.max_position_embeddings
    texts = prepare(benign, reading.model, bank.metrics[0], longest, keeps_unlabelled=True)
    rows = [text.conversation for text in texts]
    check_num_benign(rows, budget)
    _check_benign(bank, rows)
    scores = response_scores(bank, texts, reading)
    limits = {metric: limit(texts, scores[:, i], budget) for i, metric in enumerate(bank.metrics)}
    kept = {name: found for name, found in bank.card.metrics.items() if not _hangs_on_threshold(name)}
    if held_out is not None:
        kept |= _at_threshold(held_out, limits[held_out.metric].threshold, seed)
    made_with = [row for row in bank.card.data if row.role != "benign"]
    made_with += [row for metric in bank.metrics for row in data_cards("benign", texts, metric)]
    settings = {"budget": budget, "max_tokens": longest, "dtype": str(reading.model.model.dtype)}
    run = {**bank.card.run, "threshold": run_card("threshold", settings, seed)}
    card = replace(bank.card, thresholds=limits, metrics=kept, data=tuple(made_with), run=run)
    return HeadBank(bank.heads, bank.identity, card=card)


def response_scores(bank: HeadBank, texts: Sequence[Text], reading: Reading) -> Float[Tensor, "text metric"]:
    """The highest that each response runs to, which is what flags it."""
    shelf = reading.of(texts)
    runs = (bank.score_text(shelf.features(text.tokens.id), boundary=text.boundary).running for text in texts)
    return torch.stack([run[text.is_response].amax(0) for text, run in zip(texts, runs, strict=True)])


def _check_benign(bank: HeadBank, rows: Sequence[Conversation]) -> None:
    scope = _scope(rows)
    for metric in bank.metrics:
        known = bank.card.thresholds.get(metric)
        if known is not None and known.scope != scope:
            raise SettingError(
                f"the threshold of {metric!r} is for {known.scope}s, and the benign texts are {scope}s: "
                + ("leave the answers out" if known.scope == "prompt" else "give each its answer")
            )
        spans = {row.id for row in rows if any(span.metric == metric and span.value > 0 for span in row.spans)}
        positive = [row.id for row in rows if row.labels.get(metric, 0.0) > 0 or row.id in spans]
        if positive:
            raise SettingError(
                f"{len(positive)} of the benign texts are labelled positive for {metric!r}, {positive[0]!r} first; "
                "leave them out"
            )


def _scope(rows: Sequence[Conversation]) -> Literal["answer", "prompt"]:
    is_answered = [any(message.role == "assistant" for message in row.messages) for row in rows]
    if any(is_answered) and not all(is_answered):
        raise SettingError(
            f"{sum(is_answered)} of {len(rows)} benign texts have an answer, the others none; a threshold is for one "
            "side: give prompts alone, or each its answer"
        )
    return "answer" if all(is_answered) else "prompt"


def _hangs_on_threshold(name: str) -> bool:
    return name.rsplit("/", 1)[-1] in (*AT_THRESHOLD, *lexical.FIGURES)


def _at_threshold(held_out: Scored, threshold: float, seed: int) -> dict[str, Measured]:
    head, words = held_out.by_scorer["head"], held_out.by_scorer.get("words")
    found = evaluate(head, threshold=threshold, generator=generator(seed, "bootstrap"), only=AT_THRESHOLD)
    if words is not None:
        found |= lexical.lexical_control(head, words, threshold=threshold, generator=generator(seed, "bootstrap"))
    return {f"{held_out.metric}/{name}": Measured(**figure._asdict()) for name, figure in found.items()}
