"""Directions on disk, in our form and in those of other tools; damaged and foreign files are refused."""

from __future__ import annotations

import hashlib
import io
import json
import os
import zipfile
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pilotfish.core import Site
from pilotfish.errors import ArtefactError, DirectionMismatch, SettingError
from pilotfish.models import Identity
from pilotfish.steering import (
    Direction,
    DirectionCard,
    PairsCard,
    from_layer_activations,
    load_directions,
    read_gguf,
    read_hotwire,
    read_steering_vectors,
    save_directions,
    to_layer_activations,
    write_gguf,
    write_hotwire,
)
from pilotfish.steering.archive import read_archive
from pilotfish.taps import Ablate, Add

IDENTITY = Identity(name="tiny", weights="w" * 64, tokenizer="t" * 64, hidden_size=4, num_layers=3, vocab_size=300)
OTHER = replace(IDENTITY, name="other", weights="v" * 64)


def direction(site: Site, seed: int = 0) -> Direction:
    data = PairsCard(num_pairs=7, source="mine", license="CC0-1.0", tokens="last")
    card = DirectionCard(name="love", identity=IDENTITY, method="mean_difference", data=data, dose=2.5, notes="n")
    return Direction(site=site, vector=torch.randn(4, generator=torch.Generator().manual_seed(seed)), card=card)


def after_blocks(*layers: int) -> dict[Site, Direction]:
    return {site: direction(site, site.layer) for site in (Site(layer, "resid_post") for layer in layers)}


def same(one: dict[Site, Direction], other: dict[Site, Direction]) -> bool:
    return list(one) == list(other) and all(torch.equal(one[site].vector, other[site].vector) for site in one)


def test_directions_come_back_with_their_cards(tmp_path: Path) -> None:
    sites = [Site(-1, "final"), Site(2, "resid_pre"), Site(0, "mlp_out")]
    saved = {site: direction(site, index) for index, site in enumerate(sites)}
    saved[sites[1]] = (saved[sites[1]] * 2 - 0.5 * direction(sites[1], 9)).with_dose(1.0)
    back = load_directions(save_directions(tmp_path / "love", saved), identity=IDENTITY)
    assert same(saved, back)
    assert [back[site].card for site in sites] == [saved[site].card for site in sites]
    assert len(back[sites[1]].card.provenance) == 2
    assert sorted(path.name for path in (tmp_path / "love").iterdir()) == ["card.json", "directions.safetensors"]


def test_another_model_is_refused_and_another_name_is_not(tmp_path: Path) -> None:
    save_directions(tmp_path, after_blocks(1))
    with pytest.raises(DirectionMismatch, match="was made for tiny, not for other: other weights"):
        load_directions(tmp_path, identity=OTHER)
    load_directions(tmp_path, identity=replace(IDENTITY, name="copy"))
    load_directions(tmp_path, identity=None)


def test_a_card_says_for_which_kind_of_edit_its_dose_is_and_one_that_does_not_is_of_an_addition(tmp_path: Path) -> None:
    site = Site(1, "resid_post")
    saved = {site: direction(site).with_dose(1.5, "ablate")}
    back = load_directions(save_directions(tmp_path, saved), identity=IDENTITY)[site]
    assert (back.card.dose, back.card.kind) == (1.5, "ablate")
    op = back.to_edit().op
    assert isinstance(op, Ablate) and op.share == 1.5
    change_card(tmp_path, lambda raw, card: card.pop("kind"))
    op = load_directions(tmp_path, identity=IDENTITY)[site].to_edit().op
    assert isinstance(op, Add) and op.scale == 1.5


def test_a_kind_without_a_dose_means_nothing() -> None:
    ablated = direction(Site(1, "resid_post")).with_dose(1.5, "ablate")
    assert (2 * ablated).card.kind == "add"
    with pytest.raises(SettingError, match="kind 'ablate' says what a dose does, and there is none"):
        ablated.with_dose(None, "ablate")


