"""Directions in, the files of other tools out, and back: GGUF control vectors, hotwire, steering-vectors.

They all count blocks from 0 and add after a block, at our `resid_post`; none says of which weights a vector is, so
whoever imports one says which model it is for, and only its width and depth can be checked.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import gguf
import torch
from jaxtyping import Float
from torch import Tensor

from pilotfish.core import Site, Stream
from pilotfish.errors import ArtefactError, SettingError
from pilotfish.models import Identity
from pilotfish.runs import atomic_path
from pilotfish.steering.archive import read_archive, write_archive
from pilotfish.steering.card import DirectionCard
from pilotfish.steering.direction import Direction

LayerType = Literal["decoder_block", "self_attn", "mlp"]
"""Those of steering-vectors' layer types that are sites of ours."""

_ARCHITECTURE = "controlvector"
_STREAMS: dict[LayerType, Stream] = {"decoder_block": "resid_post", "self_attn": "attn_out", "mlp": "mlp_out"}


def write_gguf(path: Path, directions: Mapping[Site, Direction], *, model_type: str) -> Path:
    """Writes a control vector for llama.cpp (`--control-vector-scaled FILE DOSE`) and repeng, atomically.

    The tensor `direction.N` is added after block N, counted from 0 as our sites are. llama.cpp has no place for one
    after block 0 and refuses a file with one. repeng takes it, and leaves block 0 out by default. The file has no
    dose.

    Args:
        model_type: transformers' `config.model_type`; a hint for people.

    Raises:
        SettingError: there are no directions, or one is not after a block from 1 on.
    """
    _check_sites(directions, path, first=1)
    with atomic_path(path) as temporary:
        writer = gguf.GGUFWriter(temporary, _ARCHITECTURE)
        writer.add_string(f"{_ARCHITECTURE}.model_hint", model_type)
        writer.add_uint32(f"{_ARCHITECTURE}.layer_count", len(directions))
        for site in sorted(directions):
            writer.add_tensor(f"direction.{site.layer}", directions[site].vector.cpu().numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return path


def read_gguf(path: Path, identity: Identity, *, name: str | None = None) -> dict[Site, Direction]:
    """Reads a control vector of llama.cpp or repeng; `direction.N` becomes the direction at `N.resid_post`.

    repeng reads the last block's direction behind the final norm, yet adds it before; it is imported as it stands.

    Args:
        identity: The model that it is for.
        name: The file's by default.

    Raises:
        ArtefactError: the file cannot be read, is no control vector, or holds numbers in another form than floats.
        DirectionMismatch: it is of another width, or of deeper layers than the model has.
    """
    try:
        reader = gguf.GGUFReader(path)
        fields = {key: reader.fields[key].contents() for key in ("general.architecture", f"{_ARCHITECTURE}.model_hint")}
        tensors = {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in reader.tensors}
    except OSError as error:
        raise ArtefactError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, LookupError, TypeError) as error:
        raise ArtefactError(
            f"{path} is not a whole control vector in GGUF: {error}; copy or export it again"
        ) from error
    if fields["general.architecture"] != _ARCHITECTURE:
        raise ArtefactError(f"{path} is a GGUF file of {fields['general.architecture']!r}, not a control vector")
    layers = {}
    for key, vector in tensors.items():
        prefix, _, number = key.partition(".")
        if prefix != "direction" or not number.isdecimal() or vector.dtype not in (torch.float32, torch.float16):
            raise ArtefactError(
                f"{path}: tensor {key!r} of {vector.dtype} is no direction; a control vector has `direction.LAYER` in "
                "float32 or float16"
            )
        layers[int(number)] = vector
    notes = f"imported from a GGUF control vector for {fields[f'{_ARCHITECTURE}.model_hint']}"
    return _directions(path, layers, "resid_post", identity, name or path.stem, notes)


def write_hotwire(path: Path, directions: Mapping[Site, Direction]) -> Path:
    """Writes a vector for hotwire-vllm (`{"id": FILE, "layer": LAYER, "scale": DOSE}`), atomically: one row a layer,
    rows of 0 where there is no direction.

    Raises:
        SettingError: there are no directions, or one is not after a block.
    """
    _check_sites(directions, path, first=0)
    identity = next(iter(directions.values())).card.identity
    matrix = torch.zeros(identity.num_layers, identity.hidden_size)
    for site, direction in directions.items():
        direction.check(identity)
        matrix[site.layer] = direction.vector.cpu()
    write_archive(path, matrix)
    return path


