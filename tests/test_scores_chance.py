"""What means nothing is chance, and what leaks is refused: the whole recipe on every shape of a metric's labels."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from pilotfish.core import Conversation, Message, Span
from pilotfish.errors import LeakError, SettingError
from pilotfish.heads import FitConfig, Form, Head, HeadBank
from pilotfish.models import LoadedModel, Pair, evenly_spaced_sites
from pilotfish.runs import generator
from pilotfish.scores import FittedHead, Reading, RecipeConfig, RivalConfig, build_bank
from pilotfish.scores.measured import Measurement
from pilotfish.scores.prepared import prepare

METRIC = "anything"
CHUNKS = 5
SIZES = {"train": 24, "validation": 24, "test": 60}
CONFIG = RecipeConfig(
    num_sites=2,
    budget=0.2,
    num_resamples=60,
    fit=FitConfig(form=Form(window=4), epochs=3, batch_tokens=256, learning_rate=0.01, weight_decays=(0.1, 1.0)),
)


@pytest.fixture(scope="module")
def reader(pair: Pair) -> LoadedModel:
    assert pair.draft is not None and pair.draft_identity is not None
    return LoadedModel(pair.draft, pair.tokenizer, pair.draft_identity, "tiny")


class Drawn:
    """Words, labels and places that have nothing to do with each other."""

    def __init__(self, seed: int) -> None:
        self._random = generator(seed, "chance")

    def below(self, count: int) -> int:
        return int(torch.randint(count, (), generator=self._random))

    def words(self) -> str:
        return "".join("".join(chr(97 + self.below(26)) for _ in range(4)) + " " for _ in range(CHUNKS)).strip() + "."

    def span(self, message: int, value: float = 1.0) -> Span:
        """One of the chunks, each as likely, so that no place in a text tells anything."""
        start = 5 * self.below(CHUNKS)
        return Span(message, start, start + 5, METRIC, value)


Shape = Callable[[str, Drawn, bool], Conversation]


def spans_or_none(name: str, draw: Drawn, is_positive: bool) -> Conversation:
    """As toxicity: a span, or the label 0."""
    messages = (Message("user", "write"), Message("assistant", draw.words()))
    spans, labels = ((draw.span(1),), {}) if is_positive else ((), {METRIC: 0.0})
    return Conversation(name, name, messages, spans, labels)


def twins(name: str, draw: Drawn, is_positive: bool) -> Conversation:
    """As insecure code: two answers to one prompt, one with a span."""
    group = name.rsplit("-", 1)[0] + f"-{int(name.rsplit('-', 1)[1]) // 2}"
    messages = (Message("user", f"write {group}"), Message("assistant", draw.words()))
    spans, labels = ((draw.span(1),), {}) if is_positive else ((), {METRIC: 0.0})
    return Conversation(name, group, messages, spans, labels)


def responses(name: str, draw: Drawn, is_positive: bool) -> Conversation:
    """As refusal and untruthful answer: labels of whole responses."""
    messages = (Message("user", draw.words()), Message("assistant", draw.words()))
    return Conversation(name, name, messages, labels={METRIC: float(is_positive)})


def prompts(name: str, draw: Drawn, is_positive: bool) -> Conversation:
    """As prompt injection: a user's message, with a span or with one of value 0 on all of it."""
    words = draw.words()
    span = draw.span(0) if is_positive else Span(0, 0, len(words), METRIC, 0.0)
    return Conversation(name, name, (Message("user", words),), (span,), {} if is_positive else {METRIC: 0.0})


def some_spans(name: str, draw: Drawn, is_positive: bool) -> Conversation:
    """As hallucination: some positive replies have no span that is known."""
    row = spans_or_none(name, draw, is_positive)
    if is_positive and draw.below(4) == 0:
        return Conversation(name, name, row.messages, labels={METRIC: 1.0})
    return row


SHAPES = [spans_or_none, twins, responses, prompts, some_spans]


def drawn_splits(shape: Shape, seed: int) -> tuple[dict[str, list[Conversation]], list[Conversation]]:
    draw = Drawn(seed)
    splits = {
        split: [shape(f"{split}-{index}", draw, bool(index % 2)) for index in range(count)]
        for split, count in SIZES.items()
    }
    benign = [
        Conversation(f"benign-{index}", f"benign-{index}", (Message("user", "hm"), Message("assistant", draw.words())))
        for index in range(20)
    ]
    return splits, benign


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.__name__)
def test_labels_that_mean_nothing_give_chance_within_three_deviations(shape, reader, tmp_path):
    pytest.importorskip("sklearn")
    splits, benign = drawn_splits(shape, seed=1)
    config = RecipeConfig(**{**vars_of(CONFIG), "rivals": RivalConfig(names=("words", "length"))})
    card = build_bank(splits, benign, reader, metric=METRIC, config=config, work_folder=tmp_path, seed=0).bank.card
    found = {**card.metrics, **card.baselines}
    names = {"auroc_response", "auroc_response/words", "auroc_response/length"}
    names |= set() if shape is responses else {"auroc_token", "auroc_within", "auroc_token/words"}
    names |= {"pairwise_accuracy"} if shape is twins else set()
    for name in sorted(names):
        figure = found[f"{METRIC}/{name}"]
        deviation = (figure.high - figure.low) / 3.92
        assert deviation < 0.1, f"{name}: an interval so wide would hold anything"
        assert abs(figure.value - 0.5) < 3 * deviation + 1e-9, name
    if shape is not responses:
        assert card.better_than_words[METRIC] == (card.metrics[f"{METRIC}/auroc_token_minus_words"].low > 0)


