"""A model's identity in, the banks that ship inside the package for it out."""

from __future__ import annotations

from pathlib import Path

from pilotfish.errors import BankMismatch
from pilotfish.heads.bank import CARD_FILE, HeadBank
from pilotfish.models import Identity

SHIPPED = Path(__file__).parent / "shipped"


def shipped_banks(identity: Identity, folder: Path = SHIPPED) -> list[HeadBank]:
    """The banks in `folder` that were made for this model; none when there are none.

    Raises:
        ArtefactError: a shipped bank is damaged.
    """
    banks = []
    for card in sorted(folder.glob(f"*/{CARD_FILE}")):
        bank = HeadBank.load(card.parent)
        try:
            bank.check(identity)
        except BankMismatch:
            continue
        banks.append(bank)
    return banks


def load_bank(folder: Path) -> HeadBank:
    """A bank from its folder; or by its name one that ships, where there is no folder of that name.

    Raises:
        ArtefactError, BankMismatch: as `HeadBank.load`.
    """
    return HeadBank.load(folder if folder.exists() or not (SHIPPED / folder).exists() else SHIPPED / folder)
