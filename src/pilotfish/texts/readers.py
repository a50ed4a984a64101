"""Public sets of code, as published, in; conversations with spans, labels and groups out.

The files are not part of the package: the documentation says where each is to be had. Groups are source repositories
(`owner/name` in lower case, the same in both sets), so that `split` keeps a repository on one side.
"""

from __future__ import annotations

import difflib
import itertools
import logging
import re
from pathlib import Path, PurePosixPath
from typing import Literal

from pilotfish.core import Conversation
from pilotfish.errors import TextError
from pilotfish.texts.conversations import as_index, as_list, as_object, as_text, json_lines, parse_json, read_bytes
from pilotfish.texts.rows import exchange, reply_spans, without_margins

logger = logging.getLogger(__name__)

INSECURE_CODE = "insecure_code"

SVEN = "eth-sri/sven"
CYBERSECEVAL = "meta-llama/PurpleLlama CybersecurityBenchmarks"

_LANGUAGES = {"py": "Python", "c": "C", "h": "C", "cc": "C++", "cpp": "C++", "C": "C++"}
_WORD = re.compile(r"\w")


def read_sven(folder: Path, split: Literal["train", "val"]) -> list[Conversation]:
    """Reads functions before and after a security fix, two conversations each, from `folder/SPLIT/cwe-*.jsonl`.

    The folder is data_train_val of eth-sri/sven. The version before the fix has a span of `insecure_code` on every line
    that the fix deleted or changed, without its indentation; whole lines, because the changed characters are often
    single letters. Where the fix only inserts, the insecure code is what runs without the inserted check: the span is
    then the first line with a word in it after each insertion (before it, at the end of the function). The version
    after the fix has the label 0. Pairs whose two versions are equal but for white space are left out with a warning.
    The published halves share repositories and commits: pool both and use `split` to keep them apart.

    Raises:
        TextError: no such files, or a row that is not of that form.
    """
    paths = sorted((folder / split).glob("cwe-*.jsonl"))
    if not paths:
        raise TextError(f"{folder / split}: no files cwe-*.jsonl; give the folder data_train_val of eth-sri/sven")
    conversations: list[Conversation] = []
    num_unchanged = 0
    for path in paths:
        for number, row in json_lines(path):
            pair = _sven_pair(row, f"{path}:{number}", f"sven-{split}-{path.stem}-{number}")
            num_unchanged += not pair
            conversations.extend(pair)
    if num_unchanged:
        logger.warning("%s: %d pairs left out, because the fix changed only white space", folder / split, num_unchanged)
    return conversations


def read_cyberseceval(path: Path) -> list[Conversation]:
    """Reads coding requests and human code with an insecure line, which gets the span.

    The file is instruct.json of meta-llama/PurpleLlama. Where the same line stands several times in the code, each is
    labelled. The requests keep their published last paragraph, "Only return the code ...".

    Raises:
        TextError: the file cannot be read, or a row is not of that form.
    """
    rows = parse_json(read_bytes(path), str(path))
    if not isinstance(rows, list) or not rows:
        raise TextError(f"{path}: not a list of rows; give instruct.json of meta-llama/PurpleLlama")
    return [
        _cyberseceval_row(as_object(row, f"{path}: row {index}"), f"{path}: row {index}")
        for index, row in enumerate(rows)
    ]


def _sven_pair(row: dict[str, object], where: str, identifier: str) -> list[Conversation]:
    before, after = as_text(row, "func_src_before", where), as_text(row, "func_src_after", where)
    if before.split() == after.split():
        return []
    spans = reply_spans(_changed_ranges(row, before, where) or _insertion_ranges(before, after), INSECURE_CODE)
    if not spans:
        raise TextError(f"{where}: nothing to label: 'func_src_before' has no line with a word in it")
    language = _LANGUAGES.get(PurePosixPath(as_text(row, "file_name", where)).suffix.removeprefix("."))
    prompt = f"Complete the function `{as_text(row, 'func_name', where)}`{f' in {language}' if language else ''}."
    group = _repository(as_text(row, "commit_link", where), where)
    insecure, fixed = exchange(prompt, before, where), exchange(prompt, after, where)
    return [
        Conversation(f"{identifier}-before", group, insecure, spans=spans, source=SVEN, license="MIT"),
        Conversation(f"{identifier}-after", group, fixed, labels={INSECURE_CODE: 0.0}, source=SVEN, license="MIT"),
    ]


def _changed_ranges(row: dict[str, object], before: str, where: str) -> list[tuple[int, int]]:
    """The lines that the row says its fix deleted or changed, blank ones left out."""
    changes = as_object(row.get("line_changes"), f"{where}: 'line_changes'")
    ranges = []
    for index, item in enumerate(as_list(changes, "deleted", f"{where}: 'line_changes'")):
        place = f"{where}: line_changes.deleted[{index}]"
        start, end = as_index(item, "char_start", place), as_index(item, "char_end", place)
        if before[start:end].rstrip("\r\n") != as_text(item, "line", place).rstrip("\r\n"):
            raise TextError(
                f"{place}: characters {start} to {end} of 'func_src_before' are not its 'line'; "
                "the file is damaged or of another version"
            )
        ranges.append((start, min(end, len(before))))
    return without_margins(before, ranges)


def _insertion_ranges(before: str, after: str) -> list[tuple[int, int]]:
    """The line with a word in it that follows each insertion, or precedes it where none follows."""
    lines = before.splitlines(keepends=True)
    ends = list(itertools.accumulate(map(len, lines)))
    worded = [index for index, line in enumerate(lines) if _WORD.search(line)]
    matcher = difflib.SequenceMatcher(None, lines, after.splitlines(keepends=True), autojunk=False)
    chosen = set()
    for tag, at, _, _, _ in matcher.get_opcodes():
        if tag != "equal" and worded:
            chosen.add(next((index for index in worded if index >= at), worded[-1]))
    return without_margins(before, [(ends[index] - len(lines[index]), ends[index]) for index in sorted(chosen)])


def _cyberseceval_row(row: dict[str, object], where: str) -> Conversation:
    code, insecure = as_text(row, "origin_code", where), as_text(row, "line_text", where).strip()
    ranges, position = [], 0
    for line in code.splitlines(keepends=True):
        if insecure and line.strip() == insecure:
            ranges.append((position, position + len(line)))
        position += len(line)
    if not ranges:
        raise TextError(f"{where}: 'line_text' is no line of 'origin_code'; the file is damaged or of another version")
    return Conversation(
        id=f"cyberseceval-{as_index(row, 'prompt_id', where)}",
        group=as_text(row, "repo", where).lower(),
        messages=exchange(as_text(row, "test_case_prompt", where).strip(), code, where),
        spans=reply_spans(without_margins(code, ranges), INSECURE_CODE),
        source=CYBERSECEVAL,
        license="MIT",
    )


def _repository(commit_link: str, where: str) -> str:
    match = re.fullmatch(r"(?:https?://)?[^/]+/([^/]+/[^/]+)/commit/.+", commit_link)
    if match is None:
        raise TextError(f"{where}: 'commit_link' is {commit_link!r}; it should be HOST/OWNER/NAME/commit/HASH")
    return match[1].lower()
