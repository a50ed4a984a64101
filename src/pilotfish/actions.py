"""Scores in, verdicts out: what to do about a token. Plain data, no tensors, shared by every engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Literal, get_args

from pilotfish.core import TokenScore
from pilotfish.errors import SettingError

Action = Literal["observe", "flag", "stop"]
Scope = Literal["prompt", "answer", "all"]

ACTIONS: tuple[str, ...] = get_args(Action)
SCOPES: tuple[str, ...] = get_args(Scope)
GATING: frozenset[str] = frozenset({"stop"})
"""Actions that decide whether a token may leave; under these, pending tokens wait and an unscored one stops the
answer.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """What to do about one metric."""

    metric: str
    action: Action = "flag"
    threshold: float | None = None
    """Probability from which on the action is taken; None takes the bank's own calibrated threshold."""
    scope: Scope = "all"
    """Which tokens: the prompt's, the answer's or all."""

    def __post_init__(self) -> None:
        if self.action not in ACTIONS:
            raise SettingError(
                f"action {self.action!r} of metric {self.metric!r} is unknown; use one of {', '.join(ACTIONS)}"
            )
        if self.scope not in SCOPES:
            raise SettingError(
                f"scope {self.scope!r} of metric {self.metric!r} is unknown; use one of {', '.join(SCOPES)}"
            )
        if self.threshold is not None and not 0.0 <= self.threshold <= 1.0:
            raise SettingError(f"threshold {self.threshold} of metric {self.metric!r} is outside [0, 1]")


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """What to do about the scores of one exchange."""

    rules: tuple[Rule, ...] = ()
    """A metric without a rule is only observed."""
    hold: bool = False
    """Emit a token only together with its exact score. A gating rule implies it."""

    def __post_init__(self) -> None:
        metrics = [rule.metric for rule in self.rules]
        twice = sorted({metric for metric in metrics if metrics.count(metric) > 1})
        if twice:
            raise SettingError(f"metric {twice[0]!r} has two rules; give one rule a metric")

    @property
    def is_gating(self) -> bool:
        return any(rule.action in GATING for rule in self.rules)

    @property
    def holds(self) -> bool:
        """Whether a token waits for its score."""
        return self.hold or self.is_gating

    def check(self, metrics: Sequence[str], uncalibrated: AbstractSet[str]) -> None:
        """Refuses a policy that could not be carried out.

        Args:
            metrics: those that have a head.
            uncalibrated: those of them for which some reader's bank has no threshold.

        Raises:
            SettingError: a rule's metric has no head, or a rule has no threshold and a bank has none either.
        """
        for rule in self.rules:
            if rule.metric not in metrics:
                known = ", ".join(metrics) or "none: no bank is loaded"
                raise SettingError(f"the policy names metric {rule.metric!r}, but no head scores it; there are {known}")
            if rule.action != "observe" and rule.threshold is None and rule.metric in uncalibrated:
                raise SettingError(
                    f"the rule for {rule.metric!r} has no threshold and its head is not calibrated; give a threshold"
                )


@dataclass(frozen=True, slots=True)
class Verdict:
    """What was decided about one token, and why."""

    position: int
    metric: str
    action: Action
    score: float | None
    threshold: float | None
    reason: str


def decide(
    policy: Policy, position: int, scores: Mapping[str, TokenScore], thresholds: Mapping[str, float], *, in_prompt: bool
) -> tuple[Verdict, ...]:
    """Judges one token that is scored or unscored, never pending.

    Args:
        scores: what the reader says of the token.
        thresholds: the reader's calibrated thresholds, for rules that name none.

    Returns:
        A verdict for each rule that was broken, `stop` first. An unscored token breaks every gating rule.
    """
    verdicts = []
    for rule in policy.rules:
        if rule.action == "observe" or rule.scope == ("answer" if in_prompt else "prompt"):
            continue
        score = scores.get(rule.metric) or TokenScore.unscored(f"the reader has no head for {rule.metric}")
        assert score.state != "pending", "a pending token is not judged"
        threshold = thresholds.get(rule.metric) if rule.threshold is None else rule.threshold
        if score.running is None:
            if rule.action in GATING:
                reason = f"{rule.metric} unscored ({score.reason}); a gated token without a score stops the answer"
                verdicts.append(Verdict(position, rule.metric, rule.action, None, threshold, reason))
        elif threshold is None:  # this reader's head is not calibrated: as good as no score
            if rule.action in GATING:
                reason = f"{rule.metric} has no threshold for the {score.reader}'s states"
                verdicts.append(Verdict(position, rule.metric, rule.action, score.running, None, reason))
        elif score.running >= threshold:
            reason = f"{rule.metric} {score.running:.3f} reached the threshold {threshold:.3f}"
            verdicts.append(Verdict(position, rule.metric, rule.action, score.running, threshold, reason))
    return tuple(sorted(verdicts, key=lambda verdict: verdict.action not in GATING))
