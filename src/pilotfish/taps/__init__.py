"""A model and named sites in; activations read, edited or recorded out."""

from pilotfish.taps.tap import Taps, tapped

__all__ = ["Taps", "tapped"]
