"""A site and a vector with its card in; arithmetic, projections, heads and edits out."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from pilotfish.core import Site
from pilotfish.errors import DirectionMismatch, SettingError
from pilotfish.heads import Head, Which, linear_head
from pilotfish.models import Identity, site_module
from pilotfish.steering.card import DirectionCard, Kind, Operand, check_same_model
from pilotfish.taps import Ablate, AblateAdd, Add, AddKeepingNorm, Edit, Op, When


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Direction:
    """A vector among the activations of one site of one model.

    Sums, multiples and rests of directions are directions: their cards say of what they are made. They have no dose,
    since the one that suited an operand need not suit them.
    """

    site: Site
    """Where it was read, and where it is added."""
    vector: Float[Tensor, " hidden"]
    """Float32, in the units of the activations; not normalised."""
    card: DirectionCard

    def __post_init__(self) -> None:
        given = f"direction {self.card.name!r} at {self.site}"
        if self.vector.ndim != 1 or self.vector.dtype != torch.float32:
            raise SettingError(
                f"{given} got a tensor of shape {tuple(self.vector.shape)} and {self.vector.dtype}; give one vector of "
                "float32"
            )
        if len(self.vector) != self.card.identity.hidden_size or self.site.layer >= self.card.identity.num_layers:
            raise DirectionMismatch(
                f"{given} has {len(self.vector)} units; {self.card.identity.name} has "
                f"{self.card.identity.hidden_size} in each of {self.card.identity.num_layers} layers"
            )
        if not self.vector.isfinite().all():
            raise SettingError(f"{given} holds NaN or infinity; give finite numbers")

    @property
    def norm(self) -> float:
        """Length in the units of the activations."""
        return float(self.vector.double().norm())

    @property
    def sha256(self) -> str:
        """Of the vector's bytes."""
        return hashlib.sha256(self.vector.contiguous().cpu().numpy().tobytes()).hexdigest()

    def __add__(self, other: Direction) -> Direction:
        return _sum([(1.0, self), (1.0, other)])

    def __sub__(self, other: Direction) -> Direction:
        return _sum([(1.0, self), (-1.0, other)])

    def __mul__(self, factor: float | int) -> Direction:
        """Raises `SettingError` when the factor is not finite."""
        return _sum([(float(factor), self)])

    __rmul__ = __mul__

    def __neg__(self) -> Direction:
        return _sum([(-1.0, self)])

    def unit(self) -> Direction:
        """The same way, with length 1.

        Raises:
            SettingError: the vector is 0.
        """
        return _sum([(1.0 / self._length("has no unit"), self)])

    def projection(self, features: Float[Tensor, "*any hidden"]) -> Float[Tensor, "*any"]:
        """How far activations lie along the direction, in their own units; float32, on their device.

        Raises:
            SettingError: the vector is 0.
        """
        unit = (self.vector.double() / self._length("has no projection")).float()
        return features.float() @ unit.to(features.device)

    def cosine(self, other: Direction) -> float:
        """In [-1, 1].

        Raises:
            SettingError: a vector is 0.
            DirectionMismatch: the two are of different sites or models.
        """
        _check_together([self, other])
        lengths = self._length("has no angle") * other._length("has no angle")
        return max(-1.0, min(1.0, float(self.vector.double() @ other.vector.double()) / lengths))

    def without(self, other: Direction) -> Direction:
        """What is left after the component along `other` is taken out: orthogonal to it.

        Raises:
            SettingError: the other vector is 0.
            DirectionMismatch: the two are of different sites or models.
        """
        _check_together([self, other])
        along = float(self.vector.double() @ other.vector.double()) / other._length("cannot be taken out") ** 2
        return _sum([(1.0, self), (-along, other)])

    def named(self, name: str) -> Direction:
        return replace(self, card=replace(self.card, name=name))

    def with_dose(self, dose: float | None, kind: Kind = "add") -> Direction:
        """The same direction with the dose that a calibration chose for a kind of edit.

        Raises:
            SettingError: a kind other than `add` without a dose.
        """
        return replace(self, card=replace(self.card, dose=dose, kind=kind))

    def to_head(self, metric: str, bias: float = 0.0) -> Head:
        """A head whose logit is the dot product of the activation and the vector, plus the bias."""
        return linear_head(metric, (self.site,), self.vector.clone(), bias)

    @classmethod
    def from_head(
        cls, head: Head, identity: Identity, *, site: Site | None = None, which: Which = "token"
    ) -> Direction:
        """The way in which a head's logit rises fastest: its weights at one site, not normalised.

        Args:
            identity: The model that the head reads (`HeadBank.identity`).
            site: Which of the head's sites; may be left out where it has one.
            which: The weights of the token's logit, or those of the response's (linear heads alone).

        Raises:
            SettingError: the head is no linear function there, or does not read the site.
        """
        chosen = site or head.sites[0]
        if chosen not in head.sites or (site is None and len(head.sites) > 1):
            raise SettingError(
                f"head {head.metric!r} reads {', '.join(map(str, head.sites))}; name one of them as `site`"
            )
        if head.form.kind == "mlp" or (which == "response" and head.form.kind != "linear"):
            raise SettingError(
                f"the {which} logit of head {head.metric!r} ({head.form.kind}) is no linear function of the "
                "activations; take a linear head"
            )
        row = head.weight[0 if which == "token" else -1]
        vector = row.chunk(len(head.sites))[head.sites.index(chosen)].float().clone()
        return cls(site=chosen, vector=vector, card=DirectionCard(name=head.metric, identity=identity, method="head"))

    def to_edit(
        self, dose: float | None = None, *, when: When | None = None, model: PreTrainedModel | None = None
    ) -> Edit:
        """An edit that does with a dose what the card's kind says: adds dose times the vector, where it says nothing.

        Args:
            dose: That of the card by default.
            when: Which tokens; all by default.
            model: Whose dtype and device the vector is to have; as it is by default.

        Raises:
            SettingError: there is no dose, or the vector is 0 where its direction is needed.
        """
        chosen = self.card.dose if dose is None else dose
        if chosen is None:
            raise SettingError(
                f"direction {self.card.name!r} at {self.site} has no dose; calibrate it, or give a multiplier"
            )
        vector = self.vector
        if model is not None:
            vector = vector.to(next(site_module(model, self.site).parameters()).device, model.dtype)
        return Edit(self.site, op_of(self.card.kind, vector, float(chosen)), When() if when is None else when)

    def check(self, identity: Identity) -> None:
        """Refuses any other model than the one that the direction was made for; the name alone may differ.

        Raises:
            DirectionMismatch: names what differs.
        """
        check_same_model(self.card.identity, identity, f"direction {self.card.name!r} at {self.site}")

    def _length(self, consequence: str) -> float:
        if not self.norm:
            raise SettingError(
                f"direction {self.card.name!r} at {self.site} is 0 and {consequence}; read it at another layer or token"
            )
        return self.norm

    def _operands(self) -> tuple[Operand, ...]:
        return self.card.provenance or (Operand(weight=1.0, name=self.card.name, sha256=self.sha256),)


