"""OpenAI's requests in; its answers out, with one `monitor` object more where it is asked for."""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
from collections.abc import AsyncIterator, Awaitable, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from pilotfish.core import Message
from pilotfish.engines import Event, Generation, Sampling, TokenEvent
from pilotfish.engines import Request as Asking
from pilotfish.errors import PilotfishError
from pilotfish.server.access import REFUSALS, ApiError, refusal_of
from pilotfish.server.answer import Answer, Asked
from pilotfish.server.backend import Call
from pilotfish.server.depends import Served, User
from pilotfish.server.exchanges import verdict_json
from pilotfish.server.keys import Caller
from pilotfish.server.report import Report, finish_of, stop_of, usage_of
from pilotfish.server.schemas import (
    ChatBody,
    ChatCompletion,
    CompletionBody,
    ModelList,
    TextCompletion,
)
from pilotfish.server.service import Service
from pilotfish.server.steer_routes import checked
from pilotfish.server.steering import gated

T = TypeVar("T")
Body = ChatBody | CompletionBody

logger = logging.getLogger(__name__)

CLIENT_GONE = 499


@dataclass(frozen=True, slots=True, kw_only=True)
class _Form:
    """How the two endpoints differ."""

    endpoint: str
    prefix: str
    whole: str
    chunk: str
    is_chat: bool

    def choice(self, text: str, finish: str | None) -> dict[str, Any]:
        said = {"message": {"role": "assistant", "content": text}} if self.is_chat else {"text": text}
        return {"index": 0, **said, "finish_reason": finish, "logprobs": None}

    def delta(self, text: str, finish: str | None, *, is_first: bool) -> dict[str, Any]:
        if not self.is_chat:
            return self.choice(text, finish)
        role = {"role": "assistant"} if is_first else {}
        content = {"content": text} if text or is_first else {}
        return {"index": 0, "delta": role | content, "finish_reason": finish, "logprobs": None}


CHAT = _Form(
    endpoint="chat.completions", prefix="chatcmpl", whole="chat.completion", chunk="chat.completion.chunk", is_chat=True
)
TEXT = _Form(endpoint="completions", prefix="cmpl", whole="text_completion", chunk="text_completion", is_chat=False)


router = APIRouter(prefix="/v1", tags=["OpenAI"], responses=REFUSALS)

_ANSWER: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The answer, in one piece or as server-sent events.",
        "content": {"text/event-stream": {"schema": {"type": "string"}}},
    }
}


@router.post("/chat/completions", response_model=ChatCompletion, responses=_ANSWER)
async def chat_completions(body: ChatBody, request: Request, service: Served, caller: User) -> Response:
    return await _answered(service, body, request, caller, CHAT)


@router.post("/completions", response_model=TextCompletion, responses=_ANSWER)
async def completions(body: CompletionBody, request: Request, service: Served, caller: User) -> Response:
    return await _answered(service, body, request, caller, TEXT)


@router.get("/models", response_model=ModelList)
async def models(service: Served, _: User) -> dict[str, Any]:
    model = {"id": service.engine.info.model, "object": "model", "created": 0, "owned_by": "pilotfish"}
    return {"object": "list", "data": [model]}


def within_limits(messages: Iterable[Message], service: Service) -> tuple[Message, ...]:
    """The messages; raises `ApiError` when they are too many or too long."""
    limits, taken = service.settings.limits, tuple(messages)
    size = sum(len(message.content) for message in taken)
    if len(taken) > limits.messages or size > limits.prompt_characters:
        raise ApiError(
            400,
            f"{len(taken)} messages of {size:,} characters together; at most {limits.messages} of "
            f"{limits.prompt_characters:,} are taken",
            param="messages",
        )
    return taken


async def _answered(service: Service, body: Body, request: Request, caller: Caller, form: _Form) -> Response:
    info = service.engine.info
    if body.model != info.model:
        raise ApiError(404, f"this server has the model {info.model!r}", code="model_not_found", param="model")
    call = _call(service, body)
    report = Report(body.monitor, info, service.policy, call) if body.monitor is not None else None
    asked = Asked(call=call, endpoint=form.endpoint, prefix=form.prefix, key_id=caller.key_id, headers=request.headers)
    answer = await _unless_gone(request, service.desk.begin(asked))
    if answer is None:
        return Response(status_code=CLIENT_GONE)
    if body.stream:
        usage = body.stream_options is not None and body.stream_options.include_usage
        lines = _lines(answer, form, info.model, report, with_usage=usage)
        settings = service.settings
        return _Stream(lines, answer, limit_s=settings.request_timeout_s + settings.send_timeout_s)
    try:
        done = await _unless_gone(request, _read_to_the_end(answer))
    finally:
        answer.cancel()
    if done is None:
        return Response(status_code=CLIENT_GONE)
    generation = answer.generation
    choice = form.choice(generation.answer, finish_of(generation))
    said = report.whole(generation, answer.id, answer.tally) if report is not None else _stopped(generation)
    if said:
        choice["monitor"] = said
    whole = _envelope(answer, form.whole, info.model, [choice]) | {"usage": usage_of(generation)}
    return JSONResponse(whole)


