"""A service in, the HTTP application out; and the loop that serves it until it is told to end."""

from __future__ import annotations

import contextlib
import logging
import socket
from collections.abc import AsyncIterator, Callable
from importlib.metadata import version
from typing import Any

import uvicorn
from fastapi import APIRouter, FastAPI
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST

from pilotfish.server import monitor_routes, openai_routes, pages, steer_routes
from pilotfish.server.access import REFUSALS, add_error_handlers
from pilotfish.server.depends import Reader, Served
from pilotfish.server.guard import Guard
from pilotfish.server.schemas import Health
from pilotfish.server.service import Service

logger = logging.getLogger(__name__)

CONNECTIONS = 512
"""More at a time are refused with 503."""


def create_app(service: Service) -> FastAPI:
    """All routes of a service; it begins and ends with the application's lifespan."""

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with service.running():
            yield

    app = FastAPI(
        title="Pilotfish",
        version=version("pilotfish"),
        description="An OpenAI-compatible server whose draft model scores every token.",
        lifespan=lifespan,
        docs_url=None,  # those pages load scripts from elsewhere
        redoc_url=None,
    )
    app.state.service = service
    settings = service.settings
    app.add_middleware(Guard, body_bytes=settings.limits.body_bytes, is_loopback=settings.is_loopback)
    add_error_handlers(app)
    for router in (openai_routes.router, monitor_routes.router, steer_routes.router, operations, pages.router):
        app.include_router(router)
    return app


operations = APIRouter(tags=["operations"])


@operations.get("/healthz", response_model=Health)
async def healthz() -> dict[str, Any]:
    """Whether the process lives."""
    return {"status": "ok"}


@operations.get("/readyz", response_model=Health, responses={503: {"model": Health}})
async def readyz(service: Served) -> JSONResponse:
    """Whether it can take requests."""
    reasons = await service.why_not_ready()
    return JSONResponse({"status": "not ready" if reasons else "ok", "reasons": reasons}, 503 if reasons else 200)


@operations.get(
    "/metrics",
    response_class=Response,
    responses=REFUSALS | {200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
)
async def metrics(service: Served, _: Reader) -> Response:
    text = await service.desk.in_store(service.telemetry.text)
    return Response(text, headers={"content-type": CONTENT_TYPE_LATEST})


class _Server(uvicorn.Server):
    """Says where it listens once it does."""

    def __init__(self, config: uvicorn.Config, on_start: Callable[[str], None]) -> None:
        super().__init__(config)
        self._on_start = on_start

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            host, port = self.servers[0].sockets[0].getsockname()[:2]
            self._on_start(f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}")


def make_server(service: Service, on_start: Callable[[str], None] = lambda url: None) -> uvicorn.Server:
    """A server to `run()`. On SIGTERM or SIGINT it takes no more connections and lets answers in flight end.

    Args:
        on_start: is told the URL.
    """
    settings = service.settings
    config = uvicorn.Config(
        create_app(service),
        host=settings.host.strip("[]"),
        port=settings.port,
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        limit_concurrency=CONNECTIONS,
        timeout_keep_alive=5,
        timeout_graceful_shutdown=int(settings.drain_s),
        h11_max_incomplete_event_size=settings.limits.header_bytes,
    )
    return _Server(config, on_start)
