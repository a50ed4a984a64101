"""The settings of each verb; what a verb does stands in the module of its name and is imported when it runs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from pilotfish.errors import SettingError

DEMO_PAIR = "demo:qwen-coder"


@dataclass(frozen=True, slots=True, kw_only=True)
class Models:
    """Which models, and how they run."""

    pair: str = DEMO_PAIR
    """Target: a demo pair (demo:qwen-coder, demo:smollm2), a local folder or a hub name."""
    draft: str | None = None
    """Draft, where the pair does not name its own."""
    banks: tuple[Path, ...] = ()
    """Folders of banks; without any, the bank that ships for this draft or target."""
    device: str = "auto"
    """auto, cpu or cuda."""
    dtype: str = "auto"
    """auto, bfloat16, float16 or float32."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Demo(Models):
    """Runs coding requests through monitored speculation; ends with a page and the tax table."""

    out: Path = Path("out/demo.html")
    """The page to write."""
    max_new_tokens: int = 160
    """Longest answer."""
    tax_pairs: int = 3
    """Repetitions of the tax table; 0 leaves it out. `pilotfish bench tax` measures it properly."""

    def run(self) -> int:
        from pilotfish.cli.demo import run

        return run(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class Chat(Models):
    """Talks with the target in the terminal, every token coloured by its score."""

    prompt: str | None = None
    """One prompt, answered once; without it, lines are read until the input ends."""
    metric: str | None = None
    """Which score colours the text; the first one otherwise."""
    action: Literal["observe", "flag", "stop"] = "flag"
    """What to do at the bank's threshold."""
    threshold: float | None = None
    """Instead of the bank's calibrated threshold."""
    max_new_tokens: int = 256
    """Longest answer."""
    temperature: float = 0.0
    """0 is greedy."""
    top_p: float | None = None
    """Keep the likeliest tokens up to this mass."""
    draft_length: int | Literal["auto"] = "auto"
    """Drafted tokens a round; 0 turns speculation off."""
    seed: int = 0
    """Of the sampling."""
    page: Path | None = None
    """Also write the exchanges as a page."""

    def run(self) -> int:
        from pilotfish.cli.chat import run

        return run(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class Score(Models):
    """Scores text that is there already, in one pass of the reader: a file, or standard input."""

    file: Annotated[Path | None, tyro.conf.Positional] = None
    """UTF-8 text, or conversations when it ends in .jsonl; without it, standard input."""
    format: Literal["text", "jsonl"] = "text"
    """Coloured text, or one JSON object a token."""

    def run(self) -> int:
        from pilotfish.cli.score import run

        return run(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """Trains, calibrates and evaluates a head from labelled conversations, and writes a bank with its card."""

    data: Path
    """JSONL of conversations with spans or labels."""
    metric: str
    """Which of the labels to learn."""
    out: Path
    """Folder of the bank to write."""
    model: str = "demo:qwen-coder-0.5b"
    """The reader: the draft of the pair that will serve."""
    benign: Path | None = None
    """JSONL of ordinary traffic, for the threshold; without it, a part of the data is put aside for its negatives."""
    budget: float = 0.01
    """False-positive budget: the share of benign responses that may be flagged."""
    sites: int = 5
    """Evenly spaced layers that the head reads, the final norm among them."""
    max_tokens: int = 512
    """Longer texts are cut here."""
    seed: int = 0
    """Of splits, sampling and fit."""
    work: Path = Path("out/recordings")
    """Folder of the recorded activations; an interrupted run resumes there."""
    device: str = "auto"
    """auto, cpu or cuda."""
    dtype: str = "auto"
    """auto, bfloat16, float16 or float32; record in the dtype that will serve."""

    def __post_init__(self) -> None:
        if not 0.0 < self.budget < 1.0:
            raise SettingError(f"budget {self.budget} is outside (0, 1); 0.01 flags one benign response in a hundred")

    def run(self) -> int:
        from pilotfish.cli.fit import run

        return run(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchTax(Models):
    """Measures what monitoring costs against its alternatives, paired in one run (also: `bench tax`)."""

    num_pairs: int = 20
    """Repetitions of every arm; the interval needs about 20."""
    max_new_tokens: int = 48
    """Length of the answers."""
    heads: int = 64
    """Linear heads in the bank (random weights: cost does not depend on them); 0 takes the shipped bank."""
    sites: int = 5
    """Sites that each head reads."""
    seed: int = 0
    """Of the random heads and the bootstrap."""

    def run(self) -> int:
        from pilotfish.cli.bench import run

        return run(self)
