"""`pilotfish serve --engine vllm`, started once and read by OpenAI's own client."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import pytest
from kit import BLOCKS, LENGTH
from openai import OpenAI
from served import wait_for

from pilotfish.server.schemas import MonitorOut

START = "import sys; from pilotfish.cli import main; sys.exit(main(sys.argv[1:]))"


@pytest.fixture(scope="module")
def client(models, tmp_path_factory):
    folder = tmp_path_factory.mktemp("serve")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ours = [
        *("--pair", models.folder / "target", "--draft", models.folder / "draft"),
        *("--banks", models.folder / "bank-draft", "--action", "observe", "--dtype", "float32"),
        *("--port", port, "--store", f"sqlite:///{folder}/pilotfish.db"),
    ]
    theirs = ["--max-model-len", LENGTH, "--num-gpu-blocks-override", BLOCKS, "--block-size", 32, "--enforce-eager"]
    command = [sys.executable, "-c", START, "serve", "--engine", "vllm", *map(str, [*ours, "--", *theirs])]
    environment = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1", "XDG_CACHE_HOME": str(folder)}
    environment.pop("PILOTFISH_VLLM", None)
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT, cwd=folder)
    try:
        wait_for(f"http://127.0.0.1:{port}", process, folder / "log")
        yield OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none")
    finally:
        process.terminate()
        process.wait(120)


def test_one_command_serves_a_monitored_vllm(client, models):
    name = str(models.folder / "target")
    reply = client.chat.completions.create(
        model=name, messages=[{"role": "user", "content": "def f"}], max_tokens=8, extra_body={"monitor": {}}
    )
    monitor = MonitorOut.model_validate(reply.choices[0].model_extra["monitor"])
    assert [one.id for one in client.models.list()] == [name]
    assert monitor.stats.scored == monitor.stats.committed > 8
    assert set(monitor.heads) == set(models.bank.metrics)
