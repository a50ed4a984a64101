"""Held-out texts as a head and its rivals scored them in; all figures of a card out."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedTokenizerBase

from pilotfish.errors import SettingError
from pilotfish.runs import generator
from pilotfish.scores.evaluation import compare, evaluate
from pilotfish.scores.lexical import lexical_control
from pilotfish.scores.marking import Marking, Spans, character_f1, choose_marking, labelled_spans
from pilotfish.scores.metrics import Estimate, bootstrap_by_group, mean_of
from pilotfish.scores.rivals import ScoredParts, Texts
from pilotfish.scores.scored import ScoredText

logger = logging.getLogger(__name__)

MADE_WITH = ("train", "validation", "benign")
"""Parts that are not measured."""


class Figures(NamedTuple):
    metrics: dict[str, Estimate]
    """Of the head, and by how much it is above each rival (`FIGURE_minus_RIVAL`); `elsewhere/PART/` stands before those
    of other parts than `test`.
    """
    rivals: dict[str, Estimate]
    """`FIGURE/RIVAL`, likewise."""
    markings: dict[str, Marking]
    """By scorer: how its token scores became the marks of `character_f1`; chosen on validation."""


class _Marks(NamedTuple):
    groups: list[str]
    f1: dict[str, list[float]]
    """By scorer, one a text."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Measurement:
    """The head and its rivals, held against each other on every part but those that the head was made with."""

    texts: Texts
    scored: Mapping[str, ScoredParts]
    """By scorer; `head` has every part but `train` and `benign`."""
    metric: str
    tokenizer: PreTrainedTokenizerBase
    threshold: float
    """Of the head."""
    num_resamples: int
    seed: int

    def figures(self) -> Figures:
        found = Figures({}, {}, self._markings())
        for part in self.texts:
            if part not in MADE_WITH:
                prefix = "" if part == "test" else f"elsewhere/{part}/"
                marks = self._marks(part, found.markings)
                found.metrics.update({f"{prefix}{name}": e for name, e in self._of_head(part, marks).items()})
                found.rivals.update({f"{prefix}{name}": e for name, e in self._of_rivals(part, marks).items()})
        return found

    def _of_head(self, part: str, marks: _Marks) -> dict[str, Estimate]:
        """With the differences to its rivals on the texts that both scored."""
        head = self.scored["head"][part]
        options: dict[str, Any] = {"num_resamples": self.num_resamples}
        found = evaluate(head, threshold=self.threshold, generator=self._draws(), **options)
        found |= self._mean_f1(marks, "head")
        for name, parts in self.scored.items():
            if name == "head" or part not in parts:
                continue
            seen = {text.id for text in parts[part]}
            same = [text for text in head if text.id in seen]
            differences = compare(same, parts[part], generator=self._draws(), **options)
            differences |= self._mean_f1(marks, "head", name)
            found |= {f"{figure}_minus_{name}": estimate for figure, estimate in differences.items()}
        if words := self.scored.get("words"):
            found |= lexical_control(head, words[part], threshold=self.threshold, generator=self._draws(), **options)
        return found

    def _of_rivals(self, part: str, marks: _Marks) -> dict[str, Estimate]:
        found: dict[str, Estimate] = {}
        for name, parts in self.scored.items():
            if name != "head" and part in parts:
                figures = evaluate(parts[part], generator=self._draws(), num_resamples=self.num_resamples)
                figures |= self._mean_f1(marks, name)
                found |= {f"{figure}/{name}": estimate for figure, estimate in figures.items()}
        return found

    def _markings(self) -> dict[str, Marking]:
        """Of the scorers of tokens that scored validation, if spans are labelled there."""
        spans = self._spans("validation")
        scorers = [name for name in self.scored if self._scores_tokens(name, "validation")] if spans else []
        return {name: choose_marking(spans, self._by_id(name, "validation")) for name in scorers}

    def _marks(self, part: str, markings: Mapping[str, Marking]) -> _Marks:
        spans = self._spans(part)
        f1 = {
            name: character_f1(spans, self._by_id(name, part), marking)
            for name, marking in markings.items()
            if spans and self._scores_tokens(name, part)
        }
        return _Marks([each.text.tokens.group for each in spans], f1)

    def _spans(self, part: str) -> list[Spans]:
        """None where no text of the part has a span."""
        spans = labelled_spans(self.texts[part], self.metric, self.tokenizer)
        return spans if any(bool(each.is_span.any()) for each in spans) else []

    def _scores_tokens(self, scorer: str, part: str) -> bool:
        texts = self.scored[scorer].get(part, [])
        return bool(texts) and all(text.token_scores is not None for text in texts)

    def _by_id(self, scorer: str, part: str) -> dict[str, ScoredText]:
        return {text.id: text for text in self.scored[scorer][part]}

    def _mean_f1(self, marks: _Marks, scorer: str, minus: str | None = None) -> dict[str, Estimate]:
        """Of a scorer, or by how much it is above another; nothing where one of them marks no characters."""
        if scorer not in marks.f1 or (minus is not None and minus not in marks.f1):
            return {}
        values = marks.f1[scorer]
        if minus is not None:
            values = [ours - theirs for ours, theirs in zip(values, marks.f1[minus], strict=True)]
        try:
            found = bootstrap_by_group(
                mean_of(values), marks.groups, generator=self._draws(), num_resamples=self.num_resamples
            )
        except SettingError as error:
            logger.warning("character_f1 is left out: %s", error)
            return {}
        return {"character_f1": found}

    def _draws(self) -> torch.Generator:
        return generator(self.seed, "bootstrap")  # the same for every scorer
