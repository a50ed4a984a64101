"""A prompt in, tokens with scores out."""

from pilotfish.engines.contrast import Contrast, contrastive
from pilotfish.engines.drafting import Drafting
from pilotfish.engines.embedded import EmbeddedEngine, GenerationStream, Request
from pilotfish.engines.records import Event, Generation, Round, RoundEvent, ScoreEvent, Token, TokenEvent, VerdictEvent
from pilotfish.engines.speculate import Sampling

__all__ = [
    "Contrast",
    "Drafting",
    "EmbeddedEngine",
    "Event",
    "Generation",
    "GenerationStream",
    "Request",
    "Round",
    "RoundEvent",
    "Sampling",
    "ScoreEvent",
    "Token",
    "TokenEvent",
    "VerdictEvent",
    "contrastive",
]
