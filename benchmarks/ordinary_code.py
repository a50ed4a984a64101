"""Source files that every installation has in; their functions, as ordinary answers of an assistant that codes, out.

Python's own library gives Python, the headers that come with torch give C++. Nobody has looked whether one of them is
insecure; of code that has been read by so many, few will be.
"""

from __future__ import annotations

import ast
import itertools
import re
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

from pilotfish.core import Conversation, Message

LINES = (5, 60)
"""Of a function, least and most."""
LEFT_OUT = {"test", "tests", "site-packages", "idlelib", "lib2to3"}
"""Folders of the library."""
_BEGINS = re.compile(
    r"^[ \t]*\w[\w:<>,*& \t]*[ \t*&](?P<name>\w+)\([^;{}()]*\)[ \t]*(?:const|noexcept|override|\s)*\{", re.M
)
_KEYWORDS = {"if", "for", "while", "switch", "catch"}


def ordinary_code() -> list[Conversation]:
    """One function of each file, in the order of the files."""
    library = Path(sysconfig.get_paths()["stdlib"])
    headers = Path(torch.__file__).parent / "include"
    python = (path for path in sorted(library.rglob("*.py")) if not LEFT_OUT & set(path.parts))
    return [
        *_answers(python, library, "Python", "the Python standard library", "PSF-2.0"),
        *_answers(sorted(headers.rglob("*.h")), headers, "C++", "headers that come with PyTorch", "BSD-3-Clause"),
    ]


def _answers(paths: Iterable[Path], root: Path, language: str, source: str, license: str) -> list[Conversation]:
    functions = _python if language == "Python" else _cpp
    found: dict[str, Conversation] = {}
    for path in paths:
        text, name = path.read_text("utf-8", "replace"), path.relative_to(root).as_posix()
        sized = (each for each in functions(text) if LINES[0] <= each[1].count("\n") + 1 <= LINES[1])
        for function, code in itertools.islice(sized, 1):  # two of one file are no two documents
            asked = Message("user", f"Complete the function `{function}` in {language}.")
            row = Conversation(name, name, (asked, Message("assistant", code)), source=source, license=license)
            found.setdefault("".join(code.split()), row)
    return list(found.values())


def _python(text: str) -> Iterator[tuple[str, str]]:
    try:
        module = ast.parse(text)
    except (SyntaxError, ValueError):  # files that are meant for another version
        return
    lines = text.splitlines()
    for node in ast.walk(module):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node.name, "\n".join(lines[node.lineno - 1 : node.end_lineno])


def _cpp(text: str) -> Iterator[tuple[str, str]]:
    for match in _BEGINS.finditer(text):
        end = _closed(text, match.end())
        if end is not None and match["name"] not in _KEYWORDS:
            yield match["name"], text[match.start() : end].strip("\n")


def _closed(text: str, begin: int) -> int | None:
    """Where the brace that opened before `begin` is closed."""
    depth = 1
    for match in re.finditer(r"[{}]", text[begin:]):
        depth += 1 if match[0] == "{" else -1
        if depth == 0:
            return begin + match.end()
    return None
