"""Targets of a benchmark in; the table that it prints last out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pilotfish.cli.terminal import table


def targets_table(targets: Sequence[Mapping[str, Any]]) -> str:
    cells = [
        [
            target["name"],
            f"{target['value']:.4f} [{target['low']:.4f}, {target['high']:.4f}]",
            target["target"],
            "met" if target["met"] else "NOT met",
        ]
        for target in targets
    ]
    return table(["target", "found", "asked", ""], cells)
