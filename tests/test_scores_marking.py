"""Marked characters by hand, against the published figure's formula, and as one sweep finds them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pilotfish.core import Conversation, Message, Span
from pilotfish.models import Identity, LoadedModel, tiny_tokenizer
from pilotfish.scores import Marking, ScoredText, character_f1, character_scores, choose_marking, labelled_spans
from pilotfish.scores.marking import GAPS
from pilotfish.scores.prepared import Text, prepare, scored

METRIC = "rude"
TOKENIZER = tiny_tokenizer()
READER = LoadedModel(None, TOKENIZER, Identity("none", "w", "t", 4, 1, 400), "only its tokenizer is used")


def text(reply: str, *marked: str, name: str = "a") -> Text:
    """A reply with a span on each of some of its stretches."""
    spans = tuple(Span(1, reply.index(part), reply.index(part) + len(part), METRIC, 1.0) for part in marked)
    messages = (Message("user", "say"), Message("assistant", reply))
    row = Conversation(name, name, messages, spans=spans, labels={} if spans else {METRIC: 0.0})
    return prepare([row], READER, METRIC, 512)[0]


def says(one: Text, scores: dict[str, float], *, otherwise: float = 0.0) -> ScoredText:
    """Scores by stretch of the reply: every token that touches it, if it is there."""
    values = torch.full((len(one.tokens.token_ids),), otherwise)
    for stretch, score in scores.items():
        start = one.tokens.text.find(stretch, one.tokens.text.index("assistant"))
        if start < 0:
            continue
        for token, (first, last) in enumerate(one.tokens.offsets):
            if first < start + len(stretch) and last > start:
                values[token] = score
    return scored(one, 0.0, values)


def marked(one: Text, found: ScoredText, marking: Marking) -> str:
    """The characters that are marked, others as dots."""
    scores = character_scores(one, found.token_scores, whole_words=marking.whole_words, gap=marking.gap)
    reply = one.conversation.messages[-1].content
    start = one.tokens.text.index(reply)
    assert not (scores[:start] > -np.inf).any() and not (scores[start + len(reply) :] > -np.inf).any()
    chosen = scores[start : start + len(reply)] >= marking.threshold
    return "".join(c if is_marked else "." for c, is_marked in zip(reply, chosen, strict=True))


def test_marks_are_made_of_characters_whose_tokens_score_enough():
    one = text("you silly old fool, ok")
    found = says(one, {"silly": 0.9, "fool": 0.7, "old": 0.2})
    assert marked(one, found, Marking(0.5)) == "....silly.....fool...."
    assert marked(one, found, Marking(0.85)) == "....silly............."
    assert marked(one, found, Marking(0.15)) == "....silly old fool....", (
        "white space within a stretch, not at its ends"
    )
    assert marked(one, found, Marking(0.5, gap=4)) == "....silly.....fool....", "five characters lie between them"
    assert marked(one, found, Marking(0.5, gap=5)) == "....silly old fool...."


def test_a_word_scores_what_its_highest_token_scores_where_that_is_asked_for():
    one = text("a sillyish thing")
    found = says(one, {"ill": 0.9})
    assert marked(one, found, Marking(0.5)) == "...ill.........."
    assert marked(one, found, Marking(0.5, whole_words=True)) == "..sillyish......"


def test_tokens_without_a_score_or_a_label_mark_nothing():
    one = text("bad bad")
    everything = scored(one, 0.0, torch.full((len(one.tokens.token_ids),), 1.0))
    assert marked(one, everything, Marking(0.5)) == "bad bad"
    nothing = scored(one, 0.0, torch.full((len(one.tokens.token_ids),), math.nan))
    for whole_words in (True, False):
        assert marked(one, nothing, Marking(-math.inf, whole_words, 4)).strip(".") in {"", "bad bad"}
        assert marked(one, nothing, Marking(-1e9, whole_words, 4)) == "......."


def published_f1(predicted: set[int], gold: set[int]) -> float:
    """The formula of SemEval-2021 task 5, in sets of character offsets."""
    if not gold:
        return 1.0 if not predicted else 0.0
    if not predicted:
        return 0.0
    precision, recall = len(predicted & gold) / len(predicted), len(predicted & gold) / len(gold)
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def test_character_f1_by_hand():
    texts = [
        text("you silly fool", "silly fool", name="a"),
        text("fine by me", name="b"),
        text("oh no", "no", name="c"),
    ]
    spans = labelled_spans(texts, METRIC, TOKENIZER)
    found = {
        "a": says(texts[0], {"fool": 0.9}),
        "b": says(texts[1], {"me": 0.4}),
        "c": says(texts[2], {"oh": 0.4}),
    }
    two_thirds = 2 * 4 / (4 + 10)
    assert character_f1(spans, found, Marking(0.5)) == pytest.approx([two_thirds, 1.0, 0.0])
    assert character_f1(spans, found, Marking(0.3)) == pytest.approx([two_thirds, 0.0, 0.0])
    assert character_f1(spans, found, Marking(math.inf)) == [0.0, 1.0, 0.0], "nothing marked"


def test_white_space_at_the_ends_of_a_label_is_not_asked_for():
    tight, loose = (text("you silly fool now", words, name=words) for words in ("silly", " silly "))
    for one in (tight, loose):
        found = scored(one, 0.0, torch.tensor([0.0 if math.isnan(at) else at for at in one.labels.tolist()]))
        assert character_f1(labelled_spans([one], METRIC, TOKENIZER), {found.id: found}, Marking(0.5)) == [1.0]


@given(
    gold=st.lists(st.tuples(st.integers(0, 20), st.integers(1, 6)), max_size=3),
    values=st.lists(st.sampled_from([0.0, 0.2, 0.4, 0.6, 0.8, 1.0]), min_size=60, max_size=60),
    threshold=st.sampled_from([0.1, 0.3, 0.5, 0.9, 1.1]),
    whole_words=st.booleans(),
    gap=st.sampled_from(GAPS),
)
@settings(max_examples=30, deadline=None)
def test_the_figure_is_the_published_formula_on_the_marked_characters(gold, values, threshold, whole_words, gap):
    reply = "abc de  fghij k, lmno pq"
    spans = tuple(Span(1, start, min(start + size, len(reply)), METRIC, 1.0) for start, size in gold)
    row = Conversation(
        "a", "a", (Message("user", "u"), Message("assistant", reply)), spans, {} if spans else {METRIC: 0.0}
    )
    one = prepare([row], READER, METRIC, 512)[0]
    found = scored(one, 0.0, torch.tensor(values[: len(one.tokens.token_ids)]))
    marking = Marking(threshold, whole_words, gap)
    start = one.tokens.text.index(reply)
    scores = character_scores(one, found.token_scores, whole_words=whole_words, gap=gap)[start : start + len(reply)]
    predicted = {at for at, score in enumerate(scores) if score >= threshold}
    trimmed = [(span, reply[span.start : span.end]) for span in spans]
    labelled = {
        at
        for span, words in trimmed
        for at in range(span.start + len(words) - len(words.lstrip()), span.start + len(words.rstrip()))
    }
    [f1] = character_f1(labelled_spans([one], METRIC, TOKENIZER), {"a": found}, marking)
    assert f1 == pytest.approx(published_f1(predicted, labelled))
    plain = character_scores(one, found.token_scores, whole_words=whole_words)[start : start + len(reply)]
    assert (scores >= plain).all(), "a gap only adds marks"
    edges = [at for at in predicted if at - 1 not in predicted or at + 1 not in predicted]
    assert all(not reply[at].isspace() for at in edges)


def test_the_marking_that_is_chosen_is_the_best_of_all_and_marks_nothing_where_nothing_helps():
    texts = [
        text("you silly fool", "silly fool", name="a"),
        text("a silly hat", name="b"),
        text("fool me", "fool", name="c"),
    ]
    spans = labelled_spans(texts, METRIC, TOKENIZER)
    found = {
        "a": says(texts[0], {"silly": 0.6, "fool": 0.9}),
        "b": says(texts[1], {"silly": 0.5}),
        "c": says(texts[2], {"fool": 0.7}),
    }
    chosen = choose_marking(spans, found)
    assert np.mean(character_f1(spans, found, chosen)) == 1.0
    assert (chosen.whole_words, chosen.gap) == (False, 0), "of equals the simplest"
    assert 0.5 < chosen.threshold < 0.61
    backwards = {
        name: scored(each, 0.0, -says(each, {"silly": 1.0, "fool": 1.0}).token_scores)
        for name, each in zip("abc", texts, strict=True)
    }
    assert np.mean(character_f1(spans, backwards, choose_marking(spans, backwards))) >= 1 / 3, "as marking nothing has"


def test_a_gap_or_whole_words_are_chosen_where_they_help():
    one = text("oh you silly, fool of men", "silly, fool", name="a")
    spans = labelled_spans([one], METRIC, TOKENIZER)
    found = {"a": says(one, {"sil": 0.9, "foo": 0.9, "of": 0.8})}
    chosen = choose_marking(spans, found)
    assert chosen.whole_words and chosen.gap > 0
    assert character_f1(spans, found, chosen) == [1.0]


def test_texts_whose_spans_nobody_marked_are_no_part_of_the_figure():
    whole = Conversation("w", "w", (Message("user", "u"), Message("assistant", "bad")), labels={METRIC: 1.0})
    prepared = prepare([whole], READER, METRIC, 512)
    assert labelled_spans(prepared, METRIC, TOKENIZER) == []


def test_a_span_that_was_cut_off_counts_as_missed():
    one = text("fine words and then silly ones", "silly")
    cut = prepare([one.conversation], READER, METRIC, 20)
    assert len(cut) == 1 and math.isnan(cut[0].label)
    spans = labelled_spans(cut, METRIC, TOKENIZER)
    everything = scored(cut[0], 0.0, torch.full((20,), 1.0))
    assert character_f1(spans, {"a": everything}, Marking(math.inf)) == [0.0]
    assert spans[0].is_span.sum() == len("silly")
