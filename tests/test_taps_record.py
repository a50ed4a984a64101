"""A recording holds what a direct pass gives, and an interruption, a cut file or other settings cannot spoil it."""

from __future__ import annotations

import fcntl
import json
import logging
import re
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import PreTrainedModel

from pilotfish.core import Site
from pilotfish.errors import ArtefactError, PilotfishError, SettingError, TextError
from pilotfish.models import FAMILIES, tiny_model
from pilotfish.taps import Recording, TokenRow, record, tapped
from pilotfish.taps.record import _plan

FINAL = Site(-1, "final")
SITES = (Site(0, "resid_post"), Site(1, "mlp_out"), FINAL)
MODEL = tiny_model("llama", seed=0)


def token_rows(num_rows: int, longest: int = 40, seed: int = 0) -> list[TokenRow]:
    stream = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest + 1, (num_rows,), generator=stream).tolist()
    return [
        TokenRow(f"row-{i}", tuple(torch.randint(300, (length,), generator=stream).tolist()))
        for i, length in enumerate(lengths)
    ]


ROWS = token_rows(30)


def recorded(folder: Path, rows: list[TokenRow] = ROWS, model: PreTrainedModel = MODEL, **changes: Any) -> Recording:
    sizes = {"identity_hash": "tiny", "shard_tokens": 150, "batch_tokens": 64}
    return record(model, changes.pop("sites", SITES), rows, folder, **{**sizes, **changes})


def direct_pass(model: PreTrainedModel, row: TokenRow) -> Tensor:
    with torch.no_grad(), tapped(model, SITES) as taps:
        model(torch.tensor([row.token_ids]))
        return torch.cat([taps[site][0] for site in SITES], dim=-1)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def passes_of(model: PreTrainedModel, run: Callable[[], object]) -> list[tuple[int, ...]]:
    """Shapes of the batches that went through a model."""
    shapes = []
    look = model.base_model.register_forward_pre_hook(lambda _, args: shapes.append(tuple(args[0].shape)))
    try:
        run()
    finally:
        look.remove()
    return shapes


@pytest.mark.parametrize("family", FAMILIES)
def test_features_are_those_of_a_direct_pass_without_a_batch(family: str, tmp_path: Path) -> None:
    model = tiny_model(family, seed=0)
    recording = recorded(tmp_path, model=model)
    assert recording.num_shards > 2
    assert recording.sites == SITES
    assert sorted(recording.row_ids) == sorted(row.id for row in ROWS)
    for row in ROWS:
        assert recording.lengths[row.id] == len(row.token_ids)
        torch.testing.assert_close(recording.features(row.id), direct_pass(model, row), rtol=1e-5, atol=1e-5)


def test_shards_give_every_row_once_in_the_order_of_row_ids(tmp_path: Path) -> None:
    recording = recorded(tmp_path)
    shards = list(recording.shards())
    assert sum((shard.row_ids for shard in shards), ()) == recording.row_ids
    for shard in shards:
        assert torch.equal(shard.features, torch.cat([recording.features(row) for row in shard.row_ids]))
    swapped = [shard.row_ids for shard in recording.shards(order=[1, 0])]
    assert swapped == [shards[1].row_ids, shards[0].row_ids]


