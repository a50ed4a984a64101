"""Each objective finds the factors of its own tensor and does not see the others'."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pilotfish.discovery import Response, exponential, linear, projected, quadratic
from pilotfish.discovery.factors import fitted_strengths, orthonormal
from pilotfish.errors import SettingError

SIZE, COUNT = 32, 4


def stream(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_rows(count: int, seed: int, size: int = SIZE) -> Tensor:
    drawn = torch.randn(count, size, generator=stream(seed), dtype=torch.float64)
    return torch.nn.functional.normalize(drawn, dim=-1)


class Toy:
    """f(x) = a sum of linear, quadratic and cubic factors, all known."""

    def __init__(self, seed: int) -> None:
        self.inputs = [orthonormal(random_rows(COUNT, 10 * seed + order)) for order in (1, 2, 3)]
        self.outputs = [orthonormal(random_rows(COUNT, 10 * seed + 5 + order)) for order in (1, 2, 3)]
        self.strengths = torch.linspace(2.0, 1.0, COUNT, dtype=torch.float64)

    def response(self, *scales: float) -> Response:
        def function(x: Tensor) -> Tensor:
            terms = [
                scale * (self.strengths * (x @ ins.T).pow(order + 1)) @ outs
                for order, (scale, ins, outs) in enumerate(zip(scales, self.inputs, self.outputs, strict=True))
            ]
            return terms[0] + terms[1] + terms[2]

        return Response(function, SIZE, SIZE, dtype=torch.float64)


def mean_max_cosine(true: Tensor, found: Tensor) -> float:
    return float((true @ found.T).abs().amax(1).mean())


@pytest.mark.parametrize("seed", range(3))
def test_linear_finds_the_true_right_and_left_singular_vectors(seed: int) -> None:
    toy = Toy(seed)
    found = linear(toy.response(1.0, 1.0, 1.0), COUNT, generator=stream(0), radius=3.0)
    assert mean_max_cosine(toy.inputs[0], found.inputs) > 0.9999
    assert mean_max_cosine(toy.outputs[0], found.outputs) > 0.9999
    torch.testing.assert_close(found.strengths, 3.0 * toy.strengths)


def test_the_inputs_of_linear_are_not_the_columns_of_vh() -> None:
    """What the published code takes for right singular vectors reaches a random vector's gain."""
    matrix = torch.randn(64, 64, generator=stream(0), dtype=torch.float64)
    found = linear(Response(lambda x: x @ matrix.T, 64, 64, dtype=torch.float64), 8, generator=stream(0))
    gains = (found.inputs @ matrix.T).norm(dim=-1)
    torch.testing.assert_close(gains, torch.linalg.svdvals(matrix)[:8])
    columns = torch.linalg.svd(matrix).Vh[:, :8].T
    assert (columns @ matrix.T).norm(dim=-1).mean() < 0.7 * gains.mean()


@pytest.mark.parametrize("others", [(0.0, 0.0), (1.0, 1.0), (100.0, 100.0)])
def test_linear_does_not_see_the_higher_orders_to_the_bit(others: tuple[float, float]) -> None:
    toy = Toy(0)
    alone = linear(toy.response(1.0, 0.0, 0.0), COUNT, generator=stream(0))
    beside = linear(toy.response(1.0, *others), COUNT, generator=stream(0))
    assert torch.equal(alone.inputs, beside.inputs)
    assert torch.equal(alone.strengths, beside.strengths)


@pytest.mark.parametrize("seed", range(3))
def test_quadratic_finds_the_factors_of_the_second_derivative(seed: int) -> None:
    toy = Toy(seed)
    found = quadratic(toy.response(1.0, 1.0, 1.0), 2 * COUNT, generator=stream(seed), iterations=20).ranked()
    assert mean_max_cosine(toy.inputs[1], found.inputs) > 0.99
    assert mean_max_cosine(toy.outputs[1], found.outputs) > 0.99
    assert mean_max_cosine(toy.inputs[0], found.inputs) < 0.7


@pytest.mark.parametrize("others", [(0.0, 0.0), (1.0, 1.0), (100.0, 100.0)])
def test_quadratic_does_not_see_the_first_and_third_orders_to_the_bit(others: tuple[float, float]) -> None:
    toy = Toy(0)
    alone = quadratic(toy.response(0.0, 1.0, 0.0), COUNT, generator=stream(0), iterations=5)
    beside = quadratic(toy.response(others[0], 1.0, others[1]), COUNT, generator=stream(0), iterations=5)
    assert torch.equal(alone.inputs, beside.inputs)
    assert torch.equal(alone.strengths, beside.strengths)


def test_quadratic_does_see_the_second_order() -> None:
    """So that the test above could fail: the published products never touch it."""
    toy, other = Toy(0), Toy(1)
    found = quadratic(toy.response(1.0, 1.0, 0.0), COUNT, generator=stream(0))
    toy.inputs[1], toy.outputs[1] = other.inputs[1], other.outputs[1]
    assert not torch.allclose(found.inputs, quadratic(toy.response(1.0, 1.0, 0.0), COUNT, generator=stream(0)).inputs)


def test_a_factor_that_is_found_alone_has_its_strength() -> None:
    inputs, outputs = random_rows(1, 0), random_rows(1, 1)
    shapes = {quadratic: lambda x: x.square(), exponential: torch.expm1}
    for fit, shape in shapes.items():
        response = Response(
            lambda x, shape=shape: 3.0 * shape(x @ inputs.T / 2.0) @ outputs, SIZE, SIZE, dtype=torch.float64
        )
        found = fit(response, 1, generator=stream(0), radius=2.0, start=inputs)
        # f(2 v) = 3 shape(<input, v>) output: the strength at radius 2 is 3.
        torch.testing.assert_close(found.strengths, torch.tensor([3.0], dtype=torch.float64))
        torch.testing.assert_close(found.outputs, outputs)


