"""Token ids in, text that is safe to show out: no half characters, nothing of a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

INCOMPLETE = "\ufffd"
"""What a decoder shows for a multi-byte character whose last bytes are still to come."""


def text_of(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
    """The text of one sequence of token ids."""
    return str(tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens))


class Piece(NamedTuple):
    """The characters of one token, by their places in the answer's text."""

    start: int
    end: int
    """A character that only later tokens complete is included, and belongs to each of them."""
    shown: int
    """How much of the text may be shown with the token."""


class TextStream:
    """The text of one answer as it grows."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._ids: list[int] = []
        self._start = 0
        """First id of the window that is decoded again, so that joins between tokens come out right."""
        self._shown = 0
        """Characters of that window that are in `text` already."""
        self.text = ""
        self._taken = 0
        self.is_stopped = False
        """Whether a stop string was met; `text` ends before it."""
        self.pieces: list[Piece] = []
        """Of the tokens so far."""
        self._open = 0
        """Characters at the end of the last piece that are still to be completed."""

    def push(self, token_id: int, *, is_last: bool = False) -> str:
        """Adds a token; returns the text that may be shown now, all of the rest when it is the last token."""
        self._grow(token_id, is_last)
        self._find_stop()
        safe = len(self.text)
        if not is_last and not self.is_stopped:
            safe -= self._held_back()
        delta, self._taken = self.text[self._taken : safe], max(self._taken, safe)
        self.pieces[-1] = self.pieces[-1]._replace(shown=self._taken)
        return delta

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str], ids: Sequence[int]) -> TextStream:
        """The text of tokens that were pushed one by one."""
        stream = cls(tokenizer, stop)
        for token_id in ids:
            stream.push(token_id)
        return stream

    def without(self, hidden: AbstractSet[int], index: int, mark: str) -> str:
        """What may be shown with token `index` where the characters at the places `hidden` must not be: each run of
        them becomes one mark.
        """
        begin = self.pieces[index - 1].shown if index else 0
        shown = []
        for place in range(begin, self.pieces[index].shown):
            if place not in hidden:
                shown.append(self.text[place])
            elif place - 1 not in hidden:
                shown.append(mark)
        return "".join(shown)

    def _grow(self, token_id: int, is_last: bool) -> None:
        self._ids.append(token_id)
        window = text_of(self._tokenizer, self._ids[self._start :], skip_special_tokens=True)
        begin = self.pieces[-1].end - self._open if self.pieces else 0
        end = len(self.text) - self._shown + len(window)
        self._open = min(len(window) - len(window.rstrip(INCOMPLETE)), len(window) - self._shown)
        self.pieces.append(Piece(min(begin, end), end, 0))
        if window.endswith(INCOMPLETE) and not is_last:
            return
        self.text += window[self._shown :]
        self._start = max(0, len(self._ids) - 1)  # the last token stays as context of the next
        self._shown = len(text_of(self._tokenizer, self._ids[self._start :], skip_special_tokens=True))

    def _find_stop(self) -> None:
        places = [place for word in self._stop if (place := self.text.find(word, max(0, self._taken - len(word)))) >= 0]
        if places:
            self.text = self.text[: min(places)]
            self.is_stopped = True

    def _held_back(self) -> int:
        """Length of the longest end of the text that could be the beginning of a stop string."""
        longest = max((len(word) - 1 for word in self._stop), default=0)
        for size in range(min(longest, len(self.text)), 0, -1):
            if any(word.startswith(self.text[-size:]) for word in self._stop):
                return size
        return 0
