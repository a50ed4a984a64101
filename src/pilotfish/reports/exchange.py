"""An exchange or a table as JSON in; a refusal out for whatever the page could not show truthfully."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from pilotfish.errors import SettingError

ORIGINS = ("prompt", "draft", "target")


def check_exchange(exchange: Mapping[str, Any], where: str) -> None:
    """Checks the parts of an exchange that the page reads; further keys pass through to the JSON export.

    Args:
        where: how messages name this exchange.

    Raises:
        SettingError: a part is missing, of the wrong type, out of range, or contradicts another.
    """
    _mapping(exchange, where)
    _text(exchange.get("title"), f"{where}: title")
    metrics = _texts(exchange.get("metrics"), f"{where}: metrics")
    if not metrics or len(set(metrics)) < len(metrics):
        raise SettingError(f"{where}: metrics {metrics} must name at least one metric, each once")
    _scores(exchange.get("thresholds", {}), metrics, f"{where}: thresholds")
    _tokens(_list(exchange.get("tokens"), f"{where}: tokens"), metrics, f"{where}: tokens")
    _rounds(_list(exchange.get("rounds", []), f"{where}: rounds"), metrics, f"{where}: rounds")
    for index, verdict in enumerate(_list(exchange.get("verdicts", []), f"{where}: verdicts")):
        _verdict(verdict, metrics, f"{where}: verdicts[{index}]")
    _stats(exchange.get("stats", {}), f"{where}: stats")
    for key in ("target", "draft", "finish_reason"):
        if exchange.get(key) is not None:
            _text(exchange[key], f"{where}: {key}")


def check_table(table: Mapping[str, Any], where: str) -> None:
    """Checks a table of columns, rows and an optional note.

    Raises:
        SettingError: a row does not have one cell a column, or a cell is neither text nor a number.
    """
    _mapping(table, where)
    columns = _texts(table.get("columns"), f"{where}: columns")
    for index, row in enumerate(_list(table.get("rows"), f"{where}: rows")):
        if len(_list(row, f"{where}: rows[{index}]")) != len(columns):
            raise SettingError(
                f"{where}: rows[{index}] has {len(row)} cells; give one for each of the {len(columns)} columns"
            )
        for cell in row:
            if not isinstance(cell, str | int | float):
                raise SettingError(f"{where}: rows[{index}] holds {_brief(cell)}; a cell is text or a number")
    _text(table.get("note", ""), f"{where}: note")


def _tokens(tokens: Sequence[Any], metrics: Sequence[str], where: str) -> None:
    if not tokens:
        raise SettingError(f"{where} is empty; an exchange has at least its prompt's tokens")
    last = -1
    for index, token in enumerate(tokens):
        here = f"{where}[{index}]"
        _text(_mapping(token, here).get("text"), f"{here}: text")
        position = _count(token.get("position"), f"{here}: position")
        if position <= last:
            raise SettingError(f"{here}: position {position} comes after position {last}; positions must rise")
        last = position
        if token.get("origin") not in ORIGINS:
            raise SettingError(
                f"{here}: origin {_brief(token.get('origin'))} is unknown; use one of {', '.join(ORIGINS)}"
            )
        scores, unscored = token.get("scores", {}), _mapping(token.get("unscored", {}), f"{here}: unscored")
        _scores(scores, metrics, f"{here}: scores")
        for metric, reason in unscored.items():
            _text(reason, f"{here}: unscored[{metric!r}]")
            if metric in scores:
                raise SettingError(f"{here}: metric {metric!r} is both scored and unscored; keep one")


def _rounds(rounds: Sequence[Any], metrics: Sequence[str], where: str) -> None:
    for index, item in enumerate(rounds):
        here = f"{where}[{index}]"
        _count(_mapping(item, here).get("round"), f"{here}: round")
        _count(item.get("start"), f"{here}: start")
        for place, drafted in enumerate(_list(item.get("drafted"), f"{here}: drafted")):
            spot = f"{here}: drafted[{place}]"
            _text(_mapping(drafted, spot).get("text"), f"{spot}: text")
            if not isinstance(drafted.get("accepted"), bool):
                raise SettingError(f"{spot}: accepted is {_brief(drafted.get('accepted'))}; give true or false")
            _scores(drafted.get("scores", {}), metrics, f"{spot}: scores")


def _verdict(verdict: Any, metrics: Sequence[str], where: str) -> None:
    _count(_mapping(verdict, where).get("position"), f"{where}: position")
    for key in ("metric", "action", "reason"):
        _text(verdict.get(key), f"{where}: {key}")
    numbers = {key: verdict[key] for key in ("score", "threshold") if verdict.get(key) is not None}
    for number in numbers.values():
        _scores({verdict["metric"]: number}, metrics, where)


def _stats(stats: Any, where: str) -> None:
    for key in ("tokens_per_s", "acceptance", "coverage", "num_committed", "num_scored"):
        value = _mapping(stats, where).get(key)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise SettingError(f"{where}: {key} is {_brief(value)}; give a number, or leave it out")


def _scores(scores: Any, metrics: Sequence[str], where: str) -> None:
    for metric, value in _mapping(scores, where).items():
        if metric not in metrics:
            raise SettingError(f"{where}: metric {metric!r} is not among the exchange's metrics ({', '.join(metrics)})")
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0.0 <= value <= 1.0:
            raise SettingError(
                f"{where}: {metric!r} is {_brief(value)}, not a number in [0, 1]; "
                "leave a missing score out and give its reason under `unscored`"
            )


def _mapping(value: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise SettingError(f"{where} is {_brief(value)}; give a JSON object")
    return value


def _list(value: Any, where: str) -> Sequence[Any]:
    if not isinstance(value, list | tuple):
        raise SettingError(f"{where} is {_brief(value)}; give a JSON list")
    return value


def _texts(value: Any, where: str) -> list[str]:
    return [_text(item, where) for item in _list(value, where)]


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise SettingError(f"{where} is {_brief(value)}; give text")
    return value


def _count(value: Any, where: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise SettingError(f"{where} is {_brief(value)}; give a whole number, 0 or more")
    return value


def _brief(value: Any) -> str:
    """A value as it would stand in JSON, cut to a readable length."""
    shown = "missing" if value is None else json.dumps(value, default=repr)
    return shown if len(shown) <= 60 else f"{shown[:57]}..."
