"""The ten-minute path of docs/serve.md, run as it is written; only the models are tiny ones."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import seeded_bank

from pilotfish.models import tiny_pair

PAGE = Path(__file__).parents[1] / "docs/serve.md"

TINY = """#!{shell}
if [ "$1" = serve ]; then
    set -- "$@" --pair {root}/target --draft {root}/draft --banks {root}/bank --dtype float32 --port {port}
fi
exec {python} -c 'import sys; from pilotfish.cli import main; sys.exit(main())' "$@"
"""


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("curl") is None, reason="the page uses curl")
def test_the_path_from_install_to_the_first_alert_works_as_written(tmp_path):
    pair = tiny_pair(seed=0)
    for name, model in (("target", pair.target), ("draft", pair.draft)):
        model.save_pretrained(tmp_path / name)
        pair.tokenizer.save_pretrained(tmp_path / name)
    seeded_bank(pair, reader="draft").save(tmp_path / "bank")
    text = PAGE.read_text().split("## What is asked")[0]
    ports = {"8000": free_port(), "9000": free_port()}
    for written, port in ports.items():
        text = text.replace(f":{written}", f":{port}").replace(f'"127.0.0.1", {written}', f'"127.0.0.1", {port}')
    blocks = re.findall(r"```(python|toml|bash)\n(.*?)```", text.replace("insecure_code", "wide"), re.DOTALL)
    for language, code in blocks:
        if language != "bash":
            name = code.split("\n")[0].removeprefix("# ")
            (tmp_path / name).write_text(code)
    install, *steps = [code for language, code in blocks if language == "bash"]
    assert install == "make setup && . .venv/bin/activate\n"  # the test runs in such an environment
    folder = tmp_path / "bin"
    folder.mkdir()
    shell, python = shutil.which("bash"), sys.executable
    wrapper = TINY.format(shell=shell, root=tmp_path, python=python, port=ports["8000"])
    for name, content in (("pilotfish", wrapper), ("python", f'#!{shell}\nexec {python} "$@"\n')):
        (folder / name).write_text(content)
        (folder / name).chmod(0o755)
    environment = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    script = "set -e\n" + "".join(steps) + "wait\n"
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "start_new_session": True}
    with subprocess.Popen([shell, "-c", script], cwd=tmp_path, env=environment, **pipes) as process:
        try:
            said, _ = process.communicate(timeout=600)
        finally:
            with contextlib.suppress(ProcessLookupError):  # nothing is left when all went well
                os.killpg(process.pid, signal.SIGKILL)
    assert "ALERT wide" in said, said
    assert "serving on http://127.0.0.1:" in said
    assert "[wide " in said
    assert "Traceback" not in said
    assert (tmp_path / "pilotfish.db").exists()
