"""What a bank says of itself, as plain data: made for what, from what, how good, and what it is not for."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

from pilotfish.errors import ArtefactError
from pilotfish.heads.form import Kind
from pilotfish.models import Identity
from pilotfish.runs import write_json


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """A number with its interval."""

    value: float
    low: float
    high: float
    """Ends of the 95 % interval."""
    n: int
    """Independent groups (source documents) that the interval resamples."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadCard:
    """What a head reads, and its form (`heads.Form`)."""

    sites: tuple[str, ...]
    kind: Kind
    width: int
    window: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceCard:
    """What a threshold flags of the benign documents of one source."""

    num_benign: int
    num_flagged: int
    fpr_upper: float
    """As the threshold's, of this source alone; may be over the budget, which is for all together."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ThresholdCard:
    """Where a metric counts as found, and what that promises."""

    threshold: float
    """Probability."""
    budget: float
    """Share of benign responses that may be flagged."""
    num_benign: int
    """Documents; one of several responses counts once, with the highest score of them."""
    num_flagged: int
    fpr_upper: float
    """One-sided 95 % Clopper-Pearson bound on the share flagged."""
    benign_source: str
    scope: Literal["answer", "prompt"] = "answer"
    """The side of an exchange that the benign texts were: judge that one."""
    median_tokens: int | None = None
    """Of that side; None on older cards. A longer text has more chances to be flagged."""
    by_source: Mapping[str, SourceCard] = field(default_factory=dict)
    """Empty on older cards. Traffic that is all like one source is promised that source's bound and no other."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationCard:
    """Platt's map from the fitted logit to log-odds; the weights hold it already."""

    scale: float
    shift: float
    num_items: int
    """Validation tokens or responses that it was fitted on; probabilities are for their share of positives."""
    share_positive: float
    held_out: Mapping[str, float] = field(default_factory=dict)
    """`platt_log_loss` (nats), `platt_error` (expected calibration error), and the same of `isotonic`, on validation
    documents that a map was not fitted on; empty where those are too few. The isotonic map is not used.
    """


@dataclass(frozen=True, slots=True, kw_only=True)
class DataCard:
    source: str
    license: str
    num_rows: int
    num_tokens: int
    role: str
    """train, validation, test, benign, or elsewhere/NAME."""
    metric: str = ""
    """Of the head that they served."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """The JSON beside a bank's weights; unknown keys are refused on reading, and missing ones that cards always had."""

    identity: Identity
    """The one model that the heads were made for."""
    heads: Mapping[str, HeadCard] = field(default_factory=dict)
    """Metric to what its head is made of."""
    weights_sha256: str = ""
    data: tuple[DataCard, ...] = ()
    metrics: Mapping[str, Measured] = field(default_factory=dict)
    """Name of a figure (`insecure_code/auroc_token`, …) on held-out data."""
    baselines: Mapping[str, Measured] = field(default_factory=dict)
    """The same figures of the baselines."""
    thresholds: Mapping[str, ThresholdCard] = field(default_factory=dict)
    calibration: Mapping[str, CalibrationCard] = field(default_factory=dict)
    """`metric/token` and `metric/response` to how their logits became probabilities."""
    better_than_words: Mapping[str, bool] = field(default_factory=dict)
    """Metric to whether its head beats TF-IDF on held-out tokens: the interval of the difference lies above 0."""
    not_for: str = ""
    """What must not be concluded from a score."""
    run: Mapping[str, Any] = field(default_factory=dict)
    """Command, settings, versions and seed that made it."""

    def save(self, path: Path) -> None:
        write_json(path, asdict(self))

    @classmethod
    def load(cls, path: Path) -> Card:
        """Raises `ArtefactError` when the file is missing, is not JSON, or has unknown or missing keys."""
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise ArtefactError(
                f"{path} cannot be read: {error.strerror}; a bank is heads.safetensors with card.json"
            ) from error
        except ValueError as error:
            raise ArtefactError(f"{path} is not JSON: {error}; copy the bank again") from error
        try:
            return cls._read(_checked(cls, raw, path), path)
        except (AttributeError, TypeError) as error:
            raise ArtefactError(f"{path} is not the card of a bank: {error}; copy the bank again") from error

    @classmethod
    def _read(cls, raw: dict[str, Any], path: Path) -> Card:
        raw["identity"] = Identity(**_checked(Identity, raw["identity"], path))
        raw["data"] = tuple(DataCard(**_checked(DataCard, row, path)) for row in raw["data"])
        for name, kind in _TABLES.items():
            raw[name] = {key: _entry(kind, value, path) for key, value in raw[name].items()}
        return cls(**raw)

    def subset(self, metrics: Sequence[str]) -> Card:
        """What the card says of some of its metrics."""
        names = (*_TABLES, "better_than_words")
        kept: dict[str, Any] = {
            name: {k: v for k, v in getattr(self, name).items() if k.split("/")[0] in metrics} for name in names
        }
        data = tuple(row for row in self.data if row.metric in (*metrics, ""))
        return replace(self, data=data, **kept)

    @classmethod
    def joined(cls, cards: Sequence[Card]) -> Card:
        """One card that says what several cards of one model, of different metrics, say."""
        names = (*_TABLES, "better_than_words")
        tables: dict[str, Any] = {
            name: {k: v for card in cards for k, v in getattr(card, name).items()} for name in names
        }
        return cls(
            identity=cards[0].identity,
            data=tuple(row for card in cards for row in card.data),
            not_for="\n".join(dict.fromkeys(card.not_for for card in cards if card.not_for)),
            run={"joined": [dict(card.run) for card in cards]},
            **tables,
        )


_TABLES: dict[str, type[Any]] = {
    "heads": HeadCard,
    "metrics": Measured,
    "baselines": Measured,
    "thresholds": ThresholdCard,
    "calibration": CalibrationCard,
}
"""Fields that map to dataclasses."""


_LATER = {"median_tokens", "by_source"}
"""Keys that older cards lack."""


def _entry(kind: type[Any], raw: Any, path: Path) -> Any:
    known = _checked(kind, raw, path)
    if "by_source" in known:
        known["by_source"] = {name: _entry(SourceCard, found, path) for name, found in known["by_source"].items()}
    return kind(**known)


def _checked(kind: type[Any], raw: Any, path: Path) -> dict[str, Any]:
    if not isinstance(raw, dict):
        raise ArtefactError(f"{path}: a {type(raw).__name__} where {kind.__name__} belongs; copy the bank again")
    names = {item.name for item in fields(kind)}
    wrong = sorted((names - raw.keys() - _LATER) | (raw.keys() - names))
    if wrong:
        raise ArtefactError(
            f"{path}: unknown or missing keys for {kind.__name__}: {', '.join(wrong)}; written by another version of "
            "Pilotfish?"
        )
    return {name: tuple(value) if isinstance(value, list) else value for name, value in raw.items()}
