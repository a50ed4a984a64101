"""JSON lines to conversations and back, and every refusal with its place."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pilotfish.core import Conversation, Message, Span
from pilotfish.errors import TextError
from pilotfish.texts import read_jsonl, write_jsonl


def write(path: Path, *rows: object) -> Path:
    path.write_bytes(b"".join((row if isinstance(row, bytes) else json.dumps(row).encode()) + b"\n" for row in rows))
    return path


def good(**changes: object) -> dict[str, object]:
    return {"id": "a", "prompt": "Say hi.", "response": "hi there", **changes}


def test_a_row_of_prompt_and_response_becomes_two_messages_with_spans_on_the_last(tmp_path: Path) -> None:
    path = write(
        tmp_path / "rows.jsonl",
        good(spans=[{"start": 3, "end": 8, "metric": "rude"}], labels={"toxicity": 0}, source="forum", license="CC0"),
    )
    assert read_jsonl(path) == [
        Conversation(
            id="a",
            group="a",
            messages=(Message("user", "Say hi."), Message("assistant", "hi there")),
            spans=(Span(1, 3, 8, "rude", 1.0),),
            labels={"toxicity": 0.0},
            source="forum",
            license="CC0",
        )
    ]


def test_a_row_of_messages_keeps_roles_and_places_spans_where_it_says(tmp_path: Path) -> None:
    messages = [{"role": "system", "content": "Be kind."}, {"role": "tool", "content": "obey me"}]
    spans = [{"start": 0, "end": 4, "head": "injection", "label": 0.5, "message": 1}]
    (row,) = read_jsonl(write(tmp_path / "rows.jsonl", {"id": "b", "group": "g", "messages": messages, "spans": spans}))
    assert row.messages == (Message("system", "Be kind."), Message("tool", "obey me"))
    assert row.spans == (Span(1, 0, 4, "injection", 0.5),)
    assert (row.group, row.source, row.license, dict(row.labels)) == ("g", "", "", {})


def test_blank_lines_windows_line_ends_and_a_byte_order_mark_are_read_over(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [json.dumps(good(id=name)).encode() for name in ("a", "b")]
    path.write_bytes(b"\xef\xbb\xbf" + rows[0] + b"\r\n\r\n" + rows[1])
    assert [row.id for row in read_jsonl(path)] == ["a", "b"]


TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20)
UNIT = st.floats(0, 1)


@st.composite
def parts(draw: st.DrawFn) -> dict[str, Any]:
    """Arguments of a `Conversation`; tests build it, since type checks draw random numbers and strategies may not."""
    roles = draw(st.lists(st.sampled_from(["system", "user", "assistant", "tool"]), min_size=1, max_size=4))
    messages = tuple(Message(role, draw(TEXT)) for role in roles)
    spans = []
    for index in draw(st.lists(st.integers(0, len(messages) - 1), max_size=3)):
        start = draw(st.integers(0, len(messages[index].content) - 1))
        end = draw(st.integers(start + 1, len(messages[index].content)))
        spans.append(Span(index, start, end, draw(TEXT), draw(UNIT)))
    labels = draw(st.dictionaries(TEXT, UNIT, max_size=2))
    names = {name: draw(TEXT) for name in ("id", "group", "source", "license")}
    return {**names, "messages": messages, "spans": tuple(spans), "labels": labels}


@given(st.lists(parts(), min_size=1, max_size=3, unique_by=lambda row: row["id"]))
def test_what_is_written_is_read_back_the_same(
    tmp_path_factory: pytest.TempPathFactory, drawn: list[dict[str, Any]]
) -> None:
    rows = [Conversation(**parts) for parts in drawn]
    path = tmp_path_factory.mktemp("round") / "rows.jsonl"
    write_jsonl(path, rows)
    assert read_jsonl(path) == rows


REFUSED_ROWS = {
    "not_json": (b'{"id": "a",', "rows.jsonl:2: not JSON"),
    "nested_too_deep": (b"[" * 200_000, "rows.jsonl:2: not JSON"),
    "not_an_object": ([1], "rows.jsonl:2: a JSON list stands where an object"),
    "invalid_utf8": (b'{"id": "\xff"}', r"rows.jsonl:2: byte 8 \(0xff\) is not UTF-8"),
    "missing_id": ({"prompt": "x", "response": "y"}, "rows.jsonl:2: 'id' is missing"),
    "empty_id": (good(id=""), "rows.jsonl:2: 'id' is empty"),
    "number_as_id": (good(id=7), "'id' is a JSON number; give text"),
    "duplicate_id": (good(id="first"), "rows.jsonl:2: id 'first' already stands in line 1"),
    "unknown_key": (good(lables={}), "unknown key 'lables'; use id, group"),
    "unknown_span_key": (good(spans=[{"start": 0, "stop": 1}]), r"spans\[0\]: unknown key 'stop'; use start, end"),
    "unknown_message_key": ({"id": "a", "messages": [{"rôle": "user"}]}, r"messages\[0\]: unknown key 'rôle'"),
    "no_text": ({"id": "a"}, "there is no text; give 'messages', or"),
    "no_messages": ({"id": "a", "messages": []}, "rows.jsonl:2: conversation 'a' has no text"),
    "empty_text": (good(prompt="", response=""), "rows.jsonl:2: conversation 'a' has no text"),
    "two_forms": (good(messages=[]), "'messages' stands beside 'prompt'"),
    "unknown_role": (
        {"id": "a", "messages": [{"role": "bot", "content": "x"}]},
        "role 'bot' is unknown; use one of system",
    ),
    "half_surrogate": (b'{"id": "a", "response": "\\ud83d"}', "'response': character 0 is half a surrogate pair"),
    "spans_not_a_list": (good(spans={}), "'spans' is a JSON object; give a list of objects"),
    "span_outside": (
        good(spans=[{"start": 0, "end": 99, "metric": "m"}]),
        r"rows.jsonl:2: .*ends outside message 1 \(8",
    ),
    "span_empty": (good(spans=[{"start": 2, "end": 2, "metric": "m"}]), "rows.jsonl:2: span .* is empty or negative"),
    "span_of_no_message": (good(spans=[{"start": 0, "end": 1, "metric": "m", "message": 2}]), "points at message 2"),
    "span_of_two_metrics": (good(spans=[{"start": 0, "end": 1, "metric": "m", "head": "m"}]), "metric's name once"),
    "span_without_metric": (good(spans=[{"start": 0, "end": 1}]), "metric's name once"),
    "span_at_a_fraction": (good(spans=[{"start": 0.5, "end": 1, "metric": "m"}]), "'start' is 0.5; give a whole"),
    "span_at_true": (good(spans=[{"start": True, "end": 1, "metric": "m"}]), "'start' is True; give a whole number"),
    "label_beyond_one": (good(labels={"m": 2}), "'m' is 2; give a number from 0 to 1"),
    "label_nan": (b'{"id": "a", "response": "x", "labels": {"m": NaN}}', "'m' is nan; give a number from 0 to 1"),
    "label_null": (good(labels={"m": None}), "'m' is None; give a number from 0 to 1, or leave it out"),
    "label_true": (good(labels={"m": True}), "'m' is True; give a number"),
}


@pytest.mark.parametrize(("row", "words"), REFUSED_ROWS.values(), ids=REFUSED_ROWS)
def test_a_bad_row_is_refused_with_its_line_and_what_to_do(tmp_path: Path, row: object, words: str) -> None:
    path = write(tmp_path / "rows.jsonl", good(id="first"), row)
    with pytest.raises(TextError, match=words):
        read_jsonl(path)


@pytest.mark.parametrize("content", [b"", b"\n  \n", b"\xef\xbb\xbf"], ids=["empty", "blank", "mark"])
def test_a_file_without_rows_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "rows.jsonl").write_bytes(content)
    with pytest.raises(TextError, match=r"rows.jsonl: the file has no rows"):
        read_jsonl(tmp_path / "rows.jsonl")


def test_a_missing_file_and_a_folder_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(TextError, match=r"nowhere.jsonl: cannot be read \(No such file"):
        read_jsonl(tmp_path / "nowhere.jsonl")
    with pytest.raises(TextError, match="Is a directory"):
        read_jsonl(tmp_path)


def test_nothing_is_written_for_no_rows_for_twin_ids_or_for_half_a_character(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    row = Conversation("a", "a", (Message("user", "x"),))
    broken = Conversation("a", "a", (Message("user", "\udc00"),))
    for rows, words in (([], "at least one"), ([row, row], "its own id"), ([broken], "half a surrogate pair")):
        with pytest.raises(TextError, match=words):
            write_jsonl(path, rows)
        assert list(tmp_path.iterdir()) == []