def change_card(folder: Path, change: Any) -> None:
    path = folder / "card.json"
    raw = json.loads(path.read_text())
    change(raw, raw["directions"]["1.resid_post"])
    path.write_text(json.dumps(raw))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda f: (f / "card.json").unlink(), "card.json cannot be read: No such file"),
        (lambda f: (f / "directions.safetensors").unlink(), "directions.safetensors cannot be read"),
        (lambda f: (f / "card.json").write_text("{"), "card.json is not JSON"),
        (lambda f: (f / "card.json").write_text("[]"), "is not the card of directions"),
        (lambda f: (f / "directions.safetensors").write_bytes(b"x"), "another SHA-256"),
        (lambda f: change_card(f, lambda raw, card: raw.update(directions={})), "names no directions"),
        (lambda f: change_card(f, lambda raw, card: card.pop("dose")), "unknown or missing keys .* dose"),
        (lambda f: change_card(f, lambda raw, card: card.update(shape=1)), "unknown or missing keys .* shape"),
        (lambda f: change_card(f, lambda raw, card: card.update(dose="2")), "DirectionCard.dose is '2', not float"),
        (lambda f: change_card(f, lambda raw, card: card.update(name=7)), "DirectionCard.name is 7, not str"),
        (lambda f: change_card(f, lambda raw, card: card.update(identity=[])), "a list where Identity belongs"),
        (lambda f: change_card(f, lambda raw, card: card["data"].pop("license")), "PairsCard: license"),
        (lambda f: change_card(f, lambda raw, card: card.update(provenance=[1])), "a int where Operand belongs"),
        (lambda f: change_card(f, lambda raw, card: raw["directions"].update(x=card)), "name different sites"),
        (lambda f: change_card(f, lambda raw, card: card["identity"].update(hidden_size=5)), "has 4 units; tiny has 5"),
    ],
)
def test_a_damaged_folder_is_refused_with_what_is_wrong(tmp_path: Path, damage: Any, words: str) -> None:
    save_directions(tmp_path, after_blocks(1))
    damage(tmp_path)
    with pytest.raises(ArtefactError, match=words):
        load_directions(tmp_path, identity=IDENTITY)


def test_a_weight_file_that_is_cut_is_refused_whatever_its_hash_says(tmp_path: Path) -> None:
    save_directions(tmp_path, after_blocks(1))
    path = tmp_path / "directions.safetensors"
    cut = path.read_bytes()[:-4]
    path.write_bytes(cut)
    change_card(tmp_path, lambda raw, card: raw.update(vectors_sha256=hashlib.sha256(cut).hexdigest()))
    with pytest.raises(ArtefactError, match="is not a safetensors file"):
        load_directions(tmp_path, identity=IDENTITY)


def test_what_does_not_belong_together_is_not_saved(tmp_path: Path) -> None:
    one = direction(Site(1, "resid_post"))
    stranger = replace(one, site=Site(2, "resid_post"), card=replace(one.card, identity=OTHER))
    for wrong, error in (
        ({}, SettingError),
        ({Site(0, "resid_post"): one}, SettingError),
        ({one.site: one, stranger.site: stranger}, DirectionMismatch),
    ):
        with pytest.raises(error):
            save_directions(tmp_path / "x", wrong)
    assert not (tmp_path / "x").exists()


def test_a_gguf_control_vector_names_blocks_as_llama_cpp_does_and_comes_back(tmp_path: Path) -> None:
    saved = after_blocks(1, 2)
    path = write_gguf(tmp_path / "love.gguf", saved, model_type="llama")
    reader = gguf.GGUFReader(path)
    assert reader.fields["general.architecture"].contents() == "controlvector"
    assert reader.fields["controlvector.model_hint"].contents() == "llama"
    assert reader.fields["controlvector.layer_count"].contents() == 2
    named = {tensor.name: tensor.data for tensor in reader.tensors}
    assert np.array_equal(named["direction.2"], saved[Site(2, "resid_post")].vector.numpy())
    back = read_gguf(path, IDENTITY)
    assert same(saved, back)
    card = back[Site(1, "resid_post")].card
    assert (card.name, card.method, card.notes) == ("love", "imported", "imported from a GGUF control vector for llama")


