"""What `steer verify` promises, and that each of its checks can fail."""

from __future__ import annotations

from typing import Any

import pytest
from conftest import hooks_of
from hypothesis import given, settings
from hypothesis import strategies as st
from test_steering_dose import KINDS, MID, direction

from pilotfish.core import Site
from pilotfish.errors import SettingError
from pilotfish.models import FAMILIES, Pair, tiny_model
from pilotfish.steering import Check, Steering, verify
from pilotfish.taps import ProjectionGate, When

PROMPT = [5, 9, 20, 31, 8]
MODELS = {family: tiny_model(family, seed=0) for family in FAMILIES}
FIRES = "it fires once a token over 6 generated tokens"


def by_name(checks: list[Check]) -> dict[str, Check]:
    return {check.name: check for check in checks}


@pytest.mark.parametrize(
    ("family", "kind"), [*((family, "add") for family in FAMILIES), *(("llama", kind) for kind in KINDS[1:])]
)
def test_a_vector_passes_on_every_family_and_kind(pair: Pair, family: str, kind: Any) -> None:
    parts = (direction(pair), direction(pair, Site(2, "resid_pre"), seed=2))
    checks = verify(MODELS[family], Steering(directions=parts, kind=kind), 1.5, PROMPT, num_tokens=4)
    assert len(checks) == 5
    assert all(check.passed for check in checks), checks
    assert not hooks_of(MODELS[family])


@settings(max_examples=8, deadline=None)
@given(phase=st.sampled_from(("prompt", "generation", "both")), start=st.none() | st.integers(0, 8), gate=st.booleans())
def test_it_fires_for_exactly_the_tokens_it_is_meant_for(pair: Pair, phase: Any, start: int | None, gate: bool) -> None:
    when = When(
        phase=phase,
        positions=None if start is None else (start, start + 20),
        gate=ProjectionGate(MID, direction(pair, seed=5).vector, 0.0) if gate else None,
    )
    steering = Steering(directions=(direction(pair),), when=when)
    check = by_name(verify(pair.target, steering, 1.0, PROMPT, num_tokens=6))[FIRES]
    num_fired, num_meant = (int(check.detail.split(", ")[i].split()[0]) for i in (0, 1))
    assert num_fired == num_meant
    assert check.passed is (num_fired > 0)
    if not gate and start is None:
        assert num_fired == {"prompt": 5, "generation": 6, "both": 11}[phase]


def test_a_vector_that_reaches_no_token_fails(pair: Pair) -> None:
    steering = Steering(directions=(direction(pair),), when=When(positions=(400, 500)))
    checks = by_name(verify(pair.target, steering, 1.0, PROMPT, num_tokens=6))
    assert not checks["the vector changes the logits"].passed
    assert not checks["batch mates are untouched"].passed
    assert not checks[FIRES].passed
    assert checks["dose 0 is bit-identical"].passed


def test_a_dose_too_small_for_the_dtype_fails(pair: Pair) -> None:
    checks = by_name(
        verify(pair.target, Steering(directions=(direction(pair, scale=1e-12),)), 1.0, PROMPT, num_tokens=6)
    )
    assert not checks[FIRES].passed


def test_a_model_that_drops_the_edit_after_the_prompt_is_caught(pair: Pair) -> None:
    """As a server did whose hook did not run in decode: here a later hook puts back what was there before."""
    steering = Steering(directions=(direction(pair),))
    held: dict[str, Any] = {}
    layer = MODELS["llama"].model.layers[1]

    def keep(_: Any, __: Any, output: Any) -> None:
        held["plain"] = output

    def undo(_: Any, __: Any, output: Any) -> Any:
        return held["plain"] if output.shape[1] == 1 else output

    first = layer.register_forward_hook(keep)
    late = Late(layer, undo)
    try:
        with late:
            check = by_name(verify(MODELS["llama"], steering, 1.0, PROMPT, num_tokens=6))[FIRES]
    finally:
        first.remove()
    assert not check.passed and "5 activations changed, 11 it is meant for, 6 differ" in check.detail


class Late:
    """Keeps one forward hook of a module behind those that are registered later."""

    def __init__(self, module: Any, hook: Any) -> None:
        self._module, self._hook = module, hook

    def __enter__(self) -> None:
        self._register = self._module.register_forward_hook
        self._mine = self._register(self._hook)

        def register(hook: Any, **options: Any) -> Any:
            self._mine.remove()
            handle = self._register(hook, **options)
            self._mine = self._register(self._hook)
            self._module._forward_hooks.move_to_end(self._mine.id)
            if len(self._module._forward_hooks) > 4:  # the tap behind the edit stays last, to see what is left
                self._module._forward_hooks.move_to_end(handle.id)
            return handle

        self._module.register_forward_hook = register

    def __exit__(self, *_: Any) -> None:
        del self._module.register_forward_hook
        self._mine.remove()


@pytest.mark.parametrize(("dose", "prompt", "num_tokens"), [(0.0, PROMPT, 4), (1.0, [3], 4), (1.0, PROMPT, 0)], ids=str)
def test_what_shows_nothing_is_refused(pair: Pair, dose: float, prompt: list[int], num_tokens: int) -> None:
    with pytest.raises(SettingError, match="show nothing"):
        verify(pair.target, Steering(directions=(direction(pair),)), dose, prompt, num_tokens=num_tokens)
