"""Fusion on seeded streams, where it is known whether the second one says anything."""

import math

import pytest
import torch

from pilotfish.errors import LeakError, SettingError, TextError
from pilotfish.scores import Estimate
from pilotfish.scores.fusion import SignalText, cross_fitted, fit_fusion, fusion_gain

NUM_TOKENS = 24


def made(num_texts: int, *, signal: float, head: float = 0.5, seed: int = 0) -> list[SignalText]:
    """Answers, every second one positive in its middle third: there the head's log-odds are higher by `head` and the
    second stream's by `signal`.
    """
    random = torch.Generator().manual_seed(seed)
    texts = []
    for index in range(num_texts):
        labels = torch.zeros(NUM_TOKENS, dtype=torch.float64)
        labels[8:16] = index % 2
        noise = torch.randn(NUM_TOKENS, 2, generator=random, dtype=torch.float64)
        values = (noise + labels[:, None] * torch.tensor([head, signal])).sigmoid()
        texts.append(SignalText(f"text {index}", f"group {index // 2}", float(index % 2), labels, values))
    return texts


def gain(texts: list[SignalText], level: str = "answer", **options) -> dict[str, Estimate]:
    random = torch.Generator().manual_seed(1)
    return fusion_gain(texts, level=level, num_folds=5, generator=random, num_resamples=200, **options)


@pytest.mark.parametrize("level", ["token", "answer"])
def test_an_informative_second_signal_is_shown_to_help(level):
    found = gain(made(80, signal=1.5), level)
    assert found["auroc_gain"].low > 0
    assert found["recall_gain"].value > 0
    assert found["auroc_gain"].value == pytest.approx(found["auroc"].value - found["auroc_alone"].value)
    assert found["auroc_gain"].n == 40


@pytest.mark.parametrize("level", ["token", "answer"])
def test_a_noisy_second_signal_is_not_shown_to_help(level):
    found = gain(made(80, signal=0.0), level)
    assert found["auroc_gain"].low < 0
    assert found["auroc_gain"].value < 0.03
    assert found["auroc_alone"].value > 0.55


def test_scores_are_probabilities_that_rise_with_both_streams():
    fusion = fit_fusion(made(80, signal=1.0), level="token", num_streams=2)
    low, high = torch.full((2, NUM_TOKENS, 2), 0.2, dtype=torch.float64)
    high[:, 0] = 0.8
    highest = torch.full((NUM_TOKENS, 2), 0.8, dtype=torch.float64)
    rows = [
        SignalText(str(i), "new", 0.0, torch.zeros(NUM_TOKENS), values) for i, values in enumerate((low, high, highest))
    ]
    first, second, third = fusion.scores(rows)
    assert bool(((first < second) & (second < third)).all())
    assert bool(((first > 0) & (third < 1)).all())


def test_at_the_level_of_tokens_a_score_depends_on_no_later_token():
    fusion = fit_fusion(made(80, signal=1.0), level="token", num_streams=2)
    text = made(2, signal=1.0, seed=3)[1]._replace(group="new")
    cut = text._replace(token_labels=text.token_labels[:10], values=text.values[:10])
    whole, part = fusion.scores([text, cut])
    assert torch.allclose(whole[:10], part)


def test_a_group_that_was_fitted_on_is_refused():
    texts = made(40, signal=1.0)
    fusion = fit_fusion(texts, level="answer", num_streams=2)
    with pytest.raises(LeakError, match=r"group 3.*score other groups"):
        fusion.scores([texts[6]])


def test_folds_never_part_a_group_and_the_last_fold_scores_as_a_fit_on_the_others():
    texts = made(40, signal=1.0)
    names = sorted({text.group for text in texts})
    held = [index for index, text in enumerate(texts) if names.index(text.group) % 4 == 3]
    fusion = fit_fusion([text for i, text in enumerate(texts) if i not in held], level="answer", num_streams=2)
    found = cross_fitted(texts, level="answer", num_streams=2, num_folds=4)
    for index in held:
        assert torch.equal(found[index], fusion.scores([texts[index]])[0])


def test_a_gap_in_the_second_stream_is_filled_and_one_in_the_heads_is_no_score():
    fusion = fit_fusion(made(80, signal=1.0), level="token", num_streams=2)
    values = torch.full((3, 2), 0.5, dtype=torch.float64)
    values[1, 1], values[2, 0] = math.nan, math.nan
    (found,) = fusion.scores([SignalText("gaps", "new", 0.0, torch.zeros(3), values)])
    assert found.isnan().tolist() == [False, False, True]


def test_unlabelled_and_unscored_rows_are_left_out():
    texts = made(80, signal=1.0)
    nothing = torch.full((NUM_TOKENS, 2), math.nan, dtype=torch.float64)
    unlabelled = SignalText("a", "extra", math.nan, torch.full((NUM_TOKENS,), math.nan), nothing.nan_to_num(0.9))
    unscored = SignalText("b", "extra", 1.0, torch.ones(NUM_TOKENS), nothing)
    fitted, more = (fit_fusion(each, level="token", num_streams=2) for each in (texts, [*texts, unlabelled, unscored]))
    assert more.weight.tolist() == fitted.weight.tolist()


def test_what_cannot_be_fitted_is_refused():
    texts = made(8, signal=1.0)
    with pytest.raises(TextError, match="0 positive, 4 negative"):
        fit_fusion([text for text in texts if text.label == 0], level="answer", num_streams=2)
    with pytest.raises(SettingError, match="3 streams are asked"):
        fit_fusion(texts, level="answer", num_streams=3)
    with pytest.raises(SettingError, match="9 folds of 4 groups"):
        cross_fitted(texts, level="answer", num_streams=2, num_folds=9)
