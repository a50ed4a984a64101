"""Labelled conversations and a tokenizer in; tokens with the labels of one metric out."""

from __future__ import annotations

import logging
import math
from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from pilotfish.core import Conversation
from pilotfish.heads import BankScores, DataCard, Example
from pilotfish.models import LoadedModel
from pilotfish.scores.scored import ScoredText
from pilotfish.texts import TokenizedText, tokenize

logger = logging.getLogger(__name__)


class Text(NamedTuple):
    """A conversation with the labels of one metric."""

    conversation: Conversation
    tokens: TokenizedText
    labels: Float[Tensor, " token"]
    """NaN where unlabelled."""
    label: float
    """Of the whole response; NaN when it has none, or when all that made it positive was cut off."""
    is_response: Bool[Tensor, " token"]
    """What an engine would have generated: the assistant's tokens, ends of turn included."""

    @property
    def is_labelled(self) -> bool:
        return not math.isnan(self.label) or bool(self.labels.isfinite().any())

    @property
    def example(self) -> Example:
        """For the fit; twins are the responses to one prompt of one source document."""
        twin = f"{self.tokens.group}\n{self.prompt}"
        return Example(self.labels, self.label, self.is_response, twin, self.boundary)

    @property
    def boundary(self) -> int:
        """Where the answer begins; 0 where there is none."""
        is_answered = any(message.role == "assistant" for message in self.conversation.messages)
        return int(self.is_response.nonzero()[0, 0]) if is_answered else 0

    @property
    def prompt(self) -> str:
        return "\n".join(message.content for message in self.conversation.messages[:-1])


def prepare(
    rows: Sequence[Conversation],
    reader: LoadedModel,
    metric: str,
    max_tokens: int,
    *,
    keeps_unlabelled: bool = False,
) -> list[Text]:
    """Tokens and labels; texts without any label of the metric, or cut before their response, are left out."""
    texts = [_text(row, tokenize(row, reader.tokenizer, max_tokens=max_tokens), metric) for row in rows]
    kept = [text for text in texts if bool(text.is_response.any()) and (keeps_unlabelled or text.is_labelled)]
    if len(kept) < len(texts):
        lack = "no answer" if keeps_unlabelled else "no label"
        counts = len(texts) - len(kept), len(texts)
        logger.warning("%d of %d texts have %s within their first %d tokens", *counts, lack, max_tokens)
    num_cut = sum(text.tokens.num_truncated > 0 for text in kept)
    if keeps_unlabelled and num_cut:
        logger.warning("%d of %d texts go on after the %d tokens that count", num_cut, len(kept), max_tokens)
    return kept


def _text(conversation: Conversation, tokens: TokenizedText, metric: str) -> Text:
    labels = torch.tensor(tokens.labels.get(metric, [float("nan")] * len(tokens.token_ids)))
    label = tokens.response_labels.get(metric, float("nan"))
    if label > 0 and tokens.num_spans_lost and not bool((labels > 0).any()):
        label = float("nan")
    return Text(conversation, tokens, labels, label, _is_response(conversation, tokens.messages))


def _is_response(conversation: Conversation, messages: Sequence[int]) -> Bool[Tensor, " token"]:
    """Tokens of assistant messages and the one template token that ends each; all messages when no assistant speaks."""
    roles = [message.role for message in conversation.messages]
    chosen = {i for i, role in enumerate(roles) if role == "assistant" or "assistant" not in roles}
    before = [-1, *messages[:-1]]
    return torch.tensor(
        [now in chosen or (now < 0 and last in chosen) for now, last in zip(messages, before, strict=True)]
    )


def scored(text: Text, score: float, token_scores: Tensor | None = None, running: Tensor | None = None) -> ScoredText:
    """What a scorer says of a text."""
    return ScoredText(
        id=text.tokens.id,
        group=text.tokens.group,
        prompt=text.prompt,
        label=text.label,
        score=score,
        token_labels=text.labels,
        token_scores=token_scores,
        running=running,
        pieces=text.tokens.pieces,
    )


def scored_by_head(text: Text, found: BankScores) -> ScoredText:
    """What the first head of a bank says of a text; a response scores the highest that it has run to, as when it is
    judged online. One NaN makes it unscored.
    """
    tokens, running = (part[:, 0] for part in found)
    return scored(text, float(running[text.is_response].max()), tokens, running)


def data_cards(role: str, texts: Sequence[Text], metric: str) -> list[DataCard]:
    """One a source."""
    sizes: dict[tuple[str, str], list[int]] = defaultdict(list)
    for text in texts:
        sizes[text.conversation.source, text.conversation.license].append(len(text.tokens.token_ids))
    return [
        DataCard(
            source=source,
            license=license,
            num_rows=len(counts),
            num_tokens=sum(counts),
            role=role,
            metric=metric,
        )
        for (source, license), counts in sizes.items()
    ]


def response_labels(texts: Sequence[Text]) -> Float[Tensor, " text"]:
    return torch.tensor([text.label for text in texts])
