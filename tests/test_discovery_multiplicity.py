"""Vectors are ranked by what a person or a monitor would notice, and counted by what they do."""

from __future__ import annotations

import pytest
import torch
from conftest import random_ids, seeded_head
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pilotfish.core import Site
from pilotfish.discovery import (
    Slice,
    average_direction,
    calibrated_radius,
    deduplicated,
    effect_clusters,
    exponential,
    head_scores,
    logit_measure,
    logit_scores,
    multiplicity,
    principal_direction,
    promoted,
    unembedding_difference,
)
from pilotfish.errors import SettingError
from pilotfish.heads import Form
from pilotfish.models import FAMILIES, Pair, tiny_model
from pilotfish.taps import Add, Edit, edited, tapped

SOURCE, FINAL = Site(1, "resid_pre"), Site(-1, "final")
PROMPTS = (random_ids(1, 7)[0].tolist(), random_ids(1, 5)[0].tolist())


def stream(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def units(count: int, seed: int = 0, size: int = 32) -> Tensor:
    return torch.nn.functional.normalize(torch.randn(count, size, generator=stream(seed)), dim=-1)


@pytest.mark.parametrize("family", FAMILIES)
def test_logit_scores_are_the_differences_of_the_steered_models_logits(family: str) -> None:
    model, vectors = tiny_model(family, seed=0), 2.0 * units(3)
    direction = unembedding_difference(model, [5, 6], [7])
    found = logit_scores(Slice(model, SOURCE, FINAL, PROMPTS, last=1), vectors, direction)

    def difference(edits: list[Edit]) -> float:
        with torch.no_grad(), edited(model, edits):
            rows = [model(torch.tensor([prompt])).logits[0, -1] for prompt in PROMPTS]
        return float(sum((row[5] + row[6]) / 2 - row[7] for row in rows) / len(rows))

    expected = [difference([Edit(SOURCE, Add(vector))]) - difference([]) for vector in vectors]
    torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-4, atol=1e-4)
    measure = logit_measure(model, PROMPTS, direction)
    assert measure([]) == pytest.approx(difference([]), abs=1e-4)
    assert measure([Edit(SOURCE, Add(vectors[0]))]) - measure([]) == pytest.approx(expected[0], abs=1e-4)


@pytest.mark.parametrize("kind", ["linear", "attention", "multimax"])
def test_head_scores_are_what_the_head_reads_in_the_steered_model(kind: str) -> None:
    model, vectors = tiny_model("llama", seed=0), 2.0 * units(3)
    sites = (Site(0, "resid_post"), SOURCE, Site(1, "resid_post"), FINAL)
    head = seeded_head("seen", sites, 32, Form(kind=kind, width=2), stream())
    source = Site(0, "resid_post")
    found = head_scores(model, source, PROMPTS, head=head, vectors=vectors, last=2)

    def read(edits: list[Edit]) -> Tensor:
        rows = []
        for prompt in PROMPTS:
            with torch.no_grad(), edited(model, edits), tapped(model, sites) as taps:
                model(torch.tensor([prompt]))
            rows.append(head.logits(torch.cat([taps[site][0] for site in sites], -1))[-2:])
        return torch.cat(rows).mean()

    expected = torch.stack([read([Edit(source, Add(vector))]) - read([]) for vector in vectors])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_a_head_below_the_source_notices_nothing() -> None:
    head = seeded_head("below", (Site(0, "resid_pre"),), 32, Form(), stream())
    found = head_scores(tiny_model("llama", seed=0), SOURCE, PROMPTS, head=head, vectors=units(2))
    assert torch.equal(found, torch.zeros(2))


def test_clusters_are_of_effects_and_the_largest_comes_first() -> None:
    first, second = units(2, seed=1)
    noise = 0.05 * units(6, seed=2)
    effects = torch.stack([first, second, first, first, second, first]) * torch.tensor([[1.0, 5, 2, 3, 1, 1]]).T + noise
    assert effect_clusters(effects) == ((0, 2, 3, 5), (1, 4))
    assert effect_clusters(effects[:1]) == ((0,),)
    kept = deduplicated(effects, torch.tensor([1.0, 2.0, 9.0, 3.0, 4.0, 5.0]))
    assert kept.tolist() == [2, 4]


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 12), st.integers(0, 1000), st.floats(0.1, 0.99))
def test_clusters_part_the_vectors_and_no_two_kept_ones_do_the_same(count: int, seed: int, similarity: float) -> None:
    effects = units(count, seed, size=3)
    groups = effect_clusters(effects, similarity=similarity)
    assert sorted(i for group in groups for i in group) == list(range(count))
    kept = deduplicated(effects, torch.rand(count, generator=stream(seed)), similarity=similarity)
    cosines = effects[kept] @ effects[kept].T - 2 * torch.eye(len(kept))
    assert float(cosines.max()) <= similarity + 1e-6


def test_an_opposite_effect_is_not_the_same_effect() -> None:
    effect = units(1)
    both = torch.cat([effect, -effect])
    assert effect_clusters(both) == ((0,), (1,))
    assert len(deduplicated(both, torch.ones(2))) == 2


