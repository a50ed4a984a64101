"""vLLM's V2 model runner in (the default with CUDA); a table of scores beside each step's output out.

Written against the source of vLLM 0.32 and held to it by contract tests; it needs Triton and a GPU, and WAS NOT RUN.

An EAGLE or MTP drafter's first pass may be replayed as one CUDA graph, in which no Python runs. So what is done inside
`_run_model` are tensor operations that write persistent buffers (channels, ids, positions): capture records them,
replay repeats them. What follows the pass (slots, windows, scores) runs after `propose`, outside of any graph, from
these buffers. A draft model's first pass runs eagerly and takes the same way. The step's own output is on its way to
the host before the drafter runs; the scores follow on the same stream with an event of their own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pilotfish.heads import HeadBank
from pilotfish.vllm.align import Pass
from pilotfish.vllm.plan import Plan
from pilotfish.vllm.scorer import Batch
from pilotfish.vllm.sites import Sites
from pilotfish.vllm.tap import Tap


class V2Tap(Tap):
    """Reads in `sample_tokens`, which ends every step."""

    def __init__(self, runner: Any, bank: HeadBank, sites: Sites, *, shift: int) -> None:
        super().__init__(runner, bank, sites, shift=shift)
        self._step: Any = None
        execute, sample = runner.execute_model, runner.sample_tokens

        def execute_model(scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
            self._step = scheduler_output
            return execute(scheduler_output, *args, **kwargs)

        def sample_tokens(*args: Any, **kwargs: Any) -> Any:
            state = runner.execute_model_state
            if state is None:
                return sample(*args, **kwargs)
            self.begin()
            output = sample(*args, **kwargs)
            self.guarded(lambda: self.read(state))
            if not self.has_table:
                self.forget(self.slots(state.input_batch.positions, state.input_batch.query_start_loc))
            return self.attach(output, lambda: runner.output_copy_stream)

        runner.execute_model, runner.sample_tokens = execute_model, sample_tokens

    def read(self, state: Any) -> Tensor:
        raise NotImplementedError

    @property
    def group(self) -> int:
        """Index of the KV cache group whose blocks the reader's tokens are in."""
        return 0

    def blocks(self, num_requests: int) -> Tensor:
        """The batch's block table; vLLM gathers it for the target's pass."""
        table: Tensor = self.runner.block_tables.input_block_tables[self.group]
        return table[:num_requests]

    def slots(self, positions: Tensor, starts: Tensor) -> Tensor:
        """The slot of each row, from the block table: no buffer of vLLM's is relied on after the pass."""
        size = self.runner.block_tables.block_sizes[self.group]
        blocks = self.blocks(len(starts) - 1)
        index = torch.arange(len(positions), device=positions.device, dtype=starts.dtype)
        request = torch.searchsorted(starts[1:].contiguous(), index, right=True).clamp_max(len(starts) - 2)
        column = (positions // size).clamp_max(blocks.shape[1] - 1)
        slot = blocks[request, column].long() * size + positions % size
        return torch.where(index < starts[-1], slot, -1)

    def table(self, channels: Tensor, positions: Tensor, tokens: Tensor, starts: Tensor, last: Tensor | None) -> Tensor:
        """Scores of the rows of a pass, and of what the prefix cache spared."""
        batch = self._batch
        ran = Pass(starts, positions, tokens, self.slots(positions, starts), last)
        prompts = self.runner.req_states.prompt_len.gpu[batch.idx_mapping[: batch.num_reqs]]
        scorer = self.scorer(self.runner.block_tables.block_sizes[self.group])
        return scorer.score(
            channels, ran, Batch(self.blocks(batch.num_reqs), prompts), self.cached(self._step, batch.req_ids.index)
        )

    _batch: Any = None
    """vLLM's input batch of the step."""


class SpeculatorTap(V2Tap):
    """Reads a draft model, or an EAGLE or MTP drafter."""

    def __init__(self, runner: Any, bank: HeadBank, sites: Sites, *, shift: int, num_rows: int) -> None:
        super().__init__(runner, bank, sites, shift=shift)
        device = runner.device
        self._speculator = runner.speculator
        self._channels = torch.zeros(num_rows, bank.num_channels, device=device)
        self._tokens = torch.zeros(num_rows, dtype=torch.int32, device=device)
        self._positions = torch.zeros(num_rows, dtype=torch.int64, device=device)
        self._is_first = False
        width = bank.identity.hidden_size * len(bank.sites)
        bank.channels(torch.zeros(1, width, device=device))  # its weights go to the device before a graph is captured
        prefill, run = self._speculator._prefill, self._speculator._run_model

        def _prefill(*args: Any, **kwargs: Any) -> Any:
            self._is_first = True
            try:
                return prefill(*args, **kwargs)
            finally:
                self._is_first = False

        def _run_model(*args: Any, **kwargs: Any) -> Any:
            output = run(*args, **kwargs)
            if self._is_first:
                self._note(output[0] if isinstance(output, tuple) else output, args)
            return output

        self._speculator._prefill, self._speculator._run_model = _prefill, _run_model

    @property
    def group(self) -> int:
        names = self._speculator.draft_attn_layer_names
        groups = self.runner.kv_cache_config.kv_cache_groups
        return next(index for index, group in enumerate(groups) if names & set(group.layer_names))

    def _note(self, final: Tensor, args: tuple[Any, ...]) -> None:
        """Tensor operations alone: these may be recorded in a graph."""
        num_rows = len(final)
        if isinstance(args[0], Tensor):  # a draft model is handed its rows
            ids, positions = args[:2]
        else:  # a drafter that depends on the target reads its own buffers, which later passes overwrite
            buffers = self._speculator.input_buffers
            ids, positions = buffers.input_ids[:num_rows], buffers.positions[:num_rows]
        self._channels[:num_rows] = self.bank.channels(self.sites.features(final, num_rows))
        self._tokens[:num_rows] = ids
        self._positions[:num_rows] = positions

    def read(self, state: Any) -> Tensor:
        self._batch = batch = state.input_batch
        starts, num_rows = batch.query_start_loc[: batch.num_reqs + 1], batch.num_tokens
        extra = getattr(self._speculator, "num_extra_query_per_req", 0)
        if extra:  # a draft model's pass has one row more a request, for the token that follows
            starts = starts + extra * torch.arange(len(starts), device=starts.device, dtype=starts.dtype)
            num_rows += extra * batch.num_reqs
        return self.table(
            self._channels[:num_rows],
            self._positions[:num_rows],
            self._tokens[:num_rows],
            starts,
            self._speculator.last_token_indices[: batch.num_reqs],
        )


class TargetTapV2(V2Tap):
    """Reads the target, where there is no drafter with states of its own."""

    def read(self, state: Any) -> Tensor:
        self._batch = batch = state.input_batch
        num_rows = batch.num_tokens
        return self.table(
            self.bank.channels(self.sites.features(state.hidden_states, num_rows)),
            batch.positions[:num_rows],
            batch.input_ids[:num_rows],
            batch.query_start_loc[: batch.num_reqs + 1],
            None,
        )


def attach(worker: Any, plan: Plan, bank: HeadBank, num_rows: int) -> Tap:
    """The tap that the plan asks for, on a worker's V2 runner; before its graphs are captured."""
    runner, config = worker.model_runner, worker.vllm_config
    if plan.reader == "target":
        sites = Sites(runner.model, config.model_config.hf_text_config.model_type, bank.sites, num_rows)
        return TargetTapV2(runner, bank, sites, shift=0)
    model_type = config.speculative_config.draft_model_config.hf_text_config.model_type
    sites = Sites(runner.speculator.model, model_type, bank.sites, num_rows)
    return SpeculatorTap(runner, bank, sites, shift=plan.shift, num_rows=num_rows)
