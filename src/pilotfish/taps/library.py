"""Rows of tokens in; their activations out, each read by the model once, in whatever company it is asked for again."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from pilotfish.core import Site
from pilotfish.errors import ArtefactError, SettingError, TextError
from pilotfish.taps.record import INDEX_FILE, Recording, TokenRow, record

logger = logging.getLogger(__name__)


class Shelf:
    """Rows by the caller's ids, wherever among the recordings of a library their activations lie."""

    def __init__(self, places: Mapping[str, tuple[Recording, str]]) -> None:
        self.row_ids: tuple[str, ...] = tuple(places)
        self._places = dict(places)

    def features(self, row_id: str) -> Float[Tensor, "token feature"]:
        """As `Recording.features`."""
        if row_id not in self._places:
            raise SettingError(f"row {row_id!r} is not among the {len(self.row_ids)} rows that were asked for")
        recording, key = self._places[row_id]
        return recording.features(key)


def gather(
    model: PreTrainedModel,
    sites: Sequence[Site],
    rows: Sequence[TokenRow],
    library: Path,
    *,
    identity_hash: str,
    also: Sequence[Site] = (),
) -> Shelf:
    """Records those rows that no earlier call has recorded, and gives all of them at `sites`.

    A row is known by its tokens: its id may change, and other rows may come or go. The library holds a folder for each
    model, dtype and choice of sites, and in it one recording for each call that found something new; an interrupted
    one resumes when the same call is made again. A recording of more sites serves whoever asks for some of them.

    Args:
        also: Recorded in the same pass, where there is one, for a later call that asks for them.

    Raises:
        TextError, SettingError, ArtefactError: as `record`; an id that occurs twice included.
    """
    known = _known(library, model, sites, identity_hash)
    keys = {row.id: _digest(json.dumps(row.token_ids)) for row in rows}
    if len(keys) < len(rows):
        raise TextError(
            f"{len(rows) - len(keys)} of {len(rows)} row ids occur twice; ids name rows, so give each its own"
        )
    missing = {keys[row.id]: TokenRow(keys[row.id], row.token_ids) for row in rows if keys[row.id] not in known}
    if missing:
        recorded = tuple(dict.fromkeys((*sites, *also)))
        described = json.dumps([identity_hash, str(model.dtype), [str(site) for site in recorded]])
        folder = library / _digest(described) / _digest(json.dumps(sorted(missing)))
        record(model, recorded, list(missing.values()), folder, identity_hash=identity_hash)
        recording = Recording.open(folder, sites)
        known |= dict.fromkeys(recording.row_ids, recording)
    return Shelf({row_id: (known[key], key) for row_id, key in keys.items()})


def _known(library: Path, model: PreTrainedModel, sites: Sequence[Site], identity_hash: str) -> dict[str, Recording]:
    """Rows of finished recordings by their digest. One that is damaged is as good as none: its rows are read again."""
    known: dict[str, Recording] = {}
    for folder in (path.parent for path in sorted(library.glob(f"*/*/{INDEX_FILE}"))):
        try:
            recording = Recording.find(folder, model, sites, identity_hash=identity_hash)
        except ArtefactError as error:
            logger.warning("left aside: %s", error)
            continue
        if recording is not None:
            known |= dict.fromkeys(recording.row_ids, recording)
    return known


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:24]
