"""Labelled conversations and a model in; a trained, calibrated and evaluated bank with its card out."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from pilotfish.core import Conversation, Site
from pilotfish.errors import SettingError, TextError
from pilotfish.heads import (
    CalibrationCard,
    Card,
    DataCard,
    FitConfig,
    FitResult,
    HeadBank,
    LinearHead,
    Measured,
    ThresholdCard,
    fit,
)
from pilotfish.models import LoadedModel, evenly_spaced_sites
from pilotfish.runs import generator, run_card
from pilotfish.scores import baselines
from pilotfish.scores.calibration import Threshold, num_benign_needed, platt, threshold_at_budget
from pilotfish.scores.evaluation import ScoredText, compare, evaluate
from pilotfish.scores.metrics import Estimate, auroc
from pilotfish.taps import Recording, TokenRow, record
from pilotfish.texts import TokenizedText, check_leak, tokenize

logger = logging.getLogger(__name__)

SPLITS = ("train", "validation", "test")
NOT_FOR = (
    "A score says how much a text looks like the labelled training texts to this reader. It does not say that the "
    "model has an intention, and a low score does not show that a text is harmless. Not tested: other languages, other "
    "kinds of text than those listed under `data`, and texts written to evade the head."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class RecipeConfig:
    num_sites: int = 5
    """Evenly spaced places that the head reads, the final norm among them."""
    max_tokens: int = 512
    """Longer texts are cut here."""
    budget: float = 0.01
    """Share of benign responses that may be flagged."""
    fit: FitConfig = field(default_factory=FitConfig)
    num_resamples: int = 1000
    """Bootstrap draws an interval."""
    has_baselines: bool = True
    """Whether to train TF-IDF and length baselines too, which needs the extra `evaluate`."""
    not_for: str = NOT_FOR
    """For the card: what must not be concluded."""


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
    def prompt(self) -> str:
        return "\n".join(message.content for message in self.conversation.messages[:-1])


def build_bank(
    splits: Mapping[str, Sequence[Conversation]],
    benign: Sequence[Conversation],
    reader: LoadedModel,
    *,
    metric: str,
    config: RecipeConfig,
    work_folder: Path,
    seed: int,
) -> HeadBank:
    """Records, fits, calibrates, sets the threshold and evaluates; an interrupted run goes on from its recordings.

    Args:
        splits: `train` (the head learns), `validation` (stops the fit, chooses its regularisation, calibrates) and
            `test` (only measured).
        benign: What must not be flagged; none of it may stand in `train` or `validation`.
        work_folder: Keeps the recorded activations, one folder a split; about 2 bytes a token, site and hidden unit.

    Raises:
        SettingError: too few benign responses for the budget, splits missing, or no scikit-learn for the baselines.
        TextError: a split lacks positive or negative tokens; a text that cannot be tokenised.
        LeakError: a document stands in two splits, or a benign one among those that the head was made with.
        ArtefactError: the work folder holds recordings of other texts or of another model.
    """
    _check_given(splits, benign, config)
    texts = {name: prepare(rows, reader, metric, config.max_tokens) for name, rows in splits.items()}
    for name in SPLITS:
        _check_labels(name, texts[name], metric)
    texts["benign"] = prepare(benign, reader, metric, config.max_tokens, keeps_unlabelled=True)
    _check_num_benign(len(texts["benign"]), config.budget)
    sites = evenly_spaced_sites(reader.model, config.num_sites)
    recordings = {name: _record(rows, reader, sites, work_folder / name) for name, rows in texts.items()}

    labels = {text.tokens.id: text.labels for name in ("train", "validation") for text in texts[name]}
    result = fit(
        recordings["train"],
        recordings["validation"],
        labels,
        config=config.fit,
        quality=auroc,
        generator=generator(seed, "fit"),
    )
    head, calibration = _calibrated(result.head(metric, sites), recordings["validation"], labels)
    bank = HeadBank([head], reader.identity)
    threshold = _threshold(bank, texts["benign"], recordings["benign"], config.budget)
    figures = _evaluated(bank, texts, recordings["test"], threshold.threshold, config, seed)
    difference = figures.metrics.get(f"{metric}/auroc_token_minus_words")
    card = Card(
        identity=reader.identity,
        data=_data(texts),
        metrics=figures.metrics,
        baselines=figures.baselines,
        thresholds={metric: _threshold_card(threshold, texts["benign"])},
        calibration={metric: calibration},
        better_than_words={} if difference is None else {metric: difference.low > 0},
        not_for=config.not_for + _caveats(metric, figures.metrics),
        run=run_card("fit", _settings(metric, config, result), seed),
    )
    return HeadBank([head], reader.identity, card=card)


def _check_given(
    splits: Mapping[str, Sequence[Conversation]], benign: Sequence[Conversation], config: RecipeConfig
) -> None:
    if set(splits) != set(SPLITS):
        raise SettingError(f"splits are {', '.join(splits)}; give {', '.join(SPLITS)}")
    _check_num_benign(len(benign), config.budget)
    check_leak(splits)
    check_leak({"train": splits["train"], "validation": splits["validation"], "benign": benign})
    if config.has_baselines:
        baselines.require_sklearn()


def _check_num_benign(count: int, budget: float) -> None:
    needed = num_benign_needed(budget)
    if count < needed:
        raise SettingError(
            f"{count} benign responses cannot show a false-positive budget of {budget:g}; give {needed} or more, or a "
            "larger budget"
        )


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
    kept = [
        text
        for text in texts
        if bool(text.is_response.any()) and (keeps_unlabelled or bool(text.labels.isfinite().any()))
    ]
    if len(kept) < len(texts):
        logger.warning(
            "%d of %d texts have no labelled token within %d", len(texts) - len(kept), len(texts), max_tokens
        )
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


def _check_labels(name: str, texts: Sequence[Text], metric: str) -> None:
    known = [text.labels[text.labels.isfinite()] for text in texts]
    num_positive = sum(int((labels > 0).sum()) for labels in known)
    num_negative = sum(map(len, known)) - num_positive
    if not num_positive or not num_negative:
        raise TextError(
            f"split {name} has {num_positive} positive and {num_negative} negative tokens for {metric!r} in "
            f"{len(texts)} texts; give documents with both (spans mark the positive tokens of a text)"
        )


def _record(texts: Sequence[Text], reader: LoadedModel, sites: tuple[Site, ...], folder: Path) -> Recording:
    rows = [TokenRow(text.tokens.id, tuple(text.tokens.token_ids)) for text in texts]
    return record(reader.model, sites, rows, folder, identity_hash=reader.identity.weights)


def _calibrated(
    head: LinearHead, recording: Recording, labels: Mapping[str, Tensor]
) -> tuple[LinearHead, CalibrationCard]:
    known = {row: labels[row].isfinite() for row in recording.row_ids}
    logits = torch.cat([head.logits(recording.features(row)[known[row]]) for row in recording.row_ids])
    targets = torch.cat([labels[row][known[row]] for row in recording.row_ids])
    found = platt(logits, targets)
    if found.scale <= 0:
        logger.warning(
            "on validation, higher logits of %s go with fewer positives: the head has learned nothing", head.metric
        )
    card = CalibrationCard(**found._asdict(), num_tokens=len(targets), share_positive=float(targets.double().mean()))
    return head.rescaled(*found), card


def _threshold(bank: HeadBank, texts: Sequence[Text], recording: Recording, budget: float) -> Threshold:
    scored = _scored(bank, texts, recording)
    return threshold_at_budget(torch.tensor([text.score for text in scored]), budget)


def _scored(bank: HeadBank, texts: Sequence[Text], recording: Recording) -> list[ScoredText]:
    """What the bank's only head says of recorded texts; a response scores what its highest token scores."""
    scored = []
    for text in texts:
        scores = bank.probabilities(recording.features(text.tokens.id))[:, 0]
        scored.append(_scored_text(text, scores, float(scores[text.is_response].max())))
    return scored


