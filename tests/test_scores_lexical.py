"""The lexical control: a head that reads words alone is shown to, one that does not is not."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pilotfish.errors import SettingError
from pilotfish.runs import generator
from pilotfish.scores.lexical import lexical_control, wordless_positives, wordy_negatives
from pilotfish.scores.scored import ScoredText

NAN = math.nan


def scored(scores, labels):
    return [
        ScoredText(
            id=str(row),
            group=f"document {row % 10}",
            prompt="",
            label=label,
            score=score,
            token_labels=torch.tensor([label]),
            token_scores=None,
        )
        for row, (score, label) in enumerate(zip(scores, labels, strict=True))
    ]


def control(head, words, labels, **changes):
    options = {"threshold": 0.5, "generator": generator(0, "bootstrap"), "num_resamples": 50} | changes
    return lexical_control(scored(head, labels), scored(words, labels), **options)


def test_the_wordiest_negatives_and_the_least_wordy_positives_are_taken_by_hand():
    words = torch.tensor([0.9, 0.1, 0.8, 0.3, 0.7, 0.2, 0.99])
    labels = torch.tensor([0.0, 0.0, 0.0, 0.0, 1.0, 1.0, NAN])
    assert wordy_negatives(words, labels, 0.5).tolist() == [0, 2]
    assert wordy_negatives(words, labels, 0.1).tolist() == [0]
    assert wordless_positives(words, labels, 0.5).tolist() == [5]


def test_ties_are_taken_in_the_order_of_the_texts():
    assert wordy_negatives(torch.ones(6), torch.zeros(6), 0.5).tolist() == [0, 1, 2]


@settings(max_examples=40)
@given(
    rows=st.lists(st.tuples(st.floats(-9, 9, width=32), st.sampled_from([0.0, 0.3, 0.5, 1.0, NAN])), max_size=30),
    share=st.floats(0.01, 1.0),
)
def test_the_chosen_negatives_are_a_share_of_them_and_outscore_the_rest(rows, share):
    words, labels = (torch.tensor(column) for column in (zip(*rows, strict=True) if rows else ([], [])))
    chosen = wordy_negatives(words, labels, share).tolist()
    negatives = {row for row, (_, label) in enumerate(rows) if label < 0.5}
    assert set(chosen) <= negatives
    assert share * len(negatives) - 1e-6 <= len(chosen) < share * len(negatives) + 1
    rest = negatives - set(chosen)
    assert not chosen or not rest or min(rows[row][0] for row in chosen) >= max(rows[row][0] for row in rest)


def test_the_figures_are_shares_of_what_the_threshold_flags_by_hand():
    labels = [0.0] * 20 + [1.0] * 20
    words = [row / 20 for row in range(20)] * 2
    head = [0.1] * 20 + [0.9] * 20
    for row in (3, 18, 19, 20):  # one plain negative flagged, both wordy ones; the least wordy positive missed
        head[row] = 1.0 - head[row]
    found = control(head, words, labels, share=0.1)
    assert found["fpr_wordy_negatives"].value == 1.0
    assert found["recall_wordless_positives"].value == 0.5
    assert found["lexical_gap"].value == pytest.approx(1.0 - 1 / 18)
    assert found["lexical_gap"].n == 10


def test_a_head_of_words_alone_falls_for_words_and_a_head_of_labels_does_not():
    random = generator(0, "texts")
    labels = (torch.rand(100, generator=random) < 0.5).double().tolist()
    words = torch.rand(100, generator=random).tolist()
    fooled, sound = control(words, words, labels), control(labels, words, labels)
    assert fooled["fpr_wordy_negatives"].value == 1.0
    assert fooled["recall_wordless_positives"].value == 0.0
    assert fooled["lexical_gap"].low > 0.2
    assert sound["fpr_wordy_negatives"].high == 0.0
    assert sound["recall_wordless_positives"].low == 1.0
    assert sound["lexical_gap"].value == 0.0


def test_unlabelled_texts_change_nothing():
    labels, words, head = [0.0, 1.0] * 20, [row / 40 for row in range(40)], [row % 7 / 7 for row in range(40)]
    plain = control(head, words, labels)
    assert plain
    assert control([*head, 1.0], [*words, 1.0], [*labels, NAN]) == plain


def test_a_figure_without_texts_is_left_out_and_said(caplog):
    found = control([0.1] * 40, [row / 40 for row in range(40)], [0.0] * 40, share=0.2)
    assert set(found) == {"fpr_wordy_negatives", "lexical_gap"}
    assert "recall_wordless_positives is left out" in caplog.text


def test_a_gap_without_other_negatives_is_left_out():
    assert "lexical_gap" not in control([0.1] * 40, [row / 40 for row in range(40)], [0.0, 1.0] * 20, share=1.0)


@pytest.mark.parametrize("share", [0.0, -0.1, 1.1, NAN])
def test_a_share_that_is_none_is_refused(share):
    with pytest.raises(SettingError, match=r"outside \(0, 1\]"):
        wordy_negatives(torch.zeros(3), torch.zeros(3), share)


def test_a_labelled_text_without_a_word_score_is_refused_and_an_unlabelled_one_is_not():
    words = torch.tensor([NAN, 0.2, 0.1])
    with pytest.raises(SettingError, match="word score of NaN"):
        wordy_negatives(words, torch.zeros(3))
    assert wordy_negatives(words, torch.tensor([NAN, 0.0, 0.0]), 1.0).tolist() == [1, 2]
