"""What the plugin touches of vLLM is as it was when it was written: of both model runners, though only V1 runs here."""

from __future__ import annotations

from dataclasses import replace

import pytest
from kit import write_settings

from pilotfish.errors import SettingError
from pilotfish.vllm.compat import SHARED, V1, V2, Symbol, check_symbols, check_version, wrapped


@pytest.mark.parametrize("symbol", SHARED + V1 + V2, ids=lambda symbol: symbol.name)
def test_the_symbol_is_as_the_plugin_needs_it(symbol):
    assert symbol.problem() is None


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"name": "Scheduler.no_such"}, "is gone"),
        ({"parameters": ("self", "other")}, "takes self, scheduler_output"),
        ({"source": ("no such line",)}, "does not hold 'no such line'"),
    ],
)
def test_a_symbol_that_has_changed_is_named(change, words):
    symbol = next(item for item in SHARED if item.name == "Scheduler.update_from_output")
    with pytest.raises(SettingError, match=words):
        check_symbols((replace(symbol, **change),))


def test_another_release_is_refused():
    check_version("0.32.0")
    with pytest.raises(SettingError, match=r"vLLM 0\.33\.1 is installed"):
        check_version("0.33.1")


def test_a_plugin_that_was_there_first_is_refused(monkeypatch):
    from vllm.v1.engine.async_llm import AsyncLLM

    def generate(self, prompt, sampling_params, request_id):
        return None

    monkeypatch.setattr(AsyncLLM, "generate", generate)
    with pytest.raises(SettingError, match="another plugin has replaced"):
        check_symbols((Symbol("vllm.v1.engine.async_llm", "AsyncLLM.generate"),))


def test_nothing_is_wrapped_twice():
    class Some:
        def method(self):
            return 1

    for _ in range(2):
        wrapped(Some, "method", lambda original: lambda self: original(self) + 1)
    assert Some().method() == 2


def test_a_process_that_is_not_configured_is_left_alone(monkeypatch):
    import subprocess
    import sys

    code = (
        "import sys; from vllm.plugins import load_general_plugins; load_general_plugins();"
        "from vllm.engine.arg_utils import EngineArgs;"
        "print(hasattr(EngineArgs.create_engine_config, 'is_of_pilotfish'), 'pilotfish.vllm.install' in sys.modules,"
        " 'pilotfish.heads' in sys.modules, 'pilotfish.vllm.plugin' in sys.modules)"
    )
    monkeypatch.delenv("PILOTFISH_VLLM", raising=False)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split()[-4:] == ["False", "False", "False", "True"]


def test_a_configured_process_that_cannot_be_monitored_ends(monkeypatch, tmp_path):
    import subprocess
    import sys

    monkeypatch.setenv("PILOTFISH_VLLM", str(write_settings(tmp_path, "nonsense = 1\n")))
    code = "from vllm.plugins import load_general_plugins; load_general_plugins(); print('started')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode != 0 and "unknown key 'nonsense'" in done.stderr and "started" not in done.stdout
