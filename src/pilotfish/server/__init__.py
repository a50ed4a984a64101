"""Requests over HTTP in; scored answers out, and alerts that are never lost."""

from pilotfish.server.app import create_app, make_server
from pilotfish.server.backend import Call, EngineInfo, EventStream, HeadInfo, ScoredText, ServedEngine
from pilotfish.server.embedded import EmbeddedBackend
from pilotfish.server.keys import new_key
from pilotfish.server.outbox import Courier, Retrying
from pilotfish.server.proxy import ProxyBackend
from pilotfish.server.service import Service
from pilotfish.server.settings import Limits, ServerSettings
from pilotfish.server.sinks import JsonlSink, Sink, WebhookSink
from pilotfish.server.store import Store
from pilotfish.server.upstream import Upstream

__all__ = [
    "Call",
    "Courier",
    "EmbeddedBackend",
    "EngineInfo",
    "EventStream",
    "HeadInfo",
    "JsonlSink",
    "Limits",
    "ProxyBackend",
    "Retrying",
    "ScoredText",
    "ServedEngine",
    "ServerSettings",
    "Service",
    "Sink",
    "Store",
    "Upstream",
    "WebhookSink",
    "create_app",
    "make_server",
    "new_key",
]
