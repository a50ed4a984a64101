"""A policy's file in, a policy out, and back: TOML or JSON, every key checked by name."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from types import UnionType
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from pilotfish.actions.policy import Policy, Rule
from pilotfish.errors import SettingError
from pilotfish.runs import write_text

T = TypeVar("T", Policy, Rule)


def read_policy(path: Path) -> Policy:
    """Reads a policy from a file that ends in .toml or .json.

    Raises:
        SettingError: the file cannot be read, or a key is unknown, missing, of the wrong kind or out of range; says
            which, and what is allowed.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise SettingError(f"{path} cannot be read: {error.strerror}; give a policy's TOML or JSON file") from error
    except UnicodeDecodeError as error:
        raise SettingError(f"{path} is not UTF-8 at byte {error.start}; convert it") from error
    try:
        raw = tomllib.loads(text) if _is_toml(path) else json.loads(text)
    except ValueError as error:  # both libraries' own errors are of this kind
        raise SettingError(f"{path} is not {path.suffix[1:].upper()}: {error}") from error
    return policy_from_dict(raw, str(path))


def write_policy(path: Path, policy: Policy) -> Path:
    """Writes a policy, atomically, to a file that ends in .toml or .json; settings at their defaults are left out."""
    raw = policy_to_dict(policy)
    write_text(path, _toml(raw) if _is_toml(path) else json.dumps(raw, indent=2, ensure_ascii=False) + "\n")
    return path


def policy_from_dict(raw: Any, where: str = "policy") -> Policy:
    """Makes a policy of what a TOML or JSON file holds.

    Args:
        where: how messages name it.

    Raises:
        SettingError: see `read_policy`.
    """
    if not isinstance(raw, Mapping):
        raise SettingError(f"{where} is {_brief(raw)}; give a table with the keys {_keys(Policy)}")
    rules = raw.get("rules", [])
    if not isinstance(rules, list):
        raise SettingError(f"{where}: rules is {_brief(rules)}; give a list of tables, in TOML under [[rules]]")
    made = tuple(_made(Rule, rule, f"{where}: rules[{index}]") for index, rule in enumerate(rules))
    return _made(Policy, {**raw, "rules": made}, where)


def policy_to_dict(policy: Policy) -> dict[str, Any]:
    """The settings that are not at their defaults, as a TOML or JSON file holds them."""
    raw = _changed(policy)
    if policy.rules:
        raw["rules"] = [_changed(rule) for rule in policy.rules]
    return raw


def _changed(item: Policy | Rule) -> dict[str, Any]:
    values = asdict(item)
    values.pop("rules", None)
    defaults = {each.name: each.default for each in fields(item)}
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in values.items()
        if value != defaults[name]
    }


def _made(kind: type[T], raw: Any, where: str) -> T:
    if not isinstance(raw, Mapping):
        raise SettingError(f"{where} is {_brief(raw)}; give a table with the keys {_keys(kind)}")
    hints = get_type_hints(kind)
    values = {}
    for name, value in raw.items():
        if name not in hints:
            raise SettingError(f"{where} has the unknown key {name!r}; known are {_keys(kind)}")
        values[name] = value if name == "rules" else _fitted(value, hints[name], f"{where}: {name}")
    if kind is Rule and "metric" not in values:
        raise SettingError(f"{where} lacks the key 'metric'; name the metric that the rule is about")
    try:
        return kind(**values)
    except SettingError as error:
        raise SettingError(f"{where}: {error}") from error


def _fitted(value: Any, hint: Any, where: str) -> Any:
    """The value as the field has it; a whole number may stand for a float, and a list for a tuple."""
    if get_origin(hint) is UnionType:
        if value is None:
            return None
        hint = next(each for each in get_args(hint) if each is not type(None))
    if hint is float and type(value) in {int, float}:
        return float(value)
    if get_origin(hint) is tuple:
        num = len(get_args(hint))
        if isinstance(value, list) and len(value) == num and all(type(item) is str for item in value):
            return tuple(value)
        raise SettingError(f"{where} is {_brief(value)}; give a list of {num} texts")
    if get_origin(hint) is Literal:
        if value not in get_args(hint):
            raise SettingError(f"{where} is {_brief(value)}; use one of {', '.join(get_args(hint))}")
        return value
    if type(value) is not hint:
        wanted = {str: "text", bool: "true or false", int: "a whole number", float: "a number"}[hint]
        raise SettingError(f"{where} is {_brief(value)}; give {wanted}")
    return value


def _toml(raw: Mapping[str, Any]) -> str:
    """TOML of a policy's table, which is flat but for its rules. JSON's spelling of these values is TOML's too."""
    blocks = [{name: value for name, value in raw.items() if name != "rules"}, *raw.get("rules", [])]
    lines = []
    for index, block in enumerate(blocks):
        lines += ["", "[[rules]]"] if index else []
        lines += [f"{name} = {_toml_value(value)}" for name, value in block.items()]
    return "\n".join(lines).lstrip("\n") + "\n"


def _toml_value(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False).replace(
        "\x7f", "\\u007f"
    )  # the one control character that JSON lets be


def _is_toml(path: Path) -> bool:
    if path.suffix not in {".toml", ".json"}:
        raise SettingError(f"{path} is no policy's file; its name ends in .toml or .json")
    return path.suffix == ".toml"


def _keys(kind: type[Policy] | type[Rule]) -> str:
    return ", ".join(item.name for item in fields(kind))


def _brief(value: Any) -> str:
    shown = json.dumps(value, default=repr)
    return shown if len(shown) <= 60 else f"{shown[:57]}..."