def gguf_file(path: Path, tensors: dict[str, Any], architecture: str = "controlvector") -> Path:
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_string("controlvector.model_hint", "llama")
    for name, values in tensors.items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_direction_after_block_0_is_read_from_repengs_files_and_not_written_for_llama_cpp(tmp_path: Path) -> None:
    vector = np.arange(4, dtype=np.float16)
    found = read_gguf(gguf_file(tmp_path / "r.gguf", {"direction.0": vector}), IDENTITY, name="hate")
    assert found[Site(0, "resid_post")].vector.tolist() == [0, 1, 2, 3]
    with pytest.raises(SettingError, match=r"no place for 0\.resid_post; it holds LAYER\.resid_post from layer 1 on"):
        write_gguf(tmp_path / "x.gguf", found, model_type="llama")


@pytest.mark.parametrize(
    ("tensors", "architecture", "words"),
    [
        ({"direction.1": np.ones(4, np.float32)}, "llama", "is a GGUF file of 'llama', not a control vector"),
        ({"blk.1": np.ones(4, np.float32)}, "controlvector", "tensor 'blk.1' of torch.float32 is no direction"),
        ({"direction.1": np.ones(4, np.int32)}, "controlvector", "tensor 'direction.1' of torch.int32"),
        ({"direction.-1": np.ones(4, np.float32)}, "controlvector", "'direction.-1'"),
        ({"direction.1": np.ones((2, 4), np.float32)}, "controlvector", r"shape \(2, 4\)"),
        ({"direction.1": np.full(4, np.nan, np.float32)}, "controlvector", "NaN or infinity"),
        ({"direction.1": np.ones(5, np.float32)}, "controlvector", "has 5 units; tiny has 4"),
        ({"direction.3": np.ones(4, np.float32)}, "controlvector", "in each of 3 layers"),
    ],
)
def test_a_gguf_file_that_is_no_control_vector_for_the_model_is_refused(
    tmp_path: Path, tensors: dict[str, Any], architecture: str, words: str
) -> None:
    with pytest.raises(ArtefactError, match=words):
        read_gguf(gguf_file(tmp_path / "x.gguf", tensors, architecture), IDENTITY)


