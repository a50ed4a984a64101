"""Heads and labelled texts in; calibrated scores, thresholds and evaluations out."""

from pilotfish.scores.baselines import response_length, response_words, token_words
from pilotfish.scores.calibration import (
    Interval,
    Platt,
    Threshold,
    clopper_pearson,
    clopper_pearson_upper,
    num_benign_needed,
    platt,
    threshold_at_budget,
)
from pilotfish.scores.evaluation import ScoredText, compare, evaluate
from pilotfish.scores.metrics import Estimate, auroc, bootstrap_by_group, pairwise_accuracy, tpr_at_fpr
from pilotfish.scores.offline import score_tokens
from pilotfish.scores.recipe import RecipeConfig, build_bank

__all__ = [
    "Estimate",
    "Interval",
    "Platt",
    "RecipeConfig",
    "ScoredText",
    "Threshold",
    "auroc",
    "bootstrap_by_group",
    "build_bank",
    "clopper_pearson",
    "clopper_pearson_upper",
    "compare",
    "evaluate",
    "num_benign_needed",
    "pairwise_accuracy",
    "platt",
    "response_length",
    "response_words",
    "score_tokens",
    "threshold_at_budget",
    "token_words",
    "tpr_at_fpr",
]
