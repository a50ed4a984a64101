"""A model and named sites in; activations read, edited or recorded out."""

from pilotfish.taps.edit import Ablate, Add, Detach, Edit, Replace, Scale, When, edited
from pilotfish.taps.record import Recording, Shard, TokenRow, record
from pilotfish.taps.tap import Taps, tapped

__all__ = [
    "Ablate",
    "Add",
    "Detach",
    "Edit",
    "Recording",
    "Replace",
    "Scale",
    "Shard",
    "Taps",
    "TokenRow",
    "When",
    "edited",
    "record",
    "tapped",
]
