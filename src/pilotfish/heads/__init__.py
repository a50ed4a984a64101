"""Recorded activations and labels in; heads, banks and their cards out."""

from pilotfish.heads.bank import HeadBank
from pilotfish.heads.card import Card, DataCard, Measured, ThresholdCard
from pilotfish.heads.linear import LinearHead

__all__ = ["Card", "DataCard", "HeadBank", "LinearHead", "Measured", "ThresholdCard"]
