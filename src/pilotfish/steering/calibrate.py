"""A steering and a budget in; the dose that spends it, and the layer where that buys most, out."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple, get_args

from transformers import PreTrainedModel

from pilotfish.errors import SettingError
from pilotfish.runs import generator
from pilotfish.steering.dose import Steering, dose_of, relative_dose, stream_norms
from pilotfish.steering.meters import Behaviour, Meters, divergences, meters
from pilotfish.steering.rollouts import Decoding, rollouts
from pilotfish.taps import Edit

logger = logging.getLogger(__name__)

Meter = Literal["kl_p95", "kl_mean", "acceptance"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """How much damage a dose may do."""

    meter: Meter = "kl_p95"
    limit: float = 1.0
    """Nats a token that KL may reach, or the acceptance, in (0, 1), that must be left."""

    def __post_init__(self) -> None:
        if self.meter not in get_args(Meter):
            raise SettingError(f"meter {self.meter!r} is unknown; use one of {', '.join(get_args(Meter))}")
        if not 0.0 < self.limit < (1.0 if self.meter == "acceptance" else math.inf):
            raise SettingError(
                f"a budget of {self.limit} is not allowed for {self.meter}; give acceptance in (0, 1) or a KL above 0"
            )

    def spent(self, found: Meters) -> float:
        """The share of the budget that was spent: up to 1 is within it."""
        value = float(getattr(found, self.meter))
        return (1 - value) / (1 - self.limit) if self.meter == "acceptance" else value / self.limit

    def __str__(self) -> str:
        names = {"kl_p95": "95th percentile of KL", "kl_mean": "mean KL", "acceptance": "acceptance"}
        return f"{names[self.meter]} {'at least' if self.meter == 'acceptance' else 'at most'} {self.limit:g}"


class Found(NamedTuple):
    """What a search for a dose came to."""

    x: float
    """The largest value found within the budget; 0 where there is none."""
    is_reached: bool
    """Whether the budget is spent there, to the tolerance; else `reason` says why not."""
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationConfig:
    """How a dose is looked for."""

    first_relative: float = 0.05
    """Where the search begins, as a relative dose; it doubles until the budget is overspent."""
    highest_relative: float = 4.0
    """Where it gives up: text has long fallen apart by then. An ablation ends at 1, where all is taken out."""
    tolerance: float = 0.05
    """The dose is known to this share of itself."""
    decoding: Decoding = field(default_factory=Decoding)
    """Of the steered answers; KL and acceptance are those of temperature 1, whatever theirs is."""
    seed: int = 0
    """Of the answers: every dose draws with the same numbers."""

    def __post_init__(self) -> None:
        if not 0.0 < self.first_relative < self.highest_relative or not 0.0 < self.tolerance < 1.0:
            raise SettingError(
                f"first_relative {self.first_relative}, highest_relative {self.highest_relative} and tolerance "
                f"{self.tolerance} do not fit; 0 < first < highest and a tolerance in (0, 1) are needed"
            )


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Calibration:
    """A dose, and the curve that it was found on."""

    steering: Steering
    budget: Budget
    dose: float
    """0 where even the smallest dose overspends."""
    is_reached: bool
    reason: str
    """Why the budget is not spent to the tolerance; empty where it is."""
    curve: tuple[Meters, ...]
    """Every dose that was measured, smallest first; the first is 0."""

    @property
    def meters(self) -> Meters:
        """At the dose."""
        return next(found for found in self.curve if found.dose == self.dose)

    def edits(self, model: PreTrainedModel) -> tuple[Edit, ...]:
        return self.steering.edits(self.dose, model)


def search(spent: Callable[[float], float], *, first: float, highest: float, tolerance: float = 0.05) -> Found:
    """Finds where a budget is spent: from `first` on, x doubles until `spent(x)` exceeds 1, then the bracket is halved.

    Damage need not rise with the dose: it is noisy, and text that has fallen apart into one repeated word costs little.
    So the first crossing on the way up counts, as it would on the monotone envelope max(spent(y), y <= x), and none
    beyond it. A dip between two doublings is not seen.

    Raises:
        SettingError: `spent` gave NaN.
    """
    low, high = 0.0, first
    while (value := spent(high)) <= 1.0:
        low = high
        if high >= highest:
            return Found(low, is_reached=False, reason=f"at the highest, {high:.4g}, only {value:.2g} of it is spent")
        high = min(2 * high, highest)
    if math.isnan(value):
        raise SettingError(f"the meters give no number at {high:.4g}; the model's output is not finite there")
    smallest = first / 64
    while high - low > tolerance * high:
        middle = (low + high) / 2
        if spent(middle) <= 1.0:
            low = middle
        else:
            high = middle
        if high < smallest:
            return Found(0.0, is_reached=False, reason=f"even {high:.4g} overspends it")
    return Found(low, is_reached=True, reason="")


def calibrate(
    model: PreTrainedModel,
    steering: Steering,
    prompts: Sequence[Sequence[int]],
    *,
    budget: Budget | None = None,
    config: CalibrationConfig | None = None,
    draft: PreTrainedModel | None = None,
    behaviour: Behaviour | None = None,
) -> Calibration:
    """Finds the dose at which steering spends its budget, along texts that the steered model writes.

    Args:
        prompts: Token ids of what users ask; best not those that the directions were read from.
        draft: For acceptance; without one, that of the unsteered model as its own draft.
        behaviour: Measured at each dose, for the curve; the search does not look at it.

    Raises:
        SettingError: there are no prompts, all vectors are 0, or a dose makes the output not finite.
    """
    budget, config = budget or Budget(), config or CalibrationConfig()
    if steering.kind == "ablate":  # 1 takes all of it out; more would put it back the other way round
        config = replace(config, highest_relative=min(config.highest_relative, 1.0))
    if not prompts:
        raise SettingError("there are no prompts to calibrate on; give some, better 16 or more")
    norms = stream_norms(model, [direction.site for direction in steering.directions], prompts)
    unit = dose_of(steering, 1.0, norms)
    curve: dict[float, Meters] = {}

    def measure(dose: float) -> Meters:
        edits = steering.edits(dose, model)
        random = generator(config.seed, "steered answers")
        answers = rollouts(model, prompts, edits, decoding=config.decoding, generator=random)
        curve[dose] = meters(
            divergences(model, answers, edits, draft=draft),
            dose=dose,
            relative=relative_dose(steering, dose, norms),
            behaviour=None if behaviour is None else behaviour(edits, answers),
        )
        logger.info("dose %.4g: %s", dose, curve[dose])
        return curve[dose]

    found = _within(budget, measure, unit, config)
    return Calibration(
        steering=steering,
        budget=budget,
        dose=found.x * unit,
        is_reached=found.is_reached,
        reason=found.reason,
        curve=tuple(curve[dose] for dose in sorted(curve)),
    )


def _within(budget: Budget, measure: Callable[[float], Meters], unit: float, config: CalibrationConfig) -> Found:
    """Searches in relative doses, of which `unit` times as many are a dose."""
    plain = measure(0.0)
    if budget.spent(plain) > 1.0:  # a draft that the unsteered target itself does not accept often enough
        return Found(0.0, is_reached=False, reason=f"without any steering {budget.meter} is {plain.acceptance:.3g}")
    return search(
        lambda relative: budget.spent(measure(relative * unit)),
        first=config.first_relative,
        highest=config.highest_relative,
        tolerance=config.tolerance,
    )


class Candidate(NamedTuple):
    """One place to steer at, at its own dose for the common budget."""

    calibration: Calibration
    effect: float
    """On held-out texts, the larger the better."""


def best(
    calibrations: Iterable[Calibration], effect: Callable[[tuple[Edit, ...]], float], model: PreTrainedModel
) -> list[Candidate]:
    """Ranks calibrations, say of one direction at every layer, by their effect at equal damage; the best comes first.

    The effect of the first one is the best of several, and so a little lucky: measure it again on further texts.

    Args:
        effect: Of edits on texts that neither the directions nor the doses were made from.

    Raises:
        SettingError: there are none.
    """
    ranked = [Candidate(one, effect(one.edits(model))) for one in calibrations]
    if not ranked:
        raise SettingError("there is no calibration to choose from; give at least one")
    return sorted(ranked, key=lambda candidate: candidate.effect, reverse=True)
