"""From a model and prompts to findings: what each vector does, which do the same, and what can be made of one."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pilotfish.core import Site
from pilotfish.discovery import (
    Exploration,
    ExploreConfig,
    ObserveConfig,
    Slice,
    attack,
    explore,
    load_findings,
    load_gate,
    observe,
    promote,
    save_findings,
    unembedding_difference,
)
from pilotfish.discovery.explore import kind_of, prompt_ids
from pilotfish.discovery.observe import repeated_share
from pilotfish.errors import ArtefactError, BankMismatch, SettingError, TextError
from pilotfish.heads import HeadBank, linear_head
from pilotfish.models import LoadedModel, Pair
from pilotfish.runs import generator
from pilotfish.steering import load_directions
from pilotfish.taps import Add, Edit, edited, tapped

PROMPTS = ("Is it the end of the day?", "What is to return?", "import and print", "def the user")
SOURCE, TARGET = Site(1, "resid_pre"), Site(2, "resid_post")
CONFIG = ExploreConfig(
    num_vectors=4, num_random=2, num_shown=2, source=SOURCE, target=TARGET, radius=6.0, iterations=2,
    observing=ObserveConfig(max_new_tokens=4), towards=("the",), away=("of",),
)  # fmt: skip


@pytest.fixture(scope="module")
def loaded(pair: Pair) -> LoadedModel:
    return LoadedModel(pair.target, pair.tokenizer, pair.target_identity, "")


@pytest.fixture(scope="module")
def watch(loaded: LoadedModel) -> HeadBank:
    weight = torch.randn(loaded.identity.hidden_size, generator=torch.Generator().manual_seed(3))
    return HeadBank([linear_head("odd", (TARGET,), weight, 0.0)], loaded.identity)


@pytest.fixture(scope="module")
def found(loaded: LoadedModel, watch: HeadBank) -> Exploration:
    return explore(loaded, PROMPTS, CONFIG, banks=[watch])


def test_every_vector_is_a_finding_with_random_ones_of_the_same_length_beside_it(found: Exploration) -> None:
    assert sorted(one.id for one in found.findings) == ["random0", "random1", "v0", "v1", "v2", "v3"]
    assert {one.id for one in found.findings if one.kind == "random"} == {"random0", "random1"}
    torch.testing.assert_close(found.vectors.norm(dim=-1), torch.ones(6))
    random = [one.reach for one in found.findings if one.kind == "random"]
    assert sum(random) / len(random) == pytest.approx(1.0), "reach is told in units of the random vectors'"


def test_a_finding_tells_what_its_own_vector_does(found: Exploration, loaded: LoadedModel, watch: HeadBank) -> None:
    """In the order of the findings, vectors, effects and observations are of one another."""
    ids = [prompt_ids(loaded, prompt) for prompt in PROMPTS[:3]]
    response = Slice(loaded.model, SOURCE, TARGET, ids, last=3)
    to_final = Slice(loaded.model, SOURCE, Site(-1, "final"), ids, last=1)
    words = [loaded.tokenizer(text, add_special_tokens=False)["input_ids"][0] for text in ("the", "of")]
    direction = unembedding_difference(loaded.model, words[:1], words[1:])
    for row, finding in enumerate(found.findings):
        change = response.change(found.radius.value * found.vectors[row : row + 1])[0]
        assert finding.length == pytest.approx(float(change.norm()), rel=1e-4)
        torch.testing.assert_close(found.effects[row], change / change.norm(), atol=1e-4, rtol=1e-3)
        added = finding.share * found.radius.value * found.vectors[row : row + 1]
        (alone,) = observe(loaded.model, SOURCE, added, ids[:2], banks=[watch], config=CONFIG.observing)
        assert alone.answers == finding.observed.answers
        assert alone.monitors["odd"] == pytest.approx(finding.observed.monitors["odd"], abs=1e-4)
        assert finding.logit == pytest.approx(float(to_final.change(added)[0] @ direction), abs=1e-3)


def test_each_group_has_one_first_and_it_reaches_furthest(found: Exploration) -> None:
    for group in {one.group for one in found.findings}:
        members = [one for one in found.findings if one.group == group]
        (first,) = [one for one in members if one.is_first]
        assert first.length == max(one.length for one in members)


def test_readable_changes_come_first_and_random_vectors_last(found: Exploration) -> None:
    order = ("changed", "broken", "same", "random")
    places = [order.index(one.kind) for one in found.findings]
    assert places == sorted(places)


def test_vectors_side_by_side_do_what_each_does_alone(loaded: LoadedModel, watch: HeadBank) -> None:
    ids = [prompt_ids(loaded, prompt) for prompt in PROMPTS[:2]]
    vectors = 5.0 * torch.randn(3, loaded.identity.hidden_size, generator=torch.Generator().manual_seed(1))
    vectors[1] = 0.0
    config = ObserveConfig(max_new_tokens=5, rows_at_once=6)
    together = observe(loaded.model, SOURCE, vectors, ids, banks=[watch], config=config)
    alone = [observe(loaded.model, SOURCE, row[None], ids, banks=[watch], config=config)[0] for row in vectors]
    for one, other in zip(together, alone, strict=True):
        assert one.answers == other.answers
        assert (one.kl, one.surprise) == pytest.approx((other.kl, other.surprise), abs=1e-4)
        assert one.monitors == pytest.approx(other.monitors, abs=1e-4)
    assert together[1].kl == pytest.approx(0.0, abs=1e-6) and not together[1].rising, (
        "a row of zeros is the plain model"
    )


def test_the_kl_is_that_of_the_answers_tokens(loaded: LoadedModel) -> None:
    (ids,) = [prompt_ids(loaded, PROMPTS[0])]
    vector = 5.0 * torch.randn(1, loaded.identity.hidden_size, generator=torch.Generator().manual_seed(2))
    (seen,) = observe(loaded.model, SOURCE, vector, [ids], config=ObserveConfig(max_new_tokens=3))
    text = torch.tensor([[*ids, *seen.answers[0]]])
    with torch.no_grad():
        plain = loaded.model(text).logits[0, len(ids) - 1 : -1].log_softmax(-1)
        with edited(loaded.model, [Edit(SOURCE, Add(vector[0]))]):
            steered = loaded.model(text).logits[0, len(ids) - 1 : -1].log_softmax(-1)
    assert seen.kl == pytest.approx(float((steered.exp() * (steered - plain)).sum(-1).mean()), rel=1e-3)
    chosen = plain.gather(-1, torch.tensor(seen.answers[0])[:, None])
    assert seen.surprise == pytest.approx(float(-chosen.mean()), rel=1e-3)
    top = seen.rising[0]
    assert top.after - top.before == pytest.approx(float((steered[0].exp() - plain[0].exp()).max()), abs=1e-4)


def test_repeats_are_the_share_of_stretches_that_stood_there_before() -> None:
    assert repeated_share([1, 2, 3, 4, 5]) == 0.0
    assert repeated_share([1, 2, 3, 1, 2, 3]) == 0.25  # 123 231 312 123
    assert repeated_share([7] * 10) == pytest.approx(7 / 8)
    assert repeated_share([1]) == 0.0


def test_answers_are_told_apart_as_changed_broken_or_the_same(loaded: LoadedModel, found: Exploration) -> None:
    plain = replace(found.plain, answers=((1, 2),), repeats=0.0)
    fine = replace(plain, answers=((1, 3),), surprise=1.0)
    assert kind_of(plain, plain) == "same"
    assert kind_of(plain, fine) == "changed"
    assert kind_of(plain, replace(fine, repeats=0.5)) == "broken"
    assert kind_of(plain, replace(fine, surprise=5.0)) == "broken"
    assert kind_of(replace(plain, repeats=0.3), replace(fine, repeats=0.5)) == "changed", "the plain model repeats too"


@pytest.fixture(scope="module")
def folder(found: Exploration, loaded: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_findings(tmp_path_factory.mktemp("found"), found, loaded)


def test_findings_come_back_from_their_folder(folder: Path, found: Exploration, loaded: LoadedModel) -> None:
    again = load_findings(folder)
    assert again.identity == loaded.identity and (again.source, again.target) == (SOURCE, TARGET)
    assert torch.equal(again.vectors, found.vectors) and torch.equal(again.effects, found.effects)
    first = again.findings[0]
    assert first["id"] == found.findings[0].id
    assert first["answers"][0] == loaded.tokenizer.decode(list(found.findings[0].observed.answers[0]))


def test_a_changed_folder_is_refused(folder: Path, tmp_path: Path) -> None:
    for name in ("vectors.safetensors", "findings.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    (tmp_path / "vectors.safetensors").write_bytes(b"changed")
    with pytest.raises(ArtefactError, match="another SHA-256"):
        load_findings(tmp_path)
    (tmp_path / "findings.json").write_text("{}")
    with pytest.raises(ArtefactError, match="no folder of findings"):
        load_findings(tmp_path)
    with pytest.raises(ArtefactError, match=r"findings are vectors\.safetensors with"):
        load_findings(tmp_path / "elsewhere")


def test_a_promoted_edit_writes_the_finding_answers(
    folder: Path, found: Exploration, loaded: LoadedModel, tmp_path: Path
) -> None:
    finding = found.findings[0]
    promote(load_findings(folder), finding.id, tmp_path, form="edit", name="odd")
    (direction,) = load_directions(tmp_path, identity=loaded.identity).values()
    assert direction.card.method == "discovered" and finding.id in direction.card.notes
    ids = [prompt_ids(loaded, prompt) for prompt in PROMPTS[:2]]
    assert direction.card.dose is not None
    (seen,) = observe(loaded.model, SOURCE, direction.card.dose * direction.vector[None], ids, config=CONFIG.observing)
    assert seen.answers == finding.observed.answers


def states_at(loaded: LoadedModel, ids: list[int], edits: list[Edit]) -> torch.Tensor:
    with torch.no_grad(), edited(loaded.model, edits), tapped(loaded.model, (TARGET,)) as taps:
        loaded.model(torch.tensor([ids]), use_cache=False)
        return taps[TARGET][0]


def test_a_promoted_head_is_low_without_the_vector_and_high_with_it(
    folder: Path, found: Exploration, loaded: LoadedModel, tmp_path: Path
) -> None:
    finding = found.findings[0]
    row = [one.id for one in found.findings].index(finding.id)
    promote(load_findings(folder), finding.id, tmp_path, form="head", name="odd")
    bank = HeadBank.load(tmp_path)
    bank.check(loaded.identity)
    ids = [prompt_ids(loaded, prompt) for prompt in PROMPTS[:3]]
    response = Slice(loaded.model, SOURCE, TARGET, ids, last=3)
    both = response.states(torch.stack([torch.zeros_like(found.vectors[0]), found.radius.value * found.vectors[row]]))
    plain, steered = (bank.heads[0].logits(states).mean() for states in both)
    assert float(plain) == pytest.approx(-4.0, abs=1e-2) and float(steered) == pytest.approx(4.0, abs=1e-2)
    assert "without labels" in bank.card.not_for


def test_a_promoted_gate_takes_the_effect_back_where_the_head_sees_it_and_there_alone(
    folder: Path, found: Exploration, loaded: LoadedModel, tmp_path: Path
) -> None:
    finding = found.findings[0]
    promote(load_findings(folder), finding.id, tmp_path, form="gate", name="odd")
    edit = load_gate(tmp_path, identity=loaded.identity)
    head = HeadBank.load(tmp_path / "head").heads[0]
    ids = prompt_ids(loaded, PROMPTS[0])
    before, after = states_at(loaded, ids, []), states_at(loaded, ids, [edit])
    sees = head.logits(before) >= 0.0
    torch.testing.assert_close(after[~sees], before[~sees])
    back = finding.length * found.effects[0]
    torch.testing.assert_close(after[sees], before[sees] - back, atol=1e-3, rtol=1e-3)
    everywhere = load_gate(tmp_path, identity=loaded.identity, threshold=1e-9)
    torch.testing.assert_close(states_at(loaded, ids, [everywhere]), before - back, atol=1e-3, rtol=1e-3)


def test_a_gate_refuses_another_model(folder: Path, pair: Pair, tmp_path: Path) -> None:
    found = load_findings(folder)
    promote(found, found.findings[0]["id"], tmp_path, form="gate", name="odd")
    assert pair.draft_identity is not None
    with pytest.raises(BankMismatch, match="was made for"):
        load_gate(tmp_path, identity=pair.draft_identity)


def test_what_does_not_fit_is_refused_in_words(loaded: LoadedModel, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(TextError, match="no prompts"):
        explore(loaded, [], CONFIG)
    with pytest.raises(SettingError, match="no finding 'v99'"):
        promote(load_findings(folder), "v99", tmp_path, form="edit", name="x")
    with pytest.raises(SettingError, match="both `towards` and `away`"):
        ExploreConfig(towards=("yes",))
    with pytest.raises(SettingError, match="must be one or more numbers in"):
        ExploreConfig(shares=(2.0,))


def test_the_cards_are_json_without_token_ids(folder: Path) -> None:
    cards = json.loads((folder / "findings.json").read_text())
    assert {"identity", "source", "target", "radius", "prompts", "plain", "findings", "vectors_sha256"} <= set(cards)
    assert all(isinstance(one["text"], str) for finding in cards["findings"] for one in finding["rising"])


def test_an_attack_raises_its_objective_further_than_random_vectors_and_keeps_the_length(loaded: LoadedModel) -> None:
    ids = [prompt_ids(loaded, prompt) for prompt in PROMPTS[:2]]
    to_final = Slice(loaded.model, SOURCE, Site(-1, "final"), ids, last=1)
    direction = unembedding_difference(loaded.model, [5], [6])
    found = attack(to_final, direction[None], radius=3.0, generator=generator(0, "attack"), steps=20, num_starts=2)
    torch.testing.assert_close(found.vectors.norm(dim=-1), torch.full((2,), 3.0))
    torch.testing.assert_close(to_final.change(found.vectors) @ direction, found.gains, atol=1e-3, rtol=1e-3)
    drawn = torch.nn.functional.normalize(
        torch.randn(32, to_final.num_inputs, generator=generator(0, "random")), dim=-1
    )
    assert float(found.gains[0]) > 2 * float((to_final.change(3.0 * drawn) @ direction).max())
    assert found.gains[0] >= found.gains[1]


def test_an_attack_needs_a_slice_to_the_final_state(loaded: LoadedModel) -> None:
    short = Slice(loaded.model, SOURCE, TARGET, [prompt_ids(loaded, PROMPTS[0])])
    with pytest.raises(SettingError, match="logits are read at `final`"):
        attack(short, torch.zeros(1, short.num_outputs), radius=1.0, generator=generator(0, "attack"))
