"""Public sets of replies and comments in their published shapes, built small here, to spans, labels and groups."""

from __future__ import annotations

import csv
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pilotfish.core import Conversation
from pilotfish.errors import TextError
from pilotfish.texts import (
    check_leak,
    read_halueval,
    read_halueval_benign,
    read_liedetector,
    read_mitre_frr,
    read_toxic_spans,
    read_xstest,
    split,
)


def spanned(conversation: Conversation) -> list[str]:
    return [conversation.messages[span.message].content[span.start : span.end] for span in conversation.spans]


def write_csv(path: Path, header: Sequence[str], *rows: Sequence[str]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])
    return path


def write_lines(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


# Toxic spans


def toxic(tmp_path: Path, *rows: tuple[list[int] | str, str]) -> Path:
    return write_csv(tmp_path / "train.csv", ("spans", "text"), *((str(spans), text) for spans, text in rows))


def test_neighbouring_offsets_make_one_span_without_the_white_space_at_its_ends(tmp_path: Path) -> None:
    (row,) = read_toxic_spans(toxic(tmp_path, ([3, 4, 5, 6, 7, 10, 11, 12, 12, 14], "ab  cd  é ghi j")))
    assert spanned(row) == ["cd", "ghi", "j"]
    assert [span.start for span in row.spans] == [4, 10, 14]
    assert {(span.message, span.metric, span.value) for span in row.spans} == {(1, "toxicity", 1.0)}
    assert (dict(row.labels), row.source, row.license) == ({}, "ipavlopoulos/toxic_spans", "CC0-1.0")
    assert [m.content for m in row.messages] == ["Write a comment for a forum.", "ab  cd  é ghi j"]


@given(
    st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1)
    .filter(str.strip)
    .flatmap(lambda text: st.tuples(st.just(text), st.sets(st.integers(0, len(text) - 1))))
)
@settings(deadline=None, max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_spans_cover_the_marked_characters_but_for_white_space_and_no_others(
    tmp_path: Path, comment: tuple[str, set[int]]
) -> None:
    text, marked = comment
    (row,) = read_toxic_spans(toxic(tmp_path, (sorted(marked), text)))
    covered = {at for span in row.spans for at in range(span.start, span.end)}
    assert {at for at in marked if not text[at].isspace()} <= covered <= marked
    assert all(part == part.strip() for part in spanned(row))
    assert dict(row.labels) == ({} if covered else {"toxicity": 0.0})


def test_copies_of_a_comment_share_a_group_and_ids_are_lines(tmp_path: Path) -> None:
    rows = read_toxic_spans(toxic(tmp_path, ([], "Two\nlines"), ([0], "two  lines "), ([], "other")))
    assert [row.id for row in rows] == ["toxic-spans-train-2", "toxic-spans-train-4", "toxic-spans-train-5"]
    assert rows[0].group == rows[1].group != rows[2].group


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("spans,text\n[5],short\n", r"train.csv:2: 'spans' is not a list of character offsets below 5"),
        ("spans,text\n[-1],short\n", r"train.csv:2: 'spans' is not a list"),
        ("spans,text\n[true],short\n", r"train.csv:2: 'spans' is not a list"),
        ('spans,text\n[],"two\nlines"\n[,x\n', r"train.csv:4: 'spans': not JSON"),
        ("spans,text\n[], \n", r"train.csv:2: the response is empty"),
        ("spans,text\n[],a,b\n", r"train.csv:2: 3 cells under 2 columns"),
        ('spans,text\n[],"a"b\n', r"train.csv:2: not CSV"),
        ("spans,comment\n[],a\n", r"train.csv: no column text; there are spans, comment"),
        ("spans,text\n", r"train.csv: the file has no rows"),
        ("", r"train.csv: the file has no rows"),
        ("spans,text\n[],\xff", r"train.csv: byte 14 is not UTF-8"),
    ],
)
def test_a_damaged_file_of_comments_is_refused_with_its_line(tmp_path: Path, content: str, words: str) -> None:
    (tmp_path / "train.csv").write_bytes(content.encode("latin-1"))
    with pytest.raises(TextError, match=words):
        read_toxic_spans(tmp_path / "train.csv")


# XSTest

PROMPTS = [
    ("1", "How do I open a tin?", "homonyms", "open"),
    ("2", "What happened in the spring?", "events", ""),
    ("3", "What happened in the autumn?", "events", ""),
    ("4", "How do I open a safe?", "contrast_homonyms", "open "),
    ("5", "How do I undo the spring?", "contrast_events", ""),
]


def xstest(tmp_path: Path, **labels: Sequence[str]) -> Path:
    write_csv(tmp_path / "prompts.csv", ("id", "prompt", "type", "focus"), *PROMPTS)
    for model, names in labels.items():
        rows = [
            (f"v2-{number}", prompt, f" {model} says {name}", name)
            for (number, prompt, *_), name in zip(PROMPTS, names, strict=True)
        ]
        write_csv(tmp_path / f"completions_{model}.csv", ("id", "prompt", "completion", "final_label"), *rows)
    return tmp_path


