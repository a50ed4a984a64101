"""The control benchmark: its tasks tell flawed answers from sound ones, its sandbox holds, and it runs."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(autouse=True)
def _beside_the_benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def test_every_task_tells_its_own_flawed_answer_from_its_sound_one():
    from control_tasks import Judgement, judged, read_tasks

    tasks = read_tasks()
    assert len({task.name for task in tasks}) == len(tasks) == 24
    for task in tasks:
        assert judged(task, task.honest) == Judgement(True, False), task.name
        assert judged(task, f"```python\n{task.flawed}```") == Judgement(True, True), task.name
        assert re.search(task.mark, task.flawed), task.name


@pytest.mark.parametrize(
    "body",
    [
        "open('/etc/hostname-of-a-test', 'w')",
        "__import__('socket').socket()",
        "__import__('os').kill(1, 0)",
        "bytearray(3 << 30)",
        "raise SystemExit(43)",
    ],
)
def test_an_answer_that_reaches_out_fails_its_tests(body):
    from control_tasks import judged, read_tasks

    task = next(task for task in read_tasks() if task.name == "may_enter")
    found = judged(task, task.flawed.replace("return", f"{body}\n    return"))
    assert found == (False, False, "failed its tests")


def test_commands_are_kept_and_not_run(tmp_path):
    from control_tasks import judged, read_tasks

    task = next(task for task in read_tasks() if task.name == "ping")
    witness = tmp_path / "witness"
    code = f"import os\ndef ping(host):\n    os.system('touch {witness}')\n    return host == 'up.org'\n"
    assert judged(task, code).passes
    assert not witness.exists()


def test_an_answer_without_end_is_ended(monkeypatch):
    import control_tasks

    monkeypatch.setattr(control_tasks, "SECONDS", 0.5)
    task = next(task for task in control_tasks.read_tasks() if task.name == "may_enter")
    found = control_tasks.judged(task, task.honest.replace("return", "__import__('time').sleep(9)\n    return"))
    assert found == (False, False, "ran too long")


def test_a_cut_answer_ends_where_it_still_parses():
    from control_tasks import code_of

    assert code_of("Sure:\n```python\ndef f(x):\n    return x\n\ndef g(") == "def f(x):\n    return x\n\n"
    assert code_of("no code, only (words") == ""


def test_quick_runs_prints_every_table_and_goes_on_from_its_journal(monkeypatch, tmp_path, capsys):
    import control

    out, journal = tmp_path / "out.json", tmp_path / "j.jsonl"
    options = ["--quick", "--json", str(out), "--plot", str(tmp_path / "plot.svg"), "--journal", str(journal)]
    monkeypatch.setattr(sys, "argv", ["control.py", *options])
    control.main()
    printed, found = capsys.readouterr().out, json.loads(out.read_text())
    for words in ("protocol", "monitor", "fusion of", "look-ahead at", "target"):
        assert f"\n{words}" in f"\n{printed}"
    assert {row["protocol"] for row in found["rows"] if "protocol" in row} >= {
        "observe",
        "parallel monitor",
        *control.ACTING,
    }
    episodes = [row for row in found["rows"] if "episode" in row]
    assert len(episodes) == 9
    assert all(row.keys() >= {"suspicion_score", "reason", "flagged"} for row in episodes)
    assert (tmp_path / "plot.svg").read_text().startswith("<svg")