def _scored_text(text: Text, token_scores: Tensor | None, score: float) -> ScoredText:
    return ScoredText(
        id=text.tokens.id,
        group=text.tokens.group,
        prompt=text.prompt,
        label=text.label,
        score=score,
        token_labels=text.labels,
        token_scores=token_scores,
    )


class _Figures(NamedTuple):
    metrics: dict[str, Measured]
    baselines: dict[str, Measured]


def _evaluated(
    bank: HeadBank,
    texts: Mapping[str, Sequence[Text]],
    recording: Recording,
    threshold: float,
    config: RecipeConfig,
    seed: int,
) -> _Figures:
    metric, num_resamples = bank.metrics[0], config.num_resamples
    scored = _scored(bank, texts["test"], recording)

    def bootstrap() -> torch.Generator:
        return generator(seed, "bootstrap")  # the same draws for every scorer

    metrics = evaluate(scored, threshold=threshold, generator=bootstrap(), num_resamples=num_resamples)
    others: dict[str, Estimate] = {}
    for name, baseline in _baselines(texts, seed).items() if config.has_baselines else ():
        found = evaluate(baseline, generator=bootstrap(), num_resamples=num_resamples)
        others |= {f"{figure}/{name}": estimate for figure, estimate in found.items()}
        differences = compare(scored, baseline, generator=bootstrap(), num_resamples=num_resamples)
        metrics |= {f"{figure}_minus_{name}": estimate for figure, estimate in differences.items()}
    return _Figures(*({f"{metric}/{k}": Measured(**v._asdict()) for k, v in e.items()} for e in (metrics, others)))


