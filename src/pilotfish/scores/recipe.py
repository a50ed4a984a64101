"""Labelled conversations and a model in; a trained, calibrated and evaluated bank with its card out."""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from pilotfish.core import Conversation, Site
from pilotfish.errors import SettingError, TextError
from pilotfish.heads import (
    CalibrationCard,
    Card,
    DataCard,
    FitConfig,
    FitResult,
    Form,
    Head,
    HeadBank,
    Measured,
    ThresholdCard,
    Which,
    fit,
)
from pilotfish.models import LoadedModel, evenly_spaced_sites
from pilotfish.runs import generator, run_card
from pilotfish.scores.baselines import require_sklearn
from pilotfish.scores.calibration import Threshold, num_benign_needed, platt, threshold_at_budget
from pilotfish.scores.evaluation import compare, evaluate
from pilotfish.scores.lexical import lexical_control
from pilotfish.scores.metrics import Estimate, auroc, has_both_labels
from pilotfish.scores.prepared import Text, prepare, response_labels, scored_by_head
from pilotfish.scores.rivals import RivalConfig, rivals
from pilotfish.scores.scored import ScoredText
from pilotfish.taps import Recording, TokenRow, record
from pilotfish.texts import check_leak

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
    rivals: RivalConfig = field(default_factory=RivalConfig)
    not_for: str = NOT_FOR
    """For the card: what must not be concluded."""


class Built(NamedTuple):
    bank: HeadBank
    scored: dict[str, list[ScoredText]]
    """The test texts as the head and as each baseline scores them; they hold the texts' own words."""


def build_bank(
    splits: Mapping[str, Sequence[Conversation]],
    benign: Sequence[Conversation],
    reader: LoadedModel,
    *,
    metric: str,
    config: RecipeConfig,
    work_folder: Path,
    seed: int,
) -> Built:
    """Records, fits, calibrates, sets the threshold and evaluates; an interrupted run goes on from its recordings.

    Args:
        splits: `train` (the head learns), `validation` (stops the fit, chooses its regularisation, calibrates) and
            `test` (only measured).
        benign: What must not be flagged; none of it may stand in `train` or `validation`.
        work_folder: Keeps the recorded activations, about 2 bytes a token, site and hidden unit. A folder in it is
            named by what it holds, so that other splits of the same texts find them there.

    Raises:
        SettingError: too few benign responses for the budget, splits missing, or no scikit-learn for the baselines.
        TextError: a split lacks positive or negative labels; a text that cannot be tokenised.
        LeakError: a document stands in two splits, or a benign one among those that the head was made with.
        ArtefactError: a recording in the work folder is damaged.
    """
    _check_given(splits, benign, config)
    texts = {name: prepare(rows, reader, metric, config.max_tokens) for name, rows in splits.items()}
    form = _form(texts, metric, config.fit.form)
    texts["benign"] = prepare(benign, reader, metric, config.max_tokens, keeps_unlabelled=True)
    _check_num_benign(len(texts["benign"]), config.budget)
    sites = evenly_spaced_sites(reader.model, config.num_sites)
    recorded = _recorded([text for name in SPLITS for text in texts[name]], reader, sites, work_folder)
    recorded_benign = _recorded(texts["benign"], reader, sites, work_folder)
    result = _fitted(texts, recorded, replace(config.fit, form=form), seed)
    head, calibration = _calibrated(result.head(metric, sites), texts["validation"], recorded)
    bank = HeadBank([head], reader.identity)
    benign_scores = [text.score for text in _scored(bank, texts["benign"], recorded_benign)]
    threshold = threshold_at_budget(torch.tensor(benign_scores), config.budget)
    by_scorer = {"head": _scored(bank, texts["test"], recorded)}
    by_scorer |= rivals(texts, reader, metric=metric, config=config.rivals, seed=seed)
    figures = _evaluated(metric, by_scorer, threshold.threshold, config.num_resamples, seed)
    card = Card(
        identity=reader.identity,
        data=_data(texts, metric),
        metrics=figures.metrics,
        baselines=figures.baselines,
        thresholds={metric: _threshold_card(threshold, texts["benign"])},
        calibration=calibration,
        better_than_words=_better_than_words(metric, figures.metrics),
        not_for=config.not_for + _caveats(metric, figures.metrics),
        run=run_card("fit", _settings(metric, config, result), seed),
    )
    return Built(HeadBank([head], reader.identity, card=card), by_scorer)


