"""The settings of the verbs about policies."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyCheck:
    """Reads a policy and says what it does; a wrong one is refused with the key and what is allowed."""

    file: Annotated[Path, tyro.conf.Positional]
    """The policy, .toml or .json."""

    def run(self) -> int:
        from pilotfish.cli.policy import check

        return check(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyDryRun:
    """Tries a policy on recorded scores and says what it would have decided; no model is loaded."""

    file: Annotated[Path, tyro.conf.Positional]
    """The policy, .toml or .json."""
    on: tuple[Path, ...]
    """Recordings: generations saved as JSON, or the scored.json that `fit` leaves beside a card."""
    show: int = 3
    """Verdicts that are printed of each exchange."""
    json: Path | None = None
    """Also write all verdicts as JSON."""

    def run(self) -> int:
        from pilotfish.cli.policy import dry_run

        return dry_run(self)
