"""`pilotfish tune` as a stranger runs it, on a tiny pair saved to disk."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from test_cli import labelled_rows

from pilotfish.cli import main
from pilotfish.core import Conversation, Message
from pilotfish.errors import SettingError
from pilotfish.heads import HeadBank
from pilotfish.models import load_model, tiny_pair
from pilotfish.scores.adapter import require_peft
from pilotfish.texts import write_jsonl


@pytest.fixture(scope="module")
def given(tmp_path_factory) -> Path:
    """A target, a draft, labelled rows and ordinary traffic."""
    root = tmp_path_factory.mktemp("given")
    pair = tiny_pair(seed=0)
    for name, model in (("target", pair.target), ("draft", pair.draft)):
        model.save_pretrained(root / name)
        pair.tokenizer.save_pretrained(root / name)
    write_jsonl(root / "data.jsonl", labelled_rows(60))
    benign = [
        Conversation(f"b{i}", f"bg{i}", (Message("user", f"hello {i}"), Message("assistant", f"reply {i} is plain")))
        for i in range(80)
    ]
    write_jsonl(root / "benign.jsonl", benign)
    return root


def command(given: Path, out: Path, *more: str) -> list[str]:
    return [
        *("tune", "--data", str(given / "data.jsonl"), "--benign", str(given / "benign.jsonl"), "--metric", "danger"),
        *("--model", str(given / "target"), "--draft", str(given / "draft"), "--dtype", "float32"),
        *("--out", str(out), "--work", str(out.parent / "work"), "--budget", "0.1", "--steps", "2", "--answers", "4"),
        *("--held-out", "4", "--answer-tokens", "8", "--learning-rate", "0.001", "--sites", "2", *more),
    ]


def test_a_draft_and_its_bank_are_written_and_what_changed_is_said(given, tmp_path, capsys):
    assert main(command(given, tmp_path / "tuned")) == 0
    said = capsys.readouterr().out
    for row in ("AUROC of tokens", "AUROC of responses", "acceptance, greedy", "acceptance, the engine"):
        assert row in said
    assert "below 0 it is a gain" in said
    tuned = load_model(str(tmp_path / "tuned" / "draft"), dtype="float32")
    bank = HeadBank.load(tmp_path / "tuned" / "bank")
    bank.check(tuned.identity)
    assert "danger/auroc_token/words" in bank.card.baselines
    card = json.loads((tmp_path / "tuned" / "draft" / "tuning.json").read_text())
    assert card["answers"]["count"] == 4


def test_without_peft_it_says_what_to_install(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(SettingError, match=r"pip install 'pilotfish\[train\]'"):
        require_peft()


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--distill", "1.5"), "distill 1.5 is outside [0, 1]"),
        (("--held-out", "1"), "2 or more prompts held out"),
        (("--budget", "0"), "budget 0.0 is outside (0, 1)"),
    ],
)
def test_settings_out_of_range_are_refused_like_an_unknown_flag(given, tmp_path, capsys, more, words):
    with pytest.raises(SystemExit) as stopped:
        main(command(given, tmp_path / "tuned", *more))
    assert stopped.value.code == 2
    assert words in " ".join(capsys.readouterr().err.replace("│", " ").split())