def vars_of(config: RecipeConfig) -> dict[str, object]:
    return {name: getattr(config, name) for name in RecipeConfig.__dataclass_fields__}


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.__name__)
def test_a_head_that_always_says_the_same_is_chance(shape, reader, tmp_path):
    splits, _ = drawn_splits(shape, seed=2)
    texts = {name: prepare(rows, reader, METRIC, 512) for name, rows in splits.items()}
    sites = evenly_spaced_sites(reader.model, 2)
    size = len(sites) * reader.identity.hidden_size
    blind = Head(METRIC, sites, torch.zeros(2, size), torch.tensor([0.3, 0.3]), outputs=torch.tensor([0.3]))
    head = FittedHead(HeadBank([blind], reader.identity), Reading(reader, sites, tmp_path), None, {})
    found = Measurement(
        texts=texts,
        scored={"head": {name: head.scored(texts[name]) for name in ("validation", "test")}},
        metric=METRIC,
        tokenizer=reader.tokenizer,
        threshold=0.9,
        num_resamples=50,
        seed=0,
    ).figures()
    for name in ("auroc_token", "auroc_within", "auroc_response", "pairwise_accuracy"):
        if name in found.metrics:
            assert found.metrics[name][:3] == (0.5, 0.5, 0.5)
    assert ("auroc_token" in found.metrics) == (shape is not responses)
    for name in ("tpr_response_at_1pct_fpr", "recall_at_threshold", "fpr_at_threshold"):
        assert found.metrics[name][:3] == (0.0, 0.0, 0.0)
    if shape is responses:
        assert "character_f1" not in found.metrics
        return
    with_labels = [text for text in texts["test"] if bool(text.labels.isfinite().any())]
    share = sum(not bool((text.labels > 0).any()) for text in with_labels) / len(with_labels)
    everything = (1 - share) * 2 * 5 / (5 + 25)
    assert found.metrics["character_f1"].value <= max(share, everything) + 1e-9, "all is marked or nothing"


@pytest.mark.parametrize("name", ["train", "validation", "test", "elsewhere"])
def test_a_document_on_two_sides_is_refused_before_anything_is_recorded(name, reader, tmp_path):
    splits, benign = drawn_splits(spans_or_none, seed=3)
    splits["elsewhere"] = [spans_or_none(f"other-{i}", Drawn(4), bool(i % 2)) for i in range(4)]
    other = "validation" if name == "train" else "train"
    copied = splits[other][0]
    same_text = Conversation("copy", "a group of its own", copied.messages, copied.spans, copied.labels)
    for leak in (
        same_text,
        Conversation("copy", copied.group, (Message("assistant", "x" * 80),), labels={METRIC: 0.0}),
    ):
        leaking = splits | {name: [*splits[name], leak]}
        with pytest.raises(LeakError, match=f"'{name}'|'{other}'"):
            build_bank(leaking, benign, reader, metric=METRIC, config=CONFIG, work_folder=tmp_path / "w", seed=0)
    assert not (tmp_path / "w").exists()


def test_texts_from_elsewhere_may_be_those_of_the_test_but_not_the_benign_ones(reader, tmp_path):
    splits, benign = drawn_splits(spans_or_none, seed=5)
    config = RecipeConfig(**{**vars_of(CONFIG), "rivals": RivalConfig(names=())})

    def built(elsewhere: list[Conversation]):
        given = splits | {"elsewhere": elsewhere}
        return build_bank(given, benign, reader, metric=METRIC, config=config, work_folder=tmp_path, seed=0).bank.card

    card = built(splits["test"])
    for figure in ("auroc_token", "auroc_response", "character_f1", "fpr_at_threshold"):
        assert card.metrics[f"{METRIC}/elsewhere/elsewhere/{figure}"] == card.metrics[f"{METRIC}/{figure}"]
    assert "elsewhere/elsewhere" in {row.role for row in card.data}
    with pytest.raises(LeakError, match="'benign'"):
        built([*splits["test"], benign[0]])
    with pytest.raises(SettingError, match="but 'benign'"):
        build_bank(splits | {"benign": []}, benign, reader, metric=METRIC, config=config, work_folder=tmp_path, seed=0)


def test_texts_from_elsewhere_with_one_label_tell_what_they_can(reader, tmp_path):
    splits, benign = drawn_splits(twins, seed=6)
    draw = Drawn(7)
    splits["only_positive"] = [spans_or_none(f"positive-{i}", draw, True) for i in range(6)]
    splits["only_negative"] = [responses(f"negative-{i}", draw, False) for i in range(6)]
    config = RecipeConfig(**{**vars_of(CONFIG), "rivals": RivalConfig(names=())})
    card = build_bank(splits, benign, reader, metric=METRIC, config=config, work_folder=tmp_path, seed=0).bank.card
    positive, negative = (
        {name.rsplit("/", 1)[1] for name in card.metrics if name.startswith(f"{METRIC}/elsewhere/{part}/")}
        for part in ("only_positive", "only_negative")
    )
    assert {"auroc_token", "recall_at_threshold", "share_detected"} <= positive
    assert "auroc_response" not in positive | negative
    assert negative == {"fpr_at_threshold"}
    assert not any(math.isnan(figure.value) for figure in card.metrics.values())
