"""A conversation and a tokenizer in; token ids with the characters, the message and the labels of each token out."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from pilotfish.core import Conversation, Message, Span
from pilotfish.errors import SettingError, TextError
from pilotfish.texts.conversations import check_encodable

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TEMPLATE = -1
"""The message index of tokens that belong to no message: role headers, separators, BOS and EOS."""

_TRIMS: tuple[Callable[[str], str], ...] = (
    lambda content: content,
    str.rstrip,
    str.lstrip,
    str.strip,
    lambda content: content.rstrip("\n"),
    lambda content: content.lstrip("\n"),
    lambda content: content.strip("\n"),
)
"""What chat templates are known to do to a content."""


@dataclass(frozen=True, slots=True)
class Rendered:
    """Messages as the one text that a model reads, and where each content stands in it."""

    text: str
    starts: tuple[int, ...]
    """Per message, the character of `text` where its content begins."""
    lengths: tuple[int, ...]
    """Per message, how many characters of its content stand in `text`."""
    skipped: tuple[int, ...]
    """Per message, how many leading characters of its content the template dropped."""
    templated: bool
    """False when the tokenizer has no chat template and the plain `User: ...` form was used."""

    def range_of(self, span: Span) -> tuple[int, int]:
        """The half-open range of `text` where a span stands; empty when the template dropped its characters."""
        first, size, skipped = self.starts[span.message], self.lengths[span.message], self.skipped[span.message]
        start, end = (first + min(max(edge - skipped, 0), size) for edge in (span.start, span.end))
        return start, end


class Encoded(NamedTuple):
    token_ids: list[int]
    offsets: list[tuple[int, int]]
    """Per token, its half-open character range in the text. Tokens of one split character share its range; BOS and EOS
    have an empty one."""


@dataclass(frozen=True, slots=True)
class TokenizedText:
    """A conversation as tokens with their labels."""

    id: str
    group: str
    text: str
    """The whole rendered text, also when tokens were cut."""
    token_ids: list[int]
    offsets: list[tuple[int, int]]
    """Per token, its half-open character range in `text`."""
    messages: list[int]
    """Per token, the index of its message, or `TEMPLATE`."""
    labels: dict[str, list[float]]
    """Per metric and token, a label in [0, 1], or NaN where the token is unlabelled."""
    response_labels: dict[str, float]
    """Per metric, the label of the whole response: the one given, else the largest value of its spans."""
    num_truncated: int
    """Tokens dropped at the end by `max_tokens`."""
    num_spans_lost: int
    """Spans with no token left, because of `max_tokens` or because the template dropped their characters."""

    @property
    def pieces(self) -> tuple[str, ...]:
        """Each token's own characters; a character that is split over several tokens goes with the first."""
        ends = itertools.accumulate((end for _, end in self.offsets), max, initial=0)
        pairs = zip(self.offsets, ends, strict=False)
        return tuple(self.text[max(start, shown) : max(end, shown)] for (start, end), shown in pairs)


def render(
    conversation: Conversation | Sequence[Message],
    tokenizer: PreTrainedTokenizerBase,
    *,
    add_generation_prompt: bool = False,
) -> Rendered:
    """Renders messages with the tokenizer's chat template, or as `User: ...` paragraphs when it has none.

    Contents are located by rendering a second time with markers in their place, never by searching for their words.

    Raises:
        TextError: the template refuses these messages, or changes a content by more than trimming its ends.
    """
    name, messages = _named(conversation)
    for index, message in enumerate(messages):
        check_encodable(message.content, f"{name}, message {index}")
    markers = [f"\ue000{index}\ue001" for index in range(len(messages))]
    text, pattern = (
        _apply(tokenizer, name, list(zip((m.role for m in messages), contents, strict=True)), add_generation_prompt)
        for contents in ([m.content for m in messages], markers)
    )
    pieces = _between(pattern, markers, name)
    position = len(pieces[0])
    starts: list[int] = []
    lengths: list[int] = []
    skipped: list[int] = []
    for message, piece in zip(messages, pieces[1:], strict=True):
        is_last = len(starts) == len(messages) - 1
        kept = next((k for k in _trimmed(message.content) if _continues(text, position, k + piece, is_last)), None)
        if kept is None:
            raise TextError(
                f"{name}: the chat template of this tokenizer changes message {len(starts)} ({message.role}) by more "
                "than trimming its ends, so labels cannot be placed; give the content as the template writes it, or "
                "use another template"
            )
        starts.append(position)
        lengths.append(len(kept))
        skipped.append(message.content.index(kept))
        position += len(kept) + len(piece)
    return Rendered(text, tuple(starts), tuple(lengths), tuple(skipped), bool(tokenizer.chat_template))