def _fitted(texts: Mapping[str, Sequence[Text]], recorded: Recording, config: FitConfig, seed: int) -> FitResult:
    train, validation = (_Part(tuple(text.tokens.id for text in texts[name]), recorded) for name in SPLITS[:2])
    examples = {text.tokens.id: text.example for name in SPLITS[:2] for text in texts[name]}
    return fit(train, validation, examples, config=config, quality=auroc, generator=generator(seed, "fit"))


class _Part(NamedTuple):
    """Some rows of a recording."""

    row_ids: tuple[str, ...]
    recording: Recording

    def features(self, row_id: str) -> Float[Tensor, "token feature"]:
        return self.recording.features(row_id)


def _check_given(
    splits: Mapping[str, Sequence[Conversation]], benign: Sequence[Conversation], config: RecipeConfig
) -> None:
    if set(splits) != set(SPLITS):
        raise SettingError(f"splits are {', '.join(splits)}; give {', '.join(SPLITS)}")
    _check_num_benign(len(benign), config.budget)
    check_leak(splits)
    check_leak({"train": splits["train"], "validation": splits["validation"], "benign": benign})
    if {"words", "length"} & set(config.rivals.names):
        require_sklearn()


def _check_num_benign(count: int, budget: float) -> None:
    needed = num_benign_needed(budget)
    if count < needed:
        raise SettingError(
            f"{count} benign responses cannot show a false-positive budget of {budget:g}; give {needed} or more, or a "
            "larger budget"
        )


def _form(texts: Mapping[str, Sequence[Text]], metric: str, form: Form) -> Form:
    """The form asked for; a linear head of two channels becomes one of one where only one kind of label is there."""
    lacking = {
        "tokens": [name for name in SPLITS if not has_both_labels(torch.cat([row.labels for row in texts[name]]))],
        "responses": [name for name in SPLITS if not has_both_labels(response_labels(texts[name]))],
    }
    if all(lacking.values()):
        found = "; ".join(f"{kind}: {', '.join(names)}" for kind, names in lacking.items())
        raise TextError(
            f"some splits lack positive or negative labels for {metric!r} ({found}); give documents with both to each "
            "(spans mark the positive tokens of a text, labels whole responses)"
        )
    return replace(form, width=1) if any(lacking.values()) and form.kind == "linear" else form


def _recorded(texts: Sequence[Text], reader: LoadedModel, sites: tuple[Site, ...], work_folder: Path) -> Recording:
    """The texts' activations, in a folder that is named by reader, sites and tokens."""
    rows = sorted(TokenRow(text.tokens.id, tuple(text.tokens.token_ids)) for text in texts)
    content = json.dumps([reader.identity.weights, str(reader.model.dtype), [str(site) for site in sites], rows])
    folder = work_folder / hashlib.sha256(content.encode()).hexdigest()[:16]
    return record(reader.model, sites, rows, folder, identity_hash=reader.identity.weights)


def _calibrated(head: Head, texts: Sequence[Text], recorded: Recording) -> tuple[Head, dict[str, CalibrationCard]]:
    """Both logits become log-odds on validation; one without labels there, or without order, stays as it is."""
    cards: dict[str, CalibrationCard] = {}
    for which in ("token", "response"):
        logits, labels = _validation(which, head, texts, recorded)
        if not has_both_labels(labels) or (head.form.shares and cards):
            continue
        scale, shift = platt(logits, labels)
        if scale <= 0:
            logger.warning("on validation, higher %s logits of %s go with fewer positives", which, head.metric)
            continue
        head = head.rescaled(which, scale, shift)
        cards[f"{head.metric}/{which}"] = CalibrationCard(
            scale=scale, shift=shift, num_items=len(labels), share_positive=float(labels.double().mean())
        )
    return head, cards


def _validation(
    which: Which, head: Head, texts: Sequence[Text], recorded: Recording
) -> tuple[Float[Tensor, " item"], Float[Tensor, " item"]]:
    """Logits and labels of the tokens, or the responses, that have one."""
    logits, labels = [], []
    for text in texts:
        features = recorded.features(text.tokens.id)
        if which == "token":
            known = text.labels.isfinite()
            logits.append(head.logits(features)[known])
            labels.append(text.labels[known])
        elif not math.isnan(text.label):
            running = head.logits(features[text.boundary :], "response")
            logits.append(running[text.is_response[text.boundary :]].max()[None])
            labels.append(torch.tensor([text.label]))
    return torch.cat(logits or [torch.zeros(0)]), torch.cat(labels or [torch.zeros(0)])


