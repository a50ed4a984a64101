"""The one fit loop on token labels, in memory, whose labels are known to be learnable or not."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pilotfish.core import Site
from pilotfish.errors import ArtefactError, SettingError, TextError
from pilotfish.heads import Example, FitConfig, FitResult, Form, fit
from pilotfish.heads.examples import Rows
from pilotfish.heads.readout import Readout
from pilotfish.models import Pair, evenly_spaced_sites
from pilotfish.scores import auroc
from pilotfish.taps import TokenRow, record

ALONE = Form(width=1, window=1)
"""Of single tokens."""
CONFIG = FitConfig(form=ALONE, epochs=12, batch_tokens=64, learning_rate=0.02, weight_decays=(0.01, 1.0), patience=12)
NUM_FEATURES = 12


class Memory:
    """Activations in memory."""

    def __init__(self, features: dict[str, Tensor]) -> None:
        self.row_ids = tuple(features)
        self._features = features

    def features(self, row_id: str) -> Tensor:
        return self._features[row_id]


def random(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def planted(
    seed: int, *, num_rows: int = 20, name: str = "row", shuffled: bool = False
) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
    """Features of unequal mean and scale, and labels drawn from a logistic model of a known direction."""
    draw = random(seed)
    direction = torch.randn(NUM_FEATURES, generator=random(99))
    mean, scale = 10 * torch.randn(NUM_FEATURES, generator=random(98)), 10.0 ** torch.linspace(-2, 2, NUM_FEATURES)
    features, labels = {}, {}
    for index in range(num_rows):
        z = torch.randn(int(torch.randint(20, 60, (), generator=draw)), NUM_FEATURES, generator=draw)
        features[f"{name}{index}"] = z * scale + mean
        log_odds = 0 * z[:, 0] if shuffled else 3 * (z @ direction)
        labels[f"{name}{index}"] = (torch.rand(len(z), generator=draw) < log_odds.sigmoid()).float()
    return features, labels, direction / scale


def labelled(labels: dict[str, Tensor]) -> dict[str, Example]:
    return {row: Example(values) for row, values in labels.items()}


def fitted(train: tuple[dict, dict], validation: tuple[dict, dict], *, seed: int = 0, config=CONFIG) -> FitResult:
    return fit(
        Memory(train[0]),
        Memory(validation[0]),
        labelled(train[1] | validation[1]),
        config=config,
        quality=auroc,
        generator=random(seed),
    )


@pytest.fixture(scope="module")
def sides() -> tuple[tuple[dict, dict], tuple[dict, dict]]:
    return planted(1, name="train")[:2], planted(2, name="validation")[:2]


def test_a_planted_direction_is_recovered_through_unequal_means_and_scales(sides):
    result = fitted(*sides)
    direction = planted(1)[2]
    scale = 10.0 ** torch.linspace(-2, 2, NUM_FEATURES)
    cosine = torch.cosine_similarity(result.weight[0] * scale, direction * scale, dim=0)
    assert cosine > 0.97
    features, labels, _ = planted(3, name="test")
    logits = result.head("m", (Site(-1, "final"),)).logits(torch.cat(list(features.values())))
    best = torch.cat(list(features.values())).double() @ direction.double()
    truth = torch.cat(list(labels.values()))
    assert auroc(logits, truth) > auroc(best, truth) - 0.02


def test_labels_without_a_signal_give_an_auroc_of_one_half_on_fresh_rows():
    train, validation = planted(4, name="train", shuffled=True)[:2], planted(5, name="validation", shuffled=True)[:2]
    head = fitted(train, validation).head("m", (Site(-1, "final"),))
    features, labels, _ = planted(6, name="test", shuffled=True, num_rows=100)
    truth = torch.cat(list(labels.values()))
    num_positive, num_negative = float(truth.sum()), float((1 - truth).sum())
    deviation = math.sqrt((num_positive + num_negative + 1) / (12 * num_positive * num_negative))
    assert abs(auroc(head.logits(torch.cat(list(features.values()))), truth) - 0.5) < 3 * deviation


def test_the_same_seed_gives_the_same_bits_and_another_seed_does_not(sides):
    first, second, other = fitted(*sides), fitted(*sides), fitted(*sides, seed=1)
    assert torch.equal(first.weight, second.weight) and torch.equal(first.bias, second.bias)
    assert (first.chosen, str(first.history)) == (second.chosen, str(second.history))
    assert not torch.equal(first.weight, other.weight)


def test_features_of_unlabelled_tokens_have_no_influence(sides):
    (features, labels), validation = sides

    def with_gap(value: float) -> FitResult:
        changed = {row: values.clone() for row, values in features.items()}
        gaps = {row: values.clone() for row, values in labels.items()}
        for row in gaps:
            gaps[row][::3] = math.nan
            changed[row][::3] = value
        return fitted((changed, gaps), validation)

    zeros, huge, broken = with_gap(0.0), with_gap(1e30), with_gap(math.nan)
    assert torch.equal(zeros.weight, huge.weight) and torch.equal(zeros.weight, broken.weight)
    assert float(zeros.bias) == float(huge.bias) == float(broken.bias)


def test_rows_without_any_label_change_nothing_but_the_order(sides):
    (features, labels), validation = sides
    extra = features | {"unread": torch.full((5, NUM_FEATURES), math.nan)}
    gaps = labels | {"unread": torch.full((5,), math.nan)}
    result = fitted((extra, gaps), validation)
    assert bool(torch.isfinite(result.weight).all())
    assert result.chosen["both"].quality == pytest.approx(fitted(*sides).chosen["both"].quality, abs=0.01)


def test_what_is_returned_is_the_best_of_the_history(sides):
    result = fitted(*sides)
    top = max(max(epoch.token) for epoch in result.history)
    best = result.chosen["both"]
    assert best.quality == top
    column = result.history[best.epoch].token.index(top)
    assert best.weight_decay == CONFIG.weight_decays[column]
    assert all(math.isnan(value) for epoch in result.history for value in epoch.response)
    logits = result.head("m", (Site(-1, "final"),)).logits(torch.cat(list(sides[1][0].values())))
    assert auroc(logits, torch.cat(list(sides[1][1].values()))) == pytest.approx(top, abs=1e-4)


def test_the_fit_stops_when_validation_no_longer_gets_better(sides):
    result = fitted(*sides, config=dataclasses.replace(CONFIG, epochs=40, patience=2))
    assert len(result.history) == result.chosen["both"].epoch + 3 < 40


def test_a_stronger_decay_gives_smaller_weights(sides):
    weak, strong = (
        fitted(*sides, config=dataclasses.replace(CONFIG, weight_decays=(decay,))).weight for decay in (0.01, 20.0)
    )
    scale = 10.0 ** torch.linspace(-2, 2, NUM_FEATURES)
    assert (strong * scale).norm() < 0.5 * (weak * scale).norm()


def test_candidates_side_by_side_are_what_each_is_alone(sides):
    def only(decays: tuple[float, ...]) -> list[tuple[float, ...]]:
        config = dataclasses.replace(CONFIG, weight_decays=decays, patience=100)
        return [epoch.token for epoch in fitted(*sides, config=config).history]

    both, first, second = only((0.01, 5.0)), only((0.01,)), only((5.0,))
    for pair, one, two in zip(both, first, second, strict=True):
        assert pair == pytest.approx((*one, *two), abs=1e-4)  # a tie may fall either way


def test_a_balanced_fit_puts_the_boundary_between_rare_positives_and_the_rest():
    draw = random(7)
    features = {f"{name}{i}": torch.randn(50, 1, generator=draw) for name in ("t", "v") for i in range(10)}
    labels = {row: (torch.arange(50) < 3).float() for row in features}
    for row, values in labels.items():
        features[row][:, 0] += 4 * values  # negatives around 0, positives around 4
    sides = [
        ({r: features[r] for r in features if r[0] == n}, {r: labels[r] for r in labels if r[0] == n}) for n in "tv"
    ]
    config = dataclasses.replace(CONFIG, epochs=60, patience=60, weight_decays=(0.0,), learning_rate=0.05)
    boundaries = []
    for is_balanced in (True, False):
        calls = itertools.count()  # a quality that grows, so that the last pass is kept
        result = fit(
            Memory(sides[0][0]),
            Memory(sides[1][0]),
            labelled(labels),
            config=dataclasses.replace(config, is_balanced=is_balanced),
            quality=lambda logits, targets, calls=calls: float(next(calls)),
            generator=random(0),
        )
        boundaries.append(-float(result.bias) / float(result.weight))
    middle, shifted = boundaries
    assert abs(middle - 2.0) < 0.4 < shifted - middle


def test_a_constant_feature_is_not_read():
    (features, labels), validation = planted(1, name="train")[:2], planted(2, name="validation")[:2]
    for values in (*features.values(), *validation[0].values()):
        values[:, 3] = 7.25
    assert fitted((features, labels), validation).weight[0, 3] == 0.0


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.tuples(st.integers(1, 30), st.integers(0, 3)), min_size=2, max_size=8),
    batch_tokens=st.integers(1, 40),
    seed=st.integers(0, 100),
)
def test_a_pass_reads_every_labelled_token_once_in_batches_of_about_the_size_asked_for(lengths, batch_tokens, seed):
    features = {f"r{i}": torch.arange(n)[:, None] + 100.0 * i for i, (n, _) in enumerate(lengths)}
    labels = {row: torch.where(values[:, 0] % 3 == 1, math.nan, values[:, 0] % 2) for row, values in features.items()}
    twins = {f"r{i}": f"t{twin}" if twin else "" for i, (_, twin) in enumerate(lengths)}
    examples = {row: Example(labels[row], twin=twins[row]) for row in features}
    rows = Rows(Memory(features), examples, batch_tokens=batch_tokens, window=1)
    read, seen = [], []
    largest = max(sum(n for n, other in lengths if other and other == twin) or n for n, twin in lengths)
    for batch in rows.batches(random(seed)):
        parts = batch.split(batch.features)
        assert len(batch.features) == sum(map(len, parts)) < batch_tokens + largest
        for row, part in zip(batch.rows, parts, strict=True):
            assert torch.equal(part, row.features)
            read += list(zip(part[:, 0].tolist(), row.labels.tolist(), strict=True))
        seen.append({row.twin for row in batch.rows} - {""})
    assert sorted(read) == sorted(
        (f, y)
        for row in features
        for f, y in zip(features[row][:, 0].tolist(), labels[row].tolist(), strict=True)
        if y == y
    )
    assert all(not a & b for a, b in itertools.combinations(seen, 2)), "twins stand in one batch"


def test_a_row_with_a_response_keeps_the_window_before_it_and_nothing_after():
    features, nan = torch.arange(10.0)[:, None], math.nan
    labels = torch.tensor([nan, nan, 1.0, *[nan] * 7])
    in_response = torch.tensor([False] * 5 + [True] * 3 + [False] * 2)

    def kept(window: int, example: Example) -> list[float]:
        rows = Rows(Memory({"r": features}), {"r": example}, batch_tokens=100, window=window)
        return [value for batch in rows.batches() for value in batch.features[:, 0].tolist()]

    unlabelled = torch.full((10,), nan)
    assert kept(3, Example(unlabelled, 1.0, in_response)) == [3, 4, 5, 6, 7]
    assert kept(1, Example(unlabelled, 1.0, in_response)) == [5, 6, 7]
    assert kept(2, Example(labels, 1.0, in_response)) == [1, 2, 3, 4, 5, 6, 7], "a labelled token is read as well"
    assert kept(9, Example(unlabelled, 1.0, None)) == list(range(10))
    assert kept(9, Example(labels, nan, in_response)) == [2], "without a response's label only labelled tokens are"


def test_the_standardiser_is_the_mean_and_the_deviation_of_what_is_read(sides):
    features, labels = sides[0]
    rows = Rows(Memory(features), labelled(labels), batch_tokens=50, window=1)
    mean, inverse = rows.standardiser()
    whole = torch.cat(list(features.values())).double()
    torch.testing.assert_close(mean.double(), whole.mean(0), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(inverse.double(), 1 / whole.std(0, correction=0), atol=0, rtol=1e-4)


FORMS = [ALONE, Form(), *(Form(kind=kind) for kind in ("mlp", "attention", "multimax"))]


@pytest.mark.parametrize("form", FORMS, ids=str)
@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 1000))
def test_the_folded_weights_are_the_readout_over_standardised_features(form, seed):
    draw = random(seed)
    mean, inverse = torch.randn(6, generator=draw), torch.rand(6, generator=draw) + 0.1
    readout = Readout(form, mean, inverse, 3, generator=draw)
    with torch.no_grad():
        for parameter in readout.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=draw))
    features = torch.randn(9, 6, generator=draw)
    expected = torch.einsum("tf,kcf->tkc", (features - mean) * inverse, readout.weight) + readout.bias
    assert torch.allclose(readout(features), expected, atol=1e-5)
    weight, bias, outputs = readout.folded(1)
    assert torch.allclose(features @ weight.T + bias, expected[:, 1], atol=1e-4)
    assert torch.equal(outputs, readout.outputs[1])
    with torch.no_grad():
        readout.outputs.zero_()
        readout.weight.zero_()
    assert bool(weight.any()) and bool(outputs.any()) == bool(form.num_outputs), "what is kept does not train on"


def test_a_recording_on_disk_gives_what_the_same_activations_in_memory_give(pair: Pair, tmp_path):
    draw = random(0)
    rows = [TokenRow(f"row{i}", tuple(torch.randint(0, 256, (12 + i,), generator=draw).tolist())) for i in range(12)]
    recording = record(
        pair.target, evenly_spaced_sites(pair.target, 2), rows, tmp_path, identity_hash="x", shard_tokens=64
    )
    in_memory = Memory({row: recording.features(row) for row in recording.row_ids})
    labels = {row.id: (torch.tensor(row.token_ids) % 2).float() for row in rows}
    results = [
        fit(source, source, labelled(labels), config=CONFIG, quality=auroc, generator=random(0))
        for source in (recording, in_memory)
    ]
    assert torch.equal(results[0].weight, results[1].weight)
    assert results[0].chosen["both"].quality > 0.7, "whether a token id is even can be read off its embedding"


def test_activations_in_bfloat16_are_taken_as_they_are(sides):
    halves = [({row: values.bfloat16() for row, values in features.items()}, labels) for features, labels in sides]
    wide = [({row: values.float() for row, values in features.items()}, labels) for features, labels in halves]
    assert torch.equal(fitted(*halves).weight, fitted(*wide).weight)


def test_one_sided_labels_are_refused_with_the_shares(sides):
    (features, labels), validation = sides
    zeros = {row: torch.zeros_like(values) for row, values in labels.items()}
    with pytest.raises(TextError, match=r"positives is 0 of the training tokens and 0 of their responses, 0\.\d+ and"):
        fitted((features, zeros), validation)
    nothing = {row: torch.full_like(values, math.nan) for row, values in validation[1].items()}
    with pytest.raises(TextError, match=r"0 and 0 on validation; a head needs positive and negative ones on both"):
        fitted(sides[0], (validation[0], nothing))


def test_a_form_of_two_channels_is_refused_where_responses_have_no_labels(sides):
    words = r"Give more documents, or a form of one channel \(width 1\) where only one kind is labelled"
    with pytest.raises(TextError, match=words):
        fitted(*sides, config=dataclasses.replace(CONFIG, form=Form(width=2)))


def test_labels_of_another_length_are_refused_by_row(sides):
    (features, labels), validation = sides
    wrong = labels | {"train3": torch.zeros(3)}
    with pytest.raises(SettingError, match=r"'train3' has \d+ recorded tokens but 3 labels"):
        fitted((features, wrong), validation)


def test_rows_without_an_entry_in_the_labels_are_refused(sides):
    (features, labels), validation = sides
    with pytest.raises(SettingError, match="1 training rows have no labels, the first is 'train0'"):
        fitted((features, {row: values for row, values in labels.items() if row != "train0"}), validation)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_activations_that_are_not_finite_are_refused(value, sides):
    (features, labels), validation = sides
    broken = features | {"train0": torch.full_like(features["train0"], value)}
    with pytest.raises(ArtefactError, match="not finite; record them again"):
        fitted((broken, labels), validation)


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ({"epochs": 0}, "epochs is 0; give 1 or more"),
        ({"batch_tokens": -1}, "batch_tokens is -1"),
        ({"learning_rate": 0.0}, "learning_rate 0.0 is not a positive number"),
        ({"learning_rate": math.nan}, "learning_rate nan"),
        ({"temperature": 0.0}, "temperature 0.0"),
        ({"contrast": -1.0}, "contrast and segment_variance are weights of 0 or more"),
        ({"segment_variance": -0.1}, "weights of 0 or more"),
        ({"span_max": 1.5}, r"span_max a share in \[0, 1\]"),
        ({"top_k": 0}, "top_k 0"),
        ({"weight_decays": ()}, "weight decays"),
        ({"weight_decays": (1e9,)}, "less than 1 / learning rate"),
    ],
)
def test_settings_outside_what_is_allowed_are_refused(setting, words):
    with pytest.raises(SettingError, match=words):
        FitConfig(**setting)