def test_a_first_token_like_bos_is_there_exactly_when_the_row_has_it(tmp_path: Path) -> None:
    text = tuple(range(20, 30))
    rows = [TokenRow("with", (1, *text)), TokenRow("without", text)]
    recording = recorded(tmp_path, rows)
    assert recording.lengths == {"with": 11, "without": 10}
    for row in rows:
        torch.testing.assert_close(recording.features(row.id), direct_pass(MODEL, row), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(recording.features("with")[1:], recording.features("without"), atol=1e-2)


def test_features_keep_the_dtype_of_the_model(tmp_path: Path) -> None:
    model = tiny_model("llama", seed=0).to(torch.bfloat16)
    recording = recorded(tmp_path, model=model)
    features = recording.features("row-3")
    assert features.dtype == torch.bfloat16
    torch.testing.assert_close(features.float(), direct_pass(MODEL, ROWS[3]), rtol=0.1, atol=0.1)


def test_the_order_of_the_rows_makes_no_difference(tmp_path: Path) -> None:
    recorded(tmp_path / "a")
    recorded(tmp_path / "b", ROWS[::-1])
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_no_logits_are_computed_and_no_pass_runs_twice(tmp_path: Path) -> None:
    calls = []
    look = MODEL.lm_head.register_forward_hook(lambda *_: calls.append(1))
    try:
        first = passes_of(MODEL, lambda: recorded(tmp_path))
        again = passes_of(MODEL, lambda: recorded(tmp_path))
    finally:
        look.remove()
    assert first and not again and not calls


@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=60),
    shard_tokens=st.integers(1, 200),
    batch_tokens=st.integers(1, 100),
)
@settings(deadline=None)
def test_a_plan_holds_every_row_once_within_the_sizes_asked_for(
    lengths: list[int], shard_tokens: int, batch_tokens: int
) -> None:
    rows = [TokenRow(str(i), (0,) * length) for i, length in enumerate(lengths)]
    plan = _plan(rows, shard_tokens, batch_tokens)
    batches = [batch for shard in plan for batch in shard]
    assert sorted(row for batch in batches for row in batch) == sorted(rows)
    for batch in batches:
        sizes = [len(row.token_ids) for row in batch]
        assert sizes == sorted(sizes, reverse=True)
        assert len(batch) * sizes[0] <= batch_tokens or len(batch) == 1
    for shard in plan:
        assert sum(len(row.token_ids) for batch in shard for row in batch) <= shard_tokens or len(shard) == 1


def test_little_of_what_runs_is_padding(tmp_path: Path) -> None:
    rows = token_rows(150, longest=200)
    shapes = passes_of(MODEL, lambda: recorded(tmp_path, rows, shard_tokens=10_000, batch_tokens=1024))
    num_real = sum(len(row.token_ids) for row in rows)
    assert num_real <= sum(rows * tokens for rows, tokens in shapes) < 1.1 * num_real


def anonymous_memory_mb() -> float:
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"RssAnon:\s+(\d+) kB", status)[1]) / 1024


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_does_not_grow_with_the_recording(tmp_path: Path) -> None:
    model = tiny_model("llama", seed=0, num_layers=1, hidden=128)
    sites = [Site(0, stream) for stream in ("resid_pre", "resid_post", "attn_out", "mlp_out")]
    rows = [TokenRow(str(i), (i % 300,) * 200) for i in range(120)]
    used: list[float] = []
    look = model.base_model.register_forward_pre_hook(lambda *_: used.append(anonymous_memory_mb()))
    recording = recorded(tmp_path, rows, model, sites=sites, shard_tokens=1000, batch_tokens=1000)
    look.remove()
    size_mb = sum(path.stat().st_size for path in tmp_path.glob("*.safetensors")) / 2**20
    assert size_mb > 45
    assert max(used) - used[5] < size_mb / 4  # five passes for the allocator to warm up
    before = anonymous_memory_mb()
    read = [anonymous_memory_mb() for _ in recording.shards()]
    assert max(read) - before < size_mb / 4


KILLED = """
import os, signal, sys, torch
from pathlib import Path
sys.path.insert(0, sys.argv[1])
torch.set_num_threads(1)  # as in these tests
from test_taps_record import MODEL, recorded

def die_at(number):
    for _ in range(number - 1):
        yield
    os.kill(os.getpid(), signal.SIGKILL)

if sys.argv[3] == "pass":
    passes = die_at(9)
    MODEL.base_model.register_forward_pre_hook(lambda *_: next(passes))
else:
    rename, renames = os.replace, die_at(3)  # the second shard's: each is followed by that of its hash
    os.replace = lambda *args: (next(renames), rename(*args))
recorded(Path(sys.argv[2]))
"""


