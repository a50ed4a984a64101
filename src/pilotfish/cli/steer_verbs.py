"""The settings of the verbs that steer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro


@dataclass(frozen=True, slots=True, kw_only=True)
class Dosing:
    """How a dose is found."""

    meter: Literal["kl_p95", "kl_mean", "acceptance"] = "kl_p95"
    """What the budget limits: the KL divergence from the unsteered model, in nats a token along steered answers (95th
    percentile or mean), or the acceptance of an unsteered draft."""
    limit: float = 1.0
    """The KL that may be reached, or the acceptance, in (0, 1), that must be left."""
    kind: Literal["add", "add_keeping_norm", "ablate", "ablate_add"] = "add"
    """What a dose does with the vector."""
    num_prompts: int = 8
    """Prompts that the dose is found on."""
    max_new_tokens: int = 24
    """Tokens of each steered answer."""
    seed: int = 0
    """Of splits, answers and intervals."""
    device: str = "auto"
    """auto, cpu or cuda."""
    dtype: str = "auto"
    """auto, bfloat16, float16 or float32."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Steer(Dosing):
    """Makes a steering vector from pairs of answers, calibrates it, and says whether a prompt does better."""

    pairs: Path
    """JSONL with `positive`, `negative` and, if wanted, `prompt`; 50 rows are enough to begin with."""
    name: str = ""
    """What adding the vector should bring about; the file's name by default."""
    out: Path = Path("out/steer")
    """Folder of the vector with its card, the figures and the plot."""
    model: str = "demo:qwen-coder-0.5b"
    """The model to steer: a demo name, a local folder or a hub name."""
    instruction: str = ""
    """The system message that the vector is held against, beside a few examples."""
    match_prompt: bool = False
    """Let every vector spend the mean KL of the instruction or the examples, whichever do more, not the limit."""
    method: Literal["mean_difference", "pca_center", "logistic"] = "mean_difference"
    """How the vector is read off the pairs."""
    tokens: Literal["last", "letter", "answer"] = "last"
    """Which tokens of an answer are read; `letter` for choices such as (A)."""
    layers: tuple[int, ...] = ()
    """Blocks to try; some in the middle by default."""
    num_layers: int = 4
    """How many those are."""

    def run(self) -> int:
        from pilotfish.cli.steer import run

        return run(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class SteerCalibrate(Dosing):
    """Finds the dose at which a vector spends a budget, and writes it on its card (also: `steer calibrate`)."""

    vector: Annotated[Path, tyro.conf.Positional]
    """Folder of directions; each site gets its own dose."""
    prompts: Path
    """One prompt a line, such as users will ask."""
    pairs: Path | None = None
    """JSONL of pairs put aside: ranks the sites by what the positive answers gain at their doses."""
    pair: str = "demo:qwen-coder-0.5b"
    """The model that the vector was made for; one with a draft has that draft's acceptance measured."""

    def run(self) -> int:
        from pilotfish.cli.steer import run_calibrate

        return run_calibrate(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class SteerVerify:
    """Checks, here or on a server, that a vector acts on its tokens and on no others (also: `steer verify`)."""

    vector: Annotated[Path | None, tyro.conf.Positional] = None
    """Folder of directions; with a server all that it serves by default."""
    server: str | None = None
    """URL of a running `pilotfish serve --directions`: checks the answers that it gives instead of a model here."""
    key_env: str = "PILOTFISH_KEY"
    """NAME of the environment variable with the server's API key; where it is not set, none is sent."""
    model: str = "demo:qwen-coder-0.5b"
    """The model that they were made for."""
    dose: float | None = None
    """Instead of the card's."""
    kind: Literal["add", "add_keeping_norm", "ablate", "ablate_add"] | None = None
    """What the dose does with the vector, instead of the card's; needs a dose then."""
    phase: Literal["prompt", "generation", "both"] = "both"
    """Which tokens it is for."""
    prompt: str = "Tell me about the sea."
    """What is asked."""
    num_tokens: int = 16
    """Tokens to generate."""
    device: str = "auto"
    """auto, cpu or cuda."""
    dtype: str = "auto"
    """auto, bfloat16, float16 or float32."""

    def run(self) -> int:
        from pilotfish.cli.steer import run_verify

        return run_verify(self)
