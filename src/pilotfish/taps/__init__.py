"""A model and named sites in; activations read, edited or recorded out."""

from pilotfish.taps.edit import Edit, When, check_edits, edited
from pilotfish.taps.gate import Gate, ProjectionGate
from pilotfish.taps.library import Shelf, gather
from pilotfish.taps.ops import Ablate, AblateAdd, Add, AddKeepingNorm, Clamp, Detach, Op, Replace, Scale
from pilotfish.taps.record import Recording, Shard, TokenRow, record
from pilotfish.taps.tap import Taps, tapped

__all__ = [
    "Ablate",
    "AblateAdd",
    "Add",
    "AddKeepingNorm",
    "Clamp",
    "Detach",
    "Edit",
    "Gate",
    "Op",
    "ProjectionGate",
    "Recording",
    "Replace",
    "Scale",
    "Shard",
    "Shelf",
    "Taps",
    "TokenRow",
    "When",
    "check_edits",
    "edited",
    "gather",
    "record",
    "tapped",
]
