"""Questions about the monitor in; heads, scores, policy, exchanges and alerts out."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Path, Query
from fastapi.responses import HTMLResponse, JSONResponse

from pilotfish.actions import Policy, Recorded, dry_run, policy_from_dict, policy_to_dict
from pilotfish.actions.recorded import RecordedToken
from pilotfish.core import Message, TokenScore
from pilotfish.server.access import REFUSALS, ApiError
from pilotfish.server.backend import ScoredText
from pilotfish.server.depends import Admin, Reader, Served, User
from pilotfish.server.exchanges import storable
from pilotfish.server.openai_routes import within_limits
from pilotfish.server.report import chosen_metrics, rounded, threshold_of
from pilotfish.server.schemas import (
    AlertList,
    DryRunBody,
    DryRunReply,
    ExchangeList,
    ExchangeOut,
    HeadList,
    PolicyIn,
    PolicyOut,
    Revived,
    ScoreBody,
    ScoreReply,
    ScoreText,
)
from pilotfish.server.service import Service
from pilotfish.server.shown import report_of

_PAGE: dict[int | str, dict[str, Any]] = {
    200: {"description": "One HTML file.", "content": {"text/html": {"schema": {"type": "string"}}}}
}

router = APIRouter(prefix="/v1/monitor", tags=["monitor"], responses=REFUSALS)

Id = Annotated[str, Path(max_length=64, pattern=r"^[A-Za-z0-9_-]+$")]
Ids = Annotated[
    str,
    Query(max_length=2100, pattern=r"^[A-Za-z0-9_-]+(,[A-Za-z0-9_-]+){0,31}$", description="Ids, with commas between."),
]
Limit = Annotated[int, Query(ge=1, le=1000, description="Rows, as far as the server gives so many.")]
Before = Annotated[float | None, Query(ge=0, le=1e12, description="Only rows made before this time, in s since 1970.")]


@router.get("/heads", response_model=HeadList)
async def heads(service: Served, _: User) -> dict[str, Any]:
    info = service.engine.info
    rows = [
        {"metric": head.metric, "reader": head.reader, "threshold": head.threshold, "card": dict(head.card)}
        for head in info.heads
    ]
    return {"model": info.model, "draft": info.draft, "taxed": info.is_taxed, "heads": rows}


@router.post("/score", response_model=ScoreReply)
async def score(body: ScoreBody, service: Served, _: User) -> JSONResponse:
    limit = service.settings.limits.texts
    if len(body.texts) > limit:
        raise ApiError(400, f"{len(body.texts)} texts; at most {limit} are taken in one request", param="texts")
    info = service.engine.info
    metrics = chosen_metrics(info, body.heads)
    found = await service.engine.score([_messages(text, service) for text in body.texts])
    limits = {metric: threshold_of(info, service.policy, metric) for metric in metrics}
    return JSONResponse({"model": info.model, "results": [_scored(text, limits, body.tokens) for text in found]})


@router.get("/policy", response_model=PolicyOut)
async def policy(service: Served, _: User) -> dict[str, Any]:
    return {"policy": policy_to_dict(service.policy)}


@router.put("/policy", response_model=PolicyOut)
async def replace_policy(body: PolicyIn, service: Served, caller: Admin) -> dict[str, Any]:
    await service.replace_policy(policy_from_dict(body.policy, "the policy"), key_id=caller.key_id)
    return {"policy": policy_to_dict(service.policy)}


@router.post("/policy/dry-run", response_model=DryRunReply)
async def try_policy(body: DryRunBody, service: Served, _: Reader) -> dict[str, Any]:
    proposed = policy_from_dict(body.policy, "the policy")
    await service.engine.check(proposed)
    last = min(body.last, service.settings.limits.rows)
    found: dict[str, Any] = await service.desk.in_store(_dry_run, service, proposed, last)
    return found


@router.get("/exchanges", response_model=ExchangeList)
async def exchanges(
    service: Served,
    _: Reader,
    limit: Limit = 50,
    before_s: Before = None,
    flagged: bool = False,
    metric: Annotated[str, Query(max_length=256, description="With an alert of this metric.")] = "",
    text: Annotated[str, Query(max_length=256, description="In the prompt or the answer.")] = "",
) -> dict[str, Any]:
    limit = min(limit, service.settings.limits.rows)
    chosen = {"flagged": flagged, "metric": storable(metric), "text": storable(text)}
    rows = await service.desk.in_store(service.store.exchanges, limit=limit, before_s=before_s, **chosen)
    return {"exchanges": rows}


@router.get("/exchanges/{exchange_id}", response_model=ExchangeOut)
async def exchange(exchange_id: Id, service: Served, _: Reader) -> JSONResponse:
    return JSONResponse(await _stored(service, exchange_id))


@router.get("/report", responses=_PAGE)
async def report(service: Served, _: Reader, exchange: Ids) -> HTMLResponse:
    """The exchanges as one self-contained page, to be saved."""
    found = [await _stored(service, each) for each in exchange.split(",")]
    page = await asyncio.to_thread(report_of, found, service.engine.info, service.policy)
    return HTMLResponse(page, headers={"content-disposition": 'attachment; filename="pilotfish.html"'})


@router.get("/alerts", response_model=AlertList)
async def alerts(
    service: Served,
    _: Reader,
    limit: Limit = 50,
    before_s: Before = None,
    delivery: Literal["pending", "delivered", "dead"] | None = None,
) -> dict[str, Any]:
    limit = min(limit, service.settings.limits.rows)
    rows = await service.desk.in_store(service.store.alerts, limit=limit, before_s=before_s, state=delivery)
    return {"alerts": rows}


@router.post("/alerts/{alert_id}/retry", response_model=Revived)
async def retry(alert_id: Id, service: Served, _: Admin) -> dict[str, int]:
    number: int = await service.desk.in_store(service.store.revive, alert_id)
    for courier in service.desk.couriers:
        courier.wake()
    return {"num_revived": number}


async def _stored(service: Service, exchange_id: str) -> dict[str, Any]:
    found: dict[str, Any] | None = await service.desk.in_store(service.store.exchange, exchange_id)
    if found is None:
        raise ApiError(404, "there is no such exchange", code="not_found")
    return found


def _messages(text: ScoreText, service: Service) -> tuple[Message, ...]:
    if (text.messages is None) == (text.text is None):
        raise ApiError(400, "give each text either as `messages` or as `text`", param="texts")
    if text.text is not None:
        return within_limits([Message("assistant", text.text)], service)
    return within_limits([turn.message for turn in text.messages or ()], service)


def _scored(text: ScoredText, limits: Mapping[str, float | None], with_tokens: bool) -> dict[str, Any]:
    tokens: list[dict[str, Any]] = [
        {"position": i, "text": piece, "message": message, **rounded({m: scores[m] for m in limits if m in scores})}
        for i, (piece, message, scores) in enumerate(zip(text.pieces, text.messages, text.scores, strict=True))
    ]
    heads = {}
    for metric, threshold in limits.items():
        highest = max((token["running"][metric] for token in tokens if metric in token["running"]), default=None)
        is_over = highest is not None and threshold is not None and highest >= threshold
        heads[metric] = {"max": highest, "threshold": threshold, "flagged": is_over}
    return {"heads": heads, "tokens": tokens} if with_tokens else {"heads": heads}


def _dry_run(service: Service, policy: Policy, last: int) -> dict[str, Any]:
    """Holds a policy against the scores of stored exchanges."""
    before_count = after_count = 0
    changed = []
    rows = service.store.exchanges(limit=last)
    for row in rows:
        exchange = service.store.exchange(row["id"])
        if exchange is None:  # deleted in between
            continue
        before = _taken(exchange["verdicts"])
        verdicts = dry_run(policy, _recorded(exchange, service))
        after = _taken([{"metric": verdict.metric, "action": verdict.action} for verdict in verdicts])
        before_count += bool(before)
        after_count += bool(after)
        if before != after:
            found = {"exchange": row["id"], "created_s": row["created_s"], "before": before, "after": after}
            changed.append(found)
    return {
        "num_exchanges": len(rows),
        "num_flagged_before": before_count,
        "num_flagged_after": after_count,
        "changed": changed,
    }


def _taken(verdicts: list[dict[str, Any]]) -> list[str]:
    return sorted({f"{verdict['metric']}:{verdict['action']}" for verdict in verdicts})


def _recorded(exchange: dict[str, Any], service: Service) -> Recorded:
    info = service.engine.info
    tokens = tuple(
        RecordedToken(row["position"], row["text"] or "", _scores_of(row, info.metrics), row["origin"] == "prompt")
        for row in exchange["tokens"]
    )
    thresholds = {head.metric: head.threshold for head in info.heads if head.threshold is not None}
    return Recorded(exchange["id"], tokens, (), thresholds)


def _scores_of(row: dict[str, Any], metrics: tuple[str, ...]) -> dict[str, TokenScore]:
    """A stored token's scores; of a metric that was not read then there is none, and that is said."""
    return {
        metric: TokenScore.scored(row["scores"][metric], row["reader"], running=row["running"][metric])
        if metric in row["running"]
        else TokenScore.unscored(row["unscored"].get(metric) or "not read at that time")
        for metric in metrics
    }
