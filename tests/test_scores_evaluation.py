"""Figures of a scorer on held-out texts, by hand and against each other."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from pilotfish.scores import ScoredText, auroc, bootstrap_by_group, compare, evaluate
from pilotfish.scores.detection import FIGURES

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
        "tpr_response_at_0.1pct_fpr": round(2 / 3, 6),
        "auroc_within": round(2 / 3, 6),  # of a, c and e: 1, 0 and 1
        "ece_token": round(3.25 / 12, 6),  # fewer tokens than bins: each value has its own
        "brier_token": round(1.3325 / 12, 6),
        "share_detected": round(2 / 3, 6),
        "lag_median": 0.0,
        "lag_p90": 3.0,  # c is missed, and no text is longer than 3 tokens
        "exact_hit_rate": round(2 / 3, 6),
        "leaked_mean": 1.0,  # each onset is out before its own score
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
    assert set(evaluate(whole, threshold=0.45, generator=random(), num_resamples=20)) == {
        "auroc_response",
        "tpr_response_at_1pct_fpr",
        "tpr_response_at_0.1pct_fpr",
        "pairwise_accuracy",
        "recall_at_threshold",
        "fpr_at_threshold",
    }
    assert set(compare(TEXTS, whole, generator=random(), num_resamples=20)) == {"auroc_response", "pairwise_accuracy"}


def test_figures_that_the_texts_do_not_define_are_left_out_and_logged(caplog):
    positives = [dataclasses.replace(one, label=1.0) for one in TEXTS]
    figures = evaluate(positives, threshold=0.45, generator=random(), num_resamples=20)
    assert set(figures) == {"auroc_token", "auroc_within", "ece_token", "brier_token", "recall_at_threshold", *FIGURES}
    assert "auroc_response is left out" in caplog.text


def test_a_scorer_does_not_beat_itself():
    differences = compare(TEXTS, TEXTS, generator=random(), num_resamples=50)
    assert set(differences) == {"auroc_token", "auroc_response", "pairwise_accuracy", "auroc_within"}
    for difference in differences.values():
        assert difference[:3] == (0.0, 0.0, 0.0)


def many_texts(scores: torch.Tensor, *, shift: float = 0.0) -> list[ScoredText]:
    """A positive and a negative text of each group; row i scores the tokens of text i, the last the response."""
    labels = [[0.0, 1.0, 1.0, 0.0, NAN], [0.0] * 5]
    return [
        text(
            str(i),
            float(i % 2 == 0),
            float(row[-1]) + shift * (i % 2 == 0),
            group=f"g{i // 2}",
            tokens=tuple((y, s + shift * (y == 1.0)) for y, s in zip(labels[i % 2], row.tolist(), strict=True)),
        )
        for i, row in enumerate(scores)
    ]


CHANCE = ("auroc_token", "auroc_response", "pairwise_accuracy", "auroc_within")


def test_a_constant_scorer_is_chance():
    figures = evaluate(many_texts(torch.full((40, 5), 0.3)), threshold=0.5, generator=random(), num_resamples=50)
    for name in CHANCE:
        assert figures[name][:3] == (0.5, 0.5, 0.5)
    for name in ("tpr_response_at_1pct_fpr", "recall_at_threshold", "share_detected", "exact_hit_rate"):
        assert figures[name][:3] == (0.0, 0.0, 0.0)
    assert figures["leaked_mean"].value == 2.0, "both positive tokens of each text"
    assert figures["lag_median"].value == 4.0, "as many as there are from onset to end"


def test_random_scores_are_chance_within_the_interval_and_better_ones_are_not():
    scores = torch.rand(200, 5, generator=random(3))
    found, better = (
        evaluate(many_texts(scores, shift=shift), generator=random(), num_resamples=200) for shift in (0.0, 0.3)
    )
    for name in CHANCE:
        assert found[name].low < 0.5 < found[name].high
        assert better[name].low > 0.5


def test_the_interval_of_tokens_is_that_of_ranking_every_draw_anew():
    texts = many_texts(torch.rand(40, 5, generator=random(5)), shift=0.1)
    found = evaluate(texts, generator=random(), num_resamples=50)["auroc_token"]
    known = [one.token_labels.isfinite() for one in texts]
    scores, labels = (
        torch.cat([getattr(one, name)[mask] for one, mask in zip(texts, known, strict=True)])
        for name in ("token_scores", "token_labels")
    )
    groups = [one.group for one, mask in zip(texts, known, strict=True) for _ in range(int(mask.sum()))]
    expected = bootstrap_by_group(
        lambda rows: auroc(scores[rows], labels[rows]), groups, generator=random(), num_resamples=50
    )
    assert found == expected


def test_scores_that_are_no_probabilities_have_no_calibration_error():
    logits = many_texts(torch.randn(20, 5, generator=random(1)))
    figures = evaluate(logits, generator=random(), num_resamples=20)
    assert "auroc_token" in figures
    assert "ece_token" not in figures and "brier_token" not in figures


def test_a_nan_score_leaves_its_figures_out_loudly(caplog):
    texts = many_texts(torch.rand(20, 5, generator=random(1)))
    texts[0] = dataclasses.replace(texts[0], token_scores=torch.full((5,), NAN))
    figures = evaluate(texts, threshold=0.5, generator=random(), num_resamples=20)
    assert set(figures) == {
        "auroc_response",
        "tpr_response_at_1pct_fpr",
        "tpr_response_at_0.1pct_fpr",
        "pairwise_accuracy",
        "recall_at_threshold",
        "fpr_at_threshold",
    }
    for name in ("auroc_token", "auroc_within", "ece_token", "brier_token", *FIGURES):
        assert f"{name} is left out" in caplog.text


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