def _baselines(texts: Mapping[str, Sequence[Text]], seed: int) -> dict[str, list[ScoredText]]:
    """The test texts as scored by their words and by their length alone."""
    train, test = ([text.tokens for text in texts[name]] for name in ("train", "test"))
    responses = torch.tensor([text.label for text in texts["train"]])
    tokens = baselines.token_words(
        train, [text.labels for text in texts["train"]], test, generator=generator(seed, "baseline")
    )
    words = baselines.response_words(train, responses, test).tolist()
    lengths = baselines.response_length(train, responses, test).tolist()
    return {
        "words": [_scored_text(*each) for each in zip(texts["test"], tokens, words, strict=True)],
        "length": [_scored_text(text, None, length) for text, length in zip(texts["test"], lengths, strict=True)],
    }


def _data(texts: Mapping[str, Sequence[Text]]) -> tuple[DataCard, ...]:
    sizes: dict[tuple[str, str, str], list[int]] = defaultdict(list)
    for role, rows in texts.items():
        for text in rows:
            sizes[role, text.conversation.source, text.conversation.license].append(len(text.tokens.token_ids))
    return tuple(
        DataCard(source=source, license=license, num_rows=len(counts), num_tokens=sum(counts), role=role)
        for (role, source, license), counts in sizes.items()
    )


def _threshold_card(threshold: Threshold, benign: Sequence[Text]) -> ThresholdCard:
    sources = sorted({text.conversation.source or "unnamed" for text in benign})
    return ThresholdCard(**threshold._asdict(), benign_source=", ".join(sources))


def _caveats(metric: str, metrics: Mapping[str, Measured]) -> str:
    """What the comparison with words does not show, in words, so that no reader of the card overlooks it."""
    kinds = {"auroc_token": "telling single tokens apart", "auroc_response": "telling whole responses apart"}
    shown = {figure: metrics.get(f"{metric}/{figure}_minus_words") for figure in kinds}
    missing = [kind for figure, kind in kinds.items() if (found := shown[figure]) is not None and found.low <= 0]
    return "".join(f" Not shown to be better than TF-IDF at {kind}." for kind in missing)


def _settings(metric: str, config: RecipeConfig, result: FitResult) -> dict[str, object]:
    chosen = {"epoch": result.epoch, "weight_decay": result.weight_decay, "quality": result.quality}
    return {"metric": metric, **asdict(config), "chosen": chosen}
