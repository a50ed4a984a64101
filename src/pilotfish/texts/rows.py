"""Rows of published files in; messages, spans and names of groups out: what the readers of data sets share."""

from __future__ import annotations

import csv
import hashlib
import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from pilotfish.core import Message, Span
from pilotfish.errors import TextError
from pilotfish.texts.conversations import read_bytes


def csv_rows(path: Path, columns: Sequence[str]) -> Iterator[tuple[int, dict[str, str]]]:
    """Yields the line on which a row begins, and the row by column; quoted cells may span lines.

    Raises:
        TextError: the file cannot be read, is not UTF-8 or CSV, has no rows, lacks a column, or a row has too few or
            too many cells.
    """
    try:
        text = read_bytes(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise TextError(f"{path}: byte {error.start} is not UTF-8; save the file as UTF-8") from error
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    line, num_rows, header = 1, 0, None
    try:
        for cells in reader:
            if header is None:
                header = cells
                missing = [column for column in columns if column not in header]
                if missing:
                    raise TextError(f"{path}: no column {', '.join(missing)}; there are {', '.join(header)}")
            elif cells:
                if len(cells) != len(header):
                    raise TextError(
                        f"{path}:{line}: {len(cells)} cells under {len(header)} columns; the row is damaged"
                    )
                yield line, dict(zip(header, cells, strict=True))
                num_rows += 1
            line = reader.line_num + 1
    except csv.Error as error:
        raise TextError(f"{path}:{line}: not CSV: {error}") from error
    if not num_rows:
        raise TextError(f"{path}: the file has no rows; give a header and a row below it")


def as_texts(row: Mapping[str, object], key: str, where: str) -> list[str]:
    """The list of texts under a key.

    Raises:
        TextError: the key is missing, or is not a list of texts.
    """
    value = row.get(key)
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise TextError(f"{where}: {key!r} is not a list of texts; the file is damaged or of another version")
    return value


def exchange(prompt: str, response: str, where: str) -> tuple[Message, Message]:
    """A request and its reply.

    Raises:
        TextError: the reply is empty.
    """
    if not response.strip():
        raise TextError(f"{where}: the response is empty; remove the row")
    return Message("user", prompt), Message("assistant", response)


def reply_spans(ranges: Iterable[tuple[int, int]], metric: str) -> tuple[Span, ...]:
    """Spans of value 1 on character ranges of the reply of an `exchange`."""
    return tuple(Span(message=1, start=start, end=end, metric=metric, value=1.0) for start, end in ranges)


def without_margins(text: str, ranges: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Takes white space off both ends of the ranges; drops those of white space alone."""
    trimmed = []
    for start, end in ranges:
        body = text[start:end].strip()
        if body:
            first = text.index(body, start)
            trimmed.append((first, first + len(body)))
    return trimmed


def digest(text: str) -> str:
    """16 hex digits that name a text, whatever its case and white space: copies get the same group."""
    return hashlib.sha256(" ".join(text.split()).lower().encode("utf-8", "surrogatepass")).hexdigest()[:16]
