"""Prepared texts and a reader in; what everything that a head must beat says of the test texts out."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

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


@dataclass(frozen=True, slots=True, kw_only=True)
class RivalConfig:
    names: tuple[str, ...] = ("words", "length", "judge", "classifier")
    """`words`: TF-IDF with logistic regression. `length`: the number of tokens. `judge`: the reader itself, asked.
    `classifier`: the reader's last block, fine-tuned. The first two need the extra `evaluate`.
    """
    question: str | None = None
    """For the judge: a sentence that a yes answers when the property holds; None asks what is known for the metric."""
    num_judged: int = 200
    """Test texts, drawn at random, that judge and classifier see: they cost a pass a text."""
    num_train: int = 600
    """Training texts of the classifier."""
    classifier: ClassifierConfig = field(
        default_factory=lambda: ClassifierConfig(num_blocks=1, max_tokens=128, max_steps=120, evaluate_every=40)
    )


def rivals(
    texts: Texts, reader: LoadedModel, *, metric: str, config: RivalConfig, seed: int
) -> dict[str, list[ScoredText]]:
    """By name; those that the labels do not allow are left out and logged."""
    makers: dict[str, Callable[[], list[ScoredText]]] = {
        "words": lambda: _words(texts, seed),
        "length": lambda: _length(texts),
        "judge": lambda: _judge(texts, reader, metric, config, seed),
        "classifier": lambda: _classifier(texts, reader, config, seed),
    }
    can_learn = all(has_both_labels(response_labels(texts[name])) for name in ("train", "validation"))
    found = {}
    for name in config.names:
        if name in ("length", "classifier") and not can_learn:
            logger.warning("the baseline %s is left out: the responses of some split have one label only", name)
        else:
            found[name] = makers[name]()
    return found


def _words(texts: Texts, seed: int) -> list[ScoredText]:
    """Tokens by the characters before them, responses by all their words; one of the two where the other has no labels:
    a response then scores what its highest token scores.
    """
    train, test = ([text.tokens for text in texts[name]] for name in ("train", "test"))
    labels = [text.labels for text in texts["train"]]
    tokens: Sequence[Tensor | None] = [None] * len(test)
    if has_both_labels(torch.cat(labels)):
        tokens = token_words(train, labels, test, generator=generator(seed, "baseline"))
    responses = response_labels(texts["train"])
    if has_both_labels(responses):
        words = response_words(train, responses, test).tolist()
    else:  # then tokens have, or there would have been no fit
        pairs = zip(tokens, texts["test"], strict=True)
        words = [float(row[text.is_response].max()) for row, text in pairs if row is not None]
    return [scored(*each) for each in zip(texts["test"], words, tokens, strict=True)]


def _length(texts: Texts) -> list[ScoredText]:
    train, test = ([text.tokens for text in texts[name]] for name in ("train", "test"))
    lengths = response_length(train, response_labels(texts["train"]), test).tolist()
    return [scored(*each) for each in zip(texts["test"], lengths, strict=True)]


def _judge(texts: Texts, reader: LoadedModel, metric: str, config: RivalConfig, seed: int) -> list[ScoredText]:
    chosen = _drawn(texts["test"], config.num_judged, seed)
    question = config.question or QUESTIONS.get(metric) or f"Does this hold of the text: {metric.replace('_', ' ')}?"
    longest = min(1024, reader.model.config.max_position_embeddings // 2)  # the question needs room too
    found = judge_responses(reader, [text.conversation for text in chosen], question, max_tokens=longest)
    return [scored(*each) for each in zip(chosen, found.scores.tolist(), strict=True)]


def _classifier(texts: Texts, reader: LoadedModel, config: RivalConfig, seed: int) -> list[ScoredText]:
    chosen = {
        "train": _drawn(texts["train"], config.num_train, seed),
        "validation": _drawn(texts["validation"], config.num_judged, seed),
        "test": _drawn(texts["test"], config.num_judged, seed),
    }
    train, validation = (
        LabelledTexts([text.conversation for text in chosen[name]], response_labels(chosen[name]))
        for name in ("train", "validation")
    )
    scores = fine_tuned_scores(
        reader,
        train,
        validation=validation,
        test=[text.conversation for text in chosen["test"]],
        config=config.classifier,
        generator=generator(seed, "classifier"),
    )
    return [scored(*each) for each in zip(chosen["test"], scores.tolist(), strict=True)]


def _drawn(texts: Sequence[Text], count: int, seed: int) -> list[Text]:
    """So many, the same for every rival, in the order given."""
    order = torch.randperm(len(texts), generator=generator(seed, "rivals"))[:count]
    return [texts[index] for index in order.sort().values.tolist()]
