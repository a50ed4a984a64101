"""Seeds, files and run cards."""

from __future__ import annotations

import errno
import json
import os

import pytest
import torch

from pilotfish import runs
from pilotfish.errors import SettingError, StorageError


def test_a_seed_and_a_name_give_one_stream_and_another_name_another():
    first, again, other = (runs.generator(7, name) for name in ("fit", "fit", "split"))
    draws = [torch.rand(4, generator=stream).tolist() for stream in (first, again, other)]
    assert draws[0] == draws[1] != draws[2]


def test_a_failed_write_leaves_the_old_file_and_nothing_beside_it(tmp_path):
    path = tmp_path / "card.json"
    runs.write_json(path, {"a": 1})
    with pytest.raises(ValueError, match="not JSON compliant"):
        runs.write_json(path, {"a": float("nan")})
    with pytest.raises(KeyboardInterrupt), runs.atomic_path(path):
        raise KeyboardInterrupt
    assert json.loads(path.read_text()) == {"a": 1}
    assert os.listdir(tmp_path) == ["card.json"]


def test_a_full_disk_is_said_in_words(tmp_path):
    with (
        pytest.raises(StorageError, match=r"no space left on the disk of .*; free some and run"),
        runs.atomic_path(tmp_path / "x"),
    ):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert os.listdir(tmp_path) == []


def test_a_run_card_reads_back_and_names_no_person_and_no_machine(tmp_path):
    card = runs.run_card("fit", {"budget": 0.01}, seed=3)
    runs.write_json(tmp_path / "card.json", card)
    assert json.loads((tmp_path / "card.json").read_text()) == card
    assert (card["command"], card["seed"], card["config"]) == ("fit", 3, {"budget": 0.01})
    assert card["versions"]["torch"] == torch.__version__
    assert os.uname().nodename not in json.dumps(card)


@pytest.mark.parametrize(
    ("device", "dtype", "words"), [("tpu9", "auto", "use auto, cpu or cuda"), ("cpu", "int3", "use auto, bfloat16")]
)
def test_an_unknown_device_or_dtype_is_refused_with_what_is_known(device, dtype, words):
    with pytest.raises(SettingError, match=words):
        runs.resolve_device(device, dtype)


def test_the_choice_of_device_comes_with_its_reason():
    assert runs.resolve_device("cpu", "float32").reason == "float32 on cpu: as asked"
    assert "demo weights" in runs.resolve_device("cpu").reason
