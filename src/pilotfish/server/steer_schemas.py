"""What goes over the wire about steering, as pydantic models."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

MAX_STEERS = 8
Name = Annotated[str, StringConstraints(min_length=1, max_length=256)]
Scope = Literal["generation", "prompt", "both"]


class GateIn(BaseModel):
    model_config = ConfigDict(extra="forbid")

    metric: Name = Field(description="Of a head: steering is on while its running score is at the threshold.")
    threshold: float | None = Field(default=None, ge=0, le=1, description="The head's calibrated one when left out.")


class SteerIn(BaseModel):
    model_config = ConfigDict(extra="forbid")

    name: Name
    dose: float | None = Field(
        default=None,
        allow_inf_nan=False,
        description="What its card's kind does with the vector; the calibrated one when left out.",
    )
    scope: Scope = Field(default="generation", description="Which tokens the target reads steered.")
    gate: GateIn | None = None


class GateOut(BaseModel):
    metric: str
    threshold: float | None = Field(description="Null is the head's calibrated one.")


class SteeringOut(BaseModel):
    """What an answer was steered with."""

    name: str
    site: str
    sha256: str = Field(description="Of the vector.")
    kind: str = Field(description="What the dose did with the vector: add, add_keeping_norm, ablate or ablate_add.")
    dose: float
    scope: str
    gate: GateOut | None
    num_tokens: int = Field(description="Tokens of the answer that the target gave or verified while it was on.")


class DirectionOut(BaseModel):
    name: str
    site: str
    dose: float = Field(description="As calibrated for the kind of edit on its card; for `add` the multiplier.")
    max_dose: float = Field(description="The last that may be asked for, counted from 0.")
    sha256: str
    card: dict[str, Any]


class DirectionList(BaseModel):
    model: str
    directions: list[DirectionOut]