def test_a_recording_killed_in_a_pass_and_then_before_a_rename_resumes_to_the_same_bytes(tmp_path: Path) -> None:
    folder = tmp_path / "killed"
    num_finished = [0]
    for moment in ("pass", "rename"):
        done = subprocess.run(
            [sys.executable, "-c", KILLED, str(Path(__file__).parent), str(folder), moment],
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
        assert done.returncode == -signal.SIGKILL, done.stderr
        num_finished.append(len(list(folder.glob("*.sha256"))))
        with pytest.raises(ArtefactError, match=r"is unfinished: .* run the same command again"):
            Recording.open(folder)
    assert 0 < num_finished[1] < num_finished[2]  # the second run went on where the first one stopped
    assert len(list(folder.glob(".shard-*.part"))) == 1
    kept = {path: path.stat().st_mtime_ns for path in folder.glob("*.safetensors")}
    assert len(kept) == num_finished[2]
    recorded(folder)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    recorded(tmp_path / "whole")
    assert contents(folder) == contents(tmp_path / "whole")


def drop_sidecar(folder: Path) -> None:
    (folder / "shard-00001.sha256").unlink()


def drop_shard(folder: Path) -> None:
    (folder / "shard-00001.safetensors").unlink()


def leave_a_part(folder: Path) -> None:
    drop_sidecar(folder)
    (folder / "shard-00001.safetensors").rename(folder / ".shard-00001.safetensors.x7.part")


def cut_shard(folder: Path) -> None:
    path = folder / "shard-00001.safetensors"
    path.write_bytes(path.read_bytes()[:-7])


def flip_a_bit(folder: Path) -> None:
    path = folder / "shard-00001.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def index_alone(folder: Path) -> None:
    for path in folder.glob("shard-*"):
        path.unlink()


@pytest.mark.parametrize("damage", [drop_sidecar, drop_shard, leave_a_part, cut_shard, flip_a_bit, index_alone])
def test_the_same_call_repairs_what_a_crash_left(damage: Callable[[Path], None], tmp_path: Path) -> None:
    recorded(tmp_path)
    whole = contents(tmp_path)
    damage(tmp_path)
    assert contents(tmp_path) != whole
    recorded(tmp_path)
    assert contents(tmp_path) == whole


def test_a_damaged_shard_that_is_recorded_again_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    recorded(tmp_path)
    cut_shard(tmp_path)
    with caplog.at_level(logging.WARNING):
        recorded(tmp_path)
    assert "shard-00001.safetensors is damaged or gone; recording it again" in caplog.text


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (drop_sidecar, r"is unfinished: 1 of \d+ shards are missing; run the same command again"),
        (drop_shard, r"shard-00001.safetensors is damaged: .*run the same recording again"),
        (cut_shard, r"shard-00001.safetensors is damaged: .*run the same recording again"),
        (lambda folder: (folder / "index.json").unlink(), "holds no recording: index.json is missing"),
        (lambda folder: (folder / "index.json").write_text('{"sett'), "index.json is damaged: .*record again"),
    ],
)
def test_a_damaged_recording_does_not_open(damage: Callable[[Path], Any], message: str, tmp_path: Path) -> None:
    recorded(tmp_path)
    damage(tmp_path)
    with pytest.raises(ArtefactError, match=message):
        Recording.open(tmp_path)


def test_a_recording_opens_for_some_of_its_sites_and_refuses_others(tmp_path):
    recorded(tmp_path)
    whole, some = Recording.open(tmp_path), Recording.open(tmp_path, SITES[-1:])
    row = whole.row_ids[0]
    size = whole.features(row).shape[-1] // len(SITES)
    assert torch.equal(some.features(row), whole.features(row)[:, -size:])
    with pytest.raises(SettingError, match=r"77.mlp_out is not recorded in .*; use "):
        Recording.open(tmp_path, [Site(77, "mlp_out")])


