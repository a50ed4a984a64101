"""Labelled conversations and a model in; a trained, calibrated and evaluated bank with its card out."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from pilotfish.core import Conversation, Site
from pilotfish.errors import SettingError, TextError
from pilotfish.heads import Card, FitConfig, Form, HeadBank, Measured, ThresholdCard
from pilotfish.models import LoadedModel, check_same_vocabulary, evenly_spaced_sites, load_model
from pilotfish.runs import generator, run_card
from pilotfish.scores.baselines import require_sklearn
from pilotfish.scores.cost import cost_over_judge
from pilotfish.scores.fitted import SPLITS, FittedHead, Reading, fit_head
from pilotfish.scores.limit import check_num_benign, limit
from pilotfish.scores.measured import Figures, Measurement
from pilotfish.scores.metrics import Estimate, has_both_labels
from pilotfish.scores.prepared import Text, data_cards, prepare, response_labels
from pilotfish.scores.rivals import RivalConfig, Rivals, ScoredParts, Texts, rivals
from pilotfish.scores.scored import ScoredText
from pilotfish.texts import check_leak

logger = logging.getLogger(__name__)

BENIGN = "benign"
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
    forms: tuple[Form, ...] = ()
    """Tried beside the fit's own; the best on validation is kept."""
    num_resamples: int = 1000
    """Bootstrap draws an interval."""
    rivals: RivalConfig = field(default_factory=RivalConfig)
    not_for: str = NOT_FOR
    """For the card: what must not be concluded."""

    def of_form(self, form: Form) -> RecipeConfig:
        return replace(self, fit=replace(self.fit, form=form))


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
            `test` (only measured). What else there is, by a name that says what is new about it, is measured as the
            test is, beside it: `METRIC/elsewhere/NAME/…` on the card.
        benign: What must not be flagged; none of it may stand in another split than `test`.
        work_folder: Keeps the recorded activations, about 2 bytes a token, site and hidden unit: other splits, and more
            texts, read anew only what is new.

    Raises:
        SettingError: too few benign responses for the budget, splits missing, or no scikit-learn for the baselines.
        TextError: a split lacks positive or negative labels; a text that cannot be tokenised.
        LeakError: a document that the head is made with, or its threshold, also stands where it is measured.
        ArtefactError: the work folder is in use or cannot be written.
        PairMismatch, WeightsError: the rival on a bigger model cannot be made.
    """
    _check_given(splits, benign, config)
    texts = {name: prepare(rows, reader, metric, config.max_tokens) for name, rows in splits.items()}
    forms = tuple(dict.fromkeys(form_for(texts, metric, form) for form in (config.fit.form, *config.forms)))
    texts[BENIGN] = prepare(benign, reader, metric, config.max_tokens, keeps_unlabelled=True)
    check_num_benign([text.conversation for text in texts[BENIGN]], config.budget)
    making, head = _best([_Making(texts, metric, config.of_form(form), work_folder, seed) for form in forms], reader)
    scores = torch.tensor([text.score for text in head.scored(texts[BENIGN])])
    threshold = limit(texts[BENIGN], scores, config.budget)
    found = making.rivals(reader)
    scored = {"head": making.scored_by(head, but=("train", BENIGN)), **found.scored}
    if config.rivals.target is not None:
        scored["target"] = making.scored_on_target(config.rivals.target, reader)
    figures = Measurement(
        texts=texts,
        scored=scored,
        metric=metric,
        tokenizer=reader.tokenizer,
        threshold=threshold.threshold,
        num_resamples=config.num_resamples,
        seed=seed,
    ).figures()
    figures.metrics.update(_cost(head.bank, reader, texts["test"], found.judge_tokens, seed))
    card = making.card(head, figures, threshold, rivals_made=tuple(scored))
    bank = HeadBank(head.bank.heads, reader.identity, card=card)
    return Built(bank, {name: parts["test"] for name, parts in scored.items()})


class _Making(NamedTuple):
    """What a head is made from, whichever model reads it."""

    texts: Texts
    metric: str
    config: RecipeConfig
    work_folder: Path
    seed: int

    def head_on(self, model: LoadedModel, also: tuple[Site, ...] = ()) -> FittedHead:
        reading = Reading(model, evenly_spaced_sites(model.model, self.config.num_sites), self.work_folder, also)
        return fit_head(self.texts, reading, metric=self.metric, config=self.config.fit, seed=self.seed)

    def scored_by(self, head: FittedHead, *, but: Sequence[str]) -> ScoredParts:
        return {name: head.scored(rows) for name, rows in self.texts.items() if name not in but}

    def rivals(self, reader: LoadedModel) -> Rivals:
        return rivals(
            self.texts,
            reader,
            metric=self.metric,
            config=self.config.rivals,
            max_tokens=self.config.max_tokens,
            work_folder=self.work_folder,
            seed=self.seed,
        )

    def scored_on_target(self, name: str, reader: LoadedModel) -> ScoredParts:
        """The same texts, tokens, form and seed on a bigger model, which is dropped again."""
        where = reader.model.device.type, str(reader.model.dtype).removeprefix("torch.")
        target = load_model(name, device=where[0], dtype=where[1])
        check_same_vocabulary(target, reader)
        head = self.head_on(target)
        return {part: head.scored(self.texts[part]) for part in ("validation", "test")}

    def card(self, head: FittedHead, figures: Figures, threshold: ThresholdCard, *, rivals_made: Sequence[str]) -> Card:
        metric, texts = self.metric, self.texts
        return Card(
            identity=head.bank.identity,
            data=tuple(row for part in texts for row in data_cards(_role(part), texts[part], metric)),
            metrics=_named(metric, figures.metrics),
            baselines=_named(metric, figures.rivals),
            thresholds={metric: threshold},
            calibration=head.calibration,
            better_than_words=_better_than_words(metric, figures.metrics),
            not_for=self.config.not_for + _caveats(figures.metrics, rivals_made),
            run=run_card("fit", self._settings(head, figures), self.seed),
        )

    def _settings(self, head: FittedHead, figures: Figures) -> dict[str, object]:
        chosen = {part: found._asdict() for part, found in head.result.chosen.items()}
        markings = {scorer: marking._asdict() for scorer, marking in figures.markings.items()}
        form = asdict(head.result.form)
        return {"metric": self.metric, **asdict(self.config), "form": form, "chosen": chosen, "markings": markings}


def _best(makings: Sequence[_Making], reader: LoadedModel) -> tuple[_Making, FittedHead]:
    """Of several forms the one that validation prefers."""
    made = [(making, making.head_on(reader, making.config.rivals.sites(reader.model))) for making in makings]
    for making, head in made if len(made) > 1 else ():
        logger.info("%s: validation quality %.4f", making.config.fit.form, head.result.quality)
    return max(made, key=lambda pair: pair[1].result.quality)


def _check_given(
    splits: Mapping[str, Sequence[Conversation]], benign: Sequence[Conversation], config: RecipeConfig
) -> None:
    if not set(SPLITS) <= set(splits) or BENIGN in splits:
        raise SettingError(
            f"splits are {', '.join(splits)}; give {', '.join(SPLITS)}, and other names for texts from elsewhere but "
            f"{BENIGN!r}"
        )
    check_num_benign(benign, config.budget)
    check_leak({name: splits[name] for name in SPLITS})
    made_with = {"train": splits["train"], "validation": splits["validation"], BENIGN: benign}
    check_leak(made_with)
    for name in set(splits) - set(SPLITS):
        check_leak({**made_with, name: splits[name]})
    if {"words", "length"} & set(config.rivals.names):
        require_sklearn()


def form_for(texts: Texts, metric: str, form: Form) -> Form:
    """The form asked for; a linear head of two channels becomes one of one where only one kind of label is there.

    Raises:
        TextError: a split lacks positive or negative labels of both kinds.
    """
    lacking = {
        "tokens": [name for name in SPLITS if not has_both_labels(_joined([row.labels for row in texts[name]]))],
        "responses": [name for name in SPLITS if not has_both_labels(response_labels(texts[name]))],
    }
    if all(lacking.values()):
        found = "; ".join(f"{kind}: {', '.join(names)}" for kind, names in lacking.items())
        raise TextError(
            f"some splits lack positive or negative labels for {metric!r} ({found}); give documents with both to each "
            "(spans mark the positive tokens of a text, labels whole responses)"
        )
    return replace(form, width=1) if any(lacking.values()) and form.kind == "linear" else form


def _joined(labels: Sequence[Tensor]) -> Float[Tensor, " token"]:
    return torch.cat(list(labels)) if labels else torch.zeros(0)


def _cost(
    bank: HeadBank, reader: LoadedModel, texts: Sequence[Text], judge_tokens: Mapping[str, int], seed: int
) -> dict[str, Estimate]:
    """On the texts that the judge saw."""
    seen = [text for text in texts if text.tokens.id in judge_tokens]
    if len({text.tokens.group for text in seen}) < 2:  # no interval then, and no judge
        return {}
    return cost_over_judge(
        bank,
        reader,
        num_read=torch.tensor([len(text.tokens.token_ids) for text in seen]),
        num_judged=torch.tensor([judge_tokens[text.tokens.id] for text in seen]),
        groups=[text.tokens.group for text in seen],
        generator=generator(seed, "bootstrap"),
    )


def _named(metric: str, figures: Mapping[str, Estimate]) -> dict[str, Measured]:
    return {f"{metric}/{name}": Measured(**figure._asdict()) for name, figure in figures.items()}


def _better_than_words(metric: str, metrics: Mapping[str, Estimate]) -> dict[str, bool]:
    """By tokens where they are labelled, else by responses."""
    names = ("auroc_token_minus_words", "auroc_response_minus_words")
    found = next((metrics[name] for name in names if name in metrics), None)
    return {} if found is None else {metric: found.low > 0}


def _role(part: str) -> str:
    return part if part in (*SPLITS, BENIGN) else f"elsewhere/{part}"


def _caveats(metrics: Mapping[str, Estimate], rivals_made: Sequence[str]) -> str:
    """What the comparisons do not show, in words, so that no reader of the card overlooks it."""
    kinds = {"auroc_token": "telling single tokens apart", "auroc_response": "telling whole responses apart"}
    shown = {figure: metrics.get(f"{figure}_minus_words") for figure in kinds}
    missing = [kind for figure, kind in kinds.items() if (found := shown[figure]) is not None and found.low <= 0]
    caveats = [f" Not shown to be better than TF-IDF at {kind}." for kind in missing]
    if "target" not in rivals_made:
        caveats.append(" Not compared with the same head on a bigger model.")
    return "".join(caveats)
