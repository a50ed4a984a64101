"""`pilotfish serve --engine vllm`: words in, vLLM's command and the plugin's settings out. No vLLM."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from pilotfish.actions import read_policy
from pilotfish.cli import main
from pilotfish.cli.serve_vllm import launch
from pilotfish.cli.server_verbs import Serve
from pilotfish.errors import SettingError
from pilotfish.heads import load_bank
from pilotfish.vllm import read_settings


@pytest.fixture(scope="module")
def folder(tmp_path_factory, pair) -> Path:
    from conftest import seeded_bank

    root = tmp_path_factory.mktemp("models")
    for name, model in (("target", pair.target), ("draft", pair.draft)):
        model.save_pretrained(root / name)
        pair.tokenizer.save_pretrained(root / name)
    seeded_bank(pair, reader="draft").save(root / "bank")
    return root


@pytest.fixture
def config(folder, tmp_path, monkeypatch) -> Serve:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return Serve(
        engine="vllm",
        pair=str(folder / "target"),
        draft=str(folder / "draft"),
        banks=(folder / "bank",),
        port=8123,
        action="stop",
        threshold=0.75,
        alerts_file=Path("alerts.jsonl"),
    )


def settings_of(environment):
    return read_settings(Path(environment["PILOTFISH_VLLM"]))


def test_our_flags_become_vllm_s_and_the_rest_is_handed_on_as_it_is(config, folder):
    given = replace(config, num_drafted=5, dtype="float32", vllm_args=("--max-model-len", "256", "--enforce-eager"))
    command, environment = launch(given, {"HOME": "/home/me"})
    spec = json.loads(command[command.index("--speculative-config") + 1])
    assert command[:3] == [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    flags = dict(zip(command[3:-3:2], command[4:-3:2], strict=True))
    assert flags["--model"] == flags["--served-model-name"] == str(folder / "target")
    assert flags["--host"] == "127.0.0.1" and flags["--port"] == "8123" and flags["--dtype"] == "float32"
    assert spec == {"method": "draft_model", "model": str(folder / "draft"), "num_speculative_tokens": 5}
    assert command[-3:] == ["--max-model-len", "256", "--enforce-eager"]
    assert environment["HOME"] == "/home/me"


def test_the_plugin_s_settings_are_those_of_the_command(config, folder):
    settings = settings_of(launch(config, {}).environment)
    assert settings.banks == (str(folder / "bank"),) and settings.store == config.store
    assert settings.alerts_file == str(Path("alerts.jsonl").resolve()) and settings.webhook is None
    policy = read_policy(Path(settings.policy))
    assert {rule.action for rule in policy.rules} == {"stop"} and policy.rules[0].threshold == 0.75 and policy.hold


def test_a_bank_that_ships_goes_by_its_name(config, tmp_path):
    name = "smollm2-135m-refusal"
    settings = settings_of(launch(replace(config, banks=(Path(name),)), {}).environment)
    assert load_bank(Path(settings.banks[0])).metrics == ("refusal",)
    path = tmp_path / "settings.json"
    path.write_text(json.dumps({"banks": [name]}))
    assert read_settings(path).banks == settings.banks


def test_a_policy_that_is_named_is_taken_whole(config, tmp_path):
    path = tmp_path / "policy.toml"
    path.write_text('[[rules]]\nmetric = "danger"\naction = "observe"\n')
    settings = settings_of(launch(replace(config, policy=path), {}).environment)
    assert read_policy(Path(settings.policy)) == read_policy(path)


def test_only_the_owner_may_read_what_may_hold_a_password(config):
    path = Path(launch(replace(config, store="postgresql://me:word@host/db"), {}).environment["PILOTFISH_VLLM"])
    assert path.parent.stat().st_mode & 0o077 == 0


def test_a_drafter_of_vllm_s_own_is_left_to_it(config):
    given = replace(config, draft=None, vllm_args=("--speculative-config", '{"method": "eagle"}'))
    assert launch(given, {}).command.count("--speculative-config") == 1


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"draft": None}, "nothing drafts.*--draft"),
        ({"vllm_args": ("--speculative-config={}",)}, "both --draft or --num-drafted and vLLM's"),
        ({"max_streams": 4, "upstream": "http://x/v1"}, "no --upstream, --max-streams: that is of our own engine"),
        ({"draft": None, "banks": (), "vllm_args": ("--speculative-config", "{}")}, "say which --banks"),
    ],
)
def test_what_cannot_be_is_refused_in_words(config, changes, words):
    with pytest.raises(SettingError, match=words):
        launch(replace(config, **changes), {})


def test_a_list_of_plugins_without_ours_is_refused(config):
    with pytest.raises(SettingError, match="add pilotfish"):
        launch(config, {"VLLM_PLUGINS": "other"})


def test_where_vllm_is_missing_it_is_said_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["serve", "--engine", "vllm"]) == 1
    assert "pip install 'pilotfish[vllm]'" in capsys.readouterr().err


@pytest.mark.parametrize("flags", [["--", "--max-model-len", "256"], ["--num-drafted", "3"]])
def test_flags_of_vllm_s_are_refused_by_our_own_engine(flags, capsys):
    assert main(["serve", *flags]) == 1
    assert "add --engine vllm" in capsys.readouterr().err
