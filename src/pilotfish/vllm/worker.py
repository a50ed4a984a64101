"""A worker that has loaded its models in; the same worker, which reads them, out. Before any graph is captured."""

from __future__ import annotations

import functools
from typing import Any

from pilotfish.errors import SettingError
from pilotfish.vllm.plan import Plan
from pilotfish.vllm.sites import Sites
from pilotfish.vllm.tap_v1 import DrafterTap, TargetTap
from pilotfish.vllm.tap_v2 import attach


def read_after_loading(load: Any) -> Any:
    @functools.wraps(load)
    def load_model(self: Any, **kwargs: Any) -> None:
        load(self, **kwargs)
        if _answers(self):
            read(self)

    return load_model


def _answers(worker: Any) -> bool:
    """Whether it is this rank whose output vLLM takes: the first of the last pipeline stage. The others compute the
    same states.
    """
    from vllm.distributed.parallel_state import get_pp_group, get_tp_group

    return bool(get_pp_group().is_last_rank and get_tp_group().is_first_rank)


def read(worker: Any) -> None:
    """Attaches the tap that the plan asks for.

    Raises:
        SettingError: the runner's drafter is not the one that the configuration promised.
        BankMismatch: the model has not the sites that the bank reads.
    """
    runner, config = worker.model_runner, worker.vllm_config
    plan = Plan.of(config)
    bank = plan.bank()
    if plan.reader == "draft" and not hasattr(runner, "drafter" if not worker.use_v2_model_runner else "speculator"):
        raise SettingError("vLLM promised a drafter and has loaded none; the monitor has nothing to read")
    if worker.use_v2_model_runner:
        runner.pilotfish = attach(worker, plan, bank, _num_rows(config))
        return
    draft = config.speculative_config.draft_model_config if plan.reader == "draft" else None
    model_config = draft or config.model_config
    model = runner.drafter.model if draft is not None else runner.model
    sites = Sites(model, model_config.hf_text_config.model_type, bank.sites, _num_rows(config))
    kind = DrafterTap if draft is not None else TargetTap
    runner.pilotfish = kind(runner, bank, sites, shift=plan.shift)


def _num_rows(config: Any) -> int:
    """Rows of the longest pass: every scheduled token, and a draft model's extra one for each request."""
    scheduler = config.scheduler_config
    return int(scheduler.max_num_batched_tokens + scheduler.max_num_seqs)
