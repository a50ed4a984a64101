"""Directions in, a folder with their vectors and cards out, and back."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save

from pilotfish.core import Site
from pilotfish.errors import ArtefactError, SettingError
from pilotfish.models import Identity
from pilotfish.runs import atomic_path, write_json
from pilotfish.steering.card import DirectionCard
from pilotfish.steering.direction import Direction

VECTORS_FILE = "directions.safetensors"
CARD_FILE = "card.json"


def save_directions(folder: Path, directions: Mapping[Site, Direction]) -> Path:
    """Writes `directions.safetensors`, and `card.json` with the hash of that file; each atomically, the card last.

    Raises:
        SettingError: there are no directions, or one is not of the site that it stands under.
        DirectionMismatch: they are of different models.
    """
    if not directions:
        raise SettingError("there are no directions to save; extract at least one")
    identity = next(iter(directions.values())).card.identity
    for site, direction in directions.items():
        if site != direction.site:
            raise SettingError(f"direction {direction.card.name!r} of {direction.site} stands under {site}")
        direction.check(identity)
    data = save({str(site): direction.vector.cpu().contiguous() for site, direction in directions.items()})
    with atomic_path(folder / VECTORS_FILE) as temporary:
        temporary.write_bytes(data)
    cards = {str(site): asdict(direction.card) for site, direction in directions.items()}
    write_json(folder / CARD_FILE, {"vectors_sha256": hashlib.sha256(data).hexdigest(), "directions": cards})
    return folder


def load_directions(folder: Path, *, identity: Identity | None) -> dict[Site, Direction]:
    """Reads directions for a model, in the order in which they were saved.

    Args:
        identity: Of the model that they will be used on; None to look at them without one.

    Raises:
        ArtefactError: a file is missing, cut or changed.
        DirectionMismatch: they were made for another model.
    """
    cards = _read_cards(folder / CARD_FILE)
    path = folder / VECTORS_FILE
    data = _read(path)
    if hashlib.sha256(data).hexdigest() != cards["vectors_sha256"]:
        raise ArtefactError(
            f"{path} is not what its card describes (another SHA-256): cut, changed or mixed up; copy both files again"
        )
    try:
        vectors = load(data)
    except SafetensorError as error:
        raise ArtefactError(f"{path} is not a safetensors file: {error}; copy it again") from error
    if vectors.keys() != cards["directions"].keys():
        raise ArtefactError(f"{path} and its card name different sites; copy both files again")
    directions = {}
    for name, raw in cards["directions"].items():
        try:
            site = Site.parse(name)
            card = DirectionCard.from_json(raw, f"{folder / CARD_FILE}, {name}")
            directions[site] = Direction(site=site, vector=vectors[name], card=card)
        except SettingError as error:
            raise ArtefactError(f"{folder}: {error}; copy both files again") from error
        if identity is not None:
            directions[site].check(identity)
    return directions


def _read_cards(path: Path) -> dict[str, Any]:
    try:
        cards: Any = json.loads(_read(path))
    except ValueError as error:
        raise ArtefactError(f"{path} is not JSON: {error}; copy it again") from error
    if not isinstance(cards, dict) or cards.keys() != {"vectors_sha256", "directions"}:
        raise ArtefactError(f"{path} is not the card of directions; written by another version of Pilotfish?")
    if not isinstance(cards["directions"], dict) or not cards["directions"]:
        raise ArtefactError(f"{path} names no directions; copy both files again")
    return cards


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ArtefactError(
            f"{path} cannot be read: {error.strerror}; directions are {VECTORS_FILE} with {CARD_FILE}"
        ) from error