def encode(rendered: Rendered, tokenizer: PreTrainedTokenizerBase) -> Encoded:
    """Turns a rendered text into token ids with character ranges that leave no character out.

    Special tokens are added only to a text that no chat template has written, since templates write their own.

    Raises:
        TextError: the tokenizer cannot say which characters a token stands for.
    """
    if not tokenizer.is_fast:
        raise TextError(
            f"tokenizer {type(tokenizer).__name__} gives no character offsets; load the fast one (use_fast=True)"
        )
    encoding = tokenizer(
        rendered.text,
        add_special_tokens=not rendered.templated,
        return_offsets_mapping=True,
        return_attention_mask=False,
        verbose=False,
    )
    return Encoded(list(encoding["input_ids"]), _without_gaps(rendered.text, encoding["offset_mapping"]))


def tokenize(
    conversation: Conversation, tokenizer: PreTrainedTokenizerBase, *, max_tokens: int | None = None
) -> TokenizedText:
    """Renders and encodes a conversation and carries its spans and labels over to the tokens.

    A token takes the value of a span when their character ranges overlap, the largest where spans overlap. Elsewhere a
    metric that has spans labels 0 the tokens of assistant messages and of the messages with its spans. A metric with a
    label of 0 and no spans labels all assistant tokens 0; a positive label without spans says nothing of single tokens,
    which stay NaN.

    Raises:
        TextError: see `render` and `encode`.
        SettingError: `max_tokens` is less than 1.
    """
    if max_tokens is not None and max_tokens < 1:
        raise SettingError(f"max_tokens is {max_tokens}; give 1 or more, or None for no limit")
    rendered = render(conversation, tokenizer)
    encoded = encode(rendered, tokenizer)
    token_ids, offsets = encoded.token_ids[:max_tokens], encoded.offsets[:max_tokens]
    messages = _message_of_tokens(rendered, offsets)
    labels = {metric: _background(conversation, metric, messages) for metric in _metrics(conversation)}
    num_spans_lost = 0
    for span in sorted(conversation.spans, key=lambda span: span.value):  # so that the largest value is written last
        touched = _overlapping(offsets, *rendered.range_of(span))
        num_spans_lost += not touched
        for token in touched:
            labels[span.metric][token] = span.value
    return TokenizedText(
        id=conversation.id,
        group=conversation.group,
        text=rendered.text,
        token_ids=token_ids,
        offsets=offsets,
        messages=messages,
        labels=labels,
        response_labels=_response_labels(conversation),
        num_truncated=len(encoded.token_ids) - len(token_ids),
        num_spans_lost=num_spans_lost,
    )


def _named(conversation: Conversation | Sequence[Message]) -> tuple[str, Sequence[Message]]:
    if isinstance(conversation, Conversation):
        return f"conversation {conversation.id!r}", conversation.messages
    if not conversation:
        raise TextError("there are no messages to render; give at least one")
    return "these messages", conversation


