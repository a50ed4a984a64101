"""A prompt in, tokens with scores out."""

from pilotfish.engines.answers import engine_acceptance, target_answers
from pilotfish.engines.batch import Batch, Progress, generate_together
from pilotfish.engines.contrast import Contrast, contrastive
from pilotfish.engines.drafting import Drafting
from pilotfish.engines.embedded import EmbeddedEngine, GenerationStream
from pilotfish.engines.escalate import EndpointJudge, Judge
from pilotfish.engines.records import (
    Attempt,
    Event,
    Generation,
    Round,
    RoundEvent,
    ScoreEvent,
    Token,
    TokenEvent,
    VerdictEvent,
)
from pilotfish.engines.request import Request
from pilotfish.engines.signals import Signals
from pilotfish.engines.speculate import Sampling

__all__ = [
    "Attempt",
    "Batch",
    "Contrast",
    "Drafting",
    "EmbeddedEngine",
    "EndpointJudge",
    "Event",
    "Generation",
    "GenerationStream",
    "Judge",
    "Progress",
    "Request",
    "Round",
    "RoundEvent",
    "Sampling",
    "ScoreEvent",
    "Signals",
    "Token",
    "TokenEvent",
    "VerdictEvent",
    "contrastive",
    "engine_acceptance",
    "generate_together",
    "target_answers",
]
