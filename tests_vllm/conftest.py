"""One process, few engines: starting one takes longer than most tests."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # tiny models: a thread bound to a busy core only waits
os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parent))

import pytest
import torch
from kit import Models, engine, make_models, tap_of, write_settings

from pilotfish.vllm.loops import steps_for


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return make_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def draft_engine(models: Models) -> Iterator[Any]:
    settings = write_settings(models.folder, 'banks = ["bank-draft"]\n')
    with engine(models, settings) as llm:
        yield llm


@pytest.fixture(scope="module", params=["loops", "operations"])
def drafting(draft_engine: Any, request: pytest.FixtureRequest) -> Any:
    """An engine whose draft model is read, as on a CPU and as on a GPU."""
    tap = tap_of(draft_engine)
    steps = steps_for(tap.bank, torch.device("cpu"))
    assert steps is not None
    tap._steps, tap._scorer = steps if request.param == "loops" else None, None
    draft_engine.reset_prefix_cache()
    return draft_engine