def test_a_shard_cut_after_opening_is_noticed_by_every_way_of_reading(tmp_path: Path) -> None:
    recording = recorded(tmp_path)
    second = next(row for row in recording.row_ids if row in list(recording.shards())[1].row_ids)
    cut_shard(tmp_path)
    with pytest.raises(ArtefactError, match=r"shard-00001.safetensors is damaged"):
        recording.features(second)
    with pytest.raises(ArtefactError, match=r"shard-00001.safetensors is damaged"):
        list(recording.shards())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"identity_hash": "another"}, "other model .model: tiny there, another asked for"),
        ({"sites": SITES[:2]}, "other sites .*final.* give another folder"),
        ({"rows": ROWS[1:]}, "other rows "),
        ({"rows": [ROWS[0]._replace(token_ids=(5, 6)), *ROWS[1:]]}, "other rows "),
        ({"model": tiny_model("llama", seed=0).to(torch.bfloat16)}, "dtype: float32 there, bfloat16 asked for"),
        ({"shard_tokens": 151}, "shard_tokens: 150 there, 151 asked for"),
        ({"batch_tokens": 65, "identity_hash": "another"}, "other model, batch_tokens "),
    ],
)
def test_other_settings_do_not_go_into_a_folder_in_use(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    recorded(tmp_path)
    before = contents(tmp_path)
    with pytest.raises(ArtefactError, match=message):
        recorded(tmp_path, **changes)
    assert contents(tmp_path) == before


def test_two_processes_do_not_record_into_one_folder(tmp_path: Path) -> None:
    with (tmp_path / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ArtefactError, match=r"another process is recording into .*; wait for it"):
            recorded(tmp_path)
    recorded(tmp_path)


def test_a_full_disk_is_named_and_the_next_run_picks_up(tmp_path: Path) -> None:
    """A limit on the size of files stands in for the disk: the index fits, a shard does not."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8000, before[1]))
    try:
        with pytest.raises(ArtefactError, match=r"shard-00000.safetensors cannot be written: .*free some disk space"):
            recorded(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert set(contents(tmp_path)) == {"index.json", ".lock"}
    assert len(recorded(tmp_path).row_ids) == len(ROWS)


def long_row(length: int) -> list[TokenRow]:
    return [TokenRow("a", (1,) * length)]


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"rows": []}, TextError, "no rows to record; give at least one"),
        ({"rows": long_row(0)}, TextError, "'a' has 0 tokens; this model takes 1 to 512: drop or truncate it"),
        ({"rows": long_row(513)}, TextError, "'a' has 513 tokens; this model takes 1 to 512: drop or truncate it"),
        ({"rows": [*long_row(2), *long_row(3)]}, TextError, "'a' occurs twice"),
        ({"rows": [TokenRow("a", (0, 316))]}, TextError, "from 0 to 316; this model takes 0 to 315: use its own token"),
        ({"rows": [TokenRow("a", (-1,))]}, TextError, "from -1 to -1"),
        ({"sites": ()}, SettingError, "no sites to record; give at least one"),
        ({"sites": (FINAL, FINAL)}, SettingError, "named twice"),
        ({"sites": (Site(3, "resid_post"),)}, SettingError, "3.resid_post is outside the model"),
        ({"shard_tokens": 0}, SettingError, "shard_tokens 0 and batch_tokens 64 must both be at least 1"),
        ({"batch_tokens": 0}, SettingError, "batch_tokens 0 must both be at least 1"),
        ({"model": tiny_model("gpt2", seed=0).train()}, SettingError, r"training mode.*call model.eval\(\)"),
    ],
)
def test_what_cannot_be_recorded_is_refused_before_anything_is_written(
    changes: dict[str, Any], error: type[PilotfishError], message: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        recorded(tmp_path / "new", **changes)
    assert not (tmp_path / "new").exists()


def test_the_longest_row_that_fits_is_recorded_whole(tmp_path: Path) -> None:
    assert recorded(tmp_path, long_row(512)).features("a").shape == (512, 96)


def test_an_unknown_row_is_named(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="row 'nobody' is not among the 30 rows recorded in"):
        recorded(tmp_path).features("nobody")


def test_the_index_says_what_was_recorded(tmp_path: Path) -> None:
    recorded(tmp_path)
    index = json.loads((tmp_path / "index.json").read_text())
    assert index["settings"]["model"] == "tiny"
    assert index["settings"]["dtype"] == "float32"
    assert index["settings"]["sites"] == ["0.resid_post", "1.mlp_out", "final"]
    assert index["rows"].keys() == {row.id for row in ROWS}