def _scored(bank: HeadBank, texts: Sequence[Text], recording: Recording) -> list[ScoredText]:
    """What the bank's only head says of recorded texts."""
    return [
        scored_by_head(text, bank.score_text(recording.features(text.tokens.id), boundary=text.boundary))
        for text in texts
    ]


class _Figures(NamedTuple):
    metrics: dict[str, Measured]
    baselines: dict[str, Measured]


def _evaluated(
    metric: str, by_scorer: Mapping[str, list[ScoredText]], threshold: float, num_resamples: int, seed: int
) -> _Figures:
    """Figures of the head and of its baselines, each with the difference on the texts that both scored."""

    def bootstrap() -> torch.Generator:
        return generator(seed, "bootstrap")  # the same draws for every scorer

    head = by_scorer["head"]
    metrics = evaluate(head, threshold=threshold, generator=bootstrap(), num_resamples=num_resamples)
    others: dict[str, Estimate] = {}
    for name, rival in by_scorer.items():
        if name == "head":
            continue
        found = evaluate(rival, generator=bootstrap(), num_resamples=num_resamples)
        others |= {f"{figure}/{name}": estimate for figure, estimate in found.items()}
        seen = {text.id for text in rival}
        same = [text for text in head if text.id in seen]
        differences = compare(same, rival, generator=bootstrap(), num_resamples=num_resamples)
        metrics |= {f"{figure}_minus_{name}": estimate for figure, estimate in differences.items()}
    if "words" in by_scorer:
        metrics |= lexical_control(
            head, by_scorer["words"], threshold=threshold, generator=bootstrap(), num_resamples=num_resamples
        )
    return _Figures(*({f"{metric}/{k}": Measured(**v._asdict()) for k, v in e.items()} for e in (metrics, others)))


def _better_than_words(metric: str, metrics: Mapping[str, Measured]) -> dict[str, bool]:
    """By tokens where they are labelled, else by responses."""
    names = (f"{metric}/auroc_token_minus_words", f"{metric}/auroc_response_minus_words")
    found = next((metrics[name] for name in names if name in metrics), None)
    return {} if found is None else {metric: found.low > 0}


def _data(texts: Mapping[str, Sequence[Text]], metric: str) -> tuple[DataCard, ...]:
    sizes: dict[tuple[str, str, str], list[int]] = defaultdict(list)
    for role, rows in texts.items():
        for text in rows:
            sizes[role, text.conversation.source, text.conversation.license].append(len(text.tokens.token_ids))
    return tuple(
        DataCard(
            source=source,
            license=license,
            num_rows=len(counts),
            num_tokens=sum(counts),
            role=role,
            metric=metric,
        )
        for (role, source, license), counts in sizes.items()
    )


def _threshold_card(threshold: Threshold, benign: Sequence[Text]) -> ThresholdCard:
    sources = sorted({text.conversation.source or "unnamed" for text in benign})
    is_answered = any(message.role == "assistant" for text in benign for message in text.conversation.messages)
    scope: Literal["answer", "prompt"] = "answer" if is_answered else "prompt"
    return ThresholdCard(**threshold._asdict(), benign_source=", ".join(sources), scope=scope)


def _caveats(metric: str, metrics: Mapping[str, Measured]) -> str:
    """What the comparison with words does not show, in words, so that no reader of the card overlooks it."""
    kinds = {"auroc_token": "telling single tokens apart", "auroc_response": "telling whole responses apart"}
    shown = {figure: metrics.get(f"{metric}/{figure}_minus_words") for figure in kinds}
    missing = [kind for figure, kind in kinds.items() if (found := shown[figure]) is not None and found.low <= 0]
    return "".join(f" Not shown to be better than TF-IDF at {kind}." for kind in missing)


def _settings(metric: str, config: RecipeConfig, result: FitResult) -> dict[str, object]:
    chosen = {part: found._asdict() for part, found in result.chosen.items()}
    return {"metric": metric, **asdict(config), "form": asdict(result.form), "chosen": chosen}