def _apply(
    tokenizer: PreTrainedTokenizerBase, name: str, turns: list[tuple[str, str]], add_generation_prompt: bool
) -> str:
    if not tokenizer.chat_template:
        paragraphs = [f"{role.capitalize()}: {content}" for role, content in turns]
        return "\n\n".join([*paragraphs, "Assistant:"] if add_generation_prompt else paragraphs)
    from jinja2 import TemplateError

    try:
        text = tokenizer.apply_chat_template(
            [{"role": role, "content": content} for role, content in turns],
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
        )
    except TemplateError as error:
        roles = ", ".join(role for role, _ in turns)
        raise TextError(
            f"{name}: the chat template of this tokenizer refuses the roles {roles}: {error}; "
            "change the roles or use another template"
        ) from error
    assert isinstance(text, str), "tokenize=False gives text"
    return text


def _between(pattern: str, markers: Sequence[str], name: str) -> list[str]:
    """The template's own text before, between and after the contents."""
    pieces = []
    for index, marker in enumerate(markers):
        piece, found, pattern = pattern.partition(marker)
        if not found or marker in pattern:
            raise TextError(
                f"{name}: the chat template of this tokenizer drops, repeats or moves message {index}; "
                "change the messages or use another template"
            )
        pieces.append(piece)
    return [*pieces, pattern]


def _trimmed(content: str) -> list[str]:
    return [trim(content) for trim in _TRIMS]


def _continues(text: str, position: int, expected: str, is_last: bool) -> bool:
    return text.startswith(expected, position) and (not is_last or position + len(expected) == len(text))


def _without_gaps(text: str, ranges: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Gives the characters that a tokenizer leaves out of its ranges to a neighbour.

    Those are spaces, which belong to the word that follows, and marks that were composed with the letter before them.
    """
    offsets: list[tuple[int, int]] = []
    covered = 0
    for start, end in ranges:
        if end > covered:
            if start > covered:
                start = _give_marks(text[covered:start], offsets, covered)
            covered = end
        offsets.append((start, end))
    _give_marks(text[covered:], offsets, covered)
    return offsets


def _give_marks(gap: str, offsets: list[tuple[int, int]], covered: int) -> int:
    """Lengthens the tokens that end at `covered` by what precedes the gap's first space; returns where they end now."""
    edge = covered + next((index for index, character in enumerate(gap) if character.isspace()), len(gap))
    given = covered
    for index in reversed(range(len(offsets))):
        start, end = offsets[index]
        if start < end != covered:
            break
        if start < end:
            offsets[index] = (start, edge)
            given = edge
    return given


def _message_of_tokens(rendered: Rendered, offsets: Sequence[tuple[int, int]]) -> list[int]:
    """Per token the first message whose content it touches."""
    messages = [TEMPLATE] * len(offsets)
    for index in reversed(range(len(rendered.starts))):
        start = rendered.starts[index]
        for token in _overlapping(offsets, start, start + rendered.lengths[index]):
            messages[token] = index
    return messages


def _overlapping(offsets: Sequence[tuple[int, int]], start: int, end: int) -> list[int]:
    return [
        token
        for token, (first, last) in enumerate(offsets)
        if first < end and last > start and first < last and start < end
    ]


def _metrics(conversation: Conversation) -> list[str]:
    return sorted({*conversation.labels, *(span.metric for span in conversation.spans)})


def _background(conversation: Conversation, metric: str, messages: Sequence[int]) -> list[float]:
    """The labels of a metric's tokens before its spans are written."""
    with_spans = {span.message for span in conversation.spans if span.metric == metric}
    if not with_spans and conversation.labels[metric] != 0:
        return [math.nan] * len(messages)
    known = with_spans | {index for index, message in enumerate(conversation.messages) if message.role == "assistant"}
    return [0.0 if index in known else math.nan for index in messages]


def _response_labels(conversation: Conversation) -> dict[str, float]:
    from_spans: dict[str, float] = {}
    for span in conversation.spans:
        from_spans[span.metric] = max(span.value, from_spans.get(span.metric, 0.0))
    return {**from_spans, **conversation.labels}
