"""A command in; seeds, devices, progress, atomic files and a run card out."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from pilotfish.errors import SettingError, StorageError

if TYPE_CHECKING:
    import torch

T = TypeVar("T")

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

VERSIONED_PACKAGES = ("pilotfish", "torch", "transformers", "tokenizers", "safetensors", "numpy")


class Device(NamedTuple):
    device: torch.device
    dtype: torch.dtype
    reason: str
    """Why these were chosen, in words for the user."""


def generator(seed: int, name: str) -> torch.Generator:
    """A CPU generator for one named purpose of a run: the same seed and name give the same stream, other names
    independent ones.
    """
    import torch

    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def resolve_device(device: str = "auto", dtype: str = "auto") -> Device:
    """Picks where and in which precision to run, with the reason.

    Raises:
        SettingError: the device or dtype is unknown, or the device is not there.
    """
    import torch

    dtypes = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
    if dtype != "auto" and dtype not in dtypes:
        raise SettingError(f"dtype {dtype!r} is unknown; use auto, {', '.join(dtypes)}")
    wanted = device if device != "auto" else ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(wanted)
    except RuntimeError as error:
        raise SettingError(f"device {wanted!r} is unknown; use auto, cpu or cuda") from error
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise SettingError("device 'cuda' was asked for, but torch finds no GPU; use --device cpu")
    if dtype != "auto":
        return Device(chosen, dtypes[dtype], f"{dtype} on {chosen}: as asked")
    return Device(
        chosen,
        torch.bfloat16,
        f"bfloat16 on {chosen}: the dtype that the demo weights are kept in; float32 makes speculation lose on a CPU",
    )


def progress(iterable: Iterable[T], what: str, total: int | None = None) -> Iterable[T]:
    """Wraps an iterable in a progress bar, silent when standard error is not a terminal."""
    from tqdm import tqdm

    bar: Iterable[T] = tqdm(iterable, desc=what, total=total, disable=not sys.stderr.isatty(), leave=False)
    return bar


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yields a temporary file beside `path`; renames it onto `path` when the block ends well, removes it when it
    does not.

    Raises:
        StorageError: the disk is full.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o644)
        os.replace(temporary, path)
    except OSError as error:
        if error.errno in DISK_FULL:
            raise StorageError(
                f"no space left on the disk of {path.parent}; free some and run the same command again"
            ) from error
        raise
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Writes a UTF-8 file atomically: readers see the old one or the new one, never a part."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: object) -> None:
    """Writes indented JSON atomically; refuses NaN and infinity, which are not JSON."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def run_card(command: str, config: dict[str, Any], seed: int) -> dict[str, Any]:
    """What is needed to run this again: command, config, code revision, versions, machine, seed. Holds no host name
    and no user name.
    """
    return {
        "command": command,
        "config": config,
        "seed": seed,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "revision": _git("rev-parse", "HEAD"),
        "dirty": bool(_git("status", "--porcelain")),
        "python": platform.python_version(),
        "machine": {"processor": platform.machine(), "cpus": os.cpu_count()},
        "versions": {name: _version(name) for name in VERSIONED_PACKAGES},
    }


def _git(*args: str) -> str:
    """Output of git for the checkout that tracks this file, empty where none does (an installed package inside
    another project).
    """
    here = Path(__file__).resolve()
    for command in (["ls-files", "--error-unmatch", here.name], list(args)):
        try:
            done = subprocess.run(
                ["git", "-C", str(here.parent), *command], capture_output=True, text=True, timeout=10, check=False
            )
        except (OSError, subprocess.TimeoutExpired):
            return ""
        if done.returncode != 0:
            return ""
    return done.stdout.strip()


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"
