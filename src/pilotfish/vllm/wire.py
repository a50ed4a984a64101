"""What the worker, the scheduler and the front end tell one another in; plain bytes and lists out."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float32

from pilotfish.actions import Verdict

KEY = "pilotfish"
"""Attribute of a model runner's output, and key beside vLLM's own in what an engine core sends."""
NUM_KEYS = 3
"""Columns before a row's scores: request, position, token."""


@dataclass(frozen=True, slots=True)
class StepScores:
    """All scores of one step, from one copy of the device's memory."""

    table: Float32[np.ndarray, "row column"]
    """Index in the batch (-1: nobody's), position, token id, scores of all metrics, running scores of all metrics."""
    failure: str = ""
    """Why tokens of this step have no scores."""
    hook_s: float = 0.0
    """Seconds that the host spent in the tap."""

    def of_requests(self, num_requests: int) -> list[Float32[np.ndarray, "row column"]]:
        """The rows of each request of the batch, in order of their positions."""
        if not len(self.table):
            return [self.table] * num_requests
        order = np.lexsort((self.table[:, 1], self.table[:, 0]))
        table = self.table[order]
        edges = np.searchsorted(table[:, 0], np.arange(num_requests + 1))
        return [table[start:end] for start, end in pairwise(edges)]


def no_scores(num_metrics: int, failure: str = "") -> StepScores:
    return StepScores(np.zeros((0, NUM_KEYS + 2 * num_metrics), dtype=np.float32), failure)


class Miss(NamedTuple):
    """Tokens that have no scores."""

    start: int
    end: int
    reason: str


@dataclass(slots=True)
class News:
    """What a step brought for one request."""

    start: int
    """Position of the first token that is told of."""
    scores: Float32[np.ndarray, "token value"]
    """Scores and running scores of each; NaN where a miss says why."""
    misses: list[Miss] = field(default_factory=list)
    verdicts: list[Verdict] = field(default_factory=list)
    num_drafted: int = 0
    """Tokens of this step that the drafter proposed."""
    withheld: list[int] = field(default_factory=list)
    """Id of the token that an answer was stopped at, if one was: it does not leave."""

    @property
    def stops(self) -> bool:
        """Whether a rule ended the answer with this step."""
        return any(verdict.action == "stop" for verdict in self.verdicts)

    def packed(self) -> dict[str, Any]:
        """As msgpack takes it."""
        said: dict[str, Any] = {
            "start": self.start,
            "width": self.scores.shape[1],
            "scores": self.scores.astype(np.float32).tobytes(),
            "num_drafted": self.num_drafted,
        }
        if self.misses:
            said["misses"] = [list(miss) for miss in self.misses]
        if self.verdicts:
            said["verdicts"] = [asdict(verdict) for verdict in self.verdicts]
        if self.withheld:
            said["withheld"] = self.withheld
        return said

    @classmethod
    def unpacked(cls, said: dict[str, Any]) -> News:
        return cls(
            said["start"],
            np.frombuffer(said["scores"], dtype=np.float32).reshape(-1, said["width"]),
            [Miss(*miss) for miss in said.get("misses", ())],
            [Verdict(**verdict) for verdict in said.get("verdicts", ())],
            said["num_drafted"],
            list(said.get("withheld", ())),
        )
