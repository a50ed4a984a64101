"""Recorded activations and labels in; heads, banks and their cards out."""

from pilotfish.heads.bank import BankScores, HeadBank, joined
from pilotfish.heads.card import CalibrationCard, Card, DataCard, HeadCard, Measured, SourceCard, ThresholdCard
from pilotfish.heads.examples import Example, Source
from pilotfish.heads.fit import FitConfig, FitResult, fit
from pilotfish.heads.form import Form
from pilotfish.heads.head import Head, Which, linear_head
from pilotfish.heads.shipped import bank_folder, load_bank, shipped_banks, shipped_folders

__all__ = [
    "BankScores",
    "CalibrationCard",
    "Card",
    "DataCard",
    "Example",
    "FitConfig",
    "FitResult",
    "Form",
    "Head",
    "HeadBank",
    "HeadCard",
    "Measured",
    "Source",
    "SourceCard",
    "ThresholdCard",
    "Which",
    "bank_folder",
    "fit",
    "joined",
    "linear_head",
    "load_bank",
    "shipped_banks",
    "shipped_folders",
]
