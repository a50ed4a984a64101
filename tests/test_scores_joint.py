"""Joint tuning on a tiny pair: what each loss does alone, where gradients go, and what is left as it was."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from test_scores_recipe import BENIGN, CONFIG, METRIC, SPLITS

from pilotfish.errors import ArtefactError, BankMismatch, LeakError, SettingError, TextError
from pilotfish.heads import FitConfig, Form
from pilotfish.models import LoadedModel, Pair, load_model, tiny_pair
from pilotfish.runs import generator
from pilotfish.scores import build_bank
from pilotfish.scores.acceptance import acceptance_loss, read_acceptance
from pilotfish.scores.adapter import AdapterConfig, adapted
from pilotfish.scores.distillation import Answer, TargetRecording, divergence, next_token_logits
from pilotfish.scores.joint import (
    JointConfig,
    Lessons,
    Step,
    Trainer,
    _batches,
    _first_head,
    _schedule,
    _twins_together,
    draft_of,
    tune,
)
from pilotfish.scores.prepared import prepare
from pilotfish.scores.tuned import tuned_draft

FAST = JointConfig(
    adapter=AdapterConfig(rank=16, depth=1.0),
    learning_rate=5e-4,
    steps=16,
    batch_tokens=40,
    answer_tokens=160,
    num_sites=2,
    fit=FitConfig(form=Form(window=1), epochs=3, batch_tokens=256, learning_rate=0.01, weight_decays=(0.1,)),
)
NUM_LESSONS = 128
LENGTH = 16


@pytest.fixture(scope="module")
def answers(pair: Pair) -> list[Answer]:
    """What the target says at temperature 1 after four tokens; the last 24 are held out."""
    random = generator(0, "sampled")
    ids = torch.randint(250, (NUM_LESSONS + 24, 4), generator=random)
    with torch.inference_mode():
        while ids.shape[1] < LENGTH:
            probs = pair.target(ids).logits[:, -1].softmax(-1)
            ids = torch.cat([ids, torch.multinomial(probs, 1, generator=random)], 1)
    is_answer = torch.arange(LENGTH) >= 4
    return [Answer(f"s{i}", f"s{i}", tuple(row), is_answer) for i, row in enumerate(ids.tolist())]


@pytest.fixture(scope="module")
def lessons(answers) -> Lessons:
    return Lessons(METRIC, SPLITS, answers[:NUM_LESSONS])


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return tmp_path_factory.mktemp("work")


def tuned_with(pair, lessons, work, **changes):
    return tune(pair, lessons, config=replace(FAST, **changes), work_folder=work, generator=generator(0, "tune"))


@pytest.fixture(scope="module")
def tuned(pair, lessons, work):
    """A draft for each of three mixing weights."""
    return {distill: tuned_with(pair, lessons, work, distill=distill) for distill in (0.0, 0.5, 1.0)}


@pytest.fixture(scope="module")
def recorded(pair, work) -> TargetRecording:
    """All of the distributions."""
    return TargetRecording(pair, work / "target", top_k=pair.vocab_size)


def mean_divergence(draft, answers, recorded) -> float:
    with torch.inference_mode():
        each = [divergence(recorded.of(a), next_token_logits(draft, a, recorded.vocab_size)) for a in answers]
    return float(torch.cat(each).mean())


def test_distilling_alone_lowers_the_divergence_and_raises_acceptance_on_answers_that_were_held_out(
    pair, tuned, answers, recorded
):
    held_out = answers[NUM_LESSONS:]
    draft = tuned[1.0].model
    assert mean_divergence(draft, held_out, recorded) < 0.95 * mean_divergence(pair.draft, held_out, recorded)
    before, after = (read_acceptance(each, held_out, recorded) for each in (pair.draft, draft))
    assert acceptance_loss(before, after, generator=generator(0, "b"), num_resamples=200)["expected"].high < 0
    assert {loss.head for loss in tuned[1.0].history} == {0.0}


def test_training_for_the_head_lowers_its_loss(tuned):
    for distill in (0.0, 0.5):
        losses = [loss.head for loss in tuned[distill].history]
        assert sum(losses[-5:]) < 0.5 * sum(losses[:5])


def test_the_weight_moves_the_draft_between_its_two_masters(tuned, answers, recorded):
    far = {distill: mean_divergence(each.model, answers[NUM_LESSONS:], recorded) for distill, each in tuned.items()}
    assert far[1.0] < far[0.5] < far[0.0]


def test_without_distilling_nothing_is_asked_of_the_target(pair, lessons, tmp_path):
    tuned = tuned_with(pair, lessons._replace(answers=()), tmp_path, distill=0.0, steps=2)
    assert {loss.divergence for loss in tuned.history} == {0.0}
    assert not (tmp_path / "target").exists()


def test_the_pair_keeps_every_bit_and_the_same_seed_gives_the_same_draft(lessons, tmp_path):
    pair = tiny_pair(seed=0)
    models = {"target": pair.target, "draft": pair.draft}
    before = {name: {k: v.clone() for k, v in m.state_dict().items()} for name, m in models.items()}
    one, two = (tuned_with(pair, lessons, tmp_path, steps=2).model for _ in range(2))
    for name, model in models.items():
        assert all(torch.equal(before[name][k], v) for k, v in model.state_dict().items())
        assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


def trainer_of(pair, lessons, work, config) -> tuple[Trainer, list[Step]]:
    draft, random = draft_of(pair), generator(0, "trainer")
    texts = {name: prepare(SPLITS[name], draft, METRIC, 64) for name in ("train", "validation")}
    head = _first_head(texts, draft, config, work, random)
    steps = _schedule(_twins_together(texts["train"]), [[a] for a in lessons.answers], config, random)
    recorded = TargetRecording(pair, work / "target", top_k=config.top_k)
    tuned = adapted(draft.model, config.adapter, generator=generator(0, "adapter"))
    return Trainer(tuned, head, recorded, config), steps


@pytest.mark.parametrize("distill", [0.0, 0.5, 1.0])
def test_gradients_reach_adapters_and_readout_alone(pair, lessons, work, distill):
    trainer, steps = trainer_of(pair, lessons, work, replace(FAST, distill=distill))
    trainer.backward(steps[0])
    model = trainer.adapted.model
    reached = {name for name, p in model.named_parameters() if p.grad is not None and bool(p.grad.abs().sum() > 0)}
    assert reached
    assert all("lora_B" in name for name in reached), "while one factor is 0, only that one has a gradient"
    assert any("layers.0" in name for name in reached)
    assert all(parameter.grad is None for parameter in (*pair.target.parameters(), *pair.draft.parameters()))
    has_gradient = [p.grad is not None and bool(p.grad.abs().sum() > 0) for p in trainer.head.readout.parameters()]
    assert all(has_gradient[:2]) == (distill < 1)
    if distill == 1:
        assert not any(has_gradient)


def test_the_readout_starts_as_the_head_that_was_fitted(pair, lessons, work):
    trainer, _ = trainer_of(pair, lessons, work, replace(FAST, distill=0.0))
    readout = trainer.head.readout
    features = torch.randn(5, readout.weight.shape[-1], generator=torch.Generator().manual_seed(0))
    weight, bias, _ = readout.folded(0)
    torch.testing.assert_close(readout(features)[:, 0], features @ weight.T + bias, atol=1e-4, rtol=1e-4)
    assert bool((weight != 0).any())
    assert trainer.head.decay.tolist() == [[pytest.approx(0.1)], [pytest.approx(0.1)]]


def test_the_mixed_gradient_is_the_mixture_of_the_gradients(pair, lessons, work):
    grads, read = [], None
    for distill in (0.25, 0.0, 1.0):
        trainer, steps = trainer_of(pair, lessons, work, replace(FAST, distill=distill, steps=1))
        read = read or steps[0]
        trainer.backward(read)
        grads.append([p.grad for p in trainer.adapted.parameters()][1::2])
    for mixed, head, target in zip(*grads, strict=True):
        torch.testing.assert_close(mixed, 0.75 * head + 0.25 * target, atol=1e-5, rtol=1e-4)


def test_twins_stay_together_and_each_unit_is_read_once_a_pass(pair):
    texts = prepare(SPLITS["train"], draft_of(pair), METRIC, 64)
    units = _twins_together(texts)
    assert [len(unit) for unit in units] == [2] * 12
    drawn = _batches(units, 1, generator(0, "order"))
    one_pass = [next(drawn) for _ in units]
    assert sorted(lesson.text.id for batch in one_pass for lesson in batch) == sorted(text.tokens.id for text in texts)


def test_a_tuned_draft_is_a_model_like_any_other_that_old_banks_refuse(pair, lessons, work, tmp_path):
    assert pair.draft is not None and pair.draft_identity is not None
    folder = tmp_path / "draft"
    config = replace(FAST, steps=3)
    made = tuned_draft(pair, lessons, folder, config=config, work_folder=work, seed=0)
    assert made.identity.weights != pair.draft_identity.weights
    assert made.identity.tokenizer == pair.draft_identity.tokenizer
    assert load_model(str(folder), dtype="float32").identity == made.identity
    assert replace(pair, draft=made.model, draft_identity=made.identity).reader_identity == made.identity
    reader = LoadedModel(pair.draft, pair.tokenizer, pair.draft_identity, "tiny")
    old, new = (
        build_bank(SPLITS, BENIGN, each, metric=METRIC, config=CONFIG, work_folder=work, seed=0).bank
        for each in (reader, made)
    )
    with pytest.raises(BankMismatch, match="other weights"):
        old.check(made.identity)
    assert new.identity == made.identity


def test_the_same_call_finds_the_draft_and_another_is_refused(pair, lessons, work, tmp_path):
    folder, config = tmp_path / "draft", replace(FAST, steps=3)
    made = tuned_draft(pair, lessons, folder, config=config, work_folder=work, seed=0)
    stamp = (folder / "model.safetensors").stat().st_mtime_ns
    again = tuned_draft(pair, lessons, folder, config=config, work_folder=work, seed=0)
    assert again.identity == made.identity
    assert (folder / "model.safetensors").stat().st_mtime_ns == stamp
    with pytest.raises(ArtefactError, match="other models, texts or settings"):
        tuned_draft(pair, lessons, folder, config=replace(config, distill=0.4), work_folder=work, seed=0)
    with pytest.raises(ArtefactError, match="holds no tuned draft; give another folder"):
        tuned_draft(pair, lessons, tmp_path, config=config, work_folder=work, seed=0)
    assert [path.name for path in tmp_path.iterdir()] == ["draft"], "nothing half-written is left"


def test_the_card_says_from_what_the_draft_was_made(pair, lessons, work, tmp_path):
    tuned_draft(pair, lessons, tmp_path / "draft", config=replace(FAST, steps=3), work_folder=work, seed=0)
    card = json.loads((tmp_path / "draft" / "tuning.json").read_text())
    assert card["draft"]["weights"] == pair.draft_identity.weights
    assert card["target"]["weights"] == pair.target_identity.weights
    assert card["data"][0] == {"role": "train", "source": "ours", "license": "CC0", "num_rows": 24}
    assert card["answers"] == {"count": NUM_LESSONS, "tokens": NUM_LESSONS * 12}
    assert card["run"]["config"]["distill"] == 0.5
    assert "does not fit this one" in card["not_for"]


def test_what_does_not_change_the_draft_is_refused_and_leaves_no_folder(pair, lessons, work, tmp_path):
    config = replace(FAST, steps=1, learning_rate=1e-12)
    with pytest.raises(SettingError, match="more steps or a larger learning rate"):
        tuned_draft(pair, lessons, tmp_path / "draft", config=config, work_folder=work, seed=0)
    assert list(tmp_path.iterdir()) == []


def test_a_pair_without_a_draft_is_refused(pair, lessons, work):
    alone = replace(pair, draft=None, draft_identity=None)
    with pytest.raises(SettingError, match="has no draft to tune"):
        tuned_with(alone, lessons, work)


def test_distilling_from_no_answers_is_refused(pair, lessons, work):
    with pytest.raises(SettingError, match="no answers of the target to distil from"):
        tuned_with(pair, lessons._replace(answers=()), work)


def test_a_document_on_both_sides_is_refused(pair, lessons, work):
    leaking = {**SPLITS, "validation": SPLITS["train"][:4]}
    with pytest.raises(LeakError, match="also stands in split"):
        tuned_with(pair, lessons._replace(splits=leaking), work)


def test_texts_of_one_label_are_refused(pair, lessons, work):
    quiet = {name: [row for row in rows if row.id.endswith("quiet")] for name, rows in SPLITS.items()}
    with pytest.raises(TextError, match="needs positive and negative ones"):
        tuned_with(pair, lessons._replace(splits=quiet), work)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"distill": 1.5}, r"distill 1.5 is outside \[0, 1\]"),
        ({"steps": 0}, "steps is 0; give 1 or more"),
        ({"learning_rate": 0.0}, "learning rate 0.0 is not a positive number"),
        ({"temperature": -1.0}, "temperature -1.0 is not allowed"),
    ],
)
def test_settings_out_of_range_are_refused(changes, words):
    with pytest.raises(SettingError, match=words):
        JointConfig(**changes)
