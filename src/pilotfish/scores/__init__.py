"""Heads and labelled texts in; calibrated scores, thresholds and evaluations out."""

from pilotfish.scores.acceptance import AnswerAcceptance, acceptance, acceptance_loss, read_acceptance
from pilotfish.scores.adapter import AdapterConfig
from pilotfish.scores.agreement import Agreement, agreement
from pilotfish.scores.baselines import response_length, response_words, token_words
from pilotfish.scores.calibration import (
    Calibration,
    HeldOut,
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
from pilotfish.scores.cost import cost_over_judge, head_flops_per_token, model_flops_per_token
from pilotfish.scores.detection import Detection, detect, false_stops_per_1000
from pilotfish.scores.distillation import Answer, TargetRecording, answer_of, divergence
from pilotfish.scores.drift import Change, Drift, Tolerances, compare_configurations
from pilotfish.scores.evaluation import compare, evaluate
from pilotfish.scores.fitted import FittedHead, Reading, fit_head
from pilotfish.scores.fusion import Fusion, SignalText, cross_fitted, fit_fusion, fusion_gain
from pilotfish.scores.joint import JointConfig, JointLoss, Lessons, Tuned, tune
from pilotfish.scores.judge import judge_question, judge_responses
from pilotfish.scores.lexical import lexical_control, wordless_positives, wordy_negatives
from pilotfish.scores.limit import check_num_benign, with_limits
from pilotfish.scores.marking import Marking, Spans, character_f1, character_scores, choose_marking, labelled_spans
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
from pilotfish.scores.tuned import tuned_draft

__all__ = [
    "AdapterConfig",
    "Agreement",
    "Answer",
    "AnswerAcceptance",
    "Built",
    "Calibration",
    "Change",
    "ClassifierConfig",
    "Detection",
    "Drift",
    "Estimate",
    "FittedHead",
    "Fusion",
    "HeldOut",
    "Interval",
    "Isotonic",
    "JointConfig",
    "JointLoss",
    "LabelledTexts",
    "Lessons",
    "Marking",
    "Platt",
    "Reading",
    "RecipeConfig",
    "ReliabilityPoint",
    "RivalConfig",
    "RocPoint",
    "Scored",
    "ScoredText",
    "SignalText",
    "Spans",
    "TargetRecording",
    "Threshold",
    "Tolerances",
    "Tuned",
    "acceptance",
    "acceptance_loss",
    "agreement",
    "answer_of",
    "auroc",
    "bootstrap_by_group",
    "brier_score",
    "build_bank",
    "character_f1",
    "character_scores",
    "check_num_benign",
    "choose_calibration",
    "choose_marking",
    "clopper_pearson",
    "clopper_pearson_upper",
    "compare",
    "compare_configurations",
    "cost_over_judge",
    "cross_fitted",
    "detect",
    "divergence",
    "evaluate",
    "expected_calibration_error",
    "false_stops_per_1000",
    "fine_tuned_scores",
    "fit_fusion",
    "fit_head",
    "fusion_gain",
    "head_flops_per_token",
    "isotonic",
    "judge_question",
    "judge_responses",
    "labelled_spans",
    "lexical_control",
    "model_flops_per_token",
    "num_benign_needed",
    "pairwise_accuracy",
    "platt",
    "read_acceptance",
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
    "tune",
    "tuned_draft",
    "with_limits",
    "wordless_positives",
    "wordy_negatives",
    "write_scored",
]
