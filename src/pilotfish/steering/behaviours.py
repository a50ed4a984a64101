"""An answer's text in; simple figures of what it does, and of what steering breaks first, out."""

from __future__ import annotations

import re
from collections.abc import Callable

TextScore = Callable[[str], float]
"""An answer to a figure in [0, 1]."""

_ENGLISH = "the of and to in is that it for was with as be at by this are from or an not have you"
_FRENCH = (
    "le la les de des du et à un une est que qui dans pour pas sur au aux ce cette il elle nous vous je ne plus en "
    "avec sont par"
)
FUNCTION_WORDS = {"english": frozenset(_ENGLISH.split()), "french": frozenset(_FRENCH.split())}
"""Frequent words of two languages; none of them stands in both."""

_WORD = re.compile(r"[^\W\d_]+")
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def french_share(text: str) -> float:
    """French function words among those of French and English; 0 where there is neither."""
    words = _WORD.findall(text.lower())
    french, english = (sum(word in FUNCTION_WORDS[name] for word in words) for name in ("french", "english"))
    return french / (french + english) if french + english else 0.0


def repetition(text: str, size: int = 4) -> float:
    """Share of runs of `size` words that stood earlier in the text already; 0 for a text without such a run."""
    words = text.split()
    runs = [tuple(words[start : start + size]) for start in range(len(words) - size + 1)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


def last_number(text: str) -> float | None:
    """The last number of a text, commas between digits left out; None where there is none."""
    found = _NUMBER.findall(text)
    return float(found[-1].replace(",", "")) if found else None


def is_number(expected: float) -> TextScore:
    """Scores 1 an answer whose last number is the expected one: how GSM8K is graded."""

    def score(text: str) -> float:
        found = last_number(text)
        return float(found is not None and abs(found - expected) < 1e-6)

    return score
