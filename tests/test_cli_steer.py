"""`pilotfish steer` from pairs to a verified vector, on a tiny model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from pilotfish.cli import main
from pilotfish.models import tiny_model, tiny_tokenizer
from pilotfish.steering import load_directions


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny_model("llama", seed=0).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pairs") / "returns.jsonl"
    rows = [{"prompt": f"Is it {i}?", "positive": "return the", "negative": "of and"} for i in range(12)]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


QUICK = ["--num-prompts", "1", "--max-new-tokens", "3", "--dtype", "float32"]


@pytest.fixture(scope="module")
def vector(model: Path, pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("vector")
    told = ["--instruction", "Say return.", "--num-layers", "1", "--meter", "kl_mean", "--limit", "0.3"]
    assert main(["steer", "--pairs", str(pairs), "--model", str(model), "--out", str(out), *told, *QUICK]) == 0
    return out


def test_one_command_takes_pairs_to_a_vector_with_card_figures_and_page(vector: Path) -> None:
    ((_, direction),) = load_directions(vector, identity=None).items()
    assert direction.card.name == "returns" and direction.card.dose
    figures = json.loads((vector / "steering.json").read_text())
    assert figures["dose"] == direction.card.dose and figures["verdict"]
    assert {row["arm"] for row in figures["rows"]} >= {"no steering", "vector", "prompt", "few-shot prompt"}
    assert figures["curve"][0]["dose"] == 0.0
    assert figures["prompts"].keys() == {"prompt", "few-shot prompt"}
    assert all(one["behaviour"] is not None for site in figures["sites"] for one in site["curve"])
    page = (vector / "dose.html").read_text()
    assert "Effect against damage" in page and figures["verdict"] in page


def test_the_table_has_every_arm_and_ends_with_a_verdict(
    model: Path, pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = ["--num-layers", "1", "--match-prompt", "True", "--name", "says return"]
    assert main(["steer", "--pairs", str(pairs), "--model", str(model), "--out", str(tmp_path), *told, *QUICK]) == 0
    said = capsys.readouterr().out
    for words in ("says return: best at", "random direction", "shuffled labels", "few-shot prompt", "95 % intervals"):
        assert words in said
    assert "2 independent items are too few to tell; the " in said


def test_verify_passes_and_prints_each_check(vector: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["steer", "verify", str(vector), "--model", str(model), "--dtype", "float32", "--num-tokens", "3"]
    assert main(command) == 0
    said = capsys.readouterr().out
    assert said.count("ok  ") == 5 and "fires once a token over 3 generated tokens" in said


def test_verify_fails_where_the_dose_is_too_small_to_act(
    vector: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["steer", "verify", str(vector), "--model", str(model), "--dtype", "float32", "--dose", "1e-12"]
    assert main(command) == 1
    assert "FAIL" in capsys.readouterr().out


def test_calibrate_writes_the_dose_of_a_budget_on_the_card(
    vector: Path, model: Path, pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = next(iter(load_directions(vector, identity=None).values())).card.dose
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("What is it?\n\nWhere is it?\n")
    told = ["--prompts", str(prompts), "--pairs", str(pairs), "--pair", str(model), "--meter", "acceptance"]
    assert main(["steer", "calibrate", str(vector), *told, "--limit", "0.95", *QUICK]) == 0
    after = next(iter(load_directions(vector, identity=None).values())).card.dose
    assert after is not None and after != before
    said = capsys.readouterr().out
    assert "acceptance at least 0.95" in said and "margin, nats" in said


def test_a_budget_that_no_dose_keeps_leaves_the_card_as_it_was(
    vector: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(vector, tmp_path / "kept")
    before = next(iter(load_directions(folder, identity=None).values())).card.dose
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("What is it?\n")
    told = ["--prompts", str(prompts), "--pair", str(model), "--meter", "kl_mean", "--limit", "1e-9", *QUICK]
    assert main(["steer", "calibrate", str(folder), *told]) == 1
    assert next(iter(load_directions(folder, identity=None).values())).card.dose == before
    assert "the card keeps what it had" in capsys.readouterr().out


def test_the_kind_of_a_calibration_stands_on_the_card_and_verify_goes_by_it(
    vector: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(vector, tmp_path / "ablated")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("What is it?\n")
    told = ["--prompts", str(prompts), "--pair", str(model), "--meter", "kl_mean", "--limit", "0.01", *QUICK]
    assert main(["steer", "calibrate", str(folder), *told, "--kind", "ablate"]) == 0
    ((_, direction),) = load_directions(folder, identity=None).items()
    assert direction.card.kind == "ablate" and direction.card.dose
    verify = ["steer", "verify", str(folder), "--model", str(model), "--dtype", "float32", "--num-tokens", "3"]
    assert main(verify) == 0
    assert f"ablate with dose {direction.card.dose:.4g}" in capsys.readouterr().out
    assert main([*verify, "--kind", "add"]) == 1
    assert "was calibrated for ablate, not for add; leave --kind out" in capsys.readouterr().err
    assert main([*verify, "--kind", "add", "--dose", "2"]) == 0
    assert "add with dose 2" in capsys.readouterr().out


def test_too_few_pairs_are_refused_in_one_line(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "few.jsonl"
    path.write_text('{"prompt": "a", "positive": "b", "negative": "c"}\n')
    assert main(["steer", "--pairs", str(path), "--model", str(model)]) == 1
    assert "too few to read, choose and report on; give 10" in capsys.readouterr().err