def test_the_average_and_the_principal_direction_of_a_cone_are_its_axis() -> None:
    axis = units(1)[0]
    cone = axis + 0.3 * units(200, seed=4)
    for found in (average_direction(cone), principal_direction(cone), principal_direction(cone * 7)):
        assert float(found @ axis) > 0.99
        assert float(found.norm()) == pytest.approx(1.0, abs=1e-5)
    assert float(principal_direction(-cone) @ axis) < -0.99


def test_multiplicity_counts_the_vectors_that_reach_the_threshold_and_edits_with_their_mean() -> None:
    model = tiny_model("llama", seed=0)
    direction = unembedding_difference(model, [5], [7])
    measure = logit_measure(model, PROMPTS, direction)
    vectors = units(12, seed=3)
    single = [measure([Edit(SOURCE, Add(4.0 * vector))]) for vector in vectors]
    threshold = sorted(single)[6]
    found = multiplicity(vectors, measure, site=SOURCE, radius=4.0, threshold=threshold)
    assert found.members == tuple(i for i, value in enumerate(single) if value >= threshold)
    assert found.added.best == pytest.approx(max(single), rel=1e-5)
    assert found.added.mean == pytest.approx(sum(single[i] for i in found.members) / 6, rel=1e-5)
    joint = average_direction(vectors[list(found.members)])
    assert found.added.average == pytest.approx(measure([Edit(SOURCE, Add(4.0 * joint))]), rel=1e-5)
    assert found.unsteered == measure([])
    assert found.ablated.best <= found.ablated.mean
    assert found.condition >= 1
    assert 0 < found.mean_cosine < 1
    with pytest.raises(SettingError, match="the best has"):
        multiplicity(vectors, measure, site=SOURCE, radius=4.0, threshold=max(single) + 1)


def test_multiplicity_of_one_vector_is_that_vector() -> None:
    model = tiny_model("llama", seed=0)
    measure = logit_measure(model, PROMPTS, unembedding_difference(model, [5], [7]))
    found = multiplicity(
        units(1), measure, site=SOURCE, radius=1.0, threshold=-1e9, ablate_at=[SOURCE, Site(2, "resid_pre")]
    )
    assert (found.members, found.mean_cosine) == ((0,), 1.0)
    assert found.added.mean == found.added.best == pytest.approx(found.added.principal, rel=1e-5)
    assert found.condition == pytest.approx(1.0)


def test_a_promoted_vector_steers_by_what_was_found_and_watches_for_it(pair: Pair) -> None:
    vector = 3.0 * units(1)[0]
    found = promoted(vector, SOURCE, name="odd", identity=pair.target_identity, radius=2.5, notes="dct")
    edit = found.to_edit()
    torch.testing.assert_close(edit.op.apply(torch.zeros(1, 1, 32))[0, 0], 2.5 * vector / 3.0)
    features = torch.randn(4, 32, generator=stream())
    torch.testing.assert_close(found.to_head("odd").logits(features), features @ (vector / 3.0))
    assert (found.card.method, found.card.dose, found.card.notes) == ("discovered", 2.5, "dct")


def test_from_prompts_to_a_direction(pair: Pair) -> None:
    """The program of docs/discovery.md on a tiny model."""
    model = pair.target
    response = Slice(model, SOURCE, Site(2, "resid_pre"), PROMPTS)
    radius = calibrated_radius(response, generator=stream())
    found = exponential(response, 6, generator=stream(), radius=radius.value, iterations=2).ranked()
    found = found.chosen(deduplicated(response.change(radius.value * found.inputs), found.strengths))
    scores = logit_scores(
        Slice(model, SOURCE, FINAL, PROMPTS, last=1),
        radius.value * found.inputs,
        unembedding_difference(model, [5], [7]),
    )
    best = promoted(
        found.inputs[scores.argmax()], SOURCE, name="found", identity=pair.target_identity, radius=radius.value
    )
    measure = logit_measure(model, PROMPTS, unembedding_difference(model, [5], [7]))
    assert measure([best.to_edit(model=model)]) - measure([]) == pytest.approx(float(scores.max()), rel=1e-3)


def test_rankings_that_would_mislead_are_refused() -> None:
    model = tiny_model("llama", seed=0)
    with pytest.raises(SettingError, match="logits are read at `final`"):
        logit_scores(Slice(model, SOURCE, Site(2, "resid_post"), PROMPTS), units(1), units(1)[0])
    with pytest.raises(SettingError, match="either side"):
        unembedding_difference(model, [], [1])
    head = seeded_head("mlp", (FINAL,), 32, Form(kind="mlp"), stream())
    with pytest.raises(SettingError, match="linear"):
        head_scores(model, SOURCE, PROMPTS, head=head, vectors=units(1))
    with pytest.raises(SettingError, match="it is a cosine"):
        effect_clusters(units(2), similarity=1.5)
    with pytest.raises(SettingError, match="points nowhere"):
        effect_clusters(torch.zeros(2, 3))
