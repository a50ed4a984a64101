"""Our speculation with a steered target and an unsteered draft writes what the steered target alone would."""

from __future__ import annotations

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from test_taps_decoding import assert_greedy, built, plans

from pilotfish.engines import Drafting, EmbeddedEngine, Request
from pilotfish.models import Pair
from pilotfish.taps import edited


@settings(max_examples=12, deadline=None)
@given(plan=plans(), seed=st.integers(0, 100), length=st.integers(0, 4))
def test_our_speculation_with_an_unsteered_draft_writes_what_the_steered_target_does(
    pair: Pair, plan: Any, seed: int, length: int
) -> None:
    edits = built(plan)
    engine = EmbeddedEngine(pair, drafting=Drafting(length=length))
    stream = engine.stream("x" * (1 + seed % 7), Request(max_new_tokens=8))
    prompt = [token.id for token in stream.generation.tokens]
    with edited(pair.target, edits, prompt_length=len(prompt)):
        for _ in stream:
            pass
    assert_greedy(pair.target, prompt, [token.id for token in stream.generation.committed], edits)
