"""Token scores and labelled spans in; which characters a scorer marks, and how well that fits the spans, out.

Characters, not tokens, so that readers with other tokenizers, and people, can be held against each other.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float
from scipy.ndimage import grey_closing
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from pilotfish.scores.prepared import Text
from pilotfish.scores.scored import ScoredText
from pilotfish.texts import render

Characters = Float[np.ndarray, " character"]

GAPS = (0, 4, 12)
NUM_THRESHOLDS = 400


class Marking(NamedTuple):
    """How scores become marks. White space at the ends of a marked stretch is never marked, within one always."""

    threshold: float
    """Characters of tokens that score so much or more are marked."""
    whole_words: bool = False
    """Whether a word scores what its highest token scores."""
    gap: int = 0
    """Stretches so many characters apart, or fewer, become one."""


class Spans(NamedTuple):
    """Where the labelled spans of a text stand among the characters that its model reads."""

    text: Text
    is_span: Bool[np.ndarray, " character"]


def labelled_spans(texts: Sequence[Text], metric: str, tokenizer: PreTrainedTokenizerBase) -> list[Spans]:
    """Of the texts whose tokens are labelled, those without any span included.

    A span counts whole, also where `max_tokens` cut it: what was not read is missed.
    """
    found = []
    for text in texts:
        if not bool(text.labels.isfinite().any()):
            continue
        rendered, is_span = render(text.conversation, tokenizer), np.zeros(len(text.tokens.text), dtype=bool)
        for span in text.conversation.spans:
            if span.metric == metric and span.value >= 0.5:
                is_span[slice(*_trimmed(text.tokens.text, *rendered.range_of(span)))] = True
        found.append(Spans(text, is_span))
    return found


def _trimmed(words: str, start: int, end: int) -> tuple[int, int]:
    """Without the white space at its ends, which is never marked."""
    span = words[start:end]
    return start + len(span) - len(span.lstrip()), end - len(span) + len(span.rstrip())


def character_scores(
    text: Text, token_scores: Float[Tensor, " token"], *, whole_words: bool = False, gap: int = 0
) -> Characters:
    """What each character scores, so that those of a threshold or more are the ones to mark; -inf is never marked.

    A character scores what its highest token scores, white space the lower one of its two neighbours. Characters of
    unlabelled tokens (the template's, the user's) score -inf, as those of tokens without a score do.
    """
    words = text.tokens.text
    scores = np.full(len(words), -np.inf)
    rows = zip(text.tokens.offsets, token_scores.tolist(), text.labels.isfinite().tolist(), strict=True)
    for (start, end), score, is_labelled in rows:
        if is_labelled and not math.isnan(score):
            np.maximum(scores[start:end], score, out=scores[start:end])
    is_scored = scores > -np.inf
    if whole_words:
        for match in re.finditer(r"\w+", words):
            scores[slice(*match.span())] = scores[slice(*match.span())].max()
    _lower_spaces(scores, words)
    if gap:
        scores = _closed(scores, gap)
    scores[~is_scored] = -np.inf
    return scores


def choose_marking(spans: Sequence[Spans], scored: Mapping[str, ScoredText]) -> Marking:
    """The marking with the best mean character F1 on these texts, which should not be those that it is judged on.

    Of equals the simplest one, with the highest threshold; that may mark nothing at all.
    """
    best, chosen = -1.0, Marking(1.0)
    for whole_words, gap in itertools.product((False, True), GAPS):
        rows = [_characters(each, scored, whole_words, gap) for each in spans]
        pooled = np.concatenate([row[row > -np.inf] for row in rows]) if rows else np.empty(0)
        if not len(pooled):
            continue
        levels = np.quantile(pooled, np.linspace(0, 1, NUM_THRESHOLDS), method="lower")
        thresholds = np.append(np.unique(levels), np.nextafter(levels[-1], math.inf))
        f1 = np.mean([_f1(row, each.is_span, thresholds) for row, each in zip(rows, spans, strict=True)], axis=0)
        if f1.max() > best:
            best = float(f1.max())
            at = int(np.flatnonzero(f1 == f1.max())[-1])
            chosen = Marking(float(thresholds[at]), whole_words, gap)
    return chosen


def character_f1(spans: Sequence[Spans], scored: Mapping[str, ScoredText], marking: Marking) -> list[float]:
    """Of each text, in [0, 1]: twice the characters that are marked and labelled over those marked plus those labelled.

    A text without a label and without a mark has 1, with one of the two 0.

    Source: Pavlopoulos et al. 2021, SemEval-2021 task 5, whose figure is the mean over texts. Ours differs in white
    space: the ends of a stretch are trimmed, of labels and marks alike.
    """
    limit = np.array([marking.threshold])
    return [
        float(_f1(_characters(each, scored, marking.whole_words, marking.gap), each.is_span, limit)[0])
        for each in spans
    ]


def _characters(spans: Spans, scored: Mapping[str, ScoredText], whole_words: bool, gap: int) -> Characters:
    found = scored[spans.text.tokens.id].token_scores
    assert found is not None, "a scorer of tokens"
    return character_scores(spans.text, torch.as_tensor(found), whole_words=whole_words, gap=gap)


def _f1(
    scores: Characters, is_span: Bool[np.ndarray, " character"], thresholds: Float[np.ndarray, " threshold"]
) -> Float[np.ndarray, " threshold"]:
    marked, hits = (len(part) - np.searchsorted(np.sort(part), thresholds) for part in (scores, scores[is_span]))
    total = marked + int(is_span.sum())
    f1: Float[np.ndarray, " threshold"] = np.where(total == 0, 1.0, 2 * hits / np.maximum(total, 1))
    return f1


def _lower_spaces(scores: Characters, text: str) -> None:
    for match in re.finditer(r"\s+", text):
        start, end = match.span()
        sides = scores[start - 1] if start else -np.inf, scores[end] if end < len(scores) else -np.inf
        scores[start:end] = min(sides)


def _closed(scores: Characters, gap: int) -> Characters:
    """A stretch of at most `gap` characters between two higher ones scores what the lower of the two scores."""
    padded = np.pad(scores, gap + 1, constant_values=-np.inf)
    closed: Characters = grey_closing(padded, size=gap + 1)
    return closed[gap + 1 : -gap - 1]
