"""Heads and text in; calibrated scores, thresholds and evaluations out."""

from pilotfish.scores.offline import score_tokens

__all__ = ["score_tokens"]
