"""Figures of a scorer on held-out texts, by hand and against each other."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from pilotfish.scores import ScoredText, compare, evaluate

NAN = math.nan


def random(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def text(name: str, label: float, score: float, *, group: str | None = None, tokens: tuple = ()) -> ScoredText:
    return ScoredText(
        id=name,
        group=group or name,
        prompt="p",
        label=label,
        score=score,
        token_labels=torch.tensor([y for y, _ in tokens]),
        token_scores=torch.tensor([s for _, s in tokens]) if tokens else None,
    )


TEXTS = [
    text("a", 1.0, 0.9, group="a", tokens=((1.0, 0.9), (0.0, 0.2), (NAN, 5.0))),
    text("b", 0.0, 0.3, group="a", tokens=((0.0, 0.3), (0.0, 0.1))),
    text("c", 1.0, 0.4, group="c", tokens=((1.0, 0.25), (0.0, 0.4))),
    text("d", 0.0, 0.5, group="c", tokens=((0.0, 0.5), (0.0, 0.0))),
    text("e", 1.0, 0.8, group="e", tokens=((1.0, 0.8), (0.0, 0.3))),
    text("f", 0.0, 0.2, group="e", tokens=((0.0, 0.2), (0.0, 0.2))),
]


def test_the_figures_are_those_counted_by_hand():
    figures = evaluate(TEXTS, threshold=0.45, generator=random(), num_resamples=20)
    assert {name: round(figure.value, 6) for name, figure in figures.items()} == {
        "auroc_token": round((9 + 5 + 9) / 27, 6),  # 0.9 and 0.8 beat all nine negatives, 0.25 beats five
        "auroc_response": round(8 / 9, 6),
        "tpr_response_at_1pct_fpr": round(2 / 3, 6),
        "pairwise_accuracy": round(2 / 3, 6),
        "recall_at_threshold": round(2 / 3, 6),
        "fpr_at_threshold": round(1 / 3, 6),
    }
    assert {figure.n for figure in figures.values()} == {3}


def test_unlabelled_tokens_and_responses_change_no_figure():
    extra = dataclasses.replace(
        TEXTS[0], id="g", group="g", label=NAN, token_labels=torch.tensor([NAN]), token_scores=torch.tensor([3.0])
    )
    with_extra = evaluate([*TEXTS, extra], threshold=0.45, generator=random(), num_resamples=20)
    without = evaluate(TEXTS, threshold=0.45, generator=random(), num_resamples=20)
    assert {name: figure.value for name, figure in with_extra.items()} == {
        name: figure.value for name, figure in without.items()
    }


def test_a_scorer_of_whole_responses_has_no_token_figures():
    whole = [dataclasses.replace(one, token_scores=None) for one in TEXTS]
    assert "auroc_token" not in evaluate(whole, generator=random(), num_resamples=20)
    assert set(compare(TEXTS, whole, generator=random(), num_resamples=20)) == {"auroc_response"}


def test_figures_that_the_texts_do_not_define_are_left_out_and_logged(caplog):
    positives = [dataclasses.replace(one, label=1.0) for one in TEXTS]
    figures = evaluate(positives, threshold=0.45, generator=random(), num_resamples=20)
    assert set(figures) == {"auroc_token", "recall_at_threshold"}
    assert "auroc_response is left out" in caplog.text


def test_a_scorer_does_not_beat_itself():
    for difference in compare(TEXTS, TEXTS, generator=random(), num_resamples=50).values():
        assert difference[:3] == (0.0, 0.0, 0.0)


def test_the_interval_of_a_difference_is_above_zero_only_for_a_better_scorer():
    draw = random(1)
    groups = [f"g{i // 2}" for i in range(200)]
    labels = [float(i % 2) for i in range(200)]
    noise = torch.randn(3, 200, generator=draw).tolist()

    def scorer(strength: float, row: int) -> list[ScoredText]:
        return [
            text(str(i), y, strength * y + noise[row][i], group=g, tokens=((y, strength * y + noise[row][i]),))
            for i, (g, y) in enumerate(zip(groups, labels, strict=True))
        ]

    better = compare(scorer(2.0, 0), scorer(0.0, 1), generator=random(), num_resamples=200)
    equal = compare(scorer(0.0, 2), scorer(0.0, 1), generator=random(), num_resamples=200)
    for name in ("auroc_token", "auroc_response"):
        assert better[name].low > 0.2
        assert equal[name].low < 0 < equal[name].high


@pytest.mark.parametrize("label", [1.0, 0.0])
def test_responses_to_other_prompts_make_no_pairs(label):
    same = [dataclasses.replace(one, prompt=str(i)) for i, one in enumerate(TEXTS)]
    assert "pairwise_accuracy" not in evaluate(same, generator=random(), num_resamples=20)
