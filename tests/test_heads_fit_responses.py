"""The fit loop on labels of whole responses: a planted direction, twins, channels chosen apart, other forms."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
import torch
from test_heads_fit import Memory, random
from torch import Tensor

from pilotfish.core import Site
from pilotfish.errors import TextError
from pilotfish.heads import Example, FitConfig, FitResult, Form, fit
from pilotfish.scores import auroc, pairwise_accuracy

NUM_FEATURES = 8
FINAL = (Site(-1, "final"),)
CONFIG = FitConfig(
    form=Form(width=1, window=4),
    epochs=10,
    patience=10,
    batch_tokens=200,
    learning_rate=0.03,
    weight_decays=(0.01, 1.0),
)
Side = tuple[dict[str, Tensor], dict[str, Example]]


def fitted(train: Side, validation: Side, config: FitConfig, *, seed: int = 0) -> FitResult:
    examples = train[1] | validation[1]
    sources = Memory(train[0]), Memory(validation[0])
    return fit(*sources, examples, config=config, quality=auroc, generator=random(seed))


def highest(result: FitResult, side: Side) -> tuple[Tensor, Tensor]:
    """What each response scores, and its label."""
    features, examples = side
    head = result.head("m", FINAL)
    scores = []
    for row, values in features.items():
        running, inside = head.logits(values, "response"), examples[row].in_response
        scores.append(running.max() if inside is None else running[inside].max())
    return torch.stack(scores), torch.tensor([example.label for example in examples.values()])


def unlabelled(num_tokens: int) -> Tensor:
    return torch.full((num_tokens,), math.nan)


def stretches(seed: int, name: str, num_rows: int = 60) -> Side:
    """Every other response has a stretch of five tokens that are moved along feature 0; feature 1 is moved in every
    prompt, which says nothing.
    """
    draw, features, examples = random(seed), {}, {}
    for index in range(num_rows):
        values = torch.randn(25, NUM_FEATURES, generator=draw)
        values[:8, 1] += 6
        in_response = torch.arange(25) >= 8
        if index % 2:
            start = int(torch.randint(8, 20, (), generator=draw))
            values[start : start + 5, 0] += 2.5
        features[f"{name}{index}"] = values
        examples[f"{name}{index}"] = Example(unlabelled(25), float(index % 2), in_response)
    return features, examples


@pytest.fixture(scope="module")
def plain() -> FitResult:
    return fitted(stretches(1, "t"), stretches(2, "v"), CONFIG)


def test_a_planted_direction_is_learned_from_labels_of_responses_alone(plain):
    test = stretches(3, "test")
    assert auroc(*highest(plain, test)) > 0.9
    spread = torch.cat(list(test[0].values())).std(0)
    direction = plain.weight[0] * spread
    assert direction[0] > 3 * direction[1:].abs().max()
    best = plain.chosen["both"]
    assert best.quality == max(max(epoch.response) for epoch in plain.history)
    assert all(math.isnan(value) for epoch in plain.history for value in epoch.token)


@pytest.mark.parametrize(
    "options", [{"top_k": 3}, {"segment_variance": 0.01}, {"temperature": 0.3}, {"is_balanced": False}], ids=str
)
def test_every_way_to_weigh_a_response_learns_it_and_differs_from_the_plain_one(options, plain):
    result = fitted(stretches(1, "t"), stretches(2, "v"), dataclasses.replace(CONFIG, **options))
    assert auroc(*highest(result, stretches(3, "test"))) > 0.85
    if "is_balanced" not in options:  # as many positive responses as negative ones: nothing to weigh
        assert not torch.equal(result.weight, plain.weight)


def test_shuffled_labels_of_responses_give_an_auroc_of_one_half_on_fresh_rows():
    def shuffled(seed: int, name: str, num_rows: int) -> Side:
        features, examples = stretches(seed, name, num_rows)
        labels = torch.randperm(num_rows, generator=random(seed)) % 2
        pairs = zip(examples.items(), labels.tolist(), strict=True)
        return features, {row: example._replace(label=float(label)) for (row, example), label in pairs}

    result = fitted(shuffled(4, "t", 60), shuffled(5, "v", 60), CONFIG)
    scores, labels = highest(result, shuffled(6, "test", 400))
    assert abs(auroc(scores, labels) - 0.5) < 3 * math.sqrt(401 / (12 * 200 * 200))


def test_a_prior_is_learned_that_keeps_an_odd_beginning_from_being_a_flag():
    """The first token of every response is moved as far as three of a stretch."""

    def with_odd_beginnings(seed: int, name: str) -> Side:
        features, examples = stretches(seed, name)
        for values in features.values():
            values[8, 0] += 7.5
        return features, {row: example._replace(boundary=8) for row, example in examples.items()}

    result = fitted(with_odd_beginnings(1, "t"), with_odd_beginnings(2, "v"), CONFIG)
    assert float(result.outputs[-1]) < 0
    head, (features, examples) = result.head("m", FINAL), with_odd_beginnings(3, "test")
    running = [head.logits(values[8:], "response") for values in features.values()]
    labels = torch.tensor([example.label for example in examples.values()])
    without_prior = [head.channels(values[8:9])[0, -1] for values in features.values()]
    assert all(row[0] < alone for row, alone in zip(running, without_prior, strict=True))
    assert auroc(torch.stack([row.max() for row in running]), labels) > 0.7


def twins(seed: int, name: str, num_pairs: int) -> Side:
    """Two responses to each prompt. Feature 0 tells them apart, but differs far more between prompts; feature 1 tells
    responses apart a little, with noise of its own.
    """
    draw, features, examples = random(seed), {}, {}
    for pair in range(num_pairs):
        shared = 2 * torch.randn((), generator=draw)
        for label in (0.0, 1.0):
            values = 0.1 * torch.randn(10, 2, generator=draw)
            values[:, 0] += shared + 0.5 * label
            values[:, 1] += 0.7 * label + torch.randn((), generator=draw)
            row = f"{name}{pair}-{label:g}"
            features[row], examples[row] = values, Example(unlabelled(10), label, None, f"{name}{pair}")
    return features, examples


def test_the_contrast_of_twins_finds_what_the_difference_of_their_prompts_hides():
    train, validation, test = twins(21, "t", 40), twins(22, "v", 5), twins(23, "test", 100)
    found = {}
    for contrast in (0.0, 10.0):
        config = dataclasses.replace(
            CONFIG, contrast=contrast, epochs=15, patience=15, weight_decays=(0.0,), learning_rate=0.2
        )
        calls = itertools.count()  # a quality that grows, so that the last pass is kept
        result = fit(
            Memory(train[0]),
            Memory(validation[0]),
            train[1] | validation[1],
            config=config,
            quality=lambda scores, labels, calls=calls: float(next(calls)),
            generator=random(0),
        )
        scores, labels = highest(result, test)
        found[contrast] = pairwise_accuracy(scores[labels == 1], scores[labels == 0])
    assert found[10.0] > 0.9
    assert found[10.0] > found[0.0] + 0.15


def test_a_pair_of_twins_told_apart_counts_for_half_of_a_responses_quality():
    validation = twins(2, "v", 20)
    result = fitted(twins(1, "t", 20), validation, CONFIG)
    scores, labels = highest(result, validation)
    pairs = pairwise_accuracy(scores[labels == 1], scores[labels == 0])
    assert result.chosen["both"].quality == pytest.approx((auroc(scores, labels) + pairs) / 2, abs=1e-4)


def test_rows_without_a_twin_have_no_contrast():
    sides = stretches(1, "t", 20), stretches(2, "v", 20)
    without, with_contrast = (fitted(*sides, dataclasses.replace(CONFIG, contrast=c)) for c in (0.0, 5.0))
    assert torch.equal(without.weight, with_contrast.weight)


def marked(seed: int, name: str, num_rows: int = 60) -> Side:
    """Tokens are labelled by feature 2; responses by feature 0, as in `stretches`."""
    features, examples = stretches(seed, name, num_rows)
    return features, {
        row: example._replace(labels=(features[row][:, 2] > 0).float()) for row, example in examples.items()
    }


def test_a_head_of_two_channels_learns_each_from_its_own_labels():
    train, validation = marked(1, "t"), marked(2, "v")
    result = fitted(train, validation, dataclasses.replace(CONFIG, form=Form(window=4)))
    assert result.weight.abs().argmax(1).tolist() == [2, 0]
    assert set(result.chosen) == {"token", "response"}
    for part, found in result.chosen.items():
        assert found.quality == max(max(getattr(epoch, part)) for epoch in result.history)
        column = CONFIG.weight_decays.index(found.weight_decay)
        assert getattr(result.history[found.epoch], part)[column] == found.quality
    features, examples = validation
    tokens = result.head("m", FINAL).logits(torch.cat(list(features.values())))
    labels = torch.cat([example.labels for example in examples.values()])
    assert auroc(tokens, labels) == pytest.approx(result.chosen["token"].quality, abs=1e-4)
    assert auroc(*highest(result, validation)) == pytest.approx(result.chosen["response"].quality, abs=1e-4)


def test_each_channel_is_kept_from_the_pass_and_the_candidate_that_is_best_for_it():
    train, validation = marked(1, "t", 10), marked(2, "v", 10)
    config = dataclasses.replace(CONFIG, form=Form(window=4), epochs=3)

    def preferring(token: tuple[int, int], response: tuple[int, int]) -> FitResult:
        """What is best on tokens, and on responses: a pass and a candidate."""
        best = {(0, *token), (1, *response)}
        asked = itertools.product(range(3), range(2), range(2))  # a pass, tokens before responses, a candidate
        places = iter([(part, epoch, candidate) for epoch, part, candidate in asked])
        sources = Memory(train[0]), Memory(validation[0])
        return fit(
            *sources,
            train[1] | validation[1],
            config=config,
            quality=lambda scores, labels: float(next(places) in best),
            generator=random(0),
        )

    early, late = (0, 1), (2, 0)
    mixed, first, last = preferring(early, late), preferring(early, early), preferring(late, late)
    assert mixed.chosen == {"token": (1.0, 0, CONFIG.weight_decays[1]), "response": (1.0, 2, CONFIG.weight_decays[0])}
    for name in ("weight", "bias"):
        of_mixed, of_first, of_last = (getattr(result, name) for result in (mixed, first, last))
        assert torch.equal(of_mixed[0], of_first[0]) and torch.equal(of_mixed[1], of_last[1])
        assert not torch.equal(of_first, of_last)


def test_one_channel_learns_from_both_kinds_of_labels():
    sides = []
    for seed, name in ((1, "t"), (2, "v"), (3, "test")):
        features, examples = stretches(seed, name)
        sides.append(
            (features, {row: e._replace(labels=(features[row][:, 0] > 1.5).float()) for row, e in examples.items()})
        )
    result = fitted(sides[0], sides[1], CONFIG)
    best = result.chosen["both"]
    at = result.history[best.epoch]
    assert best.quality == pytest.approx(max((a + b) / 2 for a, b in zip(at.token, at.response, strict=True)))
    assert auroc(*highest(result, sides[2])) > 0.9


def test_spans_can_count_by_their_highest_token():
    train, validation = marked(1, "t", 30), marked(2, "v", 30)
    config = dataclasses.replace(CONFIG, form=Form(window=4))
    plain, spans = (fitted(train, validation, dataclasses.replace(config, span_max=share)) for share in (0.0, 0.5))
    assert spans.chosen["token"].quality > 0.9
    assert not torch.equal(plain.weight[0], spans.weight[0])
    assert torch.equal(plain.weight[1], spans.weight[1]), "the response's channel has no spans"


@pytest.mark.parametrize("labels", ["tokens", "responses"])
def test_a_head_of_two_channels_is_refused_where_one_kind_of_label_is_missing(labels):
    train, validation = marked(1, "t", 6), marked(2, "v", 6)
    for examples in (train[1], validation[1]):
        for row, example in examples.items():
            examples[row] = example._replace(
                **({"label": math.nan} if labels == "tokens" else {"labels": unlabelled(25)})
            )
    words = r"Give more documents, or a form of one channel \(width 1\) where only one kind is labelled"
    with pytest.raises(TextError, match=words):
        fitted(train, validation, dataclasses.replace(CONFIG, form=Form()))


def far_out(seed: int, name: str) -> Side:
    """A token is positive when feature 0 is far from 0 on either side, and a response when many of its tokens are."""
    draw, features, examples = random(seed), {}, {}
    for index in range(60):
        values = torch.randn(12, NUM_FEATURES, generator=draw)
        values[:, 0] *= 2.0 if index % 2 else 0.7
        features[f"{name}{index}"] = values
        examples[f"{name}{index}"] = Example((values[:, 0].abs() > 1.2).float(), float(index % 2))
    return features, examples


def pointed_at(seed: int, name: str) -> Side:
    """Feature 0 says which token matters, feature 1 what it says; feature 1 of all other tokens is noise. The response
    is the last token.
    """
    draw, features, examples = random(seed), {}, {}
    for index in range(100):
        values = torch.randn(8, NUM_FEATURES, generator=draw)
        values[:, 1] *= 3
        at = int(torch.randint(8, (), generator=draw))
        values[at, 0], values[at, 1] = 6.0, 3.0 if index % 2 else -3.0
        features[f"{name}{index}"] = values
        examples[f"{name}{index}"] = Example((values[:, 1] > 0).float(), float(index % 2), torch.arange(8) == 7)
    return features, examples


def either_peak(seed: int, name: str) -> Side:
    """One token of a positive response stands out in feature 0 or in feature 1."""
    draw, features, examples = random(seed), {}, {}
    for index in range(60):
        values = torch.randn(16, NUM_FEATURES, generator=draw)
        if index % 2:
            values[int(torch.randint(16, (), generator=draw)), index // 2 % 2] = 6.0
        features[f"{name}{index}"] = values
        examples[f"{name}{index}"] = Example((values[:, 0] > 0).float(), float(index % 2))
    return features, examples


@pytest.mark.parametrize(
    ("form", "task"),
    [
        (Form(kind="mlp", width=8, window=12), far_out),
        (Form(kind="attention", width=2, window=8), pointed_at),
        (Form(kind="multimax", width=2, window=16), either_peak),
    ],
    ids=["mlp", "attention", "multimax"],
)
def test_other_forms_learn_what_they_are_made_for(form, task):
    config = dataclasses.replace(CONFIG, form=form, batch_tokens=60)
    sides, test = (task(1, "t"), task(2, "v")), task(3, "test")
    result, linear = (fitted(*sides, dataclasses.replace(config, form=f)) for f in (form, Form(window=form.window)))
    found = [auroc(*highest(trained, test)) for trained in (result, linear)]
    assert found[0] > max(0.85, found[1] + 0.1), "more than a mean over the window can tell"
    tokens = result.head("m", FINAL).logits(torch.cat(list(test[0].values())))
    assert auroc(tokens, torch.cat([example.labels for example in test[1].values()])) > 0.8


@pytest.mark.parametrize("kind", ["mlp", "attention", "multimax"])
def test_a_form_that_starts_at_random_starts_the_same_from_a_seed(kind):
    config = dataclasses.replace(CONFIG, form=Form(kind=kind, window=4), epochs=2)
    result, again, other = (fitted(marked(1, "t", 10), marked(2, "v", 10), config, seed=seed) for seed in (0, 0, 1))
    for name in ("weight", "bias", "outputs"):
        assert torch.equal(getattr(result, name), getattr(again, name))
    assert not torch.equal(result.weight, other.weight)
