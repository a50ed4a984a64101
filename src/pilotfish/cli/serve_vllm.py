"""`pilotfish serve --engine vllm`: our settings in; vLLM's own server, with the monitor in it, out."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import sys
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

from pilotfish.actions import Policy, policy_to_dict, read_policy
from pilotfish.cli.server_verbs import Serve
from pilotfish.errors import SettingError
from pilotfish.heads import bank_folder
from pilotfish.models import DEMO_PAIRS, default_cache, identify_folder, resolve
from pilotfish.runs import write_json
from pilotfish.vllm.settings import VARIABLE, read_settings

TAKEN = frozenset(
    {
        *("engine", "pair", "draft", "banks", "dtype", "num_drafted", "vllm_args", "host", "port", "store"),
        *("policy", "action", "threshold", "webhook", "webhook_secret_env", "alerts_file", "redact"),
    }
)
"""Of our settings those that say something to vLLM or to the plugin."""
DRAFTED = 3
SPECULATION = "--speculative-config"


class Launch(NamedTuple):
    """What this process becomes."""

    command: list[str]
    environment: dict[str, str]


def run(config: Serve) -> int:
    if importlib.util.find_spec("vllm") is None:
        raise SettingError(
            "vLLM is not installed here; run: pip install 'pilotfish[vllm]' (for a CPU: scripts/install_vllm.sh)"
        )
    command, environment = launch(config, os.environ)
    print(f"starting vLLM, monitored as {environment[VARIABLE]} says; its server follows", flush=True)
    os.execvpe(command[0], command, environment)


def launch(config: Serve, environment: Mapping[str, str]) -> Launch:
    """Writes the plugin's settings and says how vLLM is started.

    Raises:
        SettingError: a flag is only for our own engine, nothing would draft, or vLLM would not load the plugin.
    """
    _refuse(config, environment)
    target, own_draft = DEMO_PAIRS.get(config.pair, (config.pair, None))
    draft = config.draft or own_draft
    has_own = any(word == SPECULATION or word.startswith(f"{SPECULATION}=") for word in config.vllm_args)
    if has_own and (config.draft is not None or config.num_drafted is not None):
        raise SettingError(f"both --draft or --num-drafted and vLLM's {SPECULATION} are given; leave one of them out")
    if draft is None and not has_own:
        raise SettingError(
            f"nothing drafts for {target}, so there is nothing to read: name a model of its vocabulary with --draft, "
            f"or hand vLLM a drafter of its own: -- {SPECULATION} '{{…}}'"
        )
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(resolve(target))]
    command += ["--served-model-name", config.pair, "--host", config.host, "--port", str(config.port)]
    command += ["--dtype", config.dtype]
    folder = None
    if draft is not None and not has_own:
        folder = resolve(draft)
        num_drafted = DRAFTED if config.num_drafted is None else config.num_drafted
        spec = {"method": "draft_model", "model": str(folder), "num_speculative_tokens": num_drafted}
        command += [SPECULATION, json.dumps(spec)]
    settings = _written(config, _policy(config, folder, draft or ""))
    return Launch([*command, *config.vllm_args], {**environment, VARIABLE: str(settings)})


def _refuse(config: Serve, environment: Mapping[str, str]) -> None:
    ours = [item for item in fields(Serve) if item.name not in TAKEN]
    given = [item.name.replace("_", "-") for item in ours if getattr(config, item.name) != item.default]
    if given:
        flags = ", ".join(f"--{name}" for name in given)
        raise SettingError(f"with --engine vllm there is no {flags}: that is of our own engine; vLLM's own go after --")
    plugins = environment.get("VLLM_PLUGINS")
    if plugins is not None and "pilotfish" not in plugins.split(","):
        raise SettingError(
            f"VLLM_PLUGINS is {plugins!r}, so vLLM would not load the monitor; add pilotfish to it, or unset it"
        )


def _policy(config: Serve, draft: Path | None, name: str) -> Policy:
    """The one that is named, else a rule a head as our own engine has them."""
    if config.policy is not None:
        return read_policy(config.policy)
    if draft is None and not config.banks:
        raise SettingError("say which --banks read vLLM's own drafter, or which --policy holds")
    from pilotfish.cli.session import find_banks, flag_policy

    identity = None if draft is None else identify_folder(draft, name)
    return flag_policy(
        find_banks(config.banks, (identity,)), action=config.action, threshold=config.threshold, hold=True
    )


def _written(config: Serve, policy: Policy) -> Path:
    """The settings file, in a folder that only its owner may read: a store's address may hold a password."""
    policy_json = policy_to_dict(policy)
    settings: dict[str, Any] = {
        "banks": [str(bank_folder(folder).resolve()) for folder in config.banks],
        "store": config.store,
        "webhook_secret_env": config.webhook_secret_env,
        "redact": config.redact,
    }
    settings |= {} if config.webhook is None else {"webhook": config.webhook}
    settings |= {} if config.alerts_file is None else {"alerts_file": str(config.alerts_file.resolve())}
    name = hashlib.sha256(json.dumps([settings, policy_json], sort_keys=True).encode()).hexdigest()[:16]
    folder = default_cache() / "vllm" / name
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    write_json(folder / "policy.json", policy_json)
    write_json(folder / "settings.json", settings | {"policy": "policy.json"})
    read_settings(folder / "settings.json")
    return folder / "settings.json"
