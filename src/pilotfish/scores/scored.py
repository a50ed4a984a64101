"""Texts with what scorers say of them in; one JSON file out, and back."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from pilotfish.errors import ArtefactError
from pilotfish.runs import write_text

SCORED_FILE = "scored.json"
"""Beside the card of a bank."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ScoredText:
    """A labelled text and what a scorer, a head or a baseline, says of it."""

    id: str
    group: str
    prompt: str
    """Positive and negative responses to one prompt of one group make pairs."""
    label: float
    """Of the whole response; NaN when it has none."""
    score: float
    """Of the whole response."""
    token_labels: Float[Tensor, " token"]
    """NaN where unlabelled."""
    token_scores: Float[Tensor, " token"] | None
    """None for a scorer of whole responses."""
    running: Float[Tensor, " token"] | None = None
    """Of the text up to each token, which thresholds are held against; None where that is the token's own score."""
    pieces: tuple[str, ...] = ()
    """Each token's text; empty when it is not kept."""

    @property
    def judged(self) -> Float[Tensor, " token"] | None:
        """What a threshold is held against at each token; None for a scorer of whole responses."""
        return self.token_scores if self.running is None else self.running


class Scored(NamedTuple):
    """What several scorers say of held-out texts."""

    metric: str
    by_scorer: dict[str, list[ScoredText]]


def write_scored(path: Path, metric: str, texts_by_scorer: Mapping[str, Sequence[ScoredText]]) -> None:
    """Writes the texts as JSON, atomically, NaN as null. The file holds the texts' own words: it is not for sharing."""
    scorers = {name: [_row(text) for text in texts] for name, texts in texts_by_scorer.items()}
    content = {"metric": metric, "scorers": scorers}
    write_text(path, json.dumps(content, ensure_ascii=False, allow_nan=False) + "\n")


def read_scored(path: Path) -> Scored:
    """Reads what `write_scored` wrote; scores and labels come back in float64, with the same values.

    Raises:
        ArtefactError: the file is missing, is not JSON, or is not of that form; with the place.
    """
    try:
        raw = json.loads(path.read_bytes())
    except OSError as error:
        raise ArtefactError(f"{path} cannot be read: {error.strerror}; `pilotfish fit` writes it") from error
    except ValueError as error:  # bad UTF-8 too
        raise ArtefactError(f"{path} is not JSON: {error}; write it again with `pilotfish fit`") from error
    _check(raw, {"metric", "scorers"}, f"{path}")
    if not isinstance(raw["metric"], str) or not isinstance(raw["scorers"], dict):
        raise _damaged(f"{path}", "'metric' is a name and 'scorers' an object")
    by_scorer = {}
    for name, rows in raw["scorers"].items():
        if not isinstance(rows, list):
            raise _damaged(f"{path}: {name}", "a scorer has a list of texts")
        by_scorer[name] = [_text(row, f"{path}: {name}[{index}]") for index, row in enumerate(rows)]
    return Scored(raw["metric"], by_scorer)


def _row(text: ScoredText) -> dict[str, object]:
    return {
        "id": text.id,
        "group": text.group,
        "prompt": text.prompt,
        "label": _or_null(text.label),
        "score": _or_null(text.score),
        "token_labels": list(map(_or_null, text.token_labels.tolist())),
        "token_scores": _list_or_null(text.token_scores),
        "running": _list_or_null(text.running),
        "pieces": list(text.pieces),
    }


def _list_or_null(values: Float[Tensor, " token"] | None) -> list[float | None] | None:
    return None if values is None else list(map(_or_null, values.tolist()))


def _or_null(value: float) -> float | None:
    return None if math.isnan(value) else value


def _text(row: Any, where: str) -> ScoredText:
    _check(row, {item.name for item in fields(ScoredText)}, where)
    for name in ("id", "group", "prompt"):
        if not isinstance(row[name], str):
            raise _damaged(where, f"{name!r} is text")
    pieces = row["pieces"]
    if not isinstance(pieces, list) or not all(isinstance(piece, str) for piece in pieces):
        raise _damaged(where, "'pieces' is a list of texts")
    label, score = _numbers([row["label"], row["score"]], f"{where}: label and score").tolist()
    token_labels = _numbers(row["token_labels"], f"{where}: token_labels")
    token_scores, running = (
        None if row[name] is None else _numbers(row[name], f"{where}: {name}") for name in ("token_scores", "running")
    )
    lengths = {len(values) for values in (token_scores, running, pieces or None) if values is not None}
    if lengths - {len(token_labels)}:
        raise _damaged(where, "there are as many scores and pieces as token labels")
    return ScoredText(
        id=row["id"],
        group=row["group"],
        prompt=row["prompt"],
        label=label,
        score=score,
        token_labels=token_labels,
        token_scores=token_scores,
        running=running,
        pieces=tuple(pieces),
    )


def _numbers(values: Any, where: str) -> Float[Tensor, " item"]:
    if not isinstance(values, list) or not all(value is None or type(value) in {int, float} for value in values):
        raise _damaged(where, "these are numbers or null")
    return torch.tensor([math.nan if value is None else value for value in values], dtype=torch.float64)


def _check(raw: Any, keys: set[str], where: str) -> None:
    if not isinstance(raw, dict) or raw.keys() != keys:
        raise _damaged(where, f"an object has the keys {', '.join(sorted(keys))}")


def _damaged(where: str, what: str) -> ArtefactError:
    return ArtefactError(f"{where} is not as it was written: {what}; write it again with `pilotfish fit`")
