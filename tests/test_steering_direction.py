"""Directions as vectors: hand values, the laws of arithmetic, what their cards say, and what is refused."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pilotfish.core import Site
from pilotfish.errors import DirectionMismatch, SettingError
from pilotfish.heads import Form, Head, linear_head
from pilotfish.models import Identity, tiny_model
from pilotfish.steering import Direction, DirectionCard
from pilotfish.taps import Add, When, edited, tapped

SITE = Site(1, "resid_post")
IDENTITY = Identity(name="tiny", weights="w" * 64, tokenizer="t" * 64, hidden_size=4, num_layers=3, vocab_size=300)

NUMBERS = st.floats(-100, 100, width=32).filter(lambda x: x == 0 or abs(x) > 1e-3)
VECTORS = st.lists(NUMBERS, min_size=4, max_size=4).filter(any)


def direction(
    values: list[float], name: str = "love", *, site: Site = SITE, identity: Identity = IDENTITY
) -> Direction:
    card = DirectionCard(name=name, identity=identity, method="mean_difference", dose=3.0)
    return Direction(site=site, vector=torch.tensor(values, dtype=torch.float32), card=card)


def close(one: Direction, values: torch.Tensor, size: float = 1.0) -> None:
    torch.testing.assert_close(one.vector.double(), values.double(), atol=1e-5 * max(1.0, size), rtol=1e-5)


def test_arithmetic_by_hand() -> None:
    love, hate = direction([1, 2, 0, 2]), direction([0, 1, 0, -1], "hate")
    close(love + hate, torch.tensor([1.0, 3, 0, 1]))
    close(love - hate, torch.tensor([1.0, 1, 0, 3]))
    close(2 * love, torch.tensor([2.0, 4, 0, 4]))
    close(love * -0.5, torch.tensor([-0.5, -1, 0, -1]))
    close(-love, torch.tensor([-1.0, -2, 0, -2]))
    assert love.norm == 3.0
    close(love.unit(), torch.tensor([1, 2, 0, 2]) / 3)
    assert love.cosine(hate) == 0.0
    assert direction([1, 0, 0, 0]).cosine(direction([1, 0, 1, 0])) == pytest.approx(math.sqrt(0.5))
    close(direction([3, 4, 0, 0]).without(direction([0, 2, 0, 0])), torch.tensor([3.0, 0, 0, 0]))


def test_a_projection_is_in_the_units_of_the_activations_whatever_the_length_of_the_direction() -> None:
    features = torch.tensor([[[3.0, 0, 4, 0], [0, 1, 0, 1]], [[0, 0, 0, 0], [0, 0, -2, 0]]])
    expected = torch.tensor([[4.0, 0], [0, -2]])
    for length in (0.5, 1.0, 100.0):
        assert torch.equal(direction([0, 0, length, 0]).projection(features), expected)
    assert direction([0, 0, 1, 0]).projection(features.bfloat16()).dtype == torch.float32


@given(one=VECTORS, other=VECTORS, factor=NUMBERS)
@settings(max_examples=40, deadline=None)
def test_sums_commute_distribute_and_cancel(one: list[float], other: list[float], factor: float) -> None:
    a, b = direction(one), direction(other, "hate")
    size = (abs(factor) + 1) * (a.norm + b.norm)
    close(a + b, (b + a).vector)
    close(factor * (a + b), (factor * a + factor * b).vector, size)
    close(a - b, (a + -b).vector)
    close(a + b - b, a.vector, size)
    assert (a - a).norm == 0


@given(one=VECTORS, other=VECTORS)
@settings(max_examples=40, deadline=None)
def test_what_is_left_without_a_direction_is_orthogonal_to_it_and_adds_up_to_the_whole(
    one: list[float], other: list[float]
) -> None:
    a, b = direction(one), direction(other, "hate")
    rest = a.without(b)
    assert abs(float(rest.vector.double() @ b.vector.double())) <= 1e-5 * a.norm * b.norm
    assert rest.norm <= a.norm * (1 + 1e-6)
    along = float(b.projection(a.vector))
    close(rest + along * b.unit(), a.vector, a.norm)
    close(rest.without(b), rest.vector, a.norm)


@given(values=VECTORS, other=VECTORS, factor=NUMBERS.filter(bool))
@settings(max_examples=40, deadline=None)
def test_cosines_look_at_the_angle_alone(values: list[float], other: list[float], factor: float) -> None:
    a, b = direction(values), direction(other)
    assert -1.0 <= a.cosine(b) <= 1.0
    assert a.cosine(b) == pytest.approx(b.cosine(a), abs=1e-12)
    assert (factor * a).cosine(b) == pytest.approx(math.copysign(1, factor) * a.cosine(b), abs=1e-5)
    assert a.unit().norm == pytest.approx(1.0, rel=1e-6)
    assert a.cosine(a.unit()) == pytest.approx(1.0, abs=1e-6)


@given(
    weights=st.lists(NUMBERS, min_size=3, max_size=3),
    vectors=st.lists(VECTORS, min_size=3, max_size=3, unique_by=tuple),
)
@settings(max_examples=40, deadline=None)
def test_a_card_names_what_was_summed_up_so_that_it_can_be_summed_up_again(
    weights: list[float], vectors: list[list[float]]
) -> None:
    parts = {name: direction(vector, name) for name, vector in zip("abc", vectors, strict=True)}
    made = (weights[0] * parts["a"] + parts["b"]) * weights[1] - (weights[2] * parts["c"] + parts["a"])
    assert made.card.method == "arithmetic"
    assert made.card.dose is None, "the dose of an operand need not suit the sum"
    again = sum(
        (term.weight * parts[term.name].vector.double() for term in made.card.provenance), torch.zeros(4).double()
    )
    size = sum(abs(term.weight) * parts[term.name].norm for term in made.card.provenance)
    close(made, again, size)
    assert [term.name for term in made.card.provenance] == ["a", "b", "c"], "one term a direction that was read"


def test_a_sum_is_named_after_its_terms_and_can_be_named_anew() -> None:
    made = 2 * direction([1, 0, 0, 0]) - direction([0, 1, 0, 0], "hate")
    assert made.card.name == "2 love + -1 hate"
    assert made.named("warmth").card == replace(made.card, name="warmth")
    assert made.with_dose(4.0).card.dose == 4.0


def test_a_direction_goes_to_a_head_and_back() -> None:
    love = direction([1, -2, 0, 3])
    head = love.to_head("warm", bias=0.5)
    features = torch.tensor([[1.0, 1, 1, 1], [0, 0, 0, 2]])
    torch.testing.assert_close(head.logits(features), torch.tensor([2.5, 6.5]))
    back = Direction.from_head(head, IDENTITY)
    assert torch.equal(back.vector, love.vector)
    assert (back.site, back.card.name, back.card.method) == (SITE, "warm", "head")


def test_a_head_over_several_sites_gives_the_direction_of_each() -> None:
    sites = (Site(0, "resid_post"), Site(-1, "final"))
    head = linear_head("warm", sites, torch.arange(8.0), 0.0)
    found = {site: Direction.from_head(head, IDENTITY, site=site).vector.tolist() for site in sites}
    assert found == {sites[0]: [0, 1, 2, 3], sites[1]: [4, 5, 6, 7]}
    with pytest.raises(SettingError, match=r"reads 0\.resid_post, final; name one of them as `site`"):
        Direction.from_head(head, IDENTITY)
    with pytest.raises(SettingError, match=r"reads 0\.resid_post, final"):
        Direction.from_head(head, IDENTITY, site=SITE)


def test_the_response_of_a_head_of_two_channels_has_its_own_direction() -> None:
    head = Head("warm", (SITE,), torch.tensor([[1.0, 0, 0, 0], [0, 0, 0, 1]]), torch.zeros(2))
    assert Direction.from_head(head, IDENTITY).vector.tolist() == [1, 0, 0, 0]
    assert Direction.from_head(head, IDENTITY, which="response").vector.tolist() == [0, 0, 0, 1]


@pytest.mark.parametrize(
    ("form", "which", "words"),
    [
        (Form(kind="mlp", width=2), "token", r"the token logit of head 'warm' \(mlp\) is no linear function"),
        (Form(kind="attention", width=1), "response", r"the response logit .* \(attention\)"),
    ],
)
def test_a_head_that_is_not_linear_has_no_direction(form: Form, which: str, words: str) -> None:
    head = Head(
        "warm",
        (SITE,),
        torch.ones(form.num_channels, 4),
        torch.zeros(form.num_channels),
        form,
        torch.zeros(form.num_outputs),
    )
    with pytest.raises(SettingError, match=words):
        Direction.from_head(head, IDENTITY, which=which)


def test_an_edit_adds_the_dose_times_the_vector_where_it_was_told() -> None:
    model = tiny_model("llama", seed=0)
    identity = replace(IDENTITY, hidden_size=32)
    love = direction(torch.linspace(-1, 1, 32).tolist(), identity=identity)
    edit = love.to_edit(0.5, when=When(positions=(1, 3)), model=model)
    assert isinstance(edit.op, Add)
    ids = torch.arange(5)[None]
    with torch.no_grad(), tapped(model, [SITE]) as before, edited(model, [edit]), tapped(model, [SITE]) as after:
        model(ids)
    moved = (after[SITE] - before[SITE])[0]
    torch.testing.assert_close(moved[1:3], (0.5 * love.vector).expand(2, -1), atol=1e-6, rtol=0)
    assert not moved[[0, 3, 4]].any()
    assert love.to_edit().op.scale == 3.0, "the card's dose"
    assert love.to_edit(model=model.bfloat16()).op.vector.dtype == torch.bfloat16


@pytest.mark.parametrize(
    "mix", [lambda a, b: a + b, lambda a, b: a - b, lambda a, b: a.cosine(b), lambda a, b: a.without(b)]
)
def test_directions_of_other_sites_or_models_do_not_mix(mix) -> None:
    love = direction([1, 0, 0, 0])
    with pytest.raises(DirectionMismatch, match=r"'love' at 1\.resid_post and 'hate' at 1\.resid_pre are of different"):
        mix(love, direction([0, 1, 0, 0], "hate", site=Site(1, "resid_pre")))
    other = replace(IDENTITY, name="large", weights="v" * 64)
    with pytest.raises(DirectionMismatch, match="was made for large, not for tiny: other weights"):
        mix(love, direction([0, 1, 0, 0], "hate", identity=other))
    mix(love, direction([0, 1, 0, 0], "hate", identity=replace(IDENTITY, name="another name alone")))


def test_what_is_no_direction_is_refused() -> None:
    love, nothing = direction([1, 0, 0, 0]), direction([0, 0, 0, 0], "nothing")
    for refused in (
        nothing.unit,
        lambda: nothing.projection(torch.ones(4)),
        lambda: love.cosine(nothing),
        lambda: love.without(nothing),
    ):
        with pytest.raises(SettingError, match=r"direction 'nothing' at 1\.resid_post is 0 and"):
            refused()
    with pytest.raises(SettingError, match="cannot be multiplied by nan"):
        love * math.nan
    with pytest.raises(SettingError, match="holds NaN or infinity"):
        love * 3e38 * 10
    with pytest.raises(SettingError, match="has no dose; calibrate it, or give a multiplier"):
        love.with_dose(None).to_edit()
    with pytest.raises(SettingError, match=r"torch\.float64; give one vector of float32"):
        replace(love, vector=love.vector.double())
    with pytest.raises(DirectionMismatch, match="has 5 units; tiny has 4 in each of 3 layers"):
        direction([1, 0, 0, 0, 0])
    with pytest.raises(DirectionMismatch, match="in each of 3 layers"):
        direction([1, 0, 0, 0], site=Site(3, "resid_post"))
    with pytest.raises(DirectionMismatch, match=r"direction 'love' .* made for tiny, not for small: other num layers"):
        love.check(replace(IDENTITY, name="small", num_layers=2))
