"""Answers in; counters in the Prometheus registry that vLLM's `/metrics` shows out, named as our own server's."""

from __future__ import annotations

import functools

import numpy as np
from prometheus_client import Counter, Histogram

from pilotfish.server.telemetry import LAG_STEPS, PREFIX, SCORE_STEPS
from pilotfish.vllm.record import Record


class Metrics:
    """Of one API server process."""

    def __init__(self) -> None:
        self._scored = Counter(f"{PREFIX}monitor_tokens_scored", "Tokens, of prompts too, that every head scored.")
        self._missed = Counter(f"{PREFIX}monitor_tokens_missed", "Tokens that were left unscored.", ["reason"])
        self._flags = Counter(f"{PREFIX}monitor_flags", "Verdicts, one a metric and action.", ["head", "action"])
        self._stopped = Counter(f"{PREFIX}monitor_stopped", "Answers that a rule has ended.", ["head"])
        self._score = Histogram(f"{PREFIX}monitor_score", "Highest score of an answer.", ["head"], buckets=SCORE_STEPS)
        self._lag = Histogram(
            f"{PREFIX}monitor_detection_lag_tokens", "Tokens sent from a flagged one to its alert.", buckets=LAG_STEPS
        )

    def count(self, record: Record) -> None:
        """An answer has ended, or its client has gone."""
        for reason, number in record.counts.items():
            if reason:
                self._missed.labels(_kind(reason)).inc(number)
            else:
                self._scored.inc(number)
        for head, action in record.first_flags:
            self._flags.labels(head, action).inc()
            self._lag.observe(1.0 if record.about.reader == "target" else 0.0)
        if record.stopped_by:
            self._stopped.labels(record.stopped_by).inc()
        for head, value in zip(record.about.metrics, record.highest.tolist(), strict=True):
            if not np.isnan(value):
                self._score.labels(head).observe(value)


@functools.cache
def metrics() -> Metrics:
    """The process's own; a registry takes each name once."""
    return Metrics()


def _kind(reason: str) -> str:
    """A reason without what differs from time to time: few values of a label."""
    return reason.split(":")[0]
