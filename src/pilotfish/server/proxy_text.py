"""Text that arrives bit by bit in; tokens that nothing that follows can change out."""

from __future__ import annotations

from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from pilotfish.errors import EngineFailed
from pilotfish.texts import Encoded, Rendered, encode
from pilotfish.texts.conversations import check_encodable

TAIL = 24
"""Tokens at the end that stay open where no word's end is in sight: scripts without spaces, long runs of one sign."""
LONGEST_WINDOW = 600
"""Characters from which on the tokenizer is asked about the last part of the text alone."""


class Piece(NamedTuple):
    """A final token with its place in the text."""

    id: int
    start: int
    end: int
    """Characters that it stands for, end exclusive; a split character belongs to each of its tokens."""
    shown: int
    """How much of the text may be shown with the token: a split character comes with its last one."""


class GrowingText:
    """A text's tokens while it grows, always those of the whole text so far.

    A token is final once it stands before the end of a word, a space after something else: no vocabulary of the
    families that are read has a token across such a place, so what follows changes nothing before it. Where none comes
    for long, all but the last `TAIL` are final. Should a final token change all the same, that is an error.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prefix: str, *, templated: bool) -> None:
        """Raises `TextError` for a prefix that no tokenizer can take."""
        self._tokenizer, self._templated = tokenizer, templated
        self._added = set(tokenizer.added_tokens_decoder)
        self.text = ""
        self._ids: list[int] = []
        self._offsets: list[tuple[int, int]] = []
        self._cut = self._num_final = self._num_taken = 0
        self._window = (0, 0)
        """Token and character where the part of the text begins that the tokenizer is asked about."""
        self.push(prefix)

    def __len__(self) -> int:
        """Tokens of the text so far, open ones included."""
        return len(self._ids)

    def push(self, text: str, *, is_last: bool = False) -> None:
        """Adds text.

        Raises:
            TextError: it cannot be encoded.
            EngineFailed: a token changed that was final.
        """
        check_encodable(text, "the text")
        self.text += text
        first, character = self._window
        found = self._encoded(character)
        num_kept = self._num_final - first
        if found.token_ids[:num_kept] != self._ids[first : self._num_final]:
            raise EngineFailed(
                f"the tokenizer {type(self._tokenizer).__name__} split a text otherwise once more of it had come; "
                "nothing after that can be scored as it stands. Use another reader for such texts"
            )
        self._ids[first:] = found.token_ids
        self._offsets[first:] = [(start + character, end + character) for start, end in found.offsets]
        self._cut = self._last_cut()
        self._num_final = len(self._ids) if is_last else max(self._num_final, self._cut, len(self._ids) - TAIL)
        if len(self.text) - character > LONGEST_WINDOW and self._cut > first:
            self._move_window()

    def take(self) -> list[Piece]:
        """The tokens that have become final since the last call."""
        first, self._num_taken = self._num_taken, self._num_final
        return [self._piece(index) for index in range(first, self._num_final)]

    def _piece(self, index: int) -> Piece:
        start, end = self._offsets[index]
        following = self._offsets[index + 1 : index + 2]
        shown = min([end, *(after for after, until in following if after < until)])
        return Piece(self._ids[index], start, end, shown)

    def _encoded(self, character: int) -> Encoded:
        text = self.text[character:]
        whole = (
            character == 0 and not self._templated
        )  # which begins with the tokenizer's special tokens, if it has any
        return encode(Rendered(text, (0,), (len(text),), (0,), templated=not whole), self._tokenizer)

    def _last_cut(self) -> int:
        """Tokens before the last end of a word, or up to the last special token."""
        for index in range(len(self._ids) - 1, max(self._cut, self._num_final), -1):
            place = self._offsets[index][0]
            is_word = self.text[place : place + 1] == " " and not self.text[place - 1].isspace()
            if self._ids[index - 1] in self._added or (is_word and self._offsets[index - 1][1] == place):
                return index
        return self._cut

    def _move_window(self) -> None:
        """Asks about the text from the last cut on, where that gives the same tokens."""
        character = self._offsets[self._cut][0]
        if self._encoded(character).token_ids == self._ids[self._cut :]:
            self._window = (self._cut, character)
