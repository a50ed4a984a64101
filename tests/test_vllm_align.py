"""Rows of a pass, their places and the channels by slot: without vLLM, against one pass over each whole text."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import windowed_bank
from hypothesis import given, settings
from hypothesis import strategies as st

from pilotfish.heads import Form
from pilotfish.models import Pair, tiny_model
from pilotfish.vllm.align import Pass, places, rows_of_cached, rows_of_pass
from pilotfish.vllm.cache import SlotCache
from pilotfish.vllm.loops import Loops, Steps, keep_rows, read_rows, score_rows, steps_for
from pilotfish.vllm.scorer import Batch, Scorer
from pilotfish.vllm.sites import Sites

BLOCK = 4
LINEAR = (Form(window=4), Form(width=1, window=1), Form(width=1, window=6), Form(window=2))
both_ways = pytest.mark.parametrize("is_loop", [False, True], ids=["operations", "loops"])


def scorer_of(pair: Pair, is_loop: bool, *, num_slots: int, shift: int = 0) -> Scorer:
    """With heads of all forms, or with linear ones and the loops (as Python runs it)."""
    bank = windowed_bank(pair, LINEAR) if is_loop else windowed_bank(pair)
    steps = Steps(read_rows, keep_rows, score_rows) if is_loop else None
    return Scorer(bank, num_slots=num_slots, block_size=BLOCK, shift=shift, device=torch.device("cpu"), steps=steps)


def read(scorer: Scorer, features: torch.Tensor, *given: Any) -> torch.Tensor:
    return scorer.score(scorer.bank.channels(features), *given)


def ints(*values: int) -> torch.Tensor:
    return torch.tensor(values)


def test_each_row_belongs_to_the_request_whose_rows_it_is_among():
    rows = rows_of_pass(Pass(ints(0, 2, 2, 5), ints(7, 8, 0, 1, 2), ints(5, 6, 7, 8, 9), ints(0, 1, 2, 3, 4)), shift=0)
    assert rows.request.tolist() == [0, 0, 2, 2, 2] and rows.position.tolist() == [7, 8, 0, 1, 2]


def test_rows_after_the_last_that_counts_have_no_slot():
    starts, slots = ints(0, 3, 5), ints(10, 11, 12, 20, 21)
    rows = rows_of_pass(Pass(starts, ints(4, 5, 6, 0, 1), ints(1, 2, 3, 4, 5), slots, ints(1, 4)), shift=0)
    assert rows.slot.tolist() == [10, 11, -1, 20, 21]


def test_a_shifted_drafter_has_consumed_the_token_after_its_position():
    rows = rows_of_pass(Pass(ints(0, 2), ints(0, 1), ints(8, 9), ints(0, 1)), shift=1)
    assert rows.position.tolist() == [1, 2]
    assert rows_of_cached([3], [2], shift=1, device=torch.device("cpu")).position.tolist() == [1, 2]


def test_cached_rows_count_up_in_each_request():
    rows = rows_of_cached([2, 0], [3, 2], shift=0, device=torch.device("cpu"))
    assert rows.request.tolist() == [2, 2, 2, 0, 0] and rows.position.tolist() == [0, 1, 2, 0, 1]


def test_an_answer_does_not_look_back_at_its_prompt_and_a_prompt_not_before_its_beginning():
    rows = rows_of_pass(Pass(ints(0, 4), ints(0, 1, 2, 3), ints(9, 9, 9, 9), ints(0, 1, 2, 3)), shift=0)
    found = places(rows, ints(5, 6)[None], ints(2), window=3, block_size=2, shift=0)
    assert found.is_known.tolist() == [
        [False, False, True],
        [False, True, True],
        [False, False, True],
        [False, True, True],
    ]
    assert found.slot[3].tolist() == [11, 12, 13]


def test_a_forgotten_slot_and_an_empty_one_hold_no_number():
    cache = SlotCache(4, 2, torch.device("cpu"))
    cache.keep(ints(1, -1, 2), torch.ones(3, 2), ints(7, 8, 9))
    cache.forget(ints(2, -1))
    kept = cache.read(ints(0, 1, 2, 3)[:, None])
    assert kept.channels.isnan().all(-1).flatten().tolist() == [True, False, True, True]
    assert kept.token.nan_to_num(-1.0).tolist() == [-1.0, 7.0, -1.0, -1.0]


@both_ways
@settings(deadline=None, max_examples=30)
@given(
    lengths=st.lists(st.integers(1, 14), min_size=1, max_size=4),
    prompts=st.lists(st.integers(0, 14), min_size=4, max_size=4),
    chunk=st.integers(1, 5),
    shift=st.integers(0, 1),
    seed=st.integers(0, 100),
)
def test_scores_in_steps_and_batches_are_those_of_whole_texts(pair, is_loop, lengths, prompts, chunk, shift, seed):
    scorer, random = scorer_of(pair, is_loop, num_slots=64, shift=shift), torch.Generator().manual_seed(seed)
    bank = scorer.bank
    features = [torch.randn(n, 3 * bank.identity.hidden_size, generator=random) for n in lengths]
    blocks = torch.randperm(16, generator=random)[: 4 * len(lengths)].reshape(len(lengths), 4)
    num_prompt_tokens = torch.tensor(prompts[: len(lengths)])
    found = [torch.full((n + shift, 2 * len(bank.metrics)), torch.nan) for n in lengths]
    for begin in range(0, max(lengths), chunk):
        parts = [range(begin, min(begin + chunk, n)) for n in lengths]
        starts = torch.tensor([0, *torch.tensor([len(part) for part in parts]).cumsum(0).tolist()])
        at = torch.tensor([place for part in parts for place in part])
        owner = torch.tensor([i for i, part in enumerate(parts) for _ in part])
        slots = blocks[owner, at // BLOCK] * BLOCK + at % BLOCK
        given_features = torch.cat([features[i][part.start : part.stop] for i, part in enumerate(parts) if part])
        table = read(scorer, given_features, Pass(starts, at, at + 100, slots), Batch(blocks, num_prompt_tokens))
        assert table[:, 2].tolist() == (at + 100).tolist()
        for row in table:
            found[int(row[0])][int(row[1])] = row[3:]
    for i, text in enumerate(features):
        wanted = bank.score_text(text, boundary=max(0, prompts[i] - shift))
        torch.testing.assert_close(found[i][shift:], torch.cat(wanted, dim=1), atol=1e-5, rtol=0)


@both_ways
def test_what_was_cached_comes_first_and_with_the_same_scores(pair, is_loop):
    scorer = scorer_of(pair, is_loop, num_slots=32)
    features = torch.randn(8, 3 * scorer.bank.identity.hidden_size, generator=torch.Generator().manual_seed(0))
    place = torch.arange(8)
    first = read(scorer, features, Pass(ints(0, 8), place, place, place), Batch(ints(0, 1)[None], ints(8)))
    late = Pass(ints(0, 4), place[4:], place[4:], place[4:] + 16)
    spared = rows_of_cached([0], [4], shift=0, device=torch.device("cpu"))
    again = read(scorer, features[4:], late, Batch(ints(0, 5)[None], ints(8)), spared)
    assert torch.equal(first[:4], again[:4])
    torch.testing.assert_close(first, again, atol=1e-6, rtol=0)


@both_ways
@pytest.mark.parametrize("slot", [-1, 3])
def test_a_rejected_row_is_nobodys(pair, is_loop, slot):
    scorer = scorer_of(pair, is_loop, num_slots=8)
    ran = Pass(ints(0, 1), ints(3), ints(5), ints(slot))
    features = torch.zeros(1, 3 * scorer.bank.identity.hidden_size)
    table = read(scorer, features, ran, Batch(ints(0, 1)[None], ints(0)))
    assert int(table[0, 0]) == (-1 if slot < 0 else 0)


@both_ways
def test_what_follows_the_last_row_that_counts_is_nobodys_and_is_not_kept(pair, is_loop):
    scorer = scorer_of(pair, is_loop, num_slots=16)
    features = torch.ones(5, 3 * scorer.bank.identity.hidden_size)
    ran = Pass(ints(0, 3, 5), ints(0, 1, 2, 0, 1), ints(1, 2, 3, 4, 5), ints(0, 1, 2, 8, 9), ints(1, 4))
    batch = Batch(torch.stack([ints(0, 1), ints(2, 3)]), ints(1, 1))
    table = read(scorer, features, ran, batch)
    assert table[:, 0].tolist() == [0, 0, -1, 1, 1]
    spared = rows_of_cached([0], [3], shift=0, device=torch.device("cpu"))
    again = read(scorer, features[3:], Pass(ints(0, 0, 2), *(part[3:] for part in ran[1:4])), batch, spared)
    assert again[:3, 3:].isnan().all(-1).tolist() == [False, False, True]


@both_ways
def test_a_slot_that_was_forgotten_has_no_score(pair, is_loop):
    scorer = scorer_of(pair, is_loop, num_slots=8)
    batch, features = Batch(ints(0, 1)[None], ints(0)), torch.zeros(2, 3 * scorer.bank.identity.hidden_size)
    read(scorer, features, Pass(ints(0, 2), ints(0, 1), ints(5, 6), ints(0, 1)), batch)
    scorer.forget(ints(1))
    spared = rows_of_cached([0], [2], shift=0, device=torch.device("cpu"))
    table = read(scorer, features[:1], Pass(ints(0, 1), ints(2), ints(7), ints(2)), batch, spared)
    assert table[:, 3:].isnan().any(-1).tolist() == [False, True, True]


@pytest.mark.parametrize(("slot", "position"), [(8, 0), (0, 8)])
def test_the_loops_write_and_read_nothing_outside_the_cache(pair, slot, position):
    scorer = scorer_of(pair, True, num_slots=8)
    features = torch.zeros(1, 3 * scorer.bank.identity.hidden_size)
    with pytest.raises(IndexError, match="lies outside"):
        read(
            scorer,
            features,
            Pass(ints(0, 1), ints(position), ints(5), ints(slot)),
            Batch(ints(0, 1)[None], ints(0)),
        )


def test_the_loop_reads_bfloat16_as_the_matmul_does_and_lets_nan_stay(pair):
    bank, random = windowed_bank(pair, LINEAR), torch.Generator().manual_seed(0)
    states = [torch.randn(7, bank.identity.hidden_size, generator=random).bfloat16() for _ in bank.sites]
    states[1][2, 3] = torch.nan
    loops = Loops(bank, Steps(read_rows, keep_rows, score_rows), block_size=BLOCK, shift=0)
    found = loops.channels(tuple(part.view(torch.uint16).numpy() for part in states), 5)
    wanted = bank.channels(torch.cat(states, dim=-1)[:5])
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0, equal_nan=True)
    assert found.isnan().all(-1).tolist() == [False, False, True, False, False]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_states_are_handed_to_the_loops_only_where_all_are_kept_in_bfloat16(pair, dtype):
    model, bank = tiny_model("llama", seed=0).to(dtype), windowed_bank(pair, LINEAR)
    sites = Sites(model, "llama", bank.sites, 4)
    bits = sites.bits(torch.ones(4, model.config.hidden_size, dtype=torch.bfloat16))
    assert (bits is not None) == (dtype == torch.bfloat16)


def test_heads_of_other_forms_and_other_devices_are_left_to_tensor_operations(pair):
    assert steps_for(windowed_bank(pair), torch.device("cpu")) is None
    assert steps_for(windowed_bank(pair, LINEAR), torch.device("meta")) is None