@pytest.mark.parametrize("seed", range(3))
def test_exponential_finds_the_factors_of_an_exponential_layer(seed: int) -> None:
    inputs, outputs = random_rows(COUNT, seed, 128), random_rows(COUNT, 50 + seed, 128)
    response = Response(lambda x: torch.expm1(x @ inputs.T) @ outputs, 128, 128, dtype=torch.float64)
    found = exponential(response, 3 * COUNT, generator=stream(0), radius=6.0, iterations=30).ranked()
    assert mean_max_cosine(inputs, found.inputs) > 0.99
    assert mean_max_cosine(inputs, linear(response, COUNT, generator=stream(0)).inputs) < 0.95


def test_exponential_keeps_the_sense_of_a_vector() -> None:
    """Along -v nothing grows; a fit that lost the sense would give a negative cosine."""
    inputs, outputs = random_rows(1, 0), random_rows(1, 1)
    response = Response(lambda x: torch.expm1(x @ inputs.T) @ outputs, SIZE, SIZE, dtype=torch.float64)
    for iterations in (1, 2, 3):
        found = exponential(response, 1, generator=stream(0), radius=4.0, iterations=iterations, start=inputs)
        assert float(found.inputs @ inputs.T) > 0.999


def test_projected_spans_what_the_projections_see() -> None:
    matrix = torch.randn(SIZE, SIZE, generator=stream(0), dtype=torch.float64)
    response = Response(lambda x: x @ matrix.T, SIZE, SIZE, dtype=torch.float64)
    found = projected(response, 4, generator=stream(0), radius=1.0, num_projections=4 * SIZE)
    exact = linear(response, 4, generator=stream(0))
    assert (found.inputs @ matrix.T).norm(dim=-1).mean() > 0.9 * exact.strengths.mean()
    assert torch.allclose(found.inputs @ found.inputs.T, torch.eye(4, dtype=torch.float64), atol=1e-9)


@pytest.mark.parametrize("depth", [4, 8])
def test_krylov_finds_what_the_whole_jacobian_says(depth: int) -> None:
    left, right = orthonormal(random_rows(200, 0, 200)), orthonormal(random_rows(200, 1, 200))
    values = 0.97 ** torch.arange(200, dtype=torch.float64)
    matrix = left.T @ (values[:, None] * right)
    response = Response(lambda x: x @ matrix.T, 200, 200, dtype=torch.float64)
    found = linear(response, 10, generator=stream(2), krylov_depth=depth)
    torch.testing.assert_close(found.strengths, values[:10], rtol=0.02, atol=0)
    gains = response.jvp(found.inputs).norm(dim=-1)
    torch.testing.assert_close(gains.mean(), values[:10].mean(), rtol=0.02, atol=0)


def test_krylov_is_exact_once_it_fills_the_space() -> None:
    matrix = torch.randn(12, 20, generator=stream(0), dtype=torch.float64)
    response = Response(lambda x: x @ matrix.T, 20, 12, dtype=torch.float64)
    found = linear(response, 12, generator=stream(1), krylov_depth=3)
    torch.testing.assert_close(found.strengths, torch.linalg.svdvals(matrix))


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 8), st.integers(0, 10_000))
def test_gram_schmidt_keeps_the_first_row_and_every_sense(count: int, seed: int) -> None:
    rows = random_rows(count, seed, 12)
    basis = orthonormal(rows)
    torch.testing.assert_close(basis @ basis.T, torch.eye(count, dtype=torch.float64), rtol=0, atol=1e-9)
    torch.testing.assert_close(basis[0], rows[0])
    assert ((basis * rows).sum(-1) > 0).all()


@settings(max_examples=20, deadline=None)
@given(st.sampled_from(["linear", "quadratic", "exponential"]), st.integers(0, 10_000))
def test_strengths_of_the_true_factors_are_the_true_strengths(name: str, seed: int) -> None:
    inputs, outputs = random_rows(4, seed), random_rows(4, seed + 1)
    strengths = 1 + torch.rand(4, generator=stream(seed), dtype=torch.float64)
    shape = {"linear": lambda x: x, "quadratic": torch.square, "exponential": torch.expm1}[name]
    reached = ((shape(inputs @ inputs.T) * strengths) @ outputs * outputs).sum(-1)
    torch.testing.assert_close(fitted_strengths(inputs, outputs, reached, name), strengths)


def test_factors_come_in_order_of_strength() -> None:
    toy = Toy(0)
    found = quadratic(toy.response(0.0, 1.0, 0.0), 2 * COUNT, generator=stream(0)).ranked()
    sizes = found.strengths.abs()
    assert len(found) == 2 * COUNT
    assert bool((sizes[:-1] >= sizes[1:]).all())


def test_more_factors_than_there_is_room_for_are_refused() -> None:
    response = Toy(0).response(1.0, 0.0, 0.0)
    with pytest.raises(SettingError, match="room for 1 to 32"):
        linear(response, 33, generator=stream(0))
    with pytest.raises(SettingError, match="the rest would be arbitrary"):
        projected(response, 9, generator=stream(0), radius=1.0, num_projections=8)
    with pytest.raises(SettingError, match="calibrated_radius"):
        exponential(response, 2, generator=stream(0), radius=0.0)
    with pytest.raises(SettingError, match="1 or more rounds"):
        linear(response, 2, generator=stream(0), krylov_depth=0)
    with pytest.raises(SettingError, match="at least 1"):
        Response(lambda x: x, 0, 1)
