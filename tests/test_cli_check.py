"""The drift gate as a stranger runs it: a tiny model against itself, and files of made-up scores for every verdict."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import seeded_bank

from pilotfish.cli import main
from pilotfish.core import Conversation, Message
from pilotfish.heads import Card, HeadBank, ThresholdCard
from pilotfish.models import tiny_pair
from pilotfish.runs import generator
from pilotfish.scores import ScoredText, write_scored
from pilotfish.texts import write_jsonl


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """A reader, one with other weights, a bank of the first with a threshold on its card, and labelled texts."""
    root = tmp_path_factory.mktemp("check")
    pair = tiny_pair(seed=0)
    for name, model in (("draft", pair.draft), ("tuned", pair.target)):
        model.save_pretrained(root / name)
        pair.tokenizer.save_pretrained(root / name)
    limit = ThresholdCard(
        threshold=0.999, budget=0.2, num_benign=100, num_flagged=0, fpr_upper=0.03, benign_source="made up"
    )
    bank = seeded_bank(pair, reader="draft")
    card = Card(identity=bank.identity, thresholds={"wide": limit})
    HeadBank(bank.heads, bank.identity, card=card).save(root / "bank")
    rows = [
        Conversation(
            f"r{i}", f"g{i}", (Message("user", "go"), Message("assistant", f"line {i}")), (), {"wide": float(i % 2)}
        )
        for i in range(66)
    ]
    write_jsonl(root / "rows.jsonl", rows)
    return {path.name: path for path in root.iterdir()}


def models(folders: dict[str, Path], *, dtype: str) -> list[str]:
    paths = ["--data", str(folders["rows.jsonl"]), "--model", str(folders["draft"])]
    return ["check", str(folders["bank"]), *paths, "--dtype", dtype, "--max-recall-loss", "0.1"]


def scored(path: Path, shift: float = 0.0, noise: float = 0.0, count: int = 600) -> Path:
    random = generator(0, "scores")
    labels = [float(i % 3 == 0) for i in range(count)]
    logits = torch.randn(count, generator=random, dtype=torch.float64) + 4 * torch.tensor(labels) - 2
    logits = logits + shift + noise * torch.randn(count, generator=random, dtype=torch.float64)
    texts = [
        ScoredText(
            id=f"t{i}",
            group=f"g{i}",
            prompt="",
            label=label,
            score=score,
            token_labels=torch.tensor([]),
            token_scores=None,
        )
        for i, (label, score) in enumerate(zip(labels, logits.sigmoid().tolist(), strict=True))
    ]
    write_scored(path, "wide", {"head": texts})
    return path


def test_a_tiny_model_passes_against_itself(folders, tmp_path, capsys):
    code = main([*models(folders, dtype="float32"), "--json", str(tmp_path / "drift.json")])
    said = capsys.readouterr().out
    assert code == 0, said
    assert "PASS (exit code 0)" in said
    assert "A response's score changed by 0.0000 at most" in said
    plain = json.loads((tmp_path / "drift.json").read_text())
    assert (plain["verdict"], plain["num_rows"], plain["num_positive"]) == ("pass", 66, 33)
    assert (plain["threshold"], plain["budget"], plain["warnings"]) == (0.999, 0.2, [])
    assert plain["candidate"].endswith("draft, float32")


def test_bfloat16_moves_the_scores_of_a_tiny_model_and_the_size_is_reported(folders, tmp_path):
    assert main([*models(folders, dtype="bfloat16"), "--json", str(tmp_path / "drift.json")]) in {0, 11, 12}
    assert 0.0 < json.loads((tmp_path / "drift.json").read_text())["largest_change"] < 0.2


def test_other_weights_are_refused_unless_asked_for_and_then_said_aloud(folders, capsys):
    arguments = [*models(folders, dtype="float32"), "--candidate-model", str(folders["tuned"])]
    assert main(arguments) == 1
    assert "add --other-weights True" in capsys.readouterr().err
    assert main([*arguments, "--other-weights", "True"]) in {0, 10, 11, 12}
    assert "does NOT have the weights that this bank was made for" in capsys.readouterr().out


def test_another_tokenizer_is_refused_even_where_other_weights_are_allowed(folders, tmp_path, capsys):
    pair = tiny_pair(seed=0)
    pair.tokenizer.add_tokens(["brandnew"])
    pair.draft.save_pretrained(tmp_path / "other")
    pair.tokenizer.save_pretrained(tmp_path / "other")
    other = ["--candidate-model", str(tmp_path / "other"), "--other-weights", "True"]
    assert main([*models(folders, dtype="float32"), *other]) == 1
    assert "other tokenizer" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("code", "verdict", "shift", "noise", "count"),
    [
        (0, "PASS", 0.0, 0.0, 900),
        (10, "THRESHOLD STALE", 2.0, 0.0, 900),
        (11, "SCORER DEGRADED", 0.0, 4.0, 900),
        (12, "INCONCLUSIVE", 0.0, 0.0, 30),
    ],
)
def test_two_files_of_scores_get_every_verdict(tmp_path, capsys, code, verdict, shift, noise, count):
    files = [
        *("--reference", str(scored(tmp_path / "a.json", count=count))),
        *("--candidate", str(scored(tmp_path / "b.json", shift, noise, count))),
    ]
    assert main(["check", *files, "--threshold", "0.75", "--budget", "0.01"]) == code
    assert f"{verdict} (exit code {code})" in capsys.readouterr().out


def test_threshold_and_budget_of_two_files_come_from_the_card_or_are_asked_for(folders, tmp_path, capsys):
    files = ["--reference", str(scored(tmp_path / "a.json")), "--candidate", str(scored(tmp_path / "b.json"))]
    assert main(["check", *files]) == 1
    assert "give --threshold and --budget" in capsys.readouterr().err
    assert main(["check", str(folders["bank"]), *files]) == 0
    assert "at threshold 0.999" in capsys.readouterr().out
    assert main(["check", *files, "--scorer", "words", "--threshold", "0.5", "--budget", "0.1"]) == 1
    assert "has no scorer 'words'; it has head" in capsys.readouterr().err


def test_halves_of_two_ways_to_ask_are_refused(folders, tmp_path, capsys):
    one = ["--reference", str(scored(tmp_path / "a.json"))]
    for arguments in (
        ["check"],
        ["check", str(folders["bank"])],
        ["check", *one],
        [*models(folders, dtype="auto"), *one],
    ):
        assert main(arguments) == 1
        assert "give either a bank's folder and --data, or two files" in capsys.readouterr().err


def test_a_response_that_turns_nan_is_no_pass(tmp_path, capsys):
    files = [scored(tmp_path / "a.json"), scored(tmp_path / "b.json")]
    content = json.loads(files[1].read_text())
    content["scorers"]["head"][0]["score"] = None
    files[1].write_text(json.dumps(content))
    paths = ["--reference", str(files[0]), "--candidate", str(files[1])]
    assert main(["check", *paths, "--threshold", "0.75", "--budget", "0.01"]) == 11
    assert "1 of 600 responses have no score" in capsys.readouterr().out
