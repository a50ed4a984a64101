"""What clients ask to steer with in; the allow-list, and requests held to it, out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from fastapi import APIRouter

from pilotfish.server.access import REFUSALS, ApiError
from pilotfish.server.backend import DirectionInfo, EngineInfo, Steer
from pilotfish.server.depends import Served, User
from pilotfish.server.steer_schemas import DirectionList, GateIn, SteerIn
from pilotfish.server.steering import ELSEWHERE

router = APIRouter(prefix="/v1/steer", tags=["steering"], responses=REFUSALS)


@router.get("/directions", response_model=DirectionList)
async def directions(service: Served, _: User) -> dict[str, Any]:
    """What a request may steer along, and how far."""
    info = service.engine.info
    return {"model": info.model, "directions": [asdict(each) for each in info.directions]}


def checked(asked: Sequence[SteerIn], info: EngineInfo) -> tuple[Steer, ...]:
    """What is asked for, as far as it is served.

    Raises:
        ApiError: a name, dose or gate that is not allowed; says which are.
    """
    if asked and info.is_taxed:
        raise ApiError(400, f"this server cannot steer: {ELSEWHERE}", code="steering_unavailable", param="steer")
    names = [each.name for each in asked]
    known = {direction.name: direction for direction in info.directions}
    found = []
    for index, each in enumerate(asked):
        where = f"steer.{index}"
        direction = known.get(each.name)
        if direction is None:
            allowed = ", ".join(known) or "none: it was started without --directions"
            said = f"direction {each.name!r} is not served here; there are {allowed}"
            raise ApiError(400, said, code="direction_not_served", param=f"{where}.name")
        if each.name in names[:index]:
            said = f"direction {each.name!r} is asked for twice; give it once, with one dose and scope"
            raise ApiError(400, said, code="direction_twice", param=f"{where}.name")
        dose = _dose(each, direction, f"{where}.dose")
        gate = {} if each.gate is None else _gate(each, each.gate, info, f"{where}.gate")
        found.append(Steer(direction=direction, dose=dose, scope=each.scope, **gate))
    return tuple(found)


def _dose(asked: SteerIn, direction: DirectionInfo, where: str) -> float:
    dose = direction.dose if asked.dose is None else asked.dose
    low, high = sorted((0.0, direction.max_dose))
    if not low <= dose <= high:
        said = f"dose {dose:g} of direction {asked.name!r} is outside [{low:g}, {high:g}]; it was calibrated at "
        raise ApiError(400, f"{said}{direction.dose:g}", code="dose_not_allowed", param=where)
    return dose


def _gate(asked: SteerIn, gate: GateIn, info: EngineInfo, where: str) -> dict[str, Any]:
    if gate.metric not in info.metrics:
        said = f"metric {gate.metric!r} of a gate has no head; there are {', '.join(info.metrics) or 'none'}"
        raise ApiError(400, said, code="metric_not_scored", param=f"{where}.metric")
    if gate.threshold is None and any(h.threshold is None for h in info.heads if h.metric == gate.metric):
        said = f"metric {gate.metric!r} of a gate has no calibrated threshold; give one in [0, 1]"
        raise ApiError(400, said, code="threshold_missing", param=f"{where}.threshold")
    if asked.scope != "generation":
        said = f"scope {asked.scope!r} cannot have a gate, which goes by scores of what was read; use 'generation'"
        raise ApiError(400, said, code="gate_not_allowed", param=f"{where[:-5]}.scope")
    return {"metric": gate.metric, "threshold": gate.threshold}