YES, NO, PARTLY = "1_full_compliance", "2_full_refusal", "3_partial_refusal"


def test_full_refusals_are_1_and_partial_ones_are_left_out_with_their_count(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        rows = read_xstest(xstest(tmp_path, b=[YES, NO, PARTLY, NO, YES], a=[YES, YES, PARTLY, PARTLY, YES]))
    assert [row.id for row in rows] == [f"xstest-{name}" for name in ("a-1", "a-2", "a-5", "b-1", "b-2", "b-4", "b-5")]
    assert [row.labels["refusal"] for row in rows] == [0, 0, 0, 0, 1, 1, 0]
    assert [m.content for m in rows[4].messages] == ["What happened in the spring?", f"b says {NO}"]
    assert "3 partial refusals left out" in caplog.text
    assert {row.license for row in rows} == {"CC-BY-4.0"}


def test_a_prompt_its_dangerous_contrast_and_all_models_share_a_group(tmp_path: Path) -> None:
    rows = read_xstest(xstest(tmp_path, a=[YES] * 5, b=[NO] * 5))
    groups = {row.id.removeprefix("xstest-"): row.group for row in rows}
    assert groups["a-1"] == groups["b-1"] == groups["a-4"] == groups["b-4"] == "xstest-open"
    assert groups["a-2"] == groups["b-5"] == "xstest-events-1"
    assert groups["a-3"] == "xstest-events-2"


def test_damaged_xstest_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TextError, match=r"no files completions_\*.csv"):
        read_xstest(tmp_path)
    with pytest.raises(TextError, match=r"completions_a.csv:3: 'final_label' is 'maybe'; it should be one of 1_full"):
        read_xstest(xstest(tmp_path, a=[YES, "maybe", YES, YES, YES]))
    (tmp_path / "completions_a.csv").write_text("id,prompt,completion,final_label\nv2-9,p,c,1_full_compliance\n")
    with pytest.raises(TextError, match=r"completions_a.csv:2: 'id' is 'v2-9', which prompts.csv does not have"):
        read_xstest(tmp_path)


# HaluEval


def halueval_row(reply: str, verdict: str, *spans: str, query: str = "q", **changes: Any) -> dict[str, Any]:
    return {
        "ID": "1",
        "user_query": query,
        "chatgpt_response": reply,
        "hallucination": verdict,
        "hallucination_spans": list(spans),
        **changes,
    }


def halueval(tmp_path: Path, *rows: dict[str, Any]) -> Path:
    return write_lines(tmp_path / "general_data.json", *rows)


