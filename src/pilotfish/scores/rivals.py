"""Prepared texts and a reader in; what everything that a head must beat says of other texts out."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel

from pilotfish.core import Site
from pilotfish.errors import SettingError
from pilotfish.models import LoadedModel
from pilotfish.runs import generator
from pilotfish.scores.baselines import response_length, response_words, token_words
from pilotfish.scores.classifier import ClassifierConfig, LabelledTexts, fine_tuned_scores
from pilotfish.scores.judge import QUESTIONS, judge_responses
from pilotfish.scores.metrics import has_both_labels
from pilotfish.scores.prepared import Text, response_labels, scored
from pilotfish.scores.scored import ScoredText

logger = logging.getLogger(__name__)

Texts = Mapping[str, Sequence[Text]]
"""By part: `train`, `validation`, `test`, and others."""
ScoredParts = dict[str, list[ScoredText]]
"""What one scorer says, by part; always of `test`."""

RIVALS = ("words", "length", "judge", "classifier", "target")


@dataclass(frozen=True, slots=True, kw_only=True)
class RivalConfig:
    names: tuple[str, ...] = ("words", "length", "judge", "classifier")
    """`words`: TF-IDF with logistic regression. `length`: the number of tokens. `judge`: the reader itself, asked.
    `classifier`: the reader's last block, fine-tuned. `target`: the same head on a bigger model, which reads all texts
    for it. The first two need the extra `evaluate`.
    """
    target: str | None = None
    """The bigger model, for the rival of that name; it must share the reader's vocabulary."""
    question: str | None = None
    """For the judge: a sentence that a yes answers when the property holds; None asks what is known for the metric."""
    num_judged: int = 200
    """Test texts, drawn at random, that judge and classifier see: they cost a pass a text."""
    num_train: int = 600
    """Training texts of the classifier."""
    classifier: ClassifierConfig = field(
        default_factory=lambda: ClassifierConfig(num_blocks=1, max_steps=120, evaluate_every=40)
    )
    """Its `max_tokens` are not asked: it reads as far as the head does."""

    def __post_init__(self) -> None:
        if unknown := [name for name in self.names if name not in RIVALS]:
            raise SettingError(f"rival {unknown[0]!r} is unknown; use {', '.join(RIVALS)}")
        if ("target" in self.names) != (self.target is not None):
            raise SettingError(
                f"rivals are {', '.join(self.names) or 'none'} and the target is {self.target}; the rival `target` "
                "needs the name of a bigger model, and nothing else does"
            )

    def sites(self, reader: PreTrainedModel) -> tuple[Site, ...]:
        """Where rivals read the texts, beside the head."""
        return (self.classifier.site(reader),) if "classifier" in self.names else ()


class Rivals(NamedTuple):
    scored: dict[str, ScoredParts]
    """By name."""
    judge_tokens: dict[str, int]
    """How many the judge read for each text that it saw, its question included."""


def rivals(
    texts: Texts,
    reader: LoadedModel,
    *,
    metric: str,
    config: RivalConfig,
    max_tokens: int,
    work_folder: Path,
    seed: int,
) -> Rivals:
    """All but `target`, which the recipe makes as it makes the head; those that the labels do not allow are
    left out and logged. Words and length score all parts but `train` and `benign`, the others the test alone.
    """
    parts = [name for name in texts if name not in ("train", "benign")]
    sizes = {"train": config.num_train, "validation": config.num_judged, "test": config.num_judged}
    seen = {name: drawn(texts[name], size, seed) for name, size in sizes.items()}
    makers: dict[str, Callable[[], ScoredParts]] = {
        "words": lambda: _words(texts, parts, seed),
        "length": lambda: _length(texts, parts),
        "classifier": lambda: {
            "test": _classifier(seen, reader, replace(config.classifier, max_tokens=max_tokens), work_folder, seed)
        },
    }
    learns_from = {"length": texts, "classifier": seen}
    found: dict[str, ScoredParts] = {}
    judge_tokens: dict[str, int] = {}
    for name in config.names:
        given = learns_from.get(name)
        if given and not all(has_both_labels(response_labels(given[part])) for part in ("train", "validation")):
            logger.warning("the baseline %s is left out: its responses of some split have one label only", name)
        elif name == "judge":
            found[name], judge_tokens = _judge(seen["test"], reader, metric, config)
        elif name in makers:
            found[name] = makers[name]()
    return Rivals(found, judge_tokens)


