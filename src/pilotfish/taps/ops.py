"""Hidden states in, changed hidden states out: what an edit does to a token, whatever the token and the site.

An op never writes in place. Directions are used at unit length; vectors as they are. Where lengths and projections are
taken, that is done in float32 (float64 for a float64 model) and rounded once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from pilotfish.errors import SettingError

Hidden = Float[Tensor, "batch token hidden"]
Write = Callable[[Tensor], Tensor]


class _Op:
    __slots__ = ()

    def prepared(self, dtype: torch.dtype) -> Write:
        """The op as a function for hidden states of one dtype; what does not depend on them is done here, once."""
        raise NotImplementedError

    def apply(self, hidden: Hidden) -> Hidden:
        """The changed hidden states, in float32 or wider where the op needs that; an edit rounds them back."""
        return self.prepared(hidden.dtype)(hidden)


@dataclass(frozen=True, slots=True, eq=False)
class Add(_Op):
    """Adds `scale * vector`. With scale 0 the activation keeps its very bits."""

    vector: Float[Tensor, " hidden"]
    scale: float = 1.0

    def __post_init__(self) -> None:
        check_vector("Add", self.vector)
        _check_finite("Add.scale", self.scale)

    def prepared(self, dtype: torch.dtype) -> Write:
        vector, scale = self.vector, self.scale
        return _as_it_is if scale == 0 else lambda hidden: torch.add(hidden, vector, alpha=scale)


@dataclass(frozen=True, slots=True, eq=False)
class AddKeepingNorm(_Op):
    """Adds `scale * vector`, then brings the sum back to the length that the activation had: it turns it and no more.

    With scale 0 the activation keeps its very bits.
    """

    vector: Float[Tensor, " hidden"]
    scale: float = 1.0

    def __post_init__(self) -> None:
        check_vector("AddKeepingNorm", self.vector)
        _check_finite("AddKeepingNorm.scale", self.scale)

    def prepared(self, dtype: torch.dtype) -> Write:
        if self.scale == 0:
            return _as_it_is
        precise = torch.promote_types(dtype, torch.float32)
        step, tiny = self.scale * self.vector.to(precise), torch.finfo(precise).tiny

        def write(hidden: Tensor) -> Tensor:
            values = hidden.to(precise)
            moved = values + step
            length = torch.linalg.vector_norm(values, dim=-1, keepdim=True)
            turned: Tensor = nn.functional.normalize(moved, dim=-1, eps=tiny) * length
            return turned

        return write


@dataclass(frozen=True, slots=True, eq=False)
class Ablate(_Op):
    """Takes out the component along `direction`, whose length does not matter."""

    direction: Float[Tensor, " hidden"]
    share: float = 1.0
    """How much of the component: 1 all of it, 2 mirrors the activation, 0 keeps its very bits."""

    def __post_init__(self) -> None:
        check_direction("Ablate", self.direction)
        _check_finite("Ablate.share", self.share)

    def prepared(self, dtype: torch.dtype) -> Write:
        if self.share == 0:
            return _as_it_is
        share = self.share
        return _along(self.direction, dtype, lambda along: -share * along)


@dataclass(frozen=True, slots=True, eq=False)
class AblateAdd(_Op):
    """Takes out the component along `vector` and puts `scale * vector` in its place; with scale 0 it only ablates."""

    vector: Float[Tensor, " hidden"]
    scale: float = 1.0

    def __post_init__(self) -> None:
        check_direction("AblateAdd", self.vector)
        _check_finite("AblateAdd.scale", self.scale)

    def prepared(self, dtype: torch.dtype) -> Write:
        wanted = self.scale * torch.linalg.vector_norm(self.vector.to(torch.promote_types(dtype, torch.float32)))
        return _along(self.vector, dtype, lambda along: wanted - along)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Clamp(_Op):
    """Moves the activation along `direction` until its projection lies in [low, high]; one that does so already stays.

    A projection is taken on the direction at unit length, so bounds are in the units of the activation. Equal bounds
    set the projection to a value.
    """

    direction: Float[Tensor, " hidden"]
    low: float = -math.inf
    high: float = math.inf

    def __post_init__(self) -> None:
        check_direction("Clamp", self.direction)
        if not self.low <= self.high or not (math.isfinite(self.low) or math.isfinite(self.high)):
            raise SettingError(
                f"Clamp got the bounds [{self.low}, {self.high}]; give a finite low, a finite high or both, low <= high"
            )

    def prepared(self, dtype: torch.dtype) -> Write:
        low, high = self.low, self.high
        return _along(self.direction, dtype, lambda along: along.clamp(low, high) - along)


@dataclass(frozen=True, slots=True, eq=False)
class Replace(_Op):
    """Puts `vector` where the activation was."""

    vector: Float[Tensor, " hidden"]

    def __post_init__(self) -> None:
        check_vector("Replace", self.vector)

    def prepared(self, dtype: torch.dtype) -> Write:
        return self.vector.expand_as


@dataclass(frozen=True, slots=True)
class Scale(_Op):
    """Multiplies by `factor`."""

    factor: float

    def __post_init__(self) -> None:
        _check_finite("Scale.factor", self.factor)

    def prepared(self, dtype: torch.dtype) -> Write:
        return lambda hidden: hidden * self.factor


@dataclass(frozen=True, slots=True, eq=False)
class Detach(_Op):
    """Lets the value through and no gradient back."""

    mask: Bool[Tensor, ...] | None = None
    """Where to cut; everywhere by default. Any shape that broadcasts to *batch token hidden*: `hidden` for some
    dimensions, `batch token 1` for some tokens."""

    def __post_init__(self) -> None:
        if self.mask is not None and self.mask.dtype != torch.bool:
            raise SettingError(f"Detach got a mask of {self.mask.dtype}; give torch.bool, True where gradients are cut")

    def prepared(self, dtype: torch.dtype) -> Write:
        return self._detach

    def _detach(self, hidden: Tensor) -> Tensor:
        if self.mask is None:
            return hidden.detach()
        if not _broadcasts(self.mask.shape, hidden.shape):
            raise SettingError(
                f"Detach got a mask of shape {tuple(self.mask.shape)}, but this pass has (batch, token, hidden) = "
                f"{tuple(hidden.shape)}; give one that broadcasts to that, for example (hidden,) or (batch, token, 1)"
            )
        return torch.where(self.mask, hidden.detach(), hidden)


Op = Add | AddKeepingNorm | Ablate | AblateAdd | Clamp | Replace | Scale | Detach


def vector_of(op: Op) -> Float[Tensor, " hidden"] | None:
    """The vector or direction of an op that has one."""
    match op:
        case Add(vector=vector) | AddKeepingNorm(vector=vector) | AblateAdd(vector=vector) | Replace(vector=vector):
            return vector
        case Ablate(direction=vector) | Clamp(direction=vector):
            return vector
    return None


def unit(direction: Float[Tensor, " hidden"], dtype: torch.dtype) -> Float[Tensor, " hidden"]:
    """The direction at length 1, in float32 or wider."""
    return nn.functional.normalize(direction.to(torch.promote_types(dtype, torch.float32)), dim=0, eps=0.0)


def check_vector(op: str, vector: Tensor) -> None:
    """Refuses what is not one vector of finite floats.

    Raises:
        SettingError: says which op got it.
    """
    if vector.ndim != 1 or not vector.is_floating_point():
        raise SettingError(
            f"{op} got a tensor of shape {tuple(vector.shape)} and {vector.dtype}; give one vector of floats, (hidden,)"
        )
    if not vector.isfinite().all():
        raise SettingError(
            f"{op} got a vector with NaN or infinity, which would spread to every later token; give finite numbers"
        )


def check_direction(op: str, direction: Tensor) -> None:
    """Refuses what has no direction.

    Raises:
        SettingError: says which op got it.
    """
    check_vector(op, direction)
    if not 0.0 < float(direction.detach().float().norm()) < math.inf:
        raise SettingError(f"{op} got a direction of length 0 or infinity; give one of about unit length")


def _along(direction: Tensor, dtype: torch.dtype, step: Write) -> Write:
    """Moves along one direction by `step` of the projection on it."""
    axis = unit(direction, dtype)

    def write(hidden: Tensor) -> Tensor:
        values = hidden.to(axis.dtype)
        return values + step(values @ axis).unsqueeze(-1) * axis

    return write


def _as_it_is(hidden: Tensor) -> Tensor:
    return hidden


def _check_finite(name: str, value: float) -> None:
    if not math.isfinite(value):
        raise SettingError(f"{name} is {value}; give a finite number")


def _broadcasts(small: Sequence[int], large: Sequence[int]) -> bool:
    """Whether a tensor of shape `small` stretches to `large` without stretching `large`."""
    pairs = zip(reversed(small), reversed(large), strict=False)
    return len(small) <= len(large) and all(mine in (1, other) for mine, other in pairs)