def test_a_cut_a_foreign_or_a_missing_gguf_file_is_refused(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "love.gguf", after_blocks(1), model_type="llama")
    whole = path.read_bytes()
    for data in (whole[: len(whole) // 2], whole[:-20], b"GGUF", b"not at all", b""):
        path.write_bytes(data)
        with pytest.raises(ArtefactError, match="is not a whole control vector in GGUF"):
            read_gguf(path, IDENTITY)
    with pytest.raises(ArtefactError, match="cannot be read: No such file"):
        read_gguf(tmp_path / "none.gguf", IDENTITY)


def test_a_hotwire_file_has_a_row_a_layer_torch_reads_it_and_it_comes_back(tmp_path: Path) -> None:
    saved = after_blocks(0, 2)
    path = write_hotwire(tmp_path / "love.pt", saved)
    matrix = torch.load(path, weights_only=True)
    assert matrix.dtype == torch.float32
    assert matrix[1].tolist() == [0, 0, 0, 0]
    assert all(torch.equal(matrix[site.layer], saved[site].vector) for site in saved)
    assert same(saved, read_hotwire(path, IDENTITY))


def saved_by_torch(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


@pytest.mark.parametrize("wrapped", [False, True])
def test_one_vector_of_a_hotwire_file_goes_where_one_says(tmp_path: Path, wrapped: bool) -> None:
    path = tmp_path / "v.pt"
    vector = torch.arange(4, dtype=torch.bfloat16)
    path.write_bytes(saved_by_torch({"vector": vector, "layer": 2} if wrapped else vector))
    found = read_hotwire(path, IDENTITY, layer=2)
    assert {site: item.vector.tolist() for site, item in found.items()} == {Site(2, "resid_post"): [0, 1, 2, 3]}
    with pytest.raises(SettingError, match="give `layer` for one vector"):
        read_hotwire(path, IDENTITY)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (torch.ones(4, 4), r"shape \(4, 4\); tiny takes one row for each of its 3 layers"),
        ({"a": torch.ones(3, 4), "b": torch.ones(3, 4)}, "holds 2 tensors; a hotwire vector is one"),
        ("text", "a hotwire vector is one"),
        (torch.zeros(3, 4), "holds no directions"),
        (torch.ones(3, 5), "has 5 units; tiny has 4"),
        (torch.ones(3, 4, dtype=torch.int64), "it holds numbers that are none of FloatStorage"),
    ],
)
def test_a_pt_file_that_is_no_hotwire_vector_for_the_model_is_refused(tmp_path: Path, value: Any, words: str) -> None:
    (tmp_path / "v.pt").write_bytes(saved_by_torch(value))
    with pytest.raises(ArtefactError, match=words):
        read_hotwire(tmp_path / "v.pt", IDENTITY)


LEAVES = (
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False)
    | st.text(max_size=6)
    | st.builds(
        lambda shape, dtype, turned: (
            torch.arange(6.0).reshape(shape).to(dtype).T if turned else torch.arange(6.0).reshape(shape).to(dtype)
        ),
        st.sampled_from([(6,), (2, 3), (3, 2)]),
        st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16]),
        st.just(False),
    )
    | st.just(torch.arange(6.0).reshape(2, 3).T)
    | st.just(torch.arange(8.0)[2:5])
)
VALUES = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=4).map(tuple)
        | st.dictionaries(st.text(max_size=3) | st.integers(0, 70_000), inner, max_size=3)
        | st.dictionaries(st.text(max_size=3), inner, max_size=2).map(OrderedDict)
    ),
    max_leaves=8,
)


def equal(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return list(one) == list(other) and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(equal, one, other))
    return type(one) is type(other) and one == other


@given(value=VALUES)
@settings(max_examples=80, deadline=None)
def test_the_reader_of_pt_files_reads_what_torch_reads(tmp_path_factory: pytest.TempPathFactory, value: Any) -> None:
    path = tmp_path_factory.getbasetemp() / "value.pt"
    path.write_bytes(saved_by_torch(value))
    assert equal(read_archive(path), torch.load(path, weights_only=True))


