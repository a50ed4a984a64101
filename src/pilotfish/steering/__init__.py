"""A model and contrasts in; directions that steer it, with cards, out."""

from pilotfish.steering.calibrate import Budget, Calibration, CalibrationConfig, Candidate, best, calibrate, search
from pilotfish.steering.card import DirectionCard, Kind, Method, Operand, PairsCard
from pilotfish.steering.direction import Direction
from pilotfish.steering.dose import Steering, dose_of, relative_dose, stream_norms
from pilotfish.steering.evaluate import (
    Answered,
    Arm,
    Row,
    Verdict,
    against_prompt,
    answer,
    compare,
    few_shot,
    letter_probability,
    margins,
    random_like,
    shuffled,
    text_losses,
)
from pilotfish.steering.extract import ExtractConfig, activation_addition, extract
from pilotfish.steering.files import load_directions, save_directions
from pilotfish.steering.formats import (
    from_layer_activations,
    read_gguf,
    read_hotwire,
    read_steering_vectors,
    to_layer_activations,
    write_gguf,
    write_hotwire,
)
from pilotfish.steering.gates import HeadGate
from pilotfish.steering.meters import Divergence, Meters, divergence, divergences, meters
from pilotfish.steering.pairs import Tokens
from pilotfish.steering.recipe import RecipeConfig, Steered, steer
from pilotfish.steering.rollouts import Decoding, Sampled, rollouts
from pilotfish.steering.verify import Check, verify

__all__ = [
    "Answered",
    "Arm",
    "Budget",
    "Calibration",
    "CalibrationConfig",
    "Candidate",
    "Check",
    "Decoding",
    "Direction",
    "DirectionCard",
    "Divergence",
    "ExtractConfig",
    "HeadGate",
    "Kind",
    "Meters",
    "Method",
    "Operand",
    "PairsCard",
    "RecipeConfig",
    "Row",
    "Sampled",
    "Steered",
    "Steering",
    "Tokens",
    "Verdict",
    "activation_addition",
    "against_prompt",
    "answer",
    "best",
    "calibrate",
    "compare",
    "divergence",
    "divergences",
    "dose_of",
    "extract",
    "few_shot",
    "from_layer_activations",
    "letter_probability",
    "load_directions",
    "margins",
    "meters",
    "random_like",
    "read_gguf",
    "read_hotwire",
    "read_steering_vectors",
    "relative_dose",
    "rollouts",
    "save_directions",
    "search",
    "shuffled",
    "steer",
    "stream_norms",
    "text_losses",
    "to_layer_activations",
    "verify",
    "write_gguf",
    "write_hotwire",
]
