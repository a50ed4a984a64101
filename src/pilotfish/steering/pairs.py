"""Contrasts and a tokenizer in; token ids of both sides, and which of them are read, out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

from transformers import PreTrainedTokenizerBase

from pilotfish.core import Message
from pilotfish.errors import TextError
from pilotfish.texts import Contrast, Rendered, encode, render

Tokens = Literal["last", "letter", "answer"]
"""Which tokens of an answer are read: its last one; the one with its first letter or digit, as CAA does with `(A)`; or
the mean over all of them."""


class Side(NamedTuple):
    token_ids: tuple[int, ...]
    """Prompt and answer, to the last token that is read: later ones cannot change it. A BOS token stands there where
    the tokenizer, or its chat template, puts one."""
    start: int
    """First of the tokens that are read; they end with `token_ids`."""


class TokenPair(NamedTuple):
    positive: Side
    negative: Side

    @property
    def num_shared(self) -> int:
        """Tokens at the beginning that both sides have and of which none is read."""
        limit = min(self.positive.start, self.negative.start)
        pairs = zip(self.positive.token_ids[:limit], self.negative.token_ids[:limit], strict=True)
        return next((index for index, (mine, other) in enumerate(pairs) if mine != other), limit)


def tokenized(contrast: Contrast, tokenizer: PreTrainedTokenizerBase, *, tokens: Tokens, chat: bool) -> TokenPair:
    """Both answers after their prompt, as tokens.

    Args:
        chat: Render a user's message and the assistant's answer with the chat template; else the texts stand one after
            the other, and the tokenizer adds the special tokens that it adds by itself.

    Raises:
        TextError: the template refuses the messages, the tokenizer gives no offsets, or an answer has no letter or
            digit where one is to be read.
    """
    return TokenPair(
        *(
            _side(_rendered(contrast.prompt, answer, tokenizer, chat), tokenizer, tokens, f"contrast {contrast.id!r}")
            for answer in (contrast.positive, contrast.negative)
        )
    )


def _rendered(prompt: str, answer: str, tokenizer: PreTrainedTokenizerBase, chat: bool) -> Rendered:
    if not chat:
        return Rendered(prompt + answer, (0, len(prompt)), (len(prompt), len(answer)), (0, 0), templated=False)
    question = [Message("user", prompt)] if prompt else []
    return render([*question, Message("assistant", answer.strip())], tokenizer)


def _side(rendered: Rendered, tokenizer: PreTrainedTokenizerBase, tokens: Tokens, where: str) -> Side:
    start, end = rendered.starts[-1], rendered.starts[-1] + rendered.lengths[-1]
    if tokens == "letter":
        start = next((place for place in range(start, end) if rendered.text[place].isalnum()), end)
        if start == end:
            raise TextError(f"{where}: an answer has no letter or digit to read; read its last token instead")
        end = start + 1
    encoded = encode(rendered, tokenizer)
    read = [index for index, place in enumerate(encoded.offsets) if _overlap(place, (start, end))]
    if not read:
        raise TextError(f"{where}: an answer has no token of its own; the tokenizer drops its characters")
    first, last = (read[0] if tokens == "answer" else read[-1]), read[-1]
    return Side(tuple(encoded.token_ids[: last + 1]), first)


def _overlap(one: Sequence[int], other: Sequence[int]) -> bool:
    return one[0] < other[1] and other[0] < one[1] and one[0] < one[1]
