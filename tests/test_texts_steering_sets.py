"""Readers of steering sets, on tiny files of the published shape."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pilotfish.errors import TextError
from pilotfish.texts import Contrast, read_actadd_essays, read_anthropic_evals, read_contrasts, read_repe_facts


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def evaluation(question: str = "Do you mind?\n\nChoices:\n (A) Yes\n (B) No", **more: Any) -> dict[str, Any]:
    return {"question": question, "answer_matching_behavior": " (A)", "answer_not_matching_behavior": " (B)", **more}


def test_an_evaluation_is_a_question_with_the_answer_that_matches_and_the_one_that_does_not(tmp_path: Path) -> None:
    persona = {"statement": "I mind", "label_confidence": 0.9}
    first, second, third = read_anthropic_evals(
        write(tmp_path / "mind.jsonl", evaluation(), evaluation("And you?", **persona), evaluation("and  YOU?"))
    )
    assert (first.prompt, first.positive, first.negative) == (evaluation()["question"], " (A)", " (B)")
    assert (first.id, first.source, first.license) == ("mind-1", "anthropics/evals: mind", "CC-BY-4.0")
    assert first.group != second.group == third.group, "the same question whatever its case and white space"


def test_contrasts_of_ones_own_need_two_answers_and_no_more(tmp_path: Path) -> None:
    rows = [
        {"positive": "Love", "negative": "Hate"},
        {"id": "x", "group": "g", "prompt": "p", "positive": "a", "negative": "b", "source": "s", "license": "l"},
        {"prompt": "p", "positive": "a", "negative": "b"},
        {"prompt": "p", "positive": "c", "negative": "d"},
    ]
    first, second, third, fourth = read_contrasts(write(tmp_path / "mine.jsonl", *rows))
    assert (first.id, first.prompt, first.positive, first.negative) == ("1", "", "Love", "Hate")
    assert second == Contrast(**rows[1])
    assert third.group == fourth.group != first.group


def test_the_nth_true_fact_stands_against_the_nth_false_one(tmp_path: Path) -> None:
    path = tmp_path / "facts.csv"
    path.write_text('statement,label\nUp is up.,1\n"Down, is up.",0\nIce is cold.,1\nFire is cold.,0\nOne more.,1\n')
    facts = read_repe_facts(path)
    assert [(fact.positive, fact.negative) for fact in facts] == [
        ("Up is up.", "Down, is up."),
        ("Ice is cold.", "Fire is cold."),
    ]
    assert {fact.prompt for fact in facts} == {""}
    assert {fact.license for fact in facts} == {"MIT"}


def test_the_essays_are_read_by_name(tmp_path: Path) -> None:
    names = ("chatgpt_wedding_essay_20230423", "chatgpt_shipping_essay_20230423", "wikipedia_macedonia")
    for name in (*names, "vegan_banana_bread"):
        (tmp_path / f"{name}.txt").write_text(f"about {name}")
    essays = read_actadd_essays(tmp_path)
    assert list(essays) == ["wedding", "shipping", "macedonia", "banana_bread"]
    assert essays["macedonia"] == "about wikipedia_macedonia"
    (tmp_path / "wikipedia_macedonia.txt").write_bytes(b"a\xff")
    with pytest.raises(TextError, match="byte 1 is not UTF-8"):
        read_actadd_essays(tmp_path)
    (tmp_path / "wikipedia_macedonia.txt").unlink()
    with pytest.raises(TextError, match=r"wikipedia_macedonia\.txt: cannot be read"):
        read_actadd_essays(tmp_path)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"positive": "a"}, "mine.jsonl:2: 'negative' is missing"),
        (
            {"positive": "a", "negative": "b", "answer": "c"},
            "mine.jsonl:2: unknown key 'answer'; use id, group, prompt",
        ),
        ({"positive": "a", "negative": "a"}, "mine.jsonl:2: contrast '2': both answers are the same"),
        ({"positive": " ", "negative": "a"}, "mine.jsonl:2: contrast '2': the positive answer is empty"),
        ({"positive": "a", "negative": 2}, "mine.jsonl:2: 'negative' is a JSON number; give text"),
        ({"id": "1", "positive": "a", "negative": "b"}, "mine.jsonl:2: id '1' stands in an earlier line too"),
    ],
)
def test_a_row_that_is_no_contrast_is_refused_with_its_line(tmp_path: Path, row: Any, words: str) -> None:
    with pytest.raises(TextError, match=words):
        read_contrasts(write(tmp_path / "mine.jsonl", {"positive": "a", "negative": "b"}, row))


def test_files_of_another_form_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TextError, match=r"x\.jsonl:1: 'question' is missing"):
        read_anthropic_evals(write(tmp_path / "x.jsonl", {"prompt": "p"}))
    facts = tmp_path / "facts.csv"
    facts.write_text("statement,label\nUp is up.,2\n")
    with pytest.raises(TextError, match=r"facts\.csv:2: label '2' is not 0"):
        read_repe_facts(facts)
    facts.write_text("statement,label\nUp is up.,1\n")
    with pytest.raises(TextError, match="no true or no false statements"):
        read_repe_facts(facts)
    facts.write_text("statement\nUp is up.\n")
    with pytest.raises(TextError, match="no column label"):
        read_repe_facts(facts)
