"""A request's key in, its caller out; or a refusal in the form that OpenAI's clients read."""

from __future__ import annotations

import logging
import math

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from pilotfish.errors import (
    Busy,
    EngineFailed,
    GenerationError,
    PilotfishError,
    SettingError,
    StoreError,
    TextError,
    UpstreamError,
)
from pilotfish.server.answer import Desk, TimedOut
from pilotfish.server.keys import LOCAL, Caller, KeyRing, RateLimit, Scope
from pilotfish.server.schemas import ErrorBody

logger = logging.getLogger(__name__)

WORDS = 300
"""Characters of a refused value that an error repeats."""
REFUSALS: dict[int | str, dict[str, object]] = {
    status: {"model": ErrorBody, "description": what}
    for status, what in {
        400: "The request cannot be carried out; the message says why.",
        401: "No valid API key.",
        403: "The key lacks the scope, or the request comes from another site's page.",
        404: "There is no such thing.",
        408: "The body took too long to arrive.",
        413: "The body is too large.",
        429: "Too many requests; see Retry-After.",
        500: "The engine failed.",
        502: "The server behind the proxy failed, or said what cannot be monitored.",
        503: "The store does not answer.",
        504: "It took longer than the server allows.",
    }.items()
}


class ApiError(Exception):
    """A refusal with its status."""

    def __init__(
        self, status: int, message: str, *, code: str | None = None, param: str | None = None, retry_s: float = 0.0
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.param, self.retry_s = status, code, param, retry_s

    @property
    def body(self) -> dict[str, object]:
        kinds = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}

    @property
    def response(self) -> JSONResponse:
        headers = {"retry-after": str(math.ceil(self.retry_s))} if self.retry_s else {}
        if self.status == 401:
            headers["www-authenticate"] = "Bearer"
        return JSONResponse(self.body, self.status, headers)


def refusal_of(error: PilotfishError) -> ApiError:
    """How each kind of error is said over HTTP."""
    match error:
        case Busy():
            return ApiError(429, str(error), code="queue_full", retry_s=error.retry_after_s)
        case SettingError() | TextError() | GenerationError():
            return ApiError(400, str(error))
        case TimedOut():
            return ApiError(504, str(error), code="timeout")
        case StoreError():
            logger.error("%s", error)  # its words may say where the store is
            return ApiError(
                503, "the store does not answer, so nothing could be recorded; the log says why", code="store"
            )
        case UpstreamError():
            return ApiError(error.status, str(error), code="upstream", retry_s=error.retry_after_s)
        case EngineFailed():
            return ApiError(500, str(error), code="engine_failed")
    logger.error("%s", error)
    return ApiError(500, f"the request failed ({type(error).__name__}); the server's log says more")


class Gatekeeper:
    """Says who a request comes from and whether they may ask for it."""

    def __init__(self, desk: Desk, ring: KeyRing, limit: RateLimit, *, is_open: bool) -> None:
        """`is_open`: no key was ever made and only this machine can reach the server, so anybody may do anything."""
        self._desk, self._ring, self._limit, self._is_open = desk, ring, limit, is_open

    async def admit(self, request: Request, scope: Scope) -> Caller:
        """Who asks; raises `ApiError` when they may not, or ask too often."""
        found = await self._caller(request)
        if scope not in found.scopes:
            raise ApiError(403, f"this API key lacks the scope {scope!r}", code="insufficient_scope")
        wait_s = self._limit.wait_s(found.key_id or "")
        if wait_s:
            raise ApiError(429, "too many requests with this key; see Retry-After", code="rate_limit", retry_s=wait_s)
        return found

    async def _caller(self, request: Request) -> Caller:
        if self._ring.is_stale:
            try:
                await self._desk.in_store(self._ring.refresh)
            except StoreError as error:
                logger.warning("%s; the keys read before hold on", error)
        if self._is_open and not len(self._ring):
            return LOCAL
        scheme, _, secret = request.headers.get("authorization", "").partition(" ")
        found = self._ring.caller(secret.strip()) if scheme.lower() == "bearer" else None
        if found is None:
            raise ApiError(401, "no valid API key; send it as `Authorization: Bearer …`", code="invalid_api_key")
        return found


def add_error_handlers(app: FastAPI) -> None:
    """Every refusal in one form."""

    @app.exception_handler(ApiError)
    async def refused(_: Request, error: ApiError) -> JSONResponse:
        return error.response

    @app.exception_handler(PilotfishError)
    async def failed(_: Request, error: PilotfishError) -> JSONResponse:
        return refusal_of(error).response

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"] if part != "body")[:WORDS]
        return ApiError(400, f"{where or 'the body'}: {first['msg'][:WORDS]}", param=where or None).response

    @app.exception_handler(HTTPException)
    async def plain(_: Request, error: HTTPException) -> JSONResponse:
        response = ApiError(error.status_code, str(error.detail)).response
        response.headers.update(error.headers or {})
        return response

    @app.exception_handler(Exception)
    async def broken(_: Request, error: Exception) -> JSONResponse:
        return ApiError(500, f"the server failed ({type(error).__name__}); its log says more").response
