"""Prepared texts and a model in; a head fitted on its activations and calibrated, and what it says of texts, out."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from pilotfish.core import Site
from pilotfish.heads import CalibrationCard, FitConfig, FitResult, Head, HeadBank, Which, fit
from pilotfish.models import LoadedModel
from pilotfish.runs import generator
from pilotfish.scores.calibration import Calibration, choose_calibration, platt
from pilotfish.scores.metrics import auroc, has_both_labels
from pilotfish.scores.prepared import Text, scored_by_head
from pilotfish.scores.scored import ScoredText
from pilotfish.taps import Shelf, TokenRow, gather

logger = logging.getLogger(__name__)

SPLITS = ("train", "validation", "test")


class Reading(NamedTuple):
    """A model and the places where it is read, once a text."""

    model: LoadedModel
    sites: tuple[Site, ...]
    work_folder: Path
    """Where activations are kept."""
    also: tuple[Site, ...] = ()
    """Recorded in the same pass, for others who read the splits."""

    def of(self, texts: Sequence[Text]) -> Shelf:
        """Their activations; reads those that are not kept yet."""
        rows = [TokenRow(text.tokens.id, tuple(text.tokens.token_ids)) for text in texts]
        identity = self.model.identity.weights
        return gather(self.model.model, self.sites, rows, self.work_folder, identity_hash=identity, also=self.also)


class FittedHead(NamedTuple):
    bank: HeadBank
    """Of this head alone, without a threshold."""
    reading: Reading
    result: FitResult
    calibration: dict[str, CalibrationCard]

    def scored(self, texts: Sequence[Text]) -> list[ScoredText]:
        """What the head says of any texts."""
        shelf = self.reading.of(texts)
        return [
            scored_by_head(text, self.bank.score_text(shelf.features(text.tokens.id), boundary=text.boundary))
            for text in texts
        ]


def fit_head(
    texts: Mapping[str, Sequence[Text]], reading: Reading, *, metric: str, config: FitConfig, seed: int
) -> FittedHead:
    """Fits on `train`, stops and calibrates on `validation`; `test` is read in the same pass and not looked at.

    Raises:
        TextError, SettingError, ArtefactError: as `fit` and `gather`.
    """
    shelf = reading.of([text for name in SPLITS for text in texts[name]])
    train, validation = (_Part(tuple(text.tokens.id for text in texts[name]), shelf) for name in SPLITS[:2])
    examples = {text.tokens.id: text.example for name in SPLITS[:2] for text in texts[name]}
    result = fit(train, validation, examples, config=config, quality=auroc, generator=generator(seed, "fit"))
    head, calibration = _calibrated(result.head(metric, reading.sites), texts["validation"], shelf)
    reading = reading._replace(also=())  # the splits are what others read too
    return FittedHead(HeadBank([head], reading.model.identity), reading, result, calibration)


class _Part(NamedTuple):
    """Some rows of a shelf."""

    row_ids: tuple[str, ...]
    shelf: Shelf

    def features(self, row_id: str) -> Float[Tensor, "token feature"]:
        return self.shelf.features(row_id)


class _Labelled(NamedTuple):
    """The tokens, or the responses, that have a label."""

    logits: Float[Tensor, " item"]
    labels: Float[Tensor, " item"]
    groups: list[str]


def _calibrated(head: Head, texts: Sequence[Text], shelf: Shelf) -> tuple[Head, dict[str, CalibrationCard]]:
    """Both logits become log-odds on validation; one without labels there, or without order, stays as it is."""
    cards: dict[str, CalibrationCard] = {}
    for which in ("token", "response"):
        found = _labelled(which, head, texts, shelf)
        if not has_both_labels(found.labels) or (head.form.shares and cards):
            continue
        scale, shift = platt(found.logits, found.labels)
        if scale <= 0:
            logger.warning("on validation, higher %s logits of %s go with fewer positives", which, head.metric)
            continue
        head = head.rescaled(which, scale, shift)
        cards[f"{head.metric}/{which}"] = CalibrationCard(
            scale=scale,
            shift=shift,
            num_items=len(found.labels),
            share_positive=float(found.labels.double().mean()),
            held_out=_held_out(choose_calibration(*found)),
        )
    return head, cards


def _labelled(which: Which, head: Head, texts: Sequence[Text], shelf: Shelf) -> _Labelled:
    logits, labels, groups = [], [], []
    for text in texts:
        features = shelf.features(text.tokens.id)
        if which == "token":
            known = text.labels.isfinite()
            logits.append(head.logits(features)[known])
            labels.append(text.labels[known])
        elif not math.isnan(text.label):
            running = head.logits(features[text.boundary :], "response")
            logits.append(running[text.is_response[text.boundary :]].max()[None])
            labels.append(torch.tensor([text.label]))
        else:
            continue
        groups += [text.tokens.group] * len(labels[-1])
    return _Labelled(torch.cat(logits or [torch.zeros(0)]), torch.cat(labels or [torch.zeros(0)]), groups)


def _held_out(found: Calibration) -> dict[str, float]:
    maps = {"platt": found.platt, "isotonic": found.isotonic}
    return {
        f"{name}_{figure}": value
        for name, measured in maps.items()
        if measured is not None
        for figure, value in {"log_loss": measured.log_loss, "error": measured.calibration_error}.items()
    }
