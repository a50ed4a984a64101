"""A request in; the service that it reached and who asks out, as FastAPI's dependencies."""

from __future__ import annotations

from typing import Annotated

from fastapi import Depends, Request

from pilotfish.server.keys import Caller
from pilotfish.server.service import Service


def service_of(request: Request) -> Service:
    found: Service = request.app.state.service
    return found


Served = Annotated[Service, Depends(service_of)]


async def _user(request: Request, service: Served) -> Caller:
    return await service.gate.admit(request, "use")


async def _reader(request: Request, service: Served) -> Caller:
    return await service.gate.admit(request, "read")


async def _admin(request: Request, service: Served) -> Caller:
    return await service.gate.admit(request, "admin")


User = Annotated[Caller, Depends(_user)]
Reader = Annotated[Caller, Depends(_reader)]
Admin = Annotated[Caller, Depends(_admin)]
