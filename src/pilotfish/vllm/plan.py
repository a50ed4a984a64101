"""Settings and vLLM's configuration in; what is read, with which banks, or why it cannot be, out."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pilotfish.actions import Policy, policy_from_dict, policy_to_dict, read_policy
from pilotfish.core import Reader
from pilotfish.errors import SettingError
from pilotfish.heads import HeadBank, joined, shipped_folders
from pilotfish.models import identify_folder, resolve
from pilotfish.vllm.settings import VllmSettings
from pilotfish.vllm.track import Charge

KEY = "pilotfish"
"""In vLLM's `additional_config`, which goes to every worker and into the hash of what it compiles."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What the processes of one engine agree on."""

    banks: tuple[str, ...]
    """Folders."""
    policy: dict[str, Any]
    reader: Reader
    shift: int
    """Tokens that a row of the reader's pass is ahead of its position."""

    @property
    def lags(self) -> bool:
        return self.reader == "target"

    def bank(self) -> HeadBank:
        return joined([HeadBank.load(Path(folder)) for folder in self.banks])

    def charge(self, bank: HeadBank) -> Charge:
        """Raises `SettingError` when the policy cannot be carried out."""
        return Charge(
            policy=policy_from_dict(self.policy),
            metrics=bank.metrics,
            thresholds=bank.thresholds,
            reader=self.reader,
            shift=self.shift,
            lags=self.lags,
        )

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def of(cls, config: Any) -> Plan:
        """The plan that vLLM's configuration carries."""
        said = config.additional_config[KEY]
        return cls(**{**said, "banks": tuple(said["banks"])})


def make_plan(settings: VllmSettings, config: Any) -> Plan:
    """Decides once, where vLLM is started.

    Args:
        config: vLLM's `VllmConfig`.

    Raises:
        SettingError: this configuration cannot be monitored as asked; names what stands in the way.
        BankMismatch: a bank was made for another model than the one that would be read.
    """
    spec = config.speculative_config
    has_drafter = spec is not None and (spec.uses_draft_model() or spec.use_eagle())
    if settings.reader == "draft" and not has_drafter:
        method = "none" if spec is None else repr(spec.method)
        raise SettingError(
            f"the draft is to be read, but vLLM's speculative method is {method}, which runs no model; give it "
            "--speculative-config with a draft model, EAGLE or MTP, or set reader to target"
        )
    reader: Reader = "draft" if has_drafter and settings.reader != "target" else "target"
    _refuse(config, reader)
    name = spec.draft_model_config.model if reader == "draft" else config.model_config.model
    identity = identify_folder(resolve(name), name)
    for folder in settings.banks:
        HeadBank.load(Path(folder)).check(identity)
    folders = settings.banks or tuple(map(str, shipped_folders(identity)))
    if not folders:
        raise SettingError(f"no bank ships for {name}; name banks in the settings, or fit one with `pilotfish fit`")
    policy = Policy() if settings.policy is None else read_policy(Path(settings.policy))
    shift = int(reader == "draft" and spec.use_eagle())
    plan = Plan(banks=folders, policy=policy_to_dict(policy), reader=reader, shift=shift)
    plan.charge(plan.bank())
    return plan


def _refuse(config: Any, reader: Reader) -> None:
    """Where tokens would come to stand in the KV cache without the reader's pass, or rows could not be told apart."""
    spec, parallel, model = config.speculative_config, config.parallel_config, config.model_config
    draft = spec if reader == "draft" else None
    hindrances = {
        "it serves a pooling model": model.runner_type != "generate",
        "KV blocks come from elsewhere (kv_transfer_config), without scores": config.kv_transfer_config is not None,
        "prefill context parallelism spreads a prompt's rows": parallel.prefill_context_parallel_size > 1,
        "decode context parallelism spreads a request's slots": parallel.decode_context_parallel_size > 1,
        "the target is split over pipeline ranks (read the draft)": reader == "target"
        and parallel.pipeline_parallel_size > 1,
        "LoRA adapters change the target's states (read the draft)": reader == "target"
        and config.lora_config is not None,
        "the drafter proposes all tokens in one pass (parallel drafting)": draft is not None
        and (draft.parallel_drafting or draft.method in {"dflash", "dspark"}),
        "the draft has a vocabulary of its own": draft is not None and draft.use_heterogeneous_vocab,
    }
    found = [name for name, stands in hindrances.items() if stands]
    if found:
        raise SettingError(f"this vLLM cannot be monitored: {'; '.join(found)}. Change that, or unset PILOTFISH_VLLM")
