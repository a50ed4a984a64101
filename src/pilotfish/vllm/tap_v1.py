"""vLLM's V1 model runner in; a table of scores beside each step's output out.

A drafter begins every proposal with a pass over what the target has just verified and the token that follows, so the
scores of a step's tokens are there in the same step. Between that pass and the drafter's further ones, which are not
read, a hook on the drafter's outermost module, which runs eagerly, turns states into scores. Without a drafter the
target's states are read after its pass: then the newest token's score comes one step later.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from pilotfish.heads import HeadBank
from pilotfish.vllm.align import Pass
from pilotfish.vllm.scorer import Batch
from pilotfish.vllm.sites import Sites
from pilotfish.vllm.tap import Tap


class _Pass(NamedTuple):
    """A drafter's first pass that is about to run."""

    num_rows: int
    last: Tensor
    """Of each request the last row that counts."""
    metadata: Any


class V1Tap(Tap):
    """Reads in `sample_tokens`, which ends every step."""

    def __init__(self, runner: Any, bank: HeadBank, sites: Sites, *, shift: int) -> None:
        super().__init__(runner, bank, sites, shift=shift)
        self.state: Any = None
        """What vLLM keeps between the target's pass and the sampling of its tokens."""
        sample = runner.sample_tokens

        def sample_tokens(*args: Any, **kwargs: Any) -> Any:
            self.state = runner.execute_model_state
            if self.state is None:
                return sample(*args, **kwargs)
            self.begin()
            self.before_sampling()
            output = sample(*args, **kwargs)
            self.after_sampling()
            self.state = None
            return self.attach(output, runner._get_or_create_async_output_copy_stream)

        runner.sample_tokens = sample_tokens

    def before_sampling(self) -> None: ...

    def after_sampling(self) -> None: ...

    def batch(self, blocks: Tensor) -> Batch:
        """`blocks`: the block table of the requests, with a row for each."""
        num_prompt_tokens = self.runner.input_batch.num_prompt_tokens_cpu_tensor[: len(blocks)]
        return Batch(blocks, num_prompt_tokens.to(blocks.device, non_blocking=True))

    def cached_rows(self) -> Any:
        return self.cached(self.state.scheduler_output, self.runner.input_batch.req_id_to_index.__getitem__)


class DrafterTap(V1Tap):
    """Reads a draft model, or an EAGLE or MTP drafter."""

    def __init__(self, runner: Any, bank: HeadBank, sites: Sites, *, shift: int) -> None:
        super().__init__(runner, bank, sites, shift=shift)
        self._coming: _Pass | None = None
        self._drafter = runner.drafter
        prepare = self._drafter.set_inputs_first_pass

        def set_inputs_first_pass(*args: Any, **kwargs: Any) -> Any:
            num_rows, last, metadata = prepare(*args, **kwargs)
            self._coming, self.sites.are_wanted = _Pass(num_rows, last, metadata), True
            return num_rows, last, metadata

        self._drafter.set_inputs_first_pass = set_inputs_first_pass
        self._drafter.model.register_forward_hook(self._after_pass)

    def after_sampling(self) -> None:
        self._coming = None
        if not self.has_table:
            self.forget(self.state.spec_decode_common_attn_metadata.slot_mapping)

    def _after_pass(self, module: Any, args: Any, output: Any) -> None:
        coming, self._coming, self.sites.are_wanted = self._coming, None, False
        if coming is not None:
            final = output[0] if isinstance(output, tuple) else output
            self.guarded(lambda: self._read(coming, final))

    def _read(self, coming: _Pass, final: Tensor) -> Tensor:
        num_rows, last, metadata = coming
        ran = Pass(
            metadata.query_start_loc,
            self._drafter.positions[:num_rows],
            self._drafter.input_ids[:num_rows],
            metadata.slot_mapping[:num_rows],
            last,
        )
        return self.scorer(self._drafter.block_size).read(
            self.sites, final, ran, self.batch(metadata.block_table_tensor), self.cached_rows()
        )


class TargetTap(V1Tap):
    """Reads the target, where there is no drafter with states of its own."""

    def before_sampling(self) -> None:
        self.guarded(self._read)

    def after_sampling(self) -> None:
        if not self.has_table:
            num_rows = self.state.scheduler_output.total_num_scheduled_tokens
            self.forget(self.runner.input_batch.block_table[0].slot_mapping.gpu[:num_rows])

    def _read(self) -> Tensor:
        runner, num_rows = self.runner, self.state.scheduler_output.total_num_scheduled_tokens
        table, num_requests = runner.input_batch.block_table[0], runner.input_batch.num_reqs
        ran = Pass(
            runner.query_start_loc.gpu[: num_requests + 1],
            runner.positions[:num_rows],
            runner.input_ids.gpu[:num_rows],
            table.slot_mapping.gpu[:num_rows],
        )
        return self.scorer(table.block_size).read(
            self.sites,
            self.state.hidden_states,
            ran,
            self.batch(table.get_device_tensor(num_requests)),
            self.cached_rows(),
        )