def _words(texts: Texts, parts: Sequence[str], seed: int) -> ScoredParts:
    """Tokens by the characters before them, responses by all their words; one of the two where the other has no labels:
    a response then scores what its highest token scores.
    """
    judged = [text for part in parts for text in texts[part]]
    train, others = [text.tokens for text in texts["train"]], [text.tokens for text in judged]
    labels = [text.labels for text in texts["train"]]
    tokens: Sequence[Tensor | None] = [None] * len(judged)
    if has_both_labels(torch.cat(labels)):
        tokens = token_words(train, labels, others, generator=generator(seed, "baseline"))
    responses = response_labels(texts["train"])
    if has_both_labels(responses):
        words = response_words(train, responses, others).tolist()
    else:  # then tokens have, or there would have been no fit
        pairs = zip(tokens, judged, strict=True)
        words = [float(row[text.is_response].max()) for row, text in pairs if row is not None]
    return _by_part(texts, parts, [scored(*each) for each in zip(judged, words, tokens, strict=True)])


def _length(texts: Texts, parts: Sequence[str]) -> ScoredParts:
    judged = [text for part in parts for text in texts[part]]
    train = [text.tokens for text in texts["train"]]
    sizes = (_response_sizes(texts["train"]), _response_sizes(judged))
    lengths = response_length(train, response_labels(texts["train"]), *sizes).tolist()
    return _by_part(texts, parts, [scored(*each) for each in zip(judged, lengths, strict=True)])


def _response_sizes(texts: Sequence[Text]) -> Int[Tensor, " text"]:
    return torch.tensor([int(text.is_response.sum()) for text in texts])


def _by_part(texts: Texts, parts: Sequence[str], found: Sequence[ScoredText]) -> ScoredParts:
    rest = iter(found)
    return {part: [next(rest) for _ in texts[part]] for part in parts}


def _judge(
    chosen: Sequence[Text], reader: LoadedModel, metric: str, config: RivalConfig
) -> tuple[ScoredParts, dict[str, int]]:
    question = config.question or QUESTIONS.get(metric) or f"Does this hold of the text: {metric.replace('_', ' ')}?"
    longest = min(1024, reader.model.config.max_position_embeddings // 2)  # the question needs room too
    found = judge_responses(reader, [text.conversation for text in chosen], question, max_tokens=longest)
    judged = [scored(*each) for each in zip(chosen, found.scores.tolist(), strict=True)]
    return {"test": judged}, dict(zip((text.id for text in judged), found.num_tokens.tolist(), strict=True))


def _classifier(
    chosen: Texts, reader: LoadedModel, config: ClassifierConfig, work_folder: Path, seed: int
) -> list[ScoredText]:
    train, validation = (
        LabelledTexts([text.conversation for text in chosen[name]], response_labels(chosen[name]))
        for name in ("train", "validation")
    )
    scores = fine_tuned_scores(
        reader,
        train,
        validation=validation,
        test=[text.conversation for text in chosen["test"]],
        config=config,
        work_folder=work_folder,
        generator=generator(seed, "classifier"),
    )
    return [scored(*each) for each in zip(chosen["test"], scores.tolist(), strict=True)]


def drawn(texts: Sequence[Text], count: int, seed: int) -> list[Text]:
    """So many, the same for every rival, in the order given."""
    order = torch.randperm(len(texts), generator=generator(seed, "rivals"))[:count]
    return [texts[index] for index in order.sort().values.tolist()]
