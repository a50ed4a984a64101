"""`pilotfish labels` and `pilotfish contrast` as a stranger runs them."""

from __future__ import annotations

import json

import pytest
from chat_server import quoting, serving

from pilotfish.cli import main
from pilotfish.core import Conversation, Message
from pilotfish.models import tiny_pair
from pilotfish.texts import read_jsonl, write_jsonl

KEY = "gsk_very_secret"


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")


@pytest.fixture
def data(tmp_path):
    texts = ["I am the best of all.", "Hello.", "I rule here.", "Good day.", "known"]
    rows = [
        Conversation(f"r{i}", f"g{i}", (Message("user", "go"), Message("assistant", text)))
        for i, text in enumerate(texts)
    ]
    rows[4] = Conversation("r4", "g4", rows[4].messages, labels={"boast": 1.0})
    write_jsonl(tmp_path / "rows.jsonl", rows)
    return tmp_path / "rows.jsonl"


def judge(body, _):
    """Both passes mark the first text, in part; only the first pass marks the third."""
    asked = body["messages"][1]["content"]
    is_second = "sentence by sentence" in asked
    if "I am the best" in asked:
        return quoting("the best") if is_second else quoting("I am the best")
    if "I rule" in asked and not is_second:
        return quoting("I rule")
    return quoting()


def labels(data, url: str, *more: str) -> int:
    paths = ["--data", str(data), "--out", str(data.parent / "out.jsonl")]
    return main(["labels", *paths, "--metric", "boast", "--base-url", url, "--model", "m", *more])


def test_labels_writes_what_both_passes_say_and_reports_how_far_they_agree(data, capsys, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", KEY + "\n")
    (data.parent / "definition.txt").write_text("It boasts.\n")
    more = ["--definition", f"@{data.parent / 'definition.txt'}", "--key-env", "JUDGE_KEY"]
    with serving(judge) as server:
        assert labels(data, server.url, *more) == 0
        assert labels(data, server.url, *more) == 0
    assert len(server.bodies) == 8
    assert "It boasts.\n" in server.bodies[0]["messages"][1]["content"]
    said = capsys.readouterr()
    assert "Cohen's kappa of the labels 0.50 [" in said.out
    assert f"F1 of marked characters {2 * 8 / (13 + 6 + 8):.2f} [" in said.out
    assert "0 requests in this run" in said.out
    rows = read_jsonl(data.parent / "out.jsonl")
    assert [row.labels.get("boast") for row in rows] == [1.0, 0.0, None, 0.0, 1.0]
    assert [(span.start, span.end) for span in rows[0].spans] == [(5, 13)]
    assert all(KEY not in path.read_text() for path in data.parent.iterdir())
    assert KEY not in said.out + said.err


def test_disputed_rows_can_be_left_out(data):
    with serving(judge) as server:
        assert labels(data, server.url, "--definition", "It boasts.", "--disputed", "drop") == 0
    assert [row.id for row in read_jsonl(data.parent / "out.jsonl")] == ["r0", "r1", "r3", "r4"]


def test_one_pass_labels_all_that_it_marks_and_reports_no_agreement(data, capsys):
    with serving(judge) as server:
        assert labels(data, server.url, "--definition", "It boasts.", "--passes", "1") == 0
    assert len(server.bodies) == 4
    assert [row.labels["boast"] for row in read_jsonl(data.parent / "out.jsonl")] == [1.0, 0.0, 1.0, 0.0, 1.0]
    assert "kappa" not in capsys.readouterr().out


def test_a_key_given_in_place_of_its_name_is_not_repeated(data, capsys):
    assert labels(data, "http://127.0.0.1:1/v1", "--definition", "d", "--key-env", KEY) == 1
    said = capsys.readouterr().err
    assert "give its NAME, not the key" in said
    assert KEY not in said


def test_a_wrong_key_is_one_line_and_writes_no_labels(data, capsys, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", KEY)
    with serving(lambda _, headers: (401, {}, headers["Authorization"].encode())) as server:
        assert labels(data, server.url, "--definition", "d", "--key-env", "JUDGE_KEY") == 1
    said = capsys.readouterr().err
    assert "refuses the API key" in said
    assert "Traceback" not in said
    assert KEY not in said
    assert not (data.parent / "out.jsonl").exists()


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--definition", "@nowhere.txt"], "nowhere.txt: cannot be read"),
        (["--definition", "d", "--passes", "1", "--second-model", "n"], "needs a second pass"),
        (["--definition", "d", "--concurrency", "0"], "1 or more"),
    ],
)
def test_settings_of_labels_that_make_no_sense_are_refused(data, capsys, more, words):
    assert labels(data, "http://127.0.0.1:1/v1", *more) == 1
    assert words in capsys.readouterr().err


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    pair = tiny_pair(seed=0)
    pair.target.generation_config.eos_token_id = list(range(40))  # else a tiny model hardly ever ends its turn
    flags = []
    for flag, model in (("--pair", pair.target), ("--draft", pair.draft)):
        model.save_pretrained(root / flag)
        pair.tokenizer.save_pretrained(root / flag)
        flags += [flag, str(root / flag)]
    return [*flags, "--dtype", "float32"]


def contrast(folder, models, *more: str) -> int:
    (folder / "prompts.txt").write_text("".join(f"tell me of thing {i}\n\n" for i in range(3)))
    paths = ["--prompts", str(folder / "prompts.txt"), "--out", str(folder / "out.jsonl")]
    return main(["contrast", *paths, "--metric", "boast", "--do", "Boast.", "--dont", "Do not.", *models, *more])


def test_contrast_writes_pairs_of_answers_and_goes_on_where_it_was(tmp_path, models, capsys):
    more = ["--max-new-tokens", "80", "--temperature", "2"]
    assert contrast(tmp_path, models, *more) == 0
    rows = read_jsonl(tmp_path / "out.jsonl")
    assert [row.labels["boast"] for row in rows] == [1.0, 0.0] * (len(rows) // 2)
    kept = [json.loads(line) for line in (tmp_path / "out.jsonl.answers.jsonl").read_text().splitlines()]
    capsys.readouterr()
    assert contrast(tmp_path, models, *more) == 0
    assert read_jsonl(tmp_path / "out.jsonl") == rows
    said = capsys.readouterr().out
    assert f"from the journal{len(kept):>7}" in said
    assert "sampled" not in said


def test_contrast_without_a_whole_pair_writes_nothing(tmp_path, models, capsys):
    assert contrast(tmp_path, models, "--max-new-tokens", "1") == 1
    assert "raise --max-new-tokens" in capsys.readouterr().err
    assert not (tmp_path / "out.jsonl").exists()
