"""A model's identity or a bank's name in, the banks that ship inside the package out."""

from __future__ import annotations

from pathlib import Path

from pilotfish.errors import ArtefactError, BankMismatch
from pilotfish.heads.bank import CARD_FILE, HeadBank
from pilotfish.models import Identity

SHIPPED = Path(__file__).parent / "shipped"


def shipped_folders(identity: Identity, folder: Path = SHIPPED) -> list[Path]:
    """Where, in `folder`, the banks lie that were made for this model; none when there are none.

    Raises:
        ArtefactError: a shipped bank is damaged.
    """
    return list(_shipped(identity, folder))


def shipped_banks(identity: Identity, folder: Path = SHIPPED) -> list[HeadBank]:
    """The banks of `shipped_folders`."""
    return list(_shipped(identity, folder).values())


def bank_folder(named: Path) -> Path:
    """A folder as it was given; or, where it is not there, the one of the bank of that name that ships.

    Raises:
        ArtefactError: there is neither.
    """
    shipped = SHIPPED / named
    if named.exists() or shipped.exists():
        return named if named.exists() else shipped
    names = ", ".join(path.name for path in _folders(SHIPPED))
    raise ArtefactError(
        f"there is no folder {named}, and no bank of that name ships; a bank is heads.safetensors with card.json, and "
        f"those that ship are {names}"
    )


def load_bank(named: Path) -> HeadBank:
    """The bank in `bank_folder`.

    Raises:
        ArtefactError, BankMismatch: as `bank_folder` and `HeadBank.load`.
    """
    return HeadBank.load(bank_folder(named))


def _folders(folder: Path) -> list[Path]:
    return [card.parent for card in sorted(folder.glob(f"*/{CARD_FILE}"))]


def _shipped(identity: Identity, folder: Path) -> dict[Path, HeadBank]:
    banks = {}
    for path in _folders(folder):
        bank = HeadBank.load(path)
        try:
            bank.check(identity)
        except BankMismatch:
            continue
        banks[path] = bank
    return banks
