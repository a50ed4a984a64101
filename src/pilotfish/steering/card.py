"""What a direction says of itself, as plain data: of which model, read how, from what, and at which dose."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from pilotfish.errors import ArtefactError, DirectionMismatch, SettingError
from pilotfish.models import Identity

Kind = Literal["add", "add_keeping_norm", "ablate", "ablate_add"]
Method = Literal["mean_difference", "pca_center", "logistic", "actadd", "head", "arithmetic", "imported", "discovered"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PairsCard:
    """What a direction was read from; all empty for one that was not read from texts."""

    num_pairs: int = 0
    source: str = ""
    license: str = ""
    tokens: str = ""
    """Which tokens were read (`extract.Tokens`)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Operand:
    """One term of the sum that arithmetic made a direction of."""

    weight: float
    name: str
    sha256: str
    """Of the operand's float32 vector."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DirectionCard:
    """The JSON that goes with a direction; an unknown or missing key is refused on reading."""

    name: str
    identity: Identity
    """The one model whose activations the direction lives among."""
    method: Method
    data: PairsCard = PairsCard()
    dose: float | None = None
    """What calibration chose for that kind of edit, for `add` the multiplier of the vector; None before."""
    kind: Kind = "add"
    """What the dose does with the vector (`Steering.kind`); a card that does not say so is of an addition."""
    provenance: tuple[Operand, ...] = ()
    """What arithmetic summed up: the vector is the sum of weight times operand."""
    notes: str = ""

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise SettingError(f"kind {self.kind!r} is unknown; use one of {', '.join(get_args(Kind))}")
        if self.dose is None and self.kind != "add":
            raise SettingError(f"kind {self.kind!r} says what a dose does, and there is none; give both or neither")
        if not self.name:
            raise SettingError("a direction needs a name; say what adding it should bring about")
        if self.method not in get_args(Method):
            raise SettingError(f"method {self.method!r} is unknown; use one of {', '.join(get_args(Method))}")

    @classmethod
    def from_json(cls, raw: Any, where: str) -> DirectionCard:
        """The inverse of `dataclasses.asdict`; `kind` may be missing.

        Raises:
            ArtefactError: a key is unknown or missing, or a value is of another kind.
        """
        values = _checked(cls, {"kind": "add", **raw} if isinstance(raw, Mapping) else raw, where)
        values["identity"] = Identity(**_checked(Identity, values["identity"], where))
        values["data"] = PairsCard(**_checked(PairsCard, values["data"], where))
        operands = values["provenance"] if isinstance(values["provenance"], list) else [values["provenance"]]
        values["provenance"] = tuple(Operand(**_checked(Operand, operand, where)) for operand in operands)
        try:
            return cls(**values)
        except SettingError as error:
            raise ArtefactError(f"{where}: {error}; copy the direction again") from error


def check_same_model(made_for: Identity, other: Identity, what: str) -> None:
    """Refuses another model than the one that a direction was made for; the name alone may differ.

    Raises:
        DirectionMismatch: names what differs.
    """
    names = [field.name for field in fields(Identity) if field.name != "name"]
    differing = [name for name in names if getattr(made_for, name) != getattr(other, name)]
    if differing:
        raise DirectionMismatch(
            f"{what} was made for {made_for.name}, not for {other.name}: other "
            f"{', '.join(name.replace('_', ' ') for name in differing)}. Extract it from this model, or load the model "
            "that it was made for"
        )


def _checked(kind: type[Any], raw: Any, where: str) -> dict[str, Any]:
    """The fields of a dataclass as they stand in JSON: none unknown, none missing, each of its own kind."""
    if not isinstance(raw, Mapping):
        raise ArtefactError(f"{where}: a {type(raw).__name__} where {kind.__name__} belongs; copy the direction again")
    wrong = sorted(raw.keys() ^ {field.name for field in fields(kind)})
    if wrong:
        raise ArtefactError(
            f"{where}: unknown or missing keys for {kind.__name__}: {', '.join(wrong)}; written by another version of "
            "Pilotfish?"
        )
    number = (int, float)
    kinds: dict[str, Any] = {"str": str, "int": int, "float": number, "float | None": (*number, type(None))}
    for field in fields(kind):
        allowed = kinds.get(str(field.type))
        if allowed is not None and (not isinstance(raw[field.name], allowed) or isinstance(raw[field.name], bool)):
            raise ArtefactError(
                f"{where}: {kind.__name__}.{field.name} is {raw[field.name]!r}, not {field.type}; copy the direction "
                "again"
            )
    return {
        name: float(value) if name in ("weight", "dose") and value is not None else value for name, value in raw.items()
    }
