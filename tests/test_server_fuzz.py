"""Malformed requests over real sockets: none of them is the server's error, and it serves on."""

from __future__ import annotations

from pathlib import Path

import pytest
from server_kit import serving

from pilotfish.engines import EmbeddedEngine
from pilotfish.server import EmbeddedBackend, Limits, ServerSettings

SETTINGS = ServerSettings(port=0, limits=Limits(new_tokens=16), requests_per_minute=1_000_000)


@pytest.fixture(autouse=True)
def _beside_the_benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))


def test_no_malformed_request_is_answered_with_a_server_error(pair, bank, tmp_path):
    from serve_fuzz import fuzz, status_to, well_formed
    from serve_kit import tiny_directions

    backend = EmbeddedBackend(EmbeddedEngine(pair, [bank]), directions=tiny_directions(pair))
    with serving(backend, tmp_path, SETTINGS) as server:
        requests = well_formed(server.url)
        before = [status_to(server.url, request) for request in requests]
        steered = [status for request, status in zip(requests, before, strict=True) if "steer" in (request.body or {})]
        assert steered == [200] * 4
        found = fuzz(server.url, 300, seed=0)
        assert found.broken == []
        assert found.statuses[400] > 100
        assert [status_to(server.url, request) for request in well_formed(server.url)] == before
        assert before.count(200) > 20


def test_the_fuzz_shows_an_engine_that_fails(pair, bank, tmp_path, monkeypatch):
    from serve_fuzz import fuzz

    def fails(*_: object) -> None:
        raise ZeroDivisionError

    with serving(EmbeddedBackend(EmbeddedEngine(pair, [bank])), tmp_path, SETTINGS) as server:
        monkeypatch.setattr(server.backend, "submit", fails)
        assert fuzz(server.url, 60, seed=0).broken
