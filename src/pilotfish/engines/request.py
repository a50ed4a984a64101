"""What an engine serves with, and what is asked of one generation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from pilotfish.actions import Policy
from pilotfish.core import Reader
from pilotfish.engines.drafting import Drafting
from pilotfish.engines.escalate import Judge
from pilotfish.engines.speculate import Sampling
from pilotfish.errors import SettingError
from pilotfish.heads import HeadBank
from pilotfish.models import Pair
from pilotfish.taps import Edit


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What is asked of one generation."""

    max_new_tokens: int = 256
    sampling: Sampling = field(default_factory=Sampling)
    stop: tuple[str, ...] = ()
    """Strings that end the answer; they are not part of it."""
    policy: Policy = field(default_factory=Policy)
    seed: int = 0
    """The same seed gives the same answer; without effect on greedy decoding."""
    flush: bool = True
    """Whether one more draft step at the end scores the last token or two; else they are declared misses."""
    signals: bool = False
    """Whether to record the second signals of each token; a rule about one of them asks for them too."""
    edits: Mapping[str, Sequence[Edit]] = field(default_factory=dict)
    """What this generation has beside the engine's own edits, by name: on while a rule of the policy that names it has
    its gate up, and throughout where none does."""

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise SettingError(f"max_new_tokens {self.max_new_tokens} is not allowed; give at least 1")
        if any(not word for word in self.stop):
            raise SettingError("an empty stop string ends every answer before it begins; leave it out")

    @property
    def wants_signals(self) -> bool:
        return self.signals or self.policy.asks_signals

    @property
    def standing_edits(self) -> tuple[str, ...]:
        """Names of its own edits that are on throughout."""
        named = {rule.edit for rule in self.policy.rules}
        return tuple(name for name in self.edits if name not in named)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Setup:
    """What an engine serves every request with."""

    pair: Pair
    banks: Mapping[Reader, HeadBank]
    drafting: Drafting
    weight_ratio: float
    """Cost of a draft step over that of a target step."""
    edits: Mapping[str, Sequence[Edit]]
    """What rules may switch on, on the target."""
    judge: Judge | None
    score_limit_s: float | None
    """Scores that take longer count as none."""

    @property
    def metrics(self) -> tuple[str, ...]:
        """Every metric that some reader's head scores."""
        return tuple(dict.fromkeys(metric for bank in self.banks.values() for metric in bank.metrics))


class Prompt(NamedTuple):
    text: str
    ids: list[int]
    starts_reasoning: bool
    """Whether the chat template opens the reasoning before the answer begins."""
