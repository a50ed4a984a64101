"""The fine-tuned classifier: it learns what can be learned and leaves the caller's model alone."""

import math
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from conftest import hooks_of

from pilotfish.core import Conversation, Message, Site
from pilotfish.errors import LeakError, SettingError, TextError
from pilotfish.models import FAMILIES, LoadedModel, identify, num_layers, tiny_model, tiny_tokenizer
from pilotfish.runs import generator
from pilotfish.scores import auroc
from pilotfish.scores.classifier import (
    ClassifierConfig,
    LabelledTexts,
    _Batch,
    _Classifier,
    _is_pooled,
    fine_tuned_scores,
)
from pilotfish.taps import tapped
from pilotfish.texts import tokenize

TOKENIZER = tiny_tokenizer()
FAST = ClassifierConfig(num_blocks=1, max_tokens=48, max_steps=30, evaluate_every=10, learning_rate=1e-3)
WORDS = (" the", " and", " to", " of", " is")


def loaded(family="llama", dtype=torch.float32):
    model = tiny_model(family, seed=0).to(dtype)
    return LoadedModel(model, TOKENIZER, identify(model, TOKENIZER, "tiny"), "a test")


def text_of(index):
    """Every other answer holds `import` somewhere among words that say nothing."""
    random = generator(index, "text")
    words = [WORDS[i] for i in torch.randint(len(WORDS), (6,), generator=random).tolist()]
    words.insert(index // 2 % 7, "import" if index % 2 else "return")
    return Conversation(str(index), f"document {index}", (Message("user", "Go."), Message("assistant", "".join(words))))


def side(first, last):
    return LabelledTexts(
        [text_of(index) for index in range(first, last)],
        torch.tensor([index % 2 for index in range(first, last)]).float(),
    )


TRAIN, VALIDATION, TEST = side(0, 48), side(48, 64), side(64, 88)


def scores_of(reader=None, *, train=TRAIN, validation=VALIDATION, test=TEST.texts, config=FAST, seed=0):
    with TemporaryDirectory() as folder:
        return fine_tuned_scores(
            reader or loaded(),
            train,
            validation=validation,
            test=test,
            config=config,
            work_folder=Path(folder),
            generator=generator(seed, "tune"),
        )


def test_it_learns_a_task_that_a_word_decides_and_gives_probabilities():
    scores = scores_of()
    assert scores.dtype == torch.float64
    assert auroc(scores, TEST.labels) > 0.9
    assert bool(((scores > 0) & (scores < 1)).all())


def test_labels_that_have_nothing_to_do_with_the_texts_teach_nothing():
    """Every other pair of texts is positive: each of the two words stands in as many positives as negatives."""

    def paired(given):
        return given._replace(labels=torch.tensor([int(text.id) // 2 % 2 for text in given.texts]).float())

    scores = scores_of(train=paired(TRAIN), validation=paired(VALIDATION))
    assert abs(auroc(scores, paired(TEST).labels) - 0.5) < 0.3


def test_the_callers_model_keeps_every_bit_and_gets_no_hook():
    reader = loaded(dtype=torch.bfloat16)
    before = {name: value.clone() for name, value in reader.model.state_dict().items()}
    modes = [module.training for module in reader.model.modules()]
    scores_of(reader, config=replace(FAST, num_blocks=3, max_steps=10))
    after = reader.model.state_dict()
    assert before.keys() == after.keys()
    assert all(value.dtype == after[name].dtype and torch.equal(value, after[name]) for name, value in before.items())
    assert [module.training for module in reader.model.modules()] == modes
    assert all(parameter.grad is None for parameter in reader.model.parameters())
    assert hooks_of(reader.model) == []


@pytest.mark.parametrize("num_blocks", [1, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_before_training_the_copied_blocks_compute_what_the_model_does_whatever_the_padding(family, num_blocks):
    model = loaded(family).model
    below, final = Site(num_layers(model) - num_blocks, "resid_pre"), Site(-1, "final")
    long, short = ([TOKENIZER("import the" * count)["input_ids"]] for count in (12, 5))
    states, expected = [], []
    for ids in (long, short):
        with torch.inference_mode(), tapped(model, (below, final)) as taps:
            model(torch.tensor(ids))
            states.append(taps[below][0].clone())
            expected.append(taps[final][0].mean(0))
    pooled = [torch.ones(len(state), dtype=torch.bool) for state in states]
    batch = _Batch(*(torch.nn.utils.rnn.pad_sequence(part, batch_first=True) for part in (states, pooled)))
    batch.states[1, len(states[1]) :] = 7.0  # what pads must not matter
    classifier = _Classifier(model, below)
    with torch.inference_mode():
        classifier.weight.copy_(torch.linspace(-1, 1, len(classifier.weight)))
        found = classifier(batch)
    assert torch.allclose(found, torch.stack(expected) @ classifier.weight, atol=1e-4)


def test_only_the_last_blocks_and_the_norm_are_copied():
    model = loaded().model
    classifier = _Classifier(model, Site(2, "resid_pre"))
    block = sum(parameter.numel() for parameter in model.model.layers[2].parameters())
    assert sum(p.numel() for p in classifier.parameters()) == block + 32 + 32 + 1  # norm, head, bias


def test_the_same_generator_gives_the_same_scores_and_another_one_others():
    config = replace(FAST, max_steps=10)
    first, again, other = (scores_of(config=config, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_the_best_look_at_the_validation_texts_is_kept():
    """With validation labels turned round, training only does harm there: an early look is better than the last."""
    turned = VALIDATION._replace(labels=1 - VALIDATION.labels)
    twins = [replace(text, group=f"{text.group} again") for text in VALIDATION.texts]
    config = replace(FAST, max_steps=16, patience=100)
    many, last = (
        auroc(scores_of(validation=turned, test=twins, config=replace(config, evaluate_every=every)), turned.labels)
        for every in (2, 16)
    )
    assert many > last


def test_unlabelled_texts_change_nothing():
    extra = Conversation("extra", "extra", (Message("user", "Go."), Message("assistant", "import")))
    more = LabelledTexts([*TRAIN.texts, extra], torch.cat([TRAIN.labels, torch.tensor([math.nan])]))
    config = replace(FAST, max_steps=10)
    assert torch.equal(scores_of(train=more, config=config), scores_of(config=config))


def test_a_response_is_read_where_there_is_one_and_all_of_the_text_elsewhere():
    answered, asked = text_of(0), Conversation("q", "q", (Message("user", "Go."),))
    tokens = tokenize(answered, TOKENIZER)
    assert _is_pooled(answered, tokens).tolist() == [message == 1 for message in tokens.messages]
    assert bool(_is_pooled(asked, tokenize(asked, TOKENIZER)).all())
    assert bool(_is_pooled(answered, tokenize(answered, TOKENIZER, max_tokens=3)).all())


def test_no_test_texts_give_no_scores():
    assert len(scores_of(test=[])) == 0


@pytest.mark.parametrize("label", [0.0, 1.0, math.nan])
@pytest.mark.parametrize(("name", "what"), [("train", "training"), ("validation", "validation")])
def test_labels_of_one_kind_are_refused(label, name, what):
    given = {"train": TRAIN, "validation": VALIDATION}[name]
    with pytest.raises(TextError, match=f"positive and negative {what} texts"):
        scores_of(**{name: given._replace(labels=torch.full_like(given.labels, label))})


def test_a_group_on_two_sides_is_refused():
    with pytest.raises(LeakError, match=r"'document 0' .* stands in test and in train"):
        scores_of(test=[*TEST.texts, TRAIN.texts[0]])


def test_labels_of_other_texts_are_refused():
    with pytest.raises(SettingError, match="48 training texts but 47 labels"):
        scores_of(train=TRAIN._replace(labels=TRAIN.labels[1:]))


def test_more_blocks_than_there_are_are_refused():
    with pytest.raises(SettingError, match="the model has 3 blocks, so give 1 to 3"):
        scores_of(config=replace(FAST, num_blocks=4))


@pytest.mark.parametrize(
    "setting", [{"max_steps": 0}, {"learning_rate": 0.0}, {"head_learning_rate": math.inf}, {"weight_decay": -1.0}]
)
def test_a_setting_that_cannot_train_is_refused(setting):
    with pytest.raises(SettingError, match=f"{next(iter(setting))} is .*; give"):
        ClassifierConfig(**setting)
