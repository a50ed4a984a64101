"""The V2 tap over stand-ins that do in vLLM's order what vLLM does: the real runner needs a GPU."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from conftest import windowed_bank

from pilotfish.vllm.sites import Sites
from pilotfish.vllm.tap_v2 import SpeculatorTap
from pilotfish.vllm.wire import KEY

BLOCK, HIDDEN = 4, 32
BLOCKS = torch.tensor([[3, 1, 5], [2, 4, 0]])


class Standalone:
    """A draft model: its first pass has a row more a request, for the token that follows."""

    num_extra_query_per_req = 1

    def __init__(self, states: dict[int, torch.Tensor]) -> None:
        self.states, self.last_token_indices = states, torch.zeros(2, dtype=torch.int64)
        self.draft_attn_layer_names = {"draft.0"}

    def propose(self, batch, rows):
        self._prefill(batch, rows)
        self._run_model(torch.zeros(2, dtype=torch.int32), torch.zeros(2, dtype=torch.int64))  # drafts: not told of

    def _prefill(self, batch, rows):
        ids = torch.tensor([token for _, token, _ in rows], dtype=torch.int32)
        positions = torch.tensor([position for position, _, _ in rows])
        counts = torch.diff(batch.query_start_loc) + 1
        self.last_token_indices[:] = counts.cumsum(0) - 1 - torch.tensor([row[2] for row in rows if row[2] >= 0])
        self._run_model(ids, positions)

    def _run_model(self, ids, positions):
        return torch.stack([self.states[int(token)] for token in ids])


class Dependent(Standalone):
    """A drafter of the target's states: ids one ahead of positions, both in buffers that drafting overwrites."""

    num_extra_query_per_req = 0

    def __init__(self, states):
        super().__init__(states)
        self.input_buffers = SimpleNamespace(input_ids=torch.zeros(16), positions=torch.zeros(16))

    def propose(self, batch, rows):
        self.input_buffers.input_ids = torch.tensor([token for _, token, _ in rows], dtype=torch.int32)
        self.input_buffers.positions = torch.tensor([position for position, _, _ in rows])
        self.last_token_indices[:] = batch.query_start_loc[1:] - 1
        self._prefill(2, len(rows))
        self.input_buffers.positions[:2] = 99
        self._run_model(2)

    def _prefill(self, num_requests, num_rows):
        self._run_model(num_rows)

    def _run_model(self, num_rows):
        final = torch.stack([self.states[int(token)] for token in self.input_buffers.input_ids[:num_rows]])
        return final, final


def one_step(pair, kind, rows, starts, *, shift, break_it=False):
    """The scores beside a step's output; `rows` of position, id, and -1 or (once a request) how many were rejected."""
    bank = windowed_bank(pair).subset(["linear 4", "mlp 2"])
    random = torch.Generator().manual_seed(3)
    width = HIDDEN * len(bank.sites)
    states = {token: torch.randn(width, generator=random) for token in range(40)}
    speculator = kind(states)
    batch = SimpleNamespace(
        req_ids=["a", "b"], num_reqs=2, idx_mapping=torch.tensor([1, 0]), query_start_loc=torch.tensor(starts),
        num_tokens=starts[-1], positions=torch.arange(starts[-1]),
    )  # fmt: skip
    runner = SimpleNamespace(
        device=torch.device("cpu"), speculator=speculator, execute_model_state=None, output_copy_stream=None,
        req_states=SimpleNamespace(prompt_len=SimpleNamespace(gpu=torch.tensor([2, 3]))),
        block_tables=SimpleNamespace(block_sizes=[BLOCK], input_block_tables=[BLOCKS]),
        kv_cache_config=SimpleNamespace(
            num_blocks=6,
            kv_cache_groups=[
                SimpleNamespace(layer_names=["draft.0"], kv_cache_spec=SimpleNamespace(block_size=BLOCK))
            ],
        ),
    )  # fmt: skip

    def execute_model(step):
        runner.execute_model_state = SimpleNamespace(input_batch=batch)

    def sample_tokens(grammar):
        runner.execute_model_state = None
        speculator.propose(batch, rows)
        return SimpleNamespace(get_output=lambda: SimpleNamespace())

    runner.execute_model, runner.sample_tokens = execute_model, sample_tokens
    sites = object.__new__(Sites)
    sites.features = lambda final, num_rows: final[:num_rows]
    tap = SpeculatorTap(runner, bank, sites, shift=shift, num_rows=32)
    if break_it:
        tap.table = None
    step = SimpleNamespace(scheduled_new_reqs=[], scheduled_cached_reqs=SimpleNamespace(resumed_req_ids=set()))
    runner.execute_model(step)
    scores = getattr(runner.sample_tokens(None).get_output(), KEY)

    def expected(ids, boundary):
        return torch.cat(bank.score_text(torch.stack([states[token] for token in ids]), boundary=boundary), dim=1)

    return scores, expected


def test_a_draft_model_s_rows_are_scored_and_rejected_ones_are_nobodys(pair):
    rows = [(0, 5, 1), (1, 6, -1), (2, 7, -1), (3, 8, -1), (0, 9, 0), (1, 10, -1)]
    scores, expected = one_step(pair, Standalone, rows, [0, 3, 4], shift=0)
    first, second = scores.of_requests(2)
    assert first[:, 2].tolist() == [5, 6, 7] and second[:, 2].tolist() == [9, 10]
    torch.testing.assert_close(torch.from_numpy(first[:, 3:]), expected([5, 6, 7], 3), atol=1e-5, rtol=0)
    torch.testing.assert_close(torch.from_numpy(second[:, 3:]), expected([9, 10], 2), atol=1e-5, rtol=0)


def test_a_dependent_drafter_s_rows_are_read_before_drafting_overwrites_them(pair):
    rows = [(0, 5, -1), (1, 6, -1), (0, 9, -1)]
    scores, expected = one_step(pair, Dependent, rows, [0, 2, 3], shift=1)
    first, second = scores.of_requests(2)
    assert first[:, 1].tolist() == [1, 2] and second[:, 1:3].tolist() == [[1, 9]]
    torch.testing.assert_close(torch.from_numpy(first[:, 3:]), expected([5, 6], 2), atol=1e-5, rtol=0)


def test_what_goes_wrong_after_the_pass_is_said_beside_the_output(pair):
    rows = [(0, 5, 0), (1, 6, -1), (0, 9, 0), (1, 10, -1)]
    scores, _ = one_step(pair, Standalone, rows, [0, 1, 2], shift=0, break_it=True)
    assert len(scores.table) == 0 and scores.failure.startswith("head failed: TypeError")


@pytest.mark.parametrize("kind", [Standalone, Dependent])
def test_the_stand_ins_have_what_the_tap_takes_from_vllm(kind):
    from pilotfish.vllm.compat import V2

    names = " ".join(symbol.name for symbol in V2)
    assert all(name in names for name in ("_prefill", "_run_model")) and hasattr(kind, "num_extra_query_per_req")
