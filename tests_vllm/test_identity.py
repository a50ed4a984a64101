"""The plugin absent, installed but idle, and observing: the same tokens, greedy and sampled."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest
from kit import Models, engine, generate, options, write_settings

TEXTS = ["The cat and the dog", "def f(x): return x == 1", "import"]
SAMPLINGS = (
    {"temperature": 0.0},
    {"temperature": 1.0, "seed": 7},
    {"temperature": 0.8, "seed": 1, "top_p": 0.9, "n": 2},
)
UNMONITORED = """
import json, sys
from vllm import LLM, SamplingParams
options, texts, samplings = json.loads(sys.argv[1])
llm = LLM(**options)
found = [
    [[list(c.token_ids) for c in o.outputs] for o in llm.generate(texts, SamplingParams(**s), use_tqdm=False)]
    for s in samplings
]
print("FOUND", json.dumps(found))
"""


@pytest.fixture(scope="module")
def observed(models: Models) -> list[Any]:
    settings = write_settings(models.folder, 'banks = ["bank-draft"]\n')
    with engine(models, settings) as llm:
        return [
            [[list(completion.token_ids) for completion in outputs] for outputs in generate(llm, TEXTS, **sampling)]
            for sampling in _samplings()
        ]


@pytest.mark.parametrize("plugins", ["pilotfish", "none"], ids=["idle", "absent"])
def test_tokens_are_those_of_vllm_without_the_monitor(models, observed, plugins):
    environment = {name: value for name, value in os.environ.items() if name != "PILOTFISH_VLLM"}
    given = json.dumps([options(models), TEXTS, _samplings()])
    command = [sys.executable, "-c", UNMONITORED, given]
    done = subprocess.run(
        command, env={**environment, "VLLM_PLUGINS": plugins}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout.split("FOUND", 1)[1]) == observed


def _samplings() -> list[dict[str, Any]]:
    return [{**sampling, "max_tokens": 24} for sampling in SAMPLINGS]