def _call(service: Service, body: Body) -> Call:
    info, limits = service.engine.info, service.settings.limits
    if isinstance(body, ChatBody):
        turns, wanted = [turn.message for turn in body.messages], body.max_completion_tokens or body.max_tokens
    else:
        turns, wanted = [Message("user", body.prompt)], body.max_tokens
    if wanted is not None and wanted > limits.new_tokens:
        raise ApiError(
            400, f"max_tokens {wanted:,} is more than the {limits.new_tokens:,} that are given here", param="max_tokens"
        )
    steering = checked(body.steer, info)
    stop = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())
    asking = Asking(
        max_new_tokens=wanted or min(limits.new_tokens, max(1, info.max_tokens // 4)),
        sampling=Sampling(temperature=body.temperature, top_k=body.top_k, top_p=body.top_p),
        stop=stop,
        policy=gated(service.policy, steering),
        seed=secrets.randbits(31) if body.seed is None else body.seed,
        signals=body.monitor is not None and body.monitor.signals,
    )
    messages = within_limits(turns, service)
    return Call(messages=messages, request=asking, is_raw=not isinstance(body, ChatBody), steering=steering)


async def _read_to_the_end(answer: Answer) -> bool:
    async for _ in answer:
        pass
    return True


async def _lines(
    answer: Answer, form: _Form, model: str, report: Report | None, *, with_usage: bool
) -> AsyncIterator[str]:
    """Server-sent events: the text as it comes, the reason it ended, the usage; or what went wrong."""
    generation, is_first = answer.generation, form.is_chat
    try:
        async for events in answer:
            text = _text(events)
            said = report.of(events, generation.num_prompt_tokens) if report is not None else {}
            if text or said:
                choice = form.delta(text, None, is_first=is_first)
                is_first = False
                yield _sse(_envelope(answer, form.chunk, model, [choice | ({"monitor": said} if said else {})]))
    except PilotfishError as error:
        yield _sse(refusal_of(error).body)
        return
    last = form.delta("", finish_of(generation), is_first=is_first)
    said = _stopped(generation) | (report.summary(generation, answer.id, answer.tally) if report is not None else {})
    yield _sse(_envelope(answer, form.chunk, model, [last | ({"monitor": said} if said else {})]))
    if with_usage:
        yield _sse(_envelope(answer, form.chunk, model, []) | {"usage": usage_of(generation)})
    yield "data: [DONE]\n\n"


def _text(events: list[Event]) -> str:
    return "".join(event.token.delta for event in events if isinstance(event, TokenEvent))


def _envelope(answer: Answer, kind: str, model: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
    return {"id": answer.id, "object": kind, "created": int(answer.created_s), "model": model, "choices": choices}


def _sse(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False, separators=(',', ':'))}\n\n"


def _stopped(generation: Generation) -> dict[str, Any]:
    """Why an answer was stopped, said to every client that it happens to; empty when it was not."""
    if finish_of(generation) != "content_filter":
        return {}
    stop = stop_of(generation)
    return {"verdicts": [verdict_json(stop)]} if stop is not None else {}


class _Stream(StreamingResponse):
    """Server-sent events to a client that may leave or stall; the engine's place is given back either way."""

    def __init__(self, lines: AsyncIterator[str], answer: Answer, *, limit_s: float) -> None:
        super().__init__(lines, media_type="text/event-stream")
        self._answer, self._limit_s = answer, limit_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            async with asyncio.timeout(self._limit_s):
                await super().__call__(scope, receive, send)
        except TimeoutError:
            logger.warning("%s: the client did not read its answer; the connection is closed", self._answer.id)
        finally:
            self._answer.cancel()


async def _unless_gone(request: Request, work: Awaitable[T]) -> T | None:
    """Waits for work; None, with the work cancelled, when the client leaves before it is done."""
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else None
    finally:
        for each in (task, gone):
            each.cancel()
        await asyncio.wait((task, gone))


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
