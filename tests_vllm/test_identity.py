"""The plugin absent, installed but idle, and observing: the same tokens."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest
from kit import Models, engine, generate, options, write_settings

TEXTS = ["The cat and the dog", "def f(x): return x == 1", "import"]
GREEDY = [{"temperature": 0.0, "max_tokens": 24}]
SEEDED = [
    {"temperature": 1.0, "seed": 7, "max_tokens": 24},
    {"temperature": 0.8, "seed": 1, "top_p": 0.9, "n": 2, "max_tokens": 24},
]
CASES = {"bank-draft": ({}, GREEDY), "bank-target": ({"speculative_config": None}, GREEDY + SEEDED)}
"""With a draft model, and without: vLLM's own seeded sampling does not repeat itself where a draft model speculates."""
UNMONITORED = """
import json, sys
from vllm import LLM, SamplingParams
from vllm.distributed.parallel_state import cleanup_dist_env_and_memory
found = []
texts, cases = json.loads(sys.argv[1])
for options, samplings in cases:
    llm = LLM(**options)
    found.append([
        [[list(c.token_ids) for c in o.outputs] for o in llm.generate(texts, SamplingParams(**s), use_tqdm=False)]
        for s in samplings
    ])
    llm.llm_engine.engine_core.shutdown()
    del llm
    cleanup_dist_env_and_memory()
print("FOUND", json.dumps(found))
"""


@pytest.fixture(scope="module")
def observed(models: Models) -> list[Any]:
    found = []
    for bank, (changes, samplings) in CASES.items():
        settings = write_settings(models.folder, f'banks = ["{bank}"]\n', f"{bank}.toml")
        with engine(models, settings, **changes) as llm:
            found.append(
                [
                    [
                        [list(completion.token_ids) for completion in outputs]
                        for outputs in generate(llm, TEXTS, **given)
                    ]
                    for given in samplings
                ]
            )
    return found


@pytest.mark.parametrize("plugins", ["pilotfish", "none"], ids=["idle", "absent"])
def test_tokens_are_those_of_vllm_without_the_monitor(models, observed, plugins):
    environment = {name: value for name, value in os.environ.items() if name != "PILOTFISH_VLLM"}
    given = [TEXTS, [[options(models, **changes), samplings] for changes, samplings in CASES.values()]]
    command = [sys.executable, "-c", UNMONITORED, json.dumps(given)]
    done = subprocess.run(
        command, env={**environment, "VLLM_PLUGINS": plugins}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout.split("FOUND", 1)[1]) == observed