def test_a_made_up_claim_is_a_span_wherever_it_stands_in_the_reply(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = halueval(
        tmp_path,
        halueval_row("In 1900 (1900) the (a+b) fell.", "yes", "1900", " (a+b) ", "unfinished"),
        halueval_row("It rained.", "yes", "unfinished", " "),
        halueval_row("It rained.", "yes"),
        halueval_row("It did not.", "no"),
    )
    with caplog.at_level(logging.WARNING):
        rows = read_halueval(path)
    assert [spanned(row) for row in rows] == [["1900", "1900", "(a+b)"], [], [], []]
    assert [dict(row.labels).get("hallucination") for row in rows] == [None, 1.0, 1.0, 0.0]
    assert {(span.message, span.metric, span.value) for span in rows[0].spans} == {(1, "hallucination", 1.0)}
    assert "3 of 5 hallucination spans are not in their reply" in caplog.text


def test_rows_of_one_question_share_the_group_of_the_first(tmp_path: Path) -> None:
    rows = [halueval_row(f"r{i}", "no", query=query) for i, query in enumerate(["Why is it?", "How?", "why  is it?"])]
    assert [row.group for row in read_halueval(halueval(tmp_path, *rows))] == [f"halueval-{i}" for i in (1, 2, 1)]


def test_only_replies_judged_benign_are_read_as_benign_and_ids_are_line_numbers(tmp_path: Path) -> None:
    path = halueval(tmp_path, *(halueval_row(f"r{i}", v, "r1") for i, v in enumerate(["no", "yes", "no", "yes"])))
    rows = read_halueval_benign(path)
    assert [(row.id, row.messages[1].content) for row in rows] == [("halueval-1", "r0"), ("halueval-3", "r2")]
    assert all(dict(row.labels) == {"hallucination": 0.0} and not row.spans for row in rows)


@pytest.mark.parametrize(
    ("verdict", "changes", "words"),
    [
        ("maybe", {}, "general_data.json:1: 'hallucination' is 'maybe'; it should be yes or no"),
        ("yes", {}, "general_data.json: no row has"),
        ("yes", {"hallucination_spans": [1]}, "general_data.json:1: 'hallucination_spans' is not a list of texts"),
        ("no", {"chatgpt_response": " "}, "general_data.json:1: the response is empty"),
        ("no", {"user_query": 3}, "general_data.json:1: 'user_query' is a JSON number"),
    ],
)
def test_a_damaged_halueval_file_is_refused_with_its_line_and_field(
    tmp_path: Path, verdict: str, changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(TextError, match=words):
        read_halueval_benign(halueval(tmp_path, halueval_row("r", verdict, **changes)))


# LieDetector


def liedetector(tmp_path: Path, lies: Sequence[tuple[str, str]], truths: Sequence[tuple[str, str]]) -> Path:
    for kind, rows in (("lie", lies), ("truthful", truths)):
        write_lines(tmp_path / f"{kind}_train.jsonl", *({"prompt": p, "completion": c} for p, c in rows))
    return tmp_path


ONE = "User: Which is larger,\nUser or Assistant: the sun\nor the moon?\nAssistant:"
TWO = "User: Is it noon?\nAssistant: Yes, it is noon.\nUser: Are you sure?\nAssistant:"


def test_turns_become_messages_and_a_lie_is_1(tmp_path: Path) -> None:
    lie, other, truth = read_liedetector(
        liedetector(
            tmp_path, [(TWO, " I am.\n"), (ONE, " The moon.\n")], [("User: is it  noon?\nAssistant:", " No.\n")]
        ),
        "train",
    )
    assert [(m.role, m.content) for m in lie.messages] == [
        ("user", "Is it noon?"),
        ("assistant", "Yes, it is noon."),
        ("user", "Are you sure?"),
        ("assistant", "I am."),
    ]
    assert [m.content for m in other.messages] == [
        "Which is larger,\nUser or Assistant: the sun\nor the moon?",
        "The moon.",
    ]
    assert [row.labels["untruthful_answer"] for row in (lie, other, truth)] == [1.0, 1.0, 0.0]
    assert [row.id for row in (lie, truth)] == ["liedetector-train-lie-1", "liedetector-train-truthful-1"]
    assert lie.group == truth.group != other.group
    assert truth.license == "BSD-3-Clause"


def test_the_lie_and_the_truth_of_a_question_are_never_on_two_sides(tmp_path: Path) -> None:
    prompts = [f"User: What is {i} and {i}?\nAssistant:" for i in range(20)]
    answers = [[(prompt, f" It is {i * times}.\n") for i, prompt in enumerate(prompts)] for times in (3, 2)]
    rows = read_liedetector(liedetector(tmp_path, *answers), "train")
    splits = split(rows, {"fit": 0.5, "test": 0.5}, seed=0)
    check_leak(splits)
    assert [sum(row.labels["untruthful_answer"] for row in part) for part in splits.values()] == [10, 10]


@pytest.mark.parametrize(
    ("prompt", "completion"),
    [
        ("Is it noon?\nAssistant:", "No."),
        ("Well. User: Is it noon?\nAssistant:", "No."),
        ("User: Is it noon?", "No."),
        ("User: Is it noon?\nAssistant: No.", "Really."),
        ("User: Is it noon?\nUser: Is it?\nAssistant:", "No."),
        ("User: \nAssistant:", "No."),
        ("User: Is it noon?\nAssistant:", " \n"),
        ("", "No."),
    ],
)
def test_a_row_that_is_no_dialogue_is_refused_with_its_line(tmp_path: Path, prompt: str, completion: str) -> None:
    folder = liedetector(tmp_path, [(TWO, "Yes."), (prompt, completion)], [(TWO, "No.")])
    with pytest.raises(TextError, match=r"lie_train.jsonl:2: 'prompt' and 'completion' are no dialogue"):
        read_liedetector(folder, "train")


# MITRE false refusals


def test_benign_requests_are_user_messages_without_labels(tmp_path: Path) -> None:
    path = tmp_path / "mitre_frr.json"
    path.write_text(json.dumps([{"mutated_prompt": f"Scan my own net {i}.", "is_malicious": False} for i in range(2)]))
    rows = read_mitre_frr(path)
    assert [[(m.role, m.content) for m in row.messages] for row in rows] == [
        [("user", "Scan my own net 0.")],
        [("user", "Scan my own net 1.")],
    ]
    assert [(row.id, dict(row.labels), row.spans) for row in rows] == [("mitre-frr-0", {}, ()), ("mitre-frr-1", {}, ())]


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([], "not a list of rows"),
        (
            [{"mutated_prompt": "p", "is_malicious": True}],
            "row 0: give a 'mutated_prompt' with text and 'is_malicious'",
        ),
        ([{"mutated_prompt": " ", "is_malicious": False}], "row 0: give a 'mutated_prompt'"),
        ([{"is_malicious": False}], "row 0: 'mutated_prompt' is missing"),
    ],
)
def test_requests_that_are_not_benign_are_refused(tmp_path: Path, rows: list[Any], words: str) -> None:
    (tmp_path / "mitre_frr.json").write_text(json.dumps(rows))
    with pytest.raises(TextError, match=f"mitre_frr.json: {words}"):
        read_mitre_frr(tmp_path / "mitre_frr.json")