def op_of(kind: Kind, vector: Float[Tensor, " hidden"], dose: float) -> Op:
    """What a dose does with a vector; dose 0 keeps an activation's very bits.

    `ablate_add` has no continuous way to 0, since with a small dose it ablates.
    """
    match kind:
        case "add":
            return Add(vector, dose)
        case "add_keeping_norm":
            return AddKeepingNorm(vector, dose)
        case "ablate":
            return Ablate(vector, dose)
        case "ablate_add":
            return AblateAdd(vector, dose) if dose else Add(vector, 0.0)


def _sum(terms: list[tuple[float, Direction]]) -> Direction:
    """The weighted sum, in float64, with a card that names every operand down to those that were read from a model."""
    directions = [direction for _, direction in terms]
    _check_together(directions)
    if not all(math.isfinite(weight) for weight, _ in terms):
        raise SettingError(f"a direction cannot be multiplied by {terms[0][0]}; give a finite number")
    first = directions[0]
    vector = sum((weight * direction.vector.double() for weight, direction in terms), torch.zeros_like(first.vector))
    operands = _merged(
        replace(operand, weight=weight * operand.weight)
        for weight, direction in terms
        for operand in direction._operands()
    )
    card = DirectionCard(
        name=" + ".join(f"{operand.weight:g} {operand.name}" for operand in operands),
        identity=first.card.identity,
        method="arithmetic",
        provenance=operands,
    )
    return Direction(site=first.site, vector=vector.float(), card=card)


def _merged(operands: Iterable[Operand]) -> tuple[Operand, ...]:
    """One operand a vector; those that cancel out stay, with weight 0, since rounding may have left something."""
    merged: dict[str, Operand] = {}
    for operand in operands:
        known = merged.get(operand.sha256)
        merged[operand.sha256] = operand if known is None else replace(known, weight=known.weight + operand.weight)
    return tuple(merged.values())


def _check_together(directions: list[Direction]) -> None:
    first, *others = directions
    for other in others:
        if other.site != first.site:
            raise DirectionMismatch(
                f"directions {first.card.name!r} at {first.site} and {other.card.name!r} at {other.site} are of "
                "different sites; their units have nothing in common: read both at one"
            )
        other.check(first.card.identity)
