"""How many tokens to draft: as long as the chance that all so far are accepted pays for one more draft step.

Let c be the cost of a draft step in units of a target step. A draft step adds one token if everything before it and
itself is accepted. It pays when that probability is above c times the tokens that a unit of time yields otherwise
(about 1, the target alone). The draft's own confidence predicts acceptance token by token; a running average of what
happened corrects it. All of it depends on tokens alone, never on a clock, so a seed gives the same run on a busy
machine.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from transformers import PreTrainedModel

from pilotfish.errors import SettingError
from pilotfish.models import Pair

MEMORY = 0.9
"""Weight that a round's record keeps when the next round is added."""
PRIOR_TRIALS = 6.0
PRIOR_ACCEPTANCE = 0.7
"""What is believed before the first round, as this many observed tokens."""
FIRST_PAUSE = 24
"""Tokens decoded by the target alone before speculation is tried again; doubles with each try that fails."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Drafting:
    """How speculation is driven."""

    length: int | Literal["auto"] = "auto"
    """Tokens drafted a round; `auto` adapts it to what is accepted, 0 turns speculation off."""
    max_length: int = 8
    """Upper bound of `auto`."""
    step_cost: float | Literal["auto"] = "auto"
    """Time of a draft step over that of a target step; `auto` takes the ratio of the weights that each reads."""

    def __post_init__(self) -> None:
        if self.length != "auto" and not 0 <= self.length <= 64:
            raise SettingError(f"draft length {self.length} is not allowed; give 0 (off) to 64, or auto")
        if not 1 <= self.max_length <= 64:
            raise SettingError(f"longest draft {self.max_length} is not allowed; give 1 to 64")
        if self.step_cost != "auto" and not 0.0 < self.step_cost < 1.0:
            raise SettingError(
                f"step cost {self.step_cost} is not allowed; give a share of a target step in (0, 1), or auto"
            )


class DraftLength:
    """Decides before each draft step of one generation whether it is taken."""

    def __init__(self, drafting: Drafting, weight_ratio: float) -> None:
        """`weight_ratio`: weights of the draft over those of the target, the step cost where none is given."""
        self._fixed = None if drafting.length == "auto" else drafting.length
        self._longest = drafting.max_length if self._fixed is None else self._fixed
        self._step_cost = weight_ratio if drafting.step_cost == "auto" else drafting.step_cost
        self._trials = PRIOR_TRIALS
        self._accepted = PRIOR_TRIALS * PRIOR_ACCEPTANCE
        self._pause = 0
        self._next_pause = FIRST_PAUSE

    @property
    def acceptance(self) -> float:
        """Running estimate of the chance that a drafted token is accepted."""
        return self._accepted / self._trials

    @property
    def needs_confidence(self) -> bool:
        """Whether `wants_more` looks at the confidence; a fixed length does not."""
        return self._fixed is None

    @property
    def is_off(self) -> bool:
        """Whether the user turned speculation off."""
        return self._longest == 0

    @property
    def is_paused(self) -> bool:
        """Whether this round is decoded by the target alone."""
        return self.is_off or self._pause > 0

    def wants_more(self, num_drafted: int, confidence: float) -> bool:
        """Whether one more draft step pays, after `num_drafted` tokens whose joint probability under the draft is
        `confidence`.
        """
        if num_drafted >= self._longest:
            return False
        if self._fixed is not None or num_drafted == 0:
            return True
        return confidence * self.acceptance > self._step_cost

    def observe(self, num_drafted: int, num_accepted: int) -> None:
        """Learns from one round; a paused round (nothing drafted) only counts the pause down."""
        if num_drafted == 0:
            self._pause = max(0, self._pause - 1)
            return
        seen = num_accepted + (num_accepted < num_drafted)
        self._trials = MEMORY * self._trials + seen
        self._accepted = MEMORY * self._accepted + num_accepted
        if self._fixed is not None:
            return
        if self.acceptance < self._step_cost:
            self._pause, self._next_pause = self._next_pause, 2 * self._next_pause
            self._trials, self._accepted = (
                PRIOR_TRIALS,
                PRIOR_TRIALS * self._step_cost,
            )  # the next try starts undecided
        elif num_accepted == num_drafted:
            self._next_pause = FIRST_PAUSE


def weight_ratio(pair: Pair) -> float:
    """Weights that a decoding step of the draft reads over those of the target; 1 without a draft."""
    return _num_weights(pair.draft) / _num_weights(pair.target) if pair.draft is not None else 1.0


def _num_weights(model: PreTrainedModel) -> int:
    embedding = model.get_input_embeddings().weight  # a step reads one row of it
    return sum(weight.numel() for weight in model.parameters() if weight is not embedding)
