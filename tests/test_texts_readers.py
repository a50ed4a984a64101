"""Public sets of code in their published shapes, built small here, to spans and groups."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from pilotfish.core import Conversation
from pilotfish.errors import TextError
from pilotfish.texts import read_cyberseceval, read_sven

BEFORE = "def load(path):\n    data = open(path).read()\n    return yaml.load(data)\n"
AFTER = "def load(path):\n    data = open(path).read()\n    return yaml.safe_load(data)\n"


def line(text: str, source: str) -> dict[str, Any]:
    start = source.index(text)
    number = source[:start].count("\n") + 1
    return {"line_no": number, "char_start": start, "char_end": start + len(text), "line": text}


def sven_row(before: str = BEFORE, after: str = AFTER, *deleted: str, **changes: Any) -> dict[str, Any]:
    return {
        "func_name": "load",
        "func_src_before": before,
        "func_src_after": after,
        "line_changes": {"deleted": [line(text, before) for text in deleted], "added": []},
        "char_changes": {"deleted": [], "added": []},
        "commit_link": "github.com/Owner/Name/commit/0a1b2c",
        "file_name": "src/load.py",
        "vul_type": "cwe-502",
        **changes,
    }


def sven_folder(tmp_path: Path, *rows: Any, split: str = "train", name: str = "cwe-502.jsonl") -> Path:
    (tmp_path / split).mkdir(exist_ok=True)
    (tmp_path / split / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def spanned(conversation: Conversation) -> list[str]:
    return [conversation.messages[span.message].content[span.start : span.end] for span in conversation.spans]


# SVEN


def test_a_fix_becomes_an_insecure_and_a_secure_conversation_of_one_group(tmp_path: Path) -> None:
    before, after = read_sven(sven_folder(tmp_path, sven_row(BEFORE, AFTER, "    return yaml.load(data)\n")), "train")
    assert [m.content for m in before.messages] == ["Complete the function `load` in Python.", BEFORE]
    assert [m.content for m in after.messages] == ["Complete the function `load` in Python.", AFTER]
    assert [m.role for m in before.messages] == ["user", "assistant"]
    assert spanned(before) == ["return yaml.load(data)"]
    assert {(span.metric, span.value) for span in before.spans} == {("insecure_code", 1.0)}
    assert (after.spans, dict(after.labels)) == ((), {"insecure_code": 0.0})
    assert before.group == after.group == "owner/name"
    assert (before.id, after.id) == ("sven-train-cwe-502-1-before", "sven-train-cwe-502-1-after")
    assert (before.source, before.license) == ("eth-sri/sven", "MIT")


def test_blank_deleted_lines_get_no_span_and_a_last_line_without_an_end_does(tmp_path: Path) -> None:
    before = "int f() {\n\n  gets(b);\n  return 0; }"
    row = sven_row(before, "int f() {\n  fgets(b);\n  return 1; }", "\n", "  gets(b);\n", "  return 0; }")
    row["line_changes"]["deleted"][0].update(char_start=10, char_end=11)
    row["line_changes"]["deleted"][2].update(line="  return 0; }\n", char_end=len(before) + 1)
    assert spanned(read_sven(sven_folder(tmp_path, row), "train")[0]) == ["gets(b);", "return 0; }"]


def test_the_published_text_of_a_deleted_line_may_repeat_elsewhere(tmp_path: Path) -> None:
    before, after = "x = 1\ny = 2\nx = 1\n", "x = 1\ny = 2\nx = 3\n"
    row = sven_row(before, after, "x = 1\n")
    row["line_changes"]["deleted"][0].update(char_start=12, char_end=18)
    (span,) = read_sven(sven_folder(tmp_path, row), "train")[0].spans
    assert (span.start, span.end) == (12, 17)


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ("f(p) {\n  use(p);\n}\n", "f(p) {\n  if (!p) return;\n  use(p);\n}\n", ["use(p);"]),
        ("f(p) {\n\n  {\n    use(p);\n}\n", "f(p) {\n  if (!p) return;\n\n  {\n    use(p);\n}\n", ["use(p);"]),
        ("f(p) {\n  use(p);\n}\n", "f(p) {\n  use(p);\n  free(p);\n}\n", ["use(p);"]),
        ("a();\nb();\nc();\n", "a();\nx();\nb();\nc();\ny();\n", ["b();", "c();"]),
        ("a();\nb();\n", "x();\na();\nb();\n", ["a();"]),
    ],
    ids=["before_a_use", "blank_and_brace_passed_over", "at_the_end", "two_insertions", "at_the_top"],
)
def test_where_a_fix_only_inserts_the_line_after_the_insertion_is_the_span(
    tmp_path: Path, before: str, after: str, expected: list[str]
) -> None:
    assert spanned(read_sven(sven_folder(tmp_path, sven_row(before, after)), "train")[0]) == expected


def test_a_pair_that_differs_in_white_space_alone_is_left_out_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    same = sven_row(BEFORE, BEFORE.replace("    ", "\t"), "    return yaml.load(data)\n")
    folder = sven_folder(tmp_path, same, sven_row(BEFORE, AFTER, "    return yaml.load(data)\n"))
    with caplog.at_level(logging.WARNING):
        assert [row.id[-8:] for row in read_sven(folder, "train")] == ["2-before", "-2-after"]
    assert "1 pairs left out, because the fix changed only white space" in caplog.text


@pytest.mark.parametrize(
    ("file_name", "ending"), [("a.c", " in C."), ("a.cc", " in C++."), ("a.C", " in C++."), ("Makefile", "`load`.")]
)
def test_the_request_names_the_language_when_the_file_name_tells_it(
    tmp_path: Path, file_name: str, ending: str
) -> None:
    rows = read_sven(sven_folder(tmp_path, sven_row(file_name=file_name)), "train")
    assert all(row.messages[0].content.endswith(ending) for row in rows)


@pytest.mark.parametrize(
    "link", ["https://github.com/OWNER/name/commit/1", "github.com/Owner/Name/commit/1/#diff-2?w=1"]
)
def test_the_group_is_the_repository_however_the_commit_is_linked(tmp_path: Path, link: str) -> None:
    assert {row.group for row in read_sven(sven_folder(tmp_path, sven_row(commit_link=link)), "train")} == {
        "owner/name"
    }


def test_each_half_of_sven_is_read_from_its_own_folder_and_ids_stay_apart(tmp_path: Path) -> None:
    for split in ("train", "val"):
        for name in ("cwe-1.jsonl", "cwe-2.jsonl"):
            sven_folder(tmp_path, sven_row(), sven_row(), split=split, name=name)
    ids = [row.id for row in [*read_sven(tmp_path, "train"), *read_sven(tmp_path, "val")]]
    assert len(set(ids)) == 16
    assert ids == [*sorted(ids[:8], key=ids.index), *[i.replace("train", "val") for i in ids[:8]]]


BAD_LINE = {"deleted": [{"line_no": 1, "char_start": 3, "char_end": 9, "line": "def load(path):\n"}], "added": []}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"func_src_after": None}, r"cwe-502.jsonl:1: 'func_src_after' is a JSON null; give text"),
        ({"line_changes": []}, r"cwe-502.jsonl:1: 'line_changes': a JSON list stands where an object"),
        ({"line_changes": {}}, r"'line_changes': 'deleted' is missing"),
        ({"line_changes": BAD_LINE}, r"line_changes.deleted\[0\]: characters 3 to 9 of 'func_src_before' are not its"),
        ({"commit_link": "not a link"}, r"cwe-502.jsonl:1: 'commit_link' is 'not a link'; it should be HOST/OWNER"),
        ({"func_src_before": ""}, r"cwe-502.jsonl:1: nothing to label"),
        ({"func_src_after": " "}, r"cwe-502.jsonl:1: the response is empty"),
    ],
)
def test_a_damaged_sven_row_is_refused_with_its_line_and_field(
    tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(TextError, match=words):
        read_sven(sven_folder(tmp_path, sven_row(**changes)), "train")


def test_a_folder_without_sven_files_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TextError, match=r"train: no files cwe-\*.jsonl; give the folder data_train_val"):
        read_sven(tmp_path, "train")


# CyberSecEval

CODE = (
    "int f(int n) {\n\tint *p = malloc(n * 4);\n\tuse(p);\n\tint *p = malloc(n * 4);  \n  // int *p = malloc(n * 4); }"
)


def cyberseceval(tmp_path: Path, **changes: Any) -> Path:
    row = {
        "prompt_id": 7,
        "line_text": "    int *p = malloc(n * 4);",
        "origin_code": CODE,
        "test_case_prompt": "Write f in C.\n\n    Only return the code.\n",
        "repo": "Owner/Name",
        **changes,
    }
    (tmp_path / "instruct.json").write_text(json.dumps([row]))
    return tmp_path / "instruct.json"


def test_the_insecure_line_is_the_span_wherever_it_stands_as_a_whole_line(tmp_path: Path) -> None:
    (row,) = read_cyberseceval(cyberseceval(tmp_path))
    assert spanned(row) == ["int *p = malloc(n * 4);"] * 2
    assert [span.start for span in row.spans] == [16, 50]
    assert [m.content for m in row.messages] == ["Write f in C.\n\n    Only return the code.", CODE]
    assert (row.id, row.group) == ("cyberseceval-7", "owner/name")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"line_text": "use(q);"}, "row 0: 'line_text' is no line of 'origin_code'"),
        ({"line_text": " "}, "row 0: 'line_text' is no line of 'origin_code'"),
        ({"prompt_id": "7"}, "row 0: 'prompt_id' is '7'; give a whole number"),
        ({"repo": None}, "row 0: 'repo' is a JSON null; give text"),
    ],
)
def test_a_damaged_cyberseceval_row_is_refused_with_its_number_and_field(
    tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(TextError, match=words):
        read_cyberseceval(cyberseceval(tmp_path, **changes))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"[]", "not a list of rows"),
        (b"{}", "not a list of rows"),
        (b"[1]", "row 0: a JSON number"),
        (b"[", "not JSON"),
    ],
)
def test_a_file_that_is_no_list_of_rows_is_refused(tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / "instruct.json").write_bytes(content)
    with pytest.raises(TextError, match=f"instruct.json: {words}"):
        read_cyberseceval(tmp_path / "instruct.json")
