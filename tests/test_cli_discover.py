"""`pilotfish discover` from prompts to a page and to something to use, on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pilotfish.cli import main
from pilotfish.discovery import load_findings
from pilotfish.heads import HeadBank
from pilotfish.models import tiny_model, tiny_tokenizer
from pilotfish.steering import load_directions


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny_model("llama", seed=0).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "mine.txt"
    path.write_text("Is it the end?\n\nReturn the user.\n")
    return path


def discover(model: Path, prompts: Path, out: Path, *more: str) -> int:
    quick = ["--num-vectors", "3", "--iterations", "2", "--max-new-tokens", "3", "--radius", "6"]
    sites = ["--source", "1.resid_pre", "--target", "2.resid_post"]
    return main(
        ["discover", "--prompts", str(prompts), "--model", str(model), "--out", str(out), *quick, *sites, *more]
    )


@pytest.fixture(scope="module")
def folder(model: Path, prompts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("found")
    assert discover(model, prompts, out, "--promote", "1", "--form", "head") == 0
    return out


def test_one_command_takes_prompts_to_vectors_cards_and_a_page(folder: Path) -> None:
    found = load_findings(folder)
    assert len(found.vectors) == 3 + 4 and len(found.findings) == 7
    page = (folder / "findings.html").read_text()
    assert "Is it the end?" in page and "http-equiv" in page and 'src="' not in page
    run = json.loads((folder / "findings.json").read_text())["run"]
    assert run["command"] == "pilotfish discover" and run["config"]["num_vectors"] == "3"


def test_promote_at_once_writes_the_most_promising(folder: Path) -> None:
    first = load_findings(folder).findings[0]["id"]
    assert HeadBank.load(folder / f"{first}-head").metrics == (first,)


def test_promote_takes_a_finding_by_its_name(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["discover", "promote", str(folder), "v1", "--name", "odd", "--out", str(tmp_path / "odd")]
    assert main(command) == 0
    (direction,) = load_directions(tmp_path / "odd", identity=load_findings(folder).identity).values()
    assert direction.card.name == "odd" and str(tmp_path / "odd") in capsys.readouterr().out
    assert main(["discover", "promote", str(folder), "v9"]) == 1
    assert "no finding 'v9'" in capsys.readouterr().err


def test_words_to_rank_by_and_a_bank_reach_the_page(
    folder: Path, model: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (bank,) = folder.glob("*-head")
    more = ["--banks", str(bank), "--towards", "the", "--away", "of"]
    assert discover(model, prompts, tmp_path, *more) == 0
    assert "random vectors beside them" in capsys.readouterr().out
    found = load_findings(tmp_path)
    (metric,) = HeadBank.load(bank).metrics
    assert all(0 <= one["monitors"][metric] <= 1 and one["logit"] is not None for one in found.findings)
    assert "the over of" in (tmp_path / "findings.html").read_text()


def test_what_cannot_be_is_refused_before_a_model_is_loaded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    empty = tmp_path / "empty.txt"
    empty.write_text("\n")
    assert main(["discover", "--prompts", str(empty), "--model", str(tmp_path / "none")]) == 1
    assert "no prompts; give one a line" in capsys.readouterr().err
    assert main(["discover", "--prompts", str(empty), "--promote", "99"]) == 1
    assert "outside 0 to 32" in capsys.readouterr().err
