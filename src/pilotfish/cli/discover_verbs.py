"""The settings of the verbs that discover."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro


@dataclass(frozen=True, slots=True, kw_only=True)
class Discover:
    """Finds vectors that change what a model does, without being told what to look for, and shows what each does."""

    prompts: Path
    """One prompt a line, such as the model will be asked; the first few are searched on and then answered."""
    model: str = "demo:qwen-coder-0.5b"
    """The model to look into: a demo name (demo:smollm2), a local folder or a hub name."""
    out: Path = Path("out/discover")
    """Folder of the vectors, their cards and the page."""
    method: Literal["exponential", "melbo", "quadratic", "linear", "projected"] = "exponential"
    """How it is searched: an objective of deep causal transcoding, or MELBO."""
    num_vectors: int = 32
    """How many to find."""
    source: str | None = None
    """Site where vectors are added, such as 10.resid_pre; a third of the depth by default."""
    target: str | None = None
    """Site where their change is to be large, such as 14.resid_post; the middle of the depth by default."""
    radius: float | None = None
    """Length of the vectors; calibrated by default."""
    towards: tuple[str, ...] = ()
    """Words whose chance to begin the answer is ranked by, over those of `away`."""
    away: tuple[str, ...] = ()
    """The words that they are held against."""
    banks: tuple[Path, ...] = ()
    """Folders of banks that read the steered answers; without any, the bank that ships for this model, if one does."""
    num_searched: int = 3
    """Prompts that are searched on: the first ones; time grows with them."""
    num_shown: int = 3
    """Prompts that are answered under every vector: the first ones."""
    max_new_tokens: int = 24
    """Tokens of each answer."""
    iterations: int | None = None
    """Rounds or steps of the search; the method's own number by default."""
    promote: int = 0
    """Also write the first few findings of the page for use, as `discover promote` does."""
    form: Literal["edit", "head", "gate"] = "edit"
    """As what those are written."""
    seed: int = 0
    """Of the search and of the random vectors."""
    device: str = "auto"
    """auto, cpu or cuda."""
    dtype: str = "float32"
    """float32; in others derivatives are coarse."""

    def run(self) -> int:
        from pilotfish.cli.discover import run

        return run(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class DiscoverPromote:
    """Makes a finding something to steer with, watch for or gate on (also: `discover promote`)."""

    folder: Annotated[Path, tyro.conf.Positional]
    """What `discover` wrote."""
    id: Annotated[str, tyro.conf.Positional]
    """The finding, such as v7; the page names them."""
    form: Literal["edit", "head", "gate"] = "edit"
    """edit: adds the vector; head: a bank that sees its effect; gate: takes that back where the head sees it."""
    name: str = ""
    """What it brings about; the id by default."""
    out: Path | None = None
    """Folder to write; FOLDER/ID-FORM by default."""

    def run(self) -> int:
        from pilotfish.cli.discover import run_promote

        return run_promote(self)