class Trap:
    """Runs a command when an ordinary reader meets it."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.system, (self.command,))


def test_a_file_that_would_run_a_command_is_refused_and_nothing_runs(tmp_path: Path) -> None:
    sprung, path = tmp_path / "sprung", tmp_path / "trap.pt"
    path.write_bytes(saved_by_torch({"vector": torch.ones(4), "trap": Trap(f"touch {sprung}")}))
    with pytest.raises(ArtefactError, match=r"it asks to call (posix|nt)\.system"):
        read_archive(path)
    assert not sprung.exists()
    torch.load(path, weights_only=False)
    assert sprung.exists(), "the trap would have sprung"


def archive(path: Path, stream: bytes, *, compression: int = zipfile.ZIP_STORED, **entries: bytes) -> Path:
    with zipfile.ZipFile(path, "w", compression) as file:
        for name, content in {"data.pkl": stream, **entries}.items():
            file.writestr(f"archive/{name}", content)
    return path


@given(stream=st.binary(max_size=60))
@settings(max_examples=150, deadline=None)
def test_a_stream_of_anything_is_a_value_or_a_refusal(tmp_path_factory: pytest.TempPathFactory, stream: bytes) -> None:
    path = archive(tmp_path_factory.getbasetemp() / "any.pt", stream)
    try:
        value = read_archive(path)
    except ArtefactError:
        return
    assert isinstance(value, None | bool | int | float | str | tuple | list | dict)


def cut_and_changed(data: bytes) -> list[bytes]:
    return [data[: len(data) // 2], b"", b"PK", data[:-1]]


def test_damaged_archives_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "v.pt"
    whole = saved_by_torch(torch.ones(3, 4))
    for data in cut_and_changed(whole):
        path.write_bytes(data)
        with pytest.raises(ArtefactError, match=r"not a whole PyTorch archive"):
            read_archive(path)
    with pytest.raises(ArtefactError, match="cannot be read: No such file"):
        read_archive(tmp_path / "none.pt")
    with pytest.raises(ArtefactError, match="it is compressed"):
        read_archive(archive(path, b"\x80\x02N.", compression=zipfile.ZIP_DEFLATED))
    with pytest.raises(ArtefactError, match="not little-endian"):
        read_archive(archive(path, b"\x80\x02N.", byteorder=b"big"))
    with pytest.raises(ArtefactError, match=r"no instruction b'\\x93' \(byte 2\)"):
        read_archive(archive(path, b"\x80\x02\x93."))
    with pytest.raises(ArtefactError, match="keys that are neither texts nor whole numbers"):
        read_archive(archive(path, b"\x80\x02})Ns."))


def test_a_tensor_that_reaches_beyond_its_numbers_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "v.pt"
    write_hotwire(path, after_blocks(1))
    with zipfile.ZipFile(path) as file:
        entries = {name.removeprefix("archive/"): file.read(name) for name in file.namelist()}
    stream = entries.pop("data.pkl")
    wider = stream.replace(b"J\x03\x00\x00\x00J\x04\x00\x00\x00t", b"J\x03\x00\x00\x00J\x05\x00\x00\x00t")
    assert wider != stream
    with pytest.raises(ArtefactError, match="a tensor does not fit its 12 numbers"):
        read_archive(archive(path, wider, **entries))
    with pytest.raises(ArtefactError, match="a storage of 12 numbers has 11"):
        read_archive(archive(path, stream, **{**entries, "data/0": entries["data/0"][:-4]}))


class SteeringVector:
    """Of the same shape as that of steering-vectors: an object with two attributes."""

    def __init__(self, layer_activations: dict[int, torch.Tensor], layer_type: str) -> None:
        self.layer_activations, self.layer_type = layer_activations, layer_type


@pytest.mark.parametrize("as_object", [False, True])
def test_layer_activations_of_steering_vectors_go_both_ways_also_through_a_file(
    tmp_path: Path, as_object: bool
) -> None:
    saved = after_blocks(0, 1, 2)
    activations = to_layer_activations(saved)
    assert list(activations) == [0, 1, 2]
    assert same(saved, from_layer_activations(activations, IDENTITY, name="love"))
    path = tmp_path / "love.pt"
    path.write_bytes(saved_by_torch(SteeringVector(activations, "decoder_block") if as_object else activations))
    assert same(saved, read_steering_vectors(path, IDENTITY))


def test_the_layer_types_of_steering_vectors_that_are_sites_are_named_and_others_refused(tmp_path: Path) -> None:
    activations = {1: torch.ones(4)}
    found = from_layer_activations(activations, IDENTITY, name="love", layer_type="mlp")
    assert list(found) == [Site(1, "mlp_out")]
    assert to_layer_activations(found, "mlp")[1].tolist() == [1, 1, 1, 1]
    with pytest.raises(SettingError, match=r"site 1\.mlp_out is no decoder_block; give directions at resid_post"):
        to_layer_activations(found)
    path = tmp_path / "v.pt"
    path.write_bytes(saved_by_torch(SteeringVector(activations, "input_layernorm")))
    with pytest.raises(ArtefactError, match="layer type 'input_layernorm'; only decoder_block, self_attn, mlp"):
        read_steering_vectors(path, IDENTITY)
    path.write_bytes(saved_by_torch({"a": torch.ones(4)}))
    with pytest.raises(ArtefactError, match="no mapping of layer numbers to tensors"):
        read_steering_vectors(path, IDENTITY)
    path.write_bytes(saved_by_torch([torch.ones(4)]))
    with pytest.raises(ArtefactError, match="holds no SteeringVector"):
        read_steering_vectors(path, IDENTITY)
