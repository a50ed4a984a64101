"""The commands as a stranger runs them, on tiny models saved to disk."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest
import torch
from conftest import seeded_bank

from pilotfish.cli import main
from pilotfish.cli.fit import read_splits
from pilotfish.core import Conversation, Message, Span
from pilotfish.heads import HeadBank
from pilotfish.models import Pair, tiny_pair
from pilotfish.texts import write_jsonl


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """A target, a draft and a bank as folders."""
    root = tmp_path_factory.mktemp("models")
    pair = tiny_pair(seed=0)
    for name, model in (("target", pair.target), ("draft", pair.draft)):
        model.save_pretrained(root / name)
        pair.tokenizer.save_pretrained(root / name)
    seeded_bank(pair, reader="draft").save(root / "bank")
    return {name: root / name for name in ("target", "draft", "bank")}


def models(folders: dict[str, Path]) -> list[str]:
    return [
        *("--pair", str(folders["target"]), "--draft", str(folders["draft"]), "--banks", str(folders["bank"])),
        *("--dtype", "float32"),
    ]


def labelled_rows(count: int) -> list[Conversation]:
    """Every other text has a labelled word; a tiny model can tell it from the rest."""
    rows = []
    for i in range(count):
        text = f"line {i} of plain text" + (" ZZZZ danger ZZZZ" if i % 2 else " and more of it")
        spans = (Span(1, text.index("ZZZZ"), len(text), "danger", 1.0),) if i % 2 else ()
        labels = {} if i % 2 else {"danger": 0.0}
        rows.append(Conversation(f"r{i}", f"g{i}", (Message("user", "go"), Message("assistant", text)), spans, labels))
    return rows


def test_chat_answers_scores_and_writes_a_page(folders, tmp_path, capsys):
    page = tmp_path / "chat.html"
    code = main(
        [
            "chat",
            *models(folders),
            "--prompt",
            "hello",
            "--max-new-tokens",
            "12",
            "--threshold",
            "0.5",
            "--page",
            str(page),
        ]
    )
    said = capsys.readouterr().out
    assert code == 0
    assert "wide, flagged from 0.50 on" in said
    assert "tokens scored" in said
    assert "<!doctype html>" in page.read_text().lower()


def test_chat_reads_lines_until_an_empty_one_and_keeps_the_conversation(folders, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("first\nsecond\n\nnever read\n"))
    assert main(["chat", *models(folders), "--action", "observe", "--max-new-tokens", "4"]) == 0
    assert capsys.readouterr().out.count("tokens scored") == 2


def test_chat_refuses_a_metric_without_a_head(folders, capsys):
    assert main(["chat", *models(folders), "--prompt", "x", "--metric", "scheming"]) == 1
    assert "metric 'scheming' has no head; there are wide, narrow" in capsys.readouterr().err


def test_a_bank_of_another_model_is_refused_in_one_line(folders, tmp_path, capsys):
    other = tiny_pair(seed=5)
    seeded_bank(other, reader="draft").save(tmp_path / "other")
    arguments = models(folders)
    arguments[arguments.index(str(folders["bank"]))] = str(tmp_path / "other")
    assert main(["chat", *arguments, "--prompt", "x"]) == 1
    said = capsys.readouterr().err
    assert "other weights" in said
    assert "Traceback" not in said


def test_without_a_bank_for_the_model_it_says_how_to_make_one(folders, capsys):
    arguments = [*models(folders)[:4], "--dtype", "float32"]
    assert main(["chat", *arguments, "--prompt", "x"]) == 1
    assert "make one with `pilotfish fit` and name its folder with --banks" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["text", "jsonl"])
def test_score_says_something_of_every_token(folders, tmp_path, capsys, kind):
    path = tmp_path / "some.txt"
    path.write_text("naïve 💡 text\n")
    assert main(["score", str(path), *models(folders), "--format", kind]) == 0
    said = capsys.readouterr().out
    if kind == "text":
        assert "text" in said
        return
    tokens = [json.loads(line) for line in said.splitlines()]
    assert "".join(token["text"] for token in tokens if token["message"] == 0) == path.read_text().rstrip("\n") + "\n"
    assert all(0 <= token["scores"]["wide"] <= 1 for token in tokens)


def test_score_refuses_a_text_that_the_reader_cannot_hold(folders, tmp_path, capsys):
    path = tmp_path / "long.txt"
    path.write_text("word " * 100_000)
    assert main(["score", str(path), *models(folders)]) == 1
    assert "reads at most 512. Cut the text" in capsys.readouterr().err


def test_fit_takes_labels_to_a_bank_that_score_can_use(folders, tmp_path, capsys):
    write_jsonl(tmp_path / "rows.jsonl", labelled_rows(120))
    out = tmp_path / "bank"
    arguments = ["--model", str(folders["draft"]), "--dtype", "float32", "--sites", "2", "--budget", "0.4"]
    paths = ["--data", str(tmp_path / "rows.jsonl"), "--out", str(out), "--work", str(tmp_path / "work")]
    assert main(["fit", "--metric", "danger", *arguments, *paths]) == 0
    said = capsys.readouterr().out
    assert "A response is flagged when its score reaches" in said and "tokens in the median" in said
    assert "TF-IDF" in said
    bank = HeadBank.load(out)
    assert bank.card.metrics["danger/auroc_token"].low > 0.5
    text = tmp_path / "t.txt"
    text.write_text("a line of text")
    scored = ["--pair", str(folders["draft"]), "--banks", str(out), "--dtype", "float32"]
    assert main(["score", str(text), *scored]) == 0


def test_fit_holds_the_head_against_the_same_head_on_the_target(folders, tmp_path, capsys):
    write_jsonl(tmp_path / "rows.jsonl", labelled_rows(120))
    arguments = ["--model", str(folders["draft"]), "--dtype", "float32", "--sites", "2", "--budget", "0.4"]
    paths = ["--data", str(tmp_path / "rows.jsonl"), "--out", str(tmp_path / "bank"), "--work", str(tmp_path / "work")]
    fitted = ["fit", "--metric", "danger", *arguments, *paths, "--rivals", "target"]
    assert main([*fitted, "--target", str(folders["target"])]) == 0
    assert "danger/auroc_token_minus_target" in capsys.readouterr().out
    assert main(fitted) == 1
    assert "the rival `target` needs the name of a bigger model" in capsys.readouterr().err


def test_fit_says_how_many_benign_responses_a_budget_needs(folders, tmp_path, capsys):
    write_jsonl(tmp_path / "rows.jsonl", labelled_rows(60))
    paths = ["--data", str(tmp_path / "rows.jsonl"), "--out", str(tmp_path / "b"), "--work", str(tmp_path / "w")]
    assert main(["fit", "--metric", "danger", "--model", str(folders["draft"]), *paths]) == 1
    assert "give 299 documents or more, or a larger budget" in capsys.readouterr().err
    assert not (tmp_path / "b").exists()


def test_fit_divides_the_rows_of_its_metric_alone(tmp_path):
    others = [Conversation(f"o{i}", f"o{i}", (Message("user", f"other {i}"),), (), {"other": 1.0}) for i in range(200)]
    write_jsonl(tmp_path / "rows.jsonl", [*labelled_rows(20), *others])
    found = read_splits(tmp_path / "rows.jsonl", "danger", None, budget=0.4, seed=0)
    assert sum(map(len, found.splits.values())) + 1 <= 20
    assert all(row.id.startswith("r") for rows in (*found.splits.values(), found.benign) for row in rows)
    assert all(found.splits.values())


def test_fit_names_the_metrics_that_are_there(folders, tmp_path, capsys):
    write_jsonl(tmp_path / "rows.jsonl", labelled_rows(4))
    paths = ["--data", str(tmp_path / "rows.jsonl"), "--out", str(tmp_path / "b")]
    assert main(["fit", "--metric", "typo", *paths]) == 1
    assert "has no label of metric 'typo'; it has danger" in capsys.readouterr().err


def test_bench_tax_prints_every_arm(folders, capsys):
    arguments = ["--num-pairs", "2", "--max-new-tokens", "4", "--heads", "3", "--sites", "2"]
    assert main(["bench", "tax", *models(folders), *arguments]) == 0
    said = capsys.readouterr().out
    for arm in ("target alone", "speculation + heads", "transformers assisted", "re-reading all"):
        assert arm in said


def test_a_pair_with_other_vocabularies_is_refused(folders, tmp_path, capsys):
    pair = tiny_pair(seed=0)
    tokenizer = pair.tokenizer
    tokenizer.add_tokens(["brandnew"])
    model = pair.draft
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(tmp_path / "other")
    tokenizer.save_pretrained(tmp_path / "other")
    arguments = ["--pair", str(folders["target"]), "--draft", str(tmp_path / "other"), "--prompt", "x"]
    assert main(["chat", *arguments]) == 1
    assert "do not share a vocabulary" in capsys.readouterr().err


def test_ctrl_c_is_one_line_and_exit_code_130(folders, capsys, monkeypatch):
    def interrupted(*_: object, **__: object) -> Pair:
        raise KeyboardInterrupt

    monkeypatch.setattr("pilotfish.cli.session.load_pair", interrupted)
    assert main(["chat", *models(folders), "--prompt", "x"]) == 130
    assert "interrupted" in capsys.readouterr().err


def test_ratios_are_medians_within_repetitions():
    from pilotfish.engines.tax import Timing, ratio

    slow = [Timing(2.0 * drift, 4.0, 10) for drift in (1, 2, 3)]
    fast = [Timing(1.0 * drift, 1.0, 10) for drift in (1, 2, 3)]
    found = ratio(slow, fast, generator=torch.Generator().manual_seed(0))
    assert (found.value, found.low, found.high, found.num_pairs) == (2.0, 2.0, 2.0, 3)
    assert ratio(slow, fast, generator=torch.Generator().manual_seed(0), cpu=True).value == 4.0
