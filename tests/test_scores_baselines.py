"""What words and length alone say: they learn what they can see, nothing after the token, nothing from noise."""

import math
import sys
from dataclasses import replace

import pytest
import torch

from pilotfish.core import Conversation, Message, Span
from pilotfish.errors import SettingError, TextError
from pilotfish.models import tiny_tokenizer
from pilotfish.runs import generator
from pilotfish.scores import auroc, response_length, response_words, token_words
from pilotfish.scores.baselines import WINDOW
from pilotfish.texts import TokenizedText, tokenize

pytest.importorskip("sklearn")

METRIC = "danger"
WORDS = ("gets(s)", "fgets(s)", "int x;", "return 0;", "free(p);", "if (p)", "x += 1;")
TOKENIZER = tiny_tokenizer()


def text_of(index: int, *, is_positive: bool) -> TokenizedText:
    """Every other text holds one labelled word among the others."""
    random = generator(index, "text")
    words = [WORDS[i] for i in torch.randint(1, len(WORDS), (8,), generator=random).tolist()]
    spans = ()
    if is_positive:
        place = index % len(words)
        words[place] = WORDS[0]
        start = len("".join(f"{word} " for word in words[:place]))
        spans = (Span(message=1, start=start, end=start + len(WORDS[0]), metric=METRIC, value=1.0),)
    conversation = Conversation(
        id=str(index),
        group=f"document {index // 2}",
        messages=(Message("user", "Write C."), Message("assistant", " ".join(words))),
        spans=spans,
        labels={METRIC: float(is_positive)},
    )
    return tokenize(conversation, TOKENIZER)


TEXTS = [text_of(index, is_positive=index % 2 == 0) for index in range(60)]
TRAIN, TEST = TEXTS[:40], TEXTS[40:]


def token_labels(texts):
    return [torch.tensor(text.labels[METRIC]) for text in texts]


def response_labels(texts):
    return torch.tensor([text.response_labels[METRIC] for text in texts])


def scored(test, **changes):
    given = {"train": TRAIN, "labels": token_labels(TRAIN), "generator": generator(0, "words")} | changes
    return token_words(given.pop("train"), given.pop("labels"), test, **given)


def quality(scores, labels):
    scores, labels = torch.cat(scores), torch.cat(labels)
    return auroc(scores[labels.isfinite()], labels[labels.isfinite()])


def test_token_words_find_the_words_that_were_labelled():
    found = scored(TEST)
    assert [len(scores) for scores in found] == [len(text.token_ids) for text in TEST]
    assert quality(found, token_labels(TEST)) > 0.95


def test_token_words_learn_nothing_from_shuffled_labels():
    flat = torch.cat(token_labels(TRAIN))
    known = flat.isfinite().nonzero()[:, 0]
    flat[known] = flat[known[torch.randperm(len(known), generator=generator(0, "shuffle"))]]
    shuffled = list(flat.split([len(text.token_ids) for text in TRAIN]))
    assert abs(quality(scored(TEST, labels=shuffled), token_labels(TEST)) - 0.5) < 0.2


@pytest.mark.parametrize("tail", ["gets(s)", "\n\n", "é" * WINDOW], ids=["code", "lines", "accents"])
def test_a_token_is_scored_by_nothing_that_comes_after_it(tail):
    changed = []
    for count, whole in enumerate(TEST, start=20):
        read = max(end for _, end in whole.offsets[:count])
        offsets = [*whole.offsets[:count], (read, read + len(tail))]
        changed.append(replace(whole, text=whole.text[:read] + tail, offsets=offsets))
    for count, (before, after) in enumerate(zip(scored(TEST), scored(changed), strict=True), start=20):
        assert torch.equal(after[:count], before[:count])
        assert len(after) == count + 1


def test_a_token_is_scored_by_nothing_before_its_window():
    text = TEST[0]
    far = replace(text, text="@" + text.text[1:])
    before, after = scored([text, far])
    ends = torch.tensor([end for _, end in text.offsets])
    assert bool((ends > WINDOW).any())
    assert torch.equal(after[ends > WINDOW], before[ends > WINDOW])
    assert not torch.equal(after, before)


def test_a_token_without_characters_scores_as_the_one_before_it():
    text = TEST[0]
    ended = replace(text, offsets=[*text.offsets, (0, 0)], token_ids=[*text.token_ids, 0])
    assert scored([ended])[0][-1] == scored([text])[0][-1]


def sizes(texts):
    return torch.tensor([len(text.token_ids) for text in texts])


def test_unlabelled_texts_do_not_change_a_baseline():
    noise = replace(TEST[0], text=TEST[0].text.replace("x", "gets"), group="noise")
    without = scored(TEST)
    unlabelled = torch.full((len(noise.token_ids),), math.nan)
    assert all(
        map(torch.equal, scored(TEST, train=[*TRAIN, noise], labels=[*token_labels(TRAIN), unlabelled]), without)
    )
    labels = torch.cat([response_labels(TRAIN), torch.tensor([math.nan])])
    assert torch.equal(
        response_words([*TRAIN, noise], labels, TEST), response_words(TRAIN, response_labels(TRAIN), TEST)
    )
    one, more = (
        response_length(rows, each, sizes(rows), sizes(TEST))
        for rows, each in ((TRAIN, response_labels(TRAIN)), ([*TRAIN, noise], labels))
    )
    assert torch.equal(one, more)


def test_the_generator_chooses_the_training_tokens():
    first, again, other = (scored(TEST, generator=generator(seed, "words"), max_tokens=300)[0] for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_response_words_find_texts_with_the_labelled_word():
    found = response_words(TRAIN, response_labels(TRAIN), TEST)
    assert auroc(found, response_labels(TEST)) > 0.9


def test_what_was_cut_off_is_not_read():
    cut = replace(TEST[0], token_ids=TEST[0].token_ids[:20], offsets=TEST[0].offsets[:20])
    other_end = replace(cut, text=cut.text[: cut.offsets[-1][1]] + "gets(s) gets(s)")
    first, second = response_words(TRAIN, response_labels(TRAIN), [cut, other_end]).tolist()
    assert first == second


@pytest.mark.parametrize("sign", [1, -1])
def test_length_alone_ranks_texts_by_their_tokens(sign):
    counts = torch.arange(1, 31)
    texts = [replace(TRAIN[0], group=str(count)) for count in counts.tolist()]
    found = response_length(texts, (sign * counts > sign * 15).double(), counts, counts)
    assert bool((found.diff() * sign > 0).all())


@pytest.mark.parametrize("label", [0.0, 1.0, math.nan])
def test_training_labels_of_one_kind_are_refused(label):
    with pytest.raises(TextError, match="positive and negative training tokens"):
        scored(TEST, labels=[torch.full((len(text.token_ids),), label) for text in TRAIN])
    one_kind = torch.full((len(TRAIN),), label)
    for call in (
        lambda: response_words(TRAIN, one_kind, TEST),
        lambda: response_length(TRAIN, one_kind, sizes(TRAIN), sizes(TEST)),
    ):
        with pytest.raises(TextError, match="positive and negative training texts"):
            call()


def test_without_scikit_learn_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    labels = response_labels(TRAIN)
    for call in (
        lambda: scored(TEST),
        lambda: response_words(TRAIN, labels, TEST),
        lambda: response_length(TRAIN, labels, sizes(TRAIN), sizes(TEST)),
    ):
        with pytest.raises(SettingError, match=r"pip install 'pilotfish\[evaluate\]'"):
            call()