def read_hotwire(
    path: Path, identity: Identity, *, layer: int | None = None, name: str | None = None
) -> dict[Site, Direction]:
    """Reads a hotwire vector: a matrix with a row a layer (rows of 0 are left out), or one vector for any layer.

    Args:
        identity: The model that it is for.
        layer: Where to put a file of one vector; not for a matrix.

    Raises:
        ArtefactError: the file cannot be read as data, or holds no single tensor of that shape.
        SettingError: `layer` is missing, or given for a matrix.
        DirectionMismatch: the vectors are of another width.
    """
    value = read_archive(path)
    tensors = [item for item in value.values() if isinstance(item, Tensor)] if isinstance(value, dict) else [value]
    if len(tensors) != 1 or not isinstance(tensors[0], Tensor):
        raise ArtefactError(f"{path} holds {len(tensors)} tensors; a hotwire vector is one")
    (tensor,) = tensors
    if (tensor.ndim == 1) != (layer is not None):
        raise SettingError(
            f"{path} holds a tensor of shape {tuple(tensor.shape)}; give `layer` for one vector, and for a matrix none"
        )
    if tensor.ndim != 1 and (tensor.ndim != 2 or len(tensor) != identity.num_layers):
        raise ArtefactError(
            f"{path} holds a tensor of shape {tuple(tensor.shape)}; {identity.name} takes one row for each of its "
            f"{identity.num_layers} layers"
        )
    rows = {layer: tensor} if layer is not None else {i: row for i, row in enumerate(tensor) if row.any()}
    return _directions(path, rows, "resid_post", identity, name or path.stem, "imported from a hotwire vector")


def to_layer_activations(
    directions: Mapping[Site, Direction], layer_type: LayerType = "decoder_block"
) -> dict[int, Float[Tensor, " hidden"]]:
    """What `steering_vectors.SteeringVector(layer_activations=..., layer_type=...)` takes: layer to vector.

    Raises:
        SettingError: a direction is at a site of another type.
    """
    wrong = [site for site in directions if site.stream != _STREAMS[layer_type]]
    if wrong:
        raise SettingError(f"site {wrong[0]} is no {layer_type}; give directions at {_STREAMS[layer_type]} alone")
    return {site.layer: direction.vector.clone() for site, direction in directions.items()}


def from_layer_activations(
    activations: Mapping[int, Float[Tensor, " hidden"]],
    identity: Identity,
    *,
    name: str,
    layer_type: LayerType = "decoder_block",
) -> dict[Site, Direction]:
    """Directions of a `SteeringVector`'s `layer_activations`; the inverse of `to_layer_activations`.

    `self_attn` and `mlp` are sites of ours except in Gemma 3, where a norm follows before the stream.

    Raises:
        ArtefactError: the layer type is not a site of ours, or a layer is not numbered.
        DirectionMismatch: the vectors are of another width, or of deeper layers than the model has.
    """
    return _from_layers("layer_activations", activations, layer_type, identity, name)


def read_steering_vectors(path: Path, identity: Identity, *, name: str | None = None) -> dict[Site, Direction]:
    """Reads a `SteeringVector`, or its `layer_activations`, as PyTorch saves them, without running any of it.

    Raises:
        ArtefactError: the file cannot be read as data, or is not of that form.
        DirectionMismatch: as for `from_layer_activations`.
    """
    value = read_archive(path)
    if not isinstance(value, dict):
        raise ArtefactError(f"{path} holds no SteeringVector and no dict of layers")
    activations, layer_type = value.get("layer_activations", value), value.get("layer_type", "decoder_block")
    return _from_layers(str(path), activations, layer_type, identity, name or path.stem)


def _from_layers(where: str, layers: Any, layer_type: Any, identity: Identity, name: str) -> dict[Site, Direction]:
    if layer_type not in get_args(LayerType):
        raise ArtefactError(f"{where} has layer type {layer_type!r}; only {', '.join(get_args(LayerType))} are sites")
    if not isinstance(layers, Mapping) or not all(
        isinstance(layer, int) and isinstance(vector, Tensor) for layer, vector in layers.items()
    ):
        raise ArtefactError(f"{where} is no mapping of layer numbers to tensors")
    notes = f"imported from steering-vectors ({layer_type})"
    return _directions(where, layers, _STREAMS[layer_type], identity, name, notes)


def _directions(
    where: Path | str, layers: Mapping[int, Tensor], stream: Stream, identity: Identity, name: str, notes: str
) -> dict[Site, Direction]:
    if not layers:
        raise ArtefactError(f"{where} holds no directions")
    shapes = {tuple(vector.shape) for vector in layers.values() if vector.ndim != 1}
    if shapes:
        raise ArtefactError(f"{where} holds a tensor of shape {shapes.pop()}; a direction has one axis")
    card = DirectionCard(name=name, identity=identity, method="imported", notes=notes)
    try:
        return {
            site: Direction(site=site, vector=layers[site.layer].detach().cpu().float(), card=card)
            for site in (Site(layer, stream) for layer in sorted(layers))
        }
    except SettingError as error:
        raise ArtefactError(f"{where}: {error}") from error


def _check_sites(directions: Mapping[Site, Direction], path: Path, *, first: int) -> None:
    if not directions:
        raise SettingError(f"{path}: there are no directions to write; extract at least one")
    wrong = [site for site in directions if site.stream != "resid_post" or site.layer < first]
    if wrong:
        raise SettingError(
            f"{path}: the format has no place for {', '.join(map(str, wrong))}; it holds LAYER.resid_post from layer "
            f"{first} on: leave the others out"
        )
