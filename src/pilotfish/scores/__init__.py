"""Heads and labelled texts in; calibrated scores, thresholds and evaluations out."""

from pilotfish.scores.agreement import Agreement, agreement
from pilotfish.scores.baselines import response_length, response_words, token_words
from pilotfish.scores.calibration import (
    Calibration,
    Interval,
    Isotonic,
    Platt,
    Threshold,
    choose_calibration,
    clopper_pearson,
    clopper_pearson_upper,
    isotonic,
    num_benign_needed,
    platt,
    threshold_at_budget,
)
from pilotfish.scores.classifier import ClassifierConfig, LabelledTexts, fine_tuned_scores
from pilotfish.scores.detection import Detection, detect, false_stops_per_1000
from pilotfish.scores.drift import Change, Drift, Tolerances, compare_configurations
from pilotfish.scores.evaluation import compare, evaluate
from pilotfish.scores.judge import judge_question, judge_responses
from pilotfish.scores.lexical import lexical_control, wordless_positives, wordy_negatives
from pilotfish.scores.metrics import Estimate, auroc, bootstrap_by_group, pairwise_accuracy, tpr_at_fpr
from pilotfish.scores.offline import score_tokens
from pilotfish.scores.ordinary import teach_ordinary
from pilotfish.scores.recipe import Built, RecipeConfig, build_bank
from pilotfish.scores.reliability import (
    ReliabilityPoint,
    RocPoint,
    brier_score,
    expected_calibration_error,
    reliability_curve,
    roc_points,
)
from pilotfish.scores.rivals import RivalConfig
from pilotfish.scores.scored import Scored, ScoredText, read_scored, write_scored

__all__ = [
    "Agreement",
    "Built",
    "Calibration",
    "Change",
    "ClassifierConfig",
    "Detection",
    "Drift",
    "Estimate",
    "Interval",
    "Isotonic",
    "LabelledTexts",
    "Platt",
    "RecipeConfig",
    "ReliabilityPoint",
    "RivalConfig",
    "RocPoint",
    "Scored",
    "ScoredText",
    "Threshold",
    "Tolerances",
    "agreement",
    "auroc",
    "bootstrap_by_group",
    "brier_score",
    "build_bank",
    "choose_calibration",
    "clopper_pearson",
    "clopper_pearson_upper",
    "compare",
    "compare_configurations",
    "detect",
    "evaluate",
    "expected_calibration_error",
    "false_stops_per_1000",
    "fine_tuned_scores",
    "isotonic",
    "judge_question",
    "judge_responses",
    "lexical_control",
    "num_benign_needed",
    "pairwise_accuracy",
    "platt",
    "read_scored",
    "reliability_curve",
    "response_length",
    "response_words",
    "roc_points",
    "score_tokens",
    "teach_ordinary",
    "threshold_at_budget",
    "token_words",
    "tpr_at_fpr",
    "wordless_positives",
    "wordy_negatives",
    "write_scored",
]
