"""The server is held to its own OpenAPI schema by requests that are drawn from it, well-formed and not."""

from __future__ import annotations

from pathlib import Path

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from server_kit import serving

from pilotfish.engines import EmbeddedEngine
from pilotfish.server import EmbeddedBackend, Limits, ServerSettings

CHECKS = (
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    negative_data_rejection,
)


EXAMPLES = settings(
    max_examples=15,
    deadline=None,
    database=None,
    derandomize=True,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Do not use the `random` module inside strategies")  # a thread of the server did
def test_no_request_breaks_the_server_or_its_schema(pair, bank, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    from serve_kit import tiny_directions

    backend = EmbeddedBackend(EmbeddedEngine(pair, [bank]), directions=tiny_directions(pair))
    chosen = ServerSettings(port=0, limits=Limits(new_tokens=16), requests_per_minute=1_000_000)
    with serving(backend, tmp_path, chosen) as server:
        schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
        operations = [found.ok() for found in schema.get_all_operations()]
        assert len(operations) >= 15
        sent = 0

        def holds(case: schemathesis.Case) -> None:
            nonlocal sent
            sent += 1
            case.call_and_validate(checks=list(CHECKS))

        for operation in operations:
            for mode in GenerationMode:
                if mode is GenerationMode.POSITIVE or operation.body or operation.query or operation.path_parameters:
                    EXAMPLES(given(operation.as_strategy(mode))(holds))()
        assert sent >= 200
