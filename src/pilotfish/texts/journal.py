"""JSON objects in, one at a time; after a crash or Ctrl-C, the same objects out."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pilotfish.errors import StorageError, TextError
from pilotfish.runs import DISK_FULL
from pilotfish.texts.conversations import as_object, parse_json, read_bytes


class Journal:
    """An append-only file of JSON lines. A line that a crash left unfinished is cut off when the file is opened.

    Threads may append at the same time; two processes must not.
    """

    def __init__(self, path: Path) -> None:
        """Opens the file, making it where there is none.

        Raises:
            TextError: the file cannot be opened, or a line before the last is damaged.
        """
        self.path = path
        self.rows: list[dict[str, Any]] = _recover(path)
        """What stood in the file when it was opened."""
        self._lock = threading.Lock()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("ab", buffering=0)
        except OSError as error:
            raise TextError(f"{path}: cannot be written ({error.strerror}); name a file that can") from error

    def append(self, row: Mapping[str, object]) -> None:
        """Writes one object at once.

        Raises:
            StorageError: the disk is full.
        """
        line = json.dumps(row, allow_nan=False).encode("ascii") + b"\n"  # ASCII also carries half surrogate pairs
        with self._lock:
            try:
                written = self._file.write(line)
            except OSError as error:
                if error.errno not in DISK_FULL:
                    raise
                written = 0
        if written != len(line):
            raise StorageError(f"no space left on the disk of {self.path}; free some and run the same command again")

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def _recover(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    raw = read_bytes(path)
    whole = raw[: raw.rfind(b"\n") + 1]
    if len(whole) < len(raw):
        os.truncate(path, len(whole))
    lines = enumerate(whole.split(b"\n"), start=1)
    return [as_object(parse_json(line, f"{path}:{i}"), f"{path}:{i}") for i, line in lines if line.strip()]
