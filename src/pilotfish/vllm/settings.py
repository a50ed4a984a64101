"""The file that `PILOTFISH_VLLM` names in, settings out; light, since every vLLM process looks."""

from __future__ import annotations

import json
import os
import tomllib
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args

from pilotfish.errors import SettingError

VARIABLE = "PILOTFISH_VLLM"
"""Environment variable with the path of the settings; without it the plugin does nothing."""
Whose = Literal["auto", "draft", "target"]


@dataclass(frozen=True, slots=True, kw_only=True)
class VllmSettings:
    """What to monitor and what to do about it."""

    banks: tuple[str, ...] = ()
    """Folders of banks for one model; none takes those that ship for it."""
    policy: str | None = None
    """TOML or JSON of a policy with the actions observe, flag, hold and stop; none observes."""
    reader: Whose = "auto"
    """Whose states are read: draft, target, or the drafter where there is one (auto)."""
    store: str | None = None
    """Of exchanges and alerts: sqlite:///FILE or postgresql://USER:PASSWORD@HOST/NAME; none keeps nothing."""
    alerts_file: str | None = None
    """JSONL that alerts are appended to; needs a store."""
    webhook: str | None = None
    """URL that alerts are posted to; needs a store."""
    webhook_secret_env: str = "PILOTFISH_WEBHOOK_SECRET"
    """NAME of the environment variable with the key that signs them."""
    redact: bool = False
    """Store no text and no token ids."""
    metrics: bool = True
    """Whether to count in vLLM's Prometheus registry."""

    def __post_init__(self) -> None:
        if self.store is None and (self.alerts_file is not None or self.webhook is not None):
            raise SettingError("alerts are sent from a store, but none is named; set store, or leave the sinks out")


def is_configured() -> bool:
    return bool(os.environ.get(VARIABLE))


def read_settings(path: Path | None = None) -> VllmSettings:
    """Reads a TOML or JSON file; by default the one that the environment names. Paths in it are relative to it.

    Raises:
        SettingError: the file cannot be read, or a key is unknown or of the wrong kind.
    """
    path = path or Path(os.environ[VARIABLE])
    try:
        text = path.read_text(encoding="utf-8")
        raw = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except OSError as error:
        raise SettingError(f"{path} cannot be read: {error.strerror}; {VARIABLE} names a settings file") from error
    except ValueError as error:
        raise SettingError(f"{path} is neither TOML nor JSON: {error}") from error
    known = {item.name: item for item in fields(VllmSettings)}
    for name, value in raw.items():
        if name not in known:
            raise SettingError(f"{path} has the unknown key {name!r}; known are {', '.join(known)}")
        _check_kind(path, name, value)
    return VllmSettings(**{name: _resolved(path.parent, name, value) for name, value in raw.items()})


def _check_kind(path: Path, name: str, value: Any) -> None:
    wanted: type = {"banks": list, "redact": bool, "metrics": bool}.get(name, str)
    if type(value) is not wanted or (isinstance(value, list) and not all(type(item) is str for item in value)):
        what = {list: "a list of folders", bool: "true or false", str: "text"}[wanted]
        raise SettingError(f"{path}: {name} is {value!r}; give {what}")
    if name == "reader" and value not in get_args(Whose):
        raise SettingError(f"{path}: reader {value!r} is unknown; use one of {', '.join(get_args(Whose))}")


def _bank(folder: Path, item: str) -> Path:
    """Beside the settings, or by its name one that ships."""
    from pilotfish.heads.shipped import SHIPPED  # heavy, and wanted in one process alone

    beside, shipped = folder / item, SHIPPED / item
    return shipped if shipped.exists() and not beside.exists() else beside.resolve()


def _resolved(folder: Path, name: str, value: Any) -> Any:
    if name == "banks":
        return tuple(str(_bank(folder, item)) for item in value)
    return str((folder / value).resolve()) if name in {"policy", "alerts_file"} else value
