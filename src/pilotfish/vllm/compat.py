"""Every symbol of vLLM that the plugin touches, in one table; what is wrong with the installed one out.

vLLM's objects are `Any` to the type checker throughout this package: it need not be installed where the checker runs.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pilotfish.errors import SettingError

SUPPORTED = ("0.32",)


@dataclass(frozen=True, slots=True)
class Symbol:
    """A function or attribute that is called, wrapped or read."""

    module: str
    name: str
    parameters: tuple[str, ...] = ()
    """That it has to take, in this order."""
    source: tuple[str, ...] = ()
    """What its source has to hold: attributes that are read, and the order of what it does."""

    def find(self) -> Any:
        found: Any = importlib.import_module(self.module)
        for part in self.name.split("."):
            found = getattr(found, part)
        return found

    def problem(self) -> str | None:
        """What differs from what the plugin was written against."""
        try:
            found = self.find()
        except (ImportError, AttributeError):
            return f"{self.module}.{self.name} is gone"
        if self.parameters:
            names = tuple(inspect.signature(found).parameters)
            if names[: len(self.parameters)] != self.parameters:
                return f"{self.module}.{self.name} takes {', '.join(names)}, not {', '.join(self.parameters)}"
        if self.source:
            text, place = inspect.getsource(found), 0
            for marker in self.source:
                place = text.find(marker, place)
                if place < 0:
                    return f"{self.module}.{self.name} does not hold {marker!r} where it is looked for"
        return None


_RUNNER = "vllm.v1.worker.gpu_model_runner"
_PROPOSER = "vllm.v1.spec_decode.llm_base_proposer"
_SCHEDULER = "vllm.v1.core.sched.scheduler"

SHARED = (
    Symbol("vllm.engine.arg_utils", "EngineArgs.create_engine_config", ("self", "usage_context", "headless")),
    Symbol("vllm.config.scheduler", "SchedulerConfig.get_scheduler_cls", ("self",)),
    Symbol("vllm.v1.worker.gpu_worker", "Worker.load_model", ("self",), ("self.model_runner.load_model(",)),
    Symbol(
        _SCHEDULER,
        "Scheduler.update_from_output",
        ("self", "scheduler_output", "model_runner_output"),
        (
            "num_scheduled_tokens.items()",
            "model_runner_output.req_id_to_index[req_id]",
            "self._update_request_with_output(",
            "stop_reason=request.stop_reason",
            "kv_transfer_params=kv_transfer_params",
        ),
    ),
    Symbol(_SCHEDULER, "Scheduler._update_request_with_output", ("self", "request", "new_token_ids", "is_stale")),
    Symbol("vllm.v1.core.sched.async_scheduler", "AsyncScheduler._update_request_with_output"),
    Symbol("vllm.v1.request", "Request.__init__", source=("self.num_prompt_tokens", "self.all_token_ids")),
    Symbol("vllm.v1.request", "RequestStatus.FINISHED_STOPPED"),
    Symbol(
        "vllm.v1.engine.output_processor",
        "OutputProcessor.process_outputs",
        ("self", "engine_core_outputs"),
        ("req_state.detokenizer.update(", "req_state.make_request_output("),
    ),
    Symbol(
        "vllm.v1.engine.output_processor",
        "RequestState._new_completion_output",
        ("self", "token_ids", "finish_reason", "stop_reason"),
    ),
    Symbol("vllm.v1.engine.async_llm", "AsyncLLM.generate", ("self", "prompt", "sampling_params", "request_id")),
    Symbol(
        "vllm.v1.engine.detokenizer",
        "BaseIncrementalDetokenizer.update",
        ("self", "new_token_ids", "stop_terminated"),
        ("if stop_terminated and not self.include_stop_str_in_output",),
    ),
    Symbol(
        "vllm.entrypoints.launchers.app", "build_app", ("args",), ("init_entrypoints_middleware(args, app, supported_",)
    ),
)

V1 = (
    Symbol(
        _RUNNER,
        "GPUModelRunner.sample_tokens",
        ("self", "grammar_output"),
        (") = self.execute_model_state", "propose_draft_token_ids(sampled_token_ids)", "ModelRunnerOutput("),
    ),
    Symbol(_RUNNER, "ExecuteModelState.spec_decode_common_attn_metadata"),
    Symbol(_RUNNER, "ExecuteModelState.hidden_states"),
    Symbol(_RUNNER, "AsyncGPUModelRunnerOutput.get_output", ("self",)),
    Symbol(_RUNNER, "GPUModelRunner._get_or_create_async_output_copy_stream", ("self",)),
    Symbol(
        _PROPOSER,
        "SpecDecodeBaseProposer.propose",
        ("self", "num_speculative_tokens"),
        ("self.set_inputs_first_pass(", "self.model(**model_kwargs)", "sample_hidden_states = last_hidden_states["),
    ),
    Symbol(
        _PROPOSER,
        "SpecDecodeBaseProposer.set_inputs_first_pass",
        ("self", "target_token_ids", "next_token_ids", "target_positions"),
        ("return num_tokens, token_indices_to_sample, cad", "return total_num_output_tokens, token_indices_to_sample"),
    ),
    Symbol("vllm.v1.worker.block_table", "BlockTable.get_device_tensor", ("self", "num_reqs")),
)


_V2 = "vllm.v1.worker.gpu"
_STANDALONE = f"{_V2}.spec_decode.standalone_ar.speculator"
_DEPENDENT = f"{_V2}.spec_decode.target_dependent_ar.speculator"

V2 = (
    Symbol(f"{_V2}.model_runner", "GPUModelRunner.execute_model", ("self", "scheduler_output")),
    Symbol(
        f"{_V2}.model_runner",
        "GPUModelRunner.sample_tokens",
        ("self", "grammar_output"),
        (
            "self.execute_model_state.input_batch",
            "async_output = AsyncOutput(",
            "copy_stream=self.output_copy_stream",
            "self.speculator.propose(",
            "return async_output",
        ),
    ),
    Symbol(f"{_V2}.model_runner", "ExecuteModelState.input_batch"),
    Symbol(f"{_V2}.model_runner", "ExecuteModelState.hidden_states"),
    Symbol(f"{_V2}.async_utils", "AsyncOutput.get_output", ("self",), ("return self.model_runner_output",)),
    Symbol(
        _STANDALONE,
        "StandaloneARSpeculator._run_model",
        ("self", "input_ids", "positions"),
        ("hidden_states = hidden_states[0]", "return hidden_states"),
    ),
    Symbol(
        _STANDALONE,
        "StandaloneARSpeculator._prefill",
        ("self", "input_batch", "num_rejected"),
        ("last_token_indices=self.last_token_indices", "self._run_model(", "self.expanded_input_ids[:total_expanded]"),
    ),
    Symbol(_STANDALONE, "StandaloneARSpeculator.num_extra_query_per_req"),
    Symbol(
        _DEPENDENT,
        "TargetDependentARSpeculator._run_model",
        ("self", "num_tokens"),
        ("input_buffers.input_ids[:num_tokens]", "return last_hidden_states, hidden_states"),
    ),
    Symbol(
        _DEPENDENT,
        "TargetDependentARSpeculator._prefill",
        ("self", "num_reqs", "num_tokens"),
        ("self._run_model(", "self.input_buffers.positions[:num_reqs] = positions"),
    ),
    Symbol(
        _DEPENDENT,
        "TargetDependentARSpeculator.propose",
        ("self", "input_batch"),
        ("self.last_token_indices,", "run_fullgraph(prefill_batch_desc)"),
    ),
    Symbol(f"{_V2}.spec_decode.speculator", "DraftModelSpeculator.load_model", source=("self.draft_attn_layer_names",)),
    Symbol(f"{_V2}.block_table", "BlockTables.__init__", source=("self.block_sizes", "self.input_block_tables")),
    Symbol(f"{_V2}.states", "RequestState.__init__", source=("self.prompt_len = UvaBackedTensor",)),
)


def check_version(version: str) -> None:
    """Raises `SettingError` when the plugin was not written against this release."""
    if not version.startswith(tuple(f"{known}." for known in SUPPORTED)):
        raise SettingError(
            f"vLLM {version} is installed; this plugin knows {', '.join(SUPPORTED)}. Install one of these, or unset "
            "PILOTFISH_VLLM"
        )


def check_symbols(symbols: tuple[Symbol, ...]) -> None:
    """Raises `SettingError` when vLLM is not as the plugin needs it, or another plugin has already changed it."""
    problems = [problem for symbol in symbols if (problem := symbol.problem())]
    if problems:
        raise SettingError(
            f"this vLLM is not the one that Pilotfish was written against: {'; '.join(problems)}. Install vllm "
            f"{SUPPORTED[-1]}, or unset PILOTFISH_VLLM"
        )
    foreign = sorted({owner for symbol in symbols if not (owner := _owner(symbol.find())).startswith("vllm.")})
    if foreign:
        raise SettingError(
            f"another plugin has replaced parts of vLLM that Pilotfish needs: {', '.join(foreign)}. Leave one of the "
            "two out with VLLM_PLUGINS"
        )


def _owner(found: Any) -> str:
    """The module in which a function was written; a class attribute counts as vLLM's own."""
    return str(getattr(found, "__module__", None) or "vllm.") if callable(found) else "vllm."


def wrapped(owner: Any, name: str, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Replaces a function of vLLM by one that is made of it, once however often it is asked for."""
    original = getattr(owner, name)
    if getattr(original, "is_of_pilotfish", False):
        return
    replacement: Any = make(original)
    replacement.is_of_pilotfish = True
    setattr(owner, name, replacement)
