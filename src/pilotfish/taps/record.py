"""A model, sites and rows of tokens in; a folder of activations out, one that an interruption cannot spoil.

The folder holds `index.json` (what is recorded, and where each row lies; written first), `shard-NNNNN.safetensors`
(one tensor "token hidden" a site) and, beside each finished shard, `shard-NNNNN.sha256`.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from pilotfish.core import Site
from pilotfish.errors import ArtefactError, SettingError, TextError
from pilotfish.runs import atomic_path, progress, write_json, write_text
from pilotfish.taps.tap import Taps, tapped

logger = logging.getLogger(__name__)

INDEX_FILE = "index.json"


class TokenRow(NamedTuple):
    id: str
    token_ids: tuple[int, ...]
    """Run through the model as they are: a BOS token is there if the caller put it there."""


class Shard(NamedTuple):
    row_ids: tuple[str, ...]
    features: Float[Tensor, "token feature"]
    """The rows one after the other, in the order of `row_ids`."""


class _Place(NamedTuple):
    shard: int
    offset: int
    length: int


class Recording:
    """A finished recording; reads from disk what is asked for and keeps none of it in memory."""

    def __init__(self, folder: Path, sites: tuple[Site, ...], places: dict[str, _Place]) -> None:
        self.folder = folder
        self.sites = sites
        self.row_ids: tuple[str, ...] = tuple(places)
        """In the order of the shards, which is not the order in which the rows were given."""
        self.lengths: dict[str, int] = {row: place.length for row, place in places.items()}
        """Tokens of each row."""
        self._places = places

    @classmethod
    def open(cls, folder: Path, sites: Sequence[Site] | None = None) -> Recording:
        """Opens a recording and checks that every shard is there and whole.

        Args:
            sites: Those to read, in this order; None for all that are recorded.

        Raises:
            ArtefactError: there is no recording, it is unfinished, or a file of it is damaged.
            SettingError: a site is not recorded.
        """
        recording = cls._described(folder)
        if missing_sites := [str(site) for site in sites or () if site not in recording.sites]:
            raise SettingError(
                f"{missing_sites[0]} is not recorded in {folder}; use {', '.join(map(str, recording.sites))}"
            )
        recording.sites = recording.sites if sites is None else tuple(sites)
        if missing := recording._num_missing():
            raise ArtefactError(
                f"the recording in {folder} is unfinished: {missing} of {recording.num_shards} shards are missing; run "
                "the same command again, it goes on from there"
            )
        for shard in range(recording.num_shards):
            with _opened(_shard_path(folder, shard)):
                pass
        return recording

    @classmethod
    def find(
        cls, folder: Path, model: PreTrainedModel, sites: Sequence[Site], *, identity_hash: str
    ) -> Recording | None:
        """As `open`; None where the recording is unfinished, of another model or dtype, or lacks one of the sites."""
        there = _read_index(folder)["settings"]
        is_of_model = (there.get("model"), there.get("dtype")) == (identity_hash, _dtype(model))
        if not is_of_model or not {str(site) for site in sites} <= set(there["sites"]):
            return None
        return None if cls._described(folder)._num_missing() else cls.open(folder, sites)

    @classmethod
    def _described(cls, folder: Path) -> Recording:
        index = _read_index(folder)
        places = {row: _Place(*place) for row, place in index["rows"].items()}
        return cls(folder, tuple(map(Site.parse, index["settings"]["sites"])), places)

    def _num_missing(self) -> int:
        return sum(not _sidecar(_shard_path(self.folder, shard)).exists() for shard in range(self.num_shards))

    @property
    def num_shards(self) -> int:
        return self._places[self.row_ids[-1]].shard + 1

    def features(self, row_id: str) -> Float[Tensor, "token feature"]:
        """The sites of one row, concatenated in the order of `sites`, in the dtype of the model.

        Raises:
            SettingError: there is no such row.
            ArtefactError: its shard is damaged.
        """
        if row_id not in self._places:
            raise SettingError(f"row {row_id!r} is not among the {len(self.row_ids)} rows recorded in {self.folder}")
        shard, offset, length = self._places[row_id]
        with _opened(_shard_path(self.folder, shard)) as file:
            parts = [file.get_slice(str(site))[offset : offset + length] for site in self.sites]
        return torch.cat(parts, dim=-1)

    def shards(self, order: Sequence[int] | None = None) -> Iterator[Shard]:
        """Every row once, shard by shard: batches of all lengths mixed, so that no shard is all long or all short.

        `order` gives the shards in another order than that of the files.

        Raises:
            ArtefactError: a shard is damaged.
        """
        rows: list[list[str]] = [[] for _ in range(self.num_shards)]
        for row, place in self._places.items():
            rows[place.shard].append(row)
        for shard in range(self.num_shards) if order is None else order:
            with _opened(_shard_path(self.folder, shard)) as file:
                features = torch.cat([file.get_tensor(str(site)) for site in self.sites], dim=-1)
            yield Shard(tuple(rows[shard]), features)


def record(
    model: PreTrainedModel,
    sites: Sequence[Site],
    rows: Sequence[TokenRow],
    folder: Path,
    *,
    identity_hash: str,
    shard_tokens: int = 16384,
    batch_tokens: int = 2048,
) -> Recording:
    """Runs rows through a model once and keeps the activations at `sites` on disk, in the model's own dtype.

    The same call after an interruption checks the finished shards, keeps them and makes the rest; on one machine with
    one number of threads the files come out the same to the byte. Memory is bounded by one shard and one batch,
    whatever the number of rows.

    Args:
        identity_hash: Says which weights these are (`Identity.weights`): no other model goes on with the folder.
        shard_tokens: Tokens after which a file is closed: what a kill can cost.
        batch_tokens: Tokens of a forward pass, padding included; a longer row makes a pass of its own.

    Raises:
        TextError: there are no rows, an id occurs twice, or a row is empty, too long or not of the model's vocabulary.
        SettingError: a size is not positive, a site does not exist, or the model is in training mode.
        ArtefactError: the folder holds a recording of something else, is in use, or cannot be written.
    """
    _check(model, sites, rows, shard_tokens, batch_tokens)
    settings = {
        "model": identity_hash,
        "dtype": _dtype(model),
        "sites": [str(site) for site in sites],
        "rows": hashlib.sha256(json.dumps(sorted((row.id, list(row.token_ids)) for row in rows)).encode()).hexdigest(),
        "shard_tokens": shard_tokens,
        "batch_tokens": batch_tokens,
    }
    shards = _plan(rows, shard_tokens, batch_tokens)
    with tapped(model, sites) as taps, _locked(folder):
        if (folder / INDEX_FILE).exists():
            _check_same(folder, settings)
        else:
            write_json(folder / INDEX_FILE, {"settings": settings, "rows": _places(shards)})
        for left_over in folder.glob(".*.part"):
            left_over.unlink()
        for i, batches in enumerate(shards):
            path = _shard_path(folder, i)
            if not _is_finished(path):
                _write_shard(path, _activations(model, taps, batches, f"recording {i + 1}/{len(shards)}"))
    return Recording.open(folder)


def _dtype(model: PreTrainedModel) -> str:
    return str(model.dtype).removeprefix("torch.")


def _check(
    model: PreTrainedModel, sites: Sequence[Site], rows: Sequence[TokenRow], shard_tokens: int, batch_tokens: int
) -> None:
    if min(shard_tokens, batch_tokens) < 1:
        raise SettingError(f"shard_tokens {shard_tokens} and batch_tokens {batch_tokens} must both be at least 1")
    if not sites:
        raise SettingError("no sites to record; give at least one, for example Site(-1, 'final')")
    if model.training:
        raise SettingError("the model is in training mode, where dropout changes its activations; call model.eval()")
    if not rows:
        raise TextError("no rows to record; give at least one")
    context, vocab_size = model.config.max_position_embeddings, model.config.vocab_size
    seen: set[str] = set()
    for row in rows:
        if row.id in seen:
            raise TextError(f"row id {row.id!r} occurs twice; ids name rows, so give each its own")
        seen.add(row.id)
        if not 1 <= len(row.token_ids) <= context:
            raise TextError(
                f"row {row.id!r} has {len(row.token_ids)} tokens; this model takes 1 to {context}: drop or truncate it"
            )
        if not 0 <= min(row.token_ids) <= max(row.token_ids) < vocab_size:
            raise TextError(
                f"row {row.id!r} has token ids from {min(row.token_ids)} to {max(row.token_ids)}; this model takes 0 "
                f"to {vocab_size - 1}: use its own tokenizer"
            )


Batch = list[TokenRow]


def _plan(rows: Sequence[TokenRow], shard_tokens: int, batch_tokens: int) -> list[list[Batch]]:
    """Rows of like length to batches, for little padding; batches to shards, in an order drawn from ids alone.

    The order in which the rows were given makes no difference, and no shard is all long rows or all short ones.
    """
    batches: list[Batch] = []
    for row in sorted(rows, key=lambda row: (-len(row.token_ids), row.id)):
        if not batches or len(batches[-1][0].token_ids) * (len(batches[-1]) + 1) > batch_tokens:
            batches.append([])
        batches[-1].append(row)
    batches.sort(key=lambda batch: hashlib.sha256(batch[0].id.encode()).digest())
    shards: list[list[Batch]] = []
    room = 0
    for batch in batches:
        size = sum(len(row.token_ids) for row in batch)
        if size > room:
            shards.append([])
            room = shard_tokens
        shards[-1].append(batch)
        room -= size
    return shards


def _places(shards: list[list[Batch]]) -> dict[str, _Place]:
    places = {}
    for i, batches in enumerate(shards):
        offset = 0
        for row in (row for batch in batches for row in batch):
            places[row.id] = _Place(i, offset, len(row.token_ids))
            offset += len(row.token_ids)
    return places


@torch.inference_mode()
def _activations(model: PreTrainedModel, taps: Taps, batches: list[Batch], what: str) -> dict[str, Tensor]:
    """One tensor "token hidden" a site: the rows of all batches, without their padding.

    Rows are padded on the right and no mask is given: under causal attention no real token sees what comes after it.
    """
    parts: dict[str, list[Tensor]] = {str(site): [] for site in taps.sites}
    for batch in progress(batches, what):
        lengths = [len(row.token_ids) for row in batch]
        ids = torch.zeros(len(batch), lengths[0], dtype=torch.long)
        for padded, row in zip(ids, batch, strict=True):
            padded[: len(row.token_ids)] = torch.tensor(row.token_ids)
        model.base_model(ids.to(model.device), use_cache=False)
        real = torch.arange(lengths[0]) < torch.tensor(lengths)[:, None]
        for site, value in taps.items():
            parts[str(site)].append(value[real.to(value.device)].cpu())
    taps.clear()
    return {site: torch.cat(parts.pop(site)) for site in list(parts)}  # frees each site's parts as it goes


def _write_shard(path: Path, tensors: dict[str, Tensor]) -> None:
    with atomic_path(path) as temporary:
        try:
            save_file(tensors, temporary)
        except SafetensorError as error:
            raise ArtefactError(f"{path} cannot be written: {error}; free some disk space and run it again") from error
        digest = _sha256(temporary)
    write_text(_sidecar(path), digest + "\n")


def _is_finished(path: Path) -> bool:
    """Whether a shard is there and is what was written; one that is not will be made again."""
    if not _sidecar(path).exists():
        return False
    if path.exists() and _sha256(path) == _sidecar(path).read_text().strip():
        return True
    logger.warning("%s is damaged or gone; recording it again", path)
    _sidecar(path).unlink()
    return False


def _shard_path(folder: Path, shard: int) -> Path:
    return folder / f"shard-{shard:05d}.safetensors"


def _sidecar(path: Path) -> Path:
    return path.with_suffix(".sha256")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_index(folder: Path) -> dict[str, Any]:
    path = folder / INDEX_FILE
    try:
        index: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ArtefactError(f"{folder} holds no recording: {INDEX_FILE} is missing; record into it first") from error
    except ValueError as error:
        raise ArtefactError(f"{path} is damaged: {error}; delete the folder and record again") from error
    if not isinstance(index, dict) or not {"settings", "rows"} <= index.keys():
        raise ArtefactError(f"{path} is not the index of a recording; give another folder")
    return index


def _check_same(folder: Path, settings: dict[str, Any]) -> None:
    there = _read_index(folder)["settings"]
    differing = [name for name in settings if settings[name] != there[name]]
    if differing:
        details = "; ".join(f"{name}: {there[name]} there, {settings[name]} asked for" for name in differing)
        raise ArtefactError(
            f"{folder} holds a recording with other {', '.join(differing)} ({details}); give another folder, or "
            f"delete that one"
        )


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """A shard mapped into memory; a cut file does not open."""
    try:
        with safe_open(path, "pt") as file:
            yield file
    except (SafetensorError, FileNotFoundError) as error:
        raise ArtefactError(
            f"{path} is damaged: {error}; run the same recording again, it makes this file anew"
        ) from error


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Holds the folder against other processes; the lock goes with the process, however it ends."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ArtefactError(
                f"another process is recording into {folder}; wait for it or give another folder"
            ) from error
        yield
