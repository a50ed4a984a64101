"""The documents say what is there now."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

import pilotfish.errors
from pilotfish.cli import main

ROOT = Path(__file__).parents[1]


def test_the_page_of_commands_is_what_the_verbs_say():
    script = runpy.run_path(str(ROOT / "scripts/cli_docs.py"))
    assert (ROOT / "docs/cli.md").read_text() == script["page"](), "run: python scripts/cli_docs.py"


def test_the_readme_is_short_and_names_files_that_are_there():
    text = (ROOT / "README.md").read_text()
    assert text.count("\n") <= 150
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        if not target.startswith("http"):
            assert (ROOT / target).exists(), f"README links to {target}"


def test_every_room_is_on_the_map():
    text = (ROOT / "ARCHITECTURE.md").read_text()
    for path in (ROOT / "src/pilotfish").iterdir():
        if path.is_dir() and (path / "__init__.py").exists():
            assert f"`{path.name}/`" in text
        elif path.suffix == ".py" and path.name != "__init__.py":
            assert f"`{path.name}`" in text


def test_every_error_stands_in_the_tree_of_errors():
    tree = pilotfish.errors.__doc__
    names = [name for name, value in vars(pilotfish.errors).items() if isinstance(value, type)]
    assert names
    assert all(name in tree for name in names)


@pytest.mark.parametrize("number", sorted((ROOT / "docs/decisions").glob("*.md")), ids=lambda path: path.stem)
def test_a_decision_fits_a_page(number):
    assert number.read_text().count("\n") <= 40


def test_an_unknown_flag_is_refused_with_exit_code_2(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["demo", "--nonsense", "1"])
    assert stopped.value.code == 2
    assert "nonsense" in capsys.readouterr().err


def test_a_setting_out_of_range_is_refused_like_an_unknown_flag(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["fit", "--data", "x.jsonl", "--metric", "m", "--out", "o", "--budget", "2"])
    assert stopped.value.code == 2
    assert "budget 2.0 is outside (0, 1)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b"", "is empty; give at least one character"),
        (b"  \n", "is empty; give at least one character"),
        (b"ok\xff", "not UTF-8 at byte 2; convert it"),
    ],
)
def test_text_that_cannot_be_scored_is_said_so_before_any_model_is_loaded(tmp_path, capsys, raw, words):
    path = tmp_path / "text.txt"
    path.write_bytes(raw)
    assert main(["score", str(path)]) == 1
    assert words in capsys.readouterr().err


def test_a_missing_file_is_named(tmp_path, capsys):
    assert main(["score", str(tmp_path / "none.txt")]) == 1
    assert "none.txt cannot be read: No such file" in capsys.readouterr().err
