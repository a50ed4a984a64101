"""Recorded activations and labels in; heads, banks and their cards out."""

from pilotfish.heads.bank import HeadBank
from pilotfish.heads.card import CalibrationCard, Card, DataCard, Measured, ThresholdCard
from pilotfish.heads.fit import FitConfig, FitResult, fit
from pilotfish.heads.linear import LinearHead, LinearReadout
from pilotfish.heads.shipped import shipped_banks

__all__ = [
    "CalibrationCard",
    "Card",
    "DataCard",
    "FitConfig",
    "FitResult",
    "HeadBank",
    "LinearHead",
    "LinearReadout",
    "Measured",
    "ThresholdCard",
    "fit",
    "shipped_banks",
]
