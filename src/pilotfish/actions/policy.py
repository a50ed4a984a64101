"""What to do about scores, as plain data that is refused where it could not be carried out."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, fields
from typing import Literal, get_args

from pilotfish.actions.aggregate import WINDOWS, Aggregation, Kind
from pilotfish.errors import SettingError

Action = Literal["observe", "flag", "hold", "steer", "redact", "defer", "resample", "escalate", "stop"]
"""From the mildest to the strictest; where several rules are broken at one token, the strictest comes first."""
Scope = Literal["all", "prompt", "answer", "reasoning", "reply"]
Unscored = Literal["auto", "pass", "flag", "stop"]

ACTIONS: tuple[str, ...] = get_args(Action)
SCOPES: tuple[str, ...] = get_args(Scope)
GATING: frozenset[str] = frozenset(ACTIONS) - {"observe", "flag"}
"""Actions that decide whether or how a token may leave: under these, pending tokens wait and an unscored one stops the
answer.
"""
REWRITING: frozenset[str] = frozenset({"redact", "defer", "resample"})
"""Actions that change tokens, which a prompt's cannot be."""
SIGNAL = "signal."
"""What the names of the second signals begin with: they come from the two models' distributions, not from a head."""

_BELONGS: dict[str, tuple[str, frozenset[str]]] = {
    "window": ("aggregate", frozenset(WINDOWS)),
    "top": ("aggregate", frozenset({"topk"})),
    "rate": ("aggregate", frozenset({"ema"})),
    "tries": ("action", frozenset({"resample"})),
    "edit": ("action", frozenset({"steer"})),
    "budget": ("action", frozenset({"escalate"})),
    "share": ("action", frozenset({"escalate"})),
    "every": ("action", frozenset({"escalate"})),
    "limit": ("action", frozenset({"escalate"})),
    "look_ahead": ("action", frozenset({"flag", "hold"})),
}
"""Settings that only some actions or aggregators have."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """What to do about one metric. Its gate goes up at the threshold and down under `release`; while it is up, the
    action is taken.
    """

    metric: str
    """Of a head, or a second signal (`signal.divergence`, …)."""
    action: Action = "flag"
    """observe: nothing. flag: report. hold: emit only scored tokens. stop: end before the token. redact: emit a mark in
    its place. resample: go back and sample something else. defer: take the draft's tokens. steer: switch an edit of the
    target on. escalate: ask a slower judge."""
    threshold: float | None = None
    """Probability from which on the gate goes up; None takes the bank's own calibrated threshold. That was set on
    one side of exchanges, which its card names (`scope`): give the rule that side."""
    release: float | None = None
    """Probability under which it goes down again, the threshold or lower; None takes the threshold."""
    min_tokens: int = 1
    """Consecutive tokens at the threshold before the gate goes up; those before the last of them have left by then."""
    scope: Scope = "all"
    """Which tokens: all, the prompt's, the answer's; of the answer, the reasoning's (between the policy's tags) or the
    reply's (the rest). Outside of it a rule judges nothing and lets nothing go."""
    aggregate: Kind = "running"
    """How a token's scores become the number that is held against the threshold; `running` is the head's own."""
    window: int | None = None
    """Tokens that swim, topk and attention look back on, the current one included; None takes 16, 16 and 10."""
    top: int = 8
    """How many of the window's highest log-odds topk averages."""
    rate: float = 0.1
    """Weight of the newest token in ema, in (0, 1]."""
    unscored: Unscored = "auto"
    """What an unscored token does: pass, flag or stop; auto stops under every action but observe and flag."""
    look_ahead: bool = False
    """For flag and hold: drafted tokens are judged before they are verified. A flag comes that much earlier; a hold
    then holds only while it is warned."""
    tries: int = 4
    """resample: times that one answer may go back; after that it stops."""
    edit: str | None = None
    """steer: name of the engine's edit."""
    budget: int = 4
    """escalate: calls of the judge in one answer; a gate that goes up after that stops the answer."""
    share: float = 1.0
    """escalate: share of occasions on which the judge is asked, drawn at random; the others are flagged and go on."""
    every: int = 16
    """escalate: tokens after which a gate that is still up is an occasion again."""
    limit: float = 0.5
    """escalate: the judge's probability from which on the answer stops."""

    def __post_init__(self) -> None:
        self._check_choices()
        self._check_numbers()
        for name, (key, values) in _BELONGS.items():
            if getattr(self, name) != _DEFAULTS[name] and getattr(self, key) not in values:
                raise self._wrong(
                    name, f"belongs to {key} {' or '.join(sorted(values))}; leave it out, or change {key}"
                )
        if self.action == "steer" and not self.edit:
            raise self._wrong("edit", "names what to switch on; give the name of one of the engine's edits")
        if self.look_ahead and self.metric.startswith(SIGNAL):
            raise self._wrong("look_ahead", "needs a head: signals come with the verification; leave it out")
        needs_answer = self.action in REWRITING or self.metric.startswith(SIGNAL)
        if needs_answer and self.action != "observe" and self.scope in {"all", "prompt"}:
            raise self._wrong("scope", "is about generated tokens here; set it to answer, reasoning or reply")
        if self.aggregate != "running" and self.threshold is None and self.judges:
            raise self._wrong(
                "threshold", f"is needed: the bank's own is for aggregate running, not for {self.aggregate}; give one"
            )

    def _check_choices(self) -> None:
        if not self.metric:
            raise SettingError("metric of a rule is empty; name the metric that it is about")
        choices = {"action": ACTIONS, "scope": SCOPES, "aggregate": get_args(Kind), "unscored": get_args(Unscored)}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise self._wrong(name, f"is unknown; use one of {', '.join(allowed)}")

    def _check_numbers(self) -> None:
        for name in ("threshold", "release", "share", "limit"):
            value = getattr(self, name)
            if value is not None and not 0.0 <= value <= 1.0:
                raise self._wrong(name, "is outside [0, 1]; give a probability")
        for name, least in (("min_tokens", 1), ("window", 1), ("top", 1), ("tries", 0), ("budget", 0), ("every", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise self._wrong(name, f"is too small; give {least} or more")
        if not 0.0 < self.rate <= 1.0:
            raise self._wrong("rate", "is outside (0, 1]; 0.1 gives the newest token a tenth of the weight")
        if self.release is not None and self.threshold is None:
            raise self._wrong("release", "needs a threshold beside it; give both")
        if self.release is not None and self.threshold is not None and self.release > self.threshold:
            raise self._wrong("release", f"is above the threshold {self.threshold}; give one at or below it")

    def _wrong(self, name: str, what: str) -> SettingError:
        return SettingError(f"{name} {getattr(self, name)!r} of the rule for {self.metric!r} {what}")

    @property
    def judges(self) -> bool:
        """Whether scores are held against a threshold."""
        return self.action != "observe" and (self.action != "hold" or self.look_ahead)

    @property
    def on_unscored(self) -> Unscored:
        """`unscored`, with auto spelt out."""
        if self.unscored != "auto":
            return self.unscored
        return "stop" if self.action in GATING else "pass"

    @property
    def aggregation(self) -> Aggregation:
        return Aggregation(self.aggregate, self.window or WINDOWS.get(self.aggregate, 1), self.top, self.rate)


_DEFAULTS = {item.name: item.default for item in fields(Rule)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """What to do about the scores of one exchange."""

    rules: tuple[Rule, ...] = ()
    """A metric without a rule is only observed."""
    hold: bool = False
    """Emit a token only together with its exact scores of all heads, and stop on one that has none. A gating rule
    holds too, and stops on a missing score of its own metric alone."""
    margin: int = 0
    """Judged tokens that stay back behind the newest one, so that a stop takes them along and resample has room to go
    back."""
    mark: str = "[redacted]"
    """What is emitted in place of redacted text."""
    reasoning_tags: tuple[str, str] = ("<think>", "</think>")
    """Between which the reasoning stands, as the model's chat template has them."""

    def __post_init__(self) -> None:
        kinds = [(rule.metric, rule.action, rule.scope, rule.edit) for rule in self.rules]
        twice = sorted({kind for kind in kinds if kinds.count(kind) > 1})
        if twice:
            metric, action, scope, _ = twice[0]
            raise SettingError(
                f"metric {metric!r} has two rules with action {action} and scope {scope}; give one rule of a kind"
            )
        if self.margin < 0:
            raise SettingError(f"margin {self.margin} is negative; give the number of tokens to keep back, 0 for none")
        if self.margin and not self.holds:
            raise SettingError(f"margin {self.margin} keeps judged tokens back, but nothing holds; set hold to true")
        if not all(self.reasoning_tags):
            raise SettingError(f"reasoning_tags {self.reasoning_tags} hold an empty tag; give both, or leave them out")

    @property
    def is_gating(self) -> bool:
        return any(rule.action in GATING for rule in self.rules)

    @property
    def holds(self) -> bool:
        """Whether every token waits for its score; a rule that holds by look-ahead does so only while it is warned."""
        return self.hold or any(rule.action in GATING and not rule.look_ahead for rule in self.rules)

    @property
    def looks_ahead(self) -> bool:
        return any(rule.look_ahead for rule in self.rules)

    @property
    def goes_back(self) -> bool:
        """Whether committed tokens may be taken back."""
        return self.uses("resample") or self.uses("defer")

    @property
    def asks_signals(self) -> bool:
        """Whether a rule is about a second signal."""
        return any(rule.metric.startswith(SIGNAL) for rule in self.rules)

    @property
    def asks_parts(self) -> bool:
        """Whether a rule tells reasoning from reply."""
        return any(rule.scope in {"reasoning", "reply"} for rule in self.rules)

    def uses(self, action: Action) -> bool:
        return any(rule.action == action for rule in self.rules)

    def check(
        self,
        metrics: Sequence[str],
        uncalibrated: AbstractSet[str],
        *,
        edits: Collection[str] = (),
        has_draft: bool = True,
        has_judge: bool = False,
    ) -> None:
        """Refuses a policy that could not be carried out.

        Args:
            metrics: those that have a head, and the second signals.
            uncalibrated: those of them for which some reader's bank has no threshold.
            edits: names of the engine's edits.

        Raises:
            SettingError: a rule's metric has no head, a rule has no threshold and a bank has none either, or the
                engine lacks what an action needs.
        """
        for rule in self.rules:
            if rule.metric not in metrics:
                known = ", ".join(metrics) or "none: no bank is loaded"
                raise SettingError(f"the policy names metric {rule.metric!r}, but no head scores it; there are {known}")
            if rule.judges and rule.threshold is None and rule.metric in uncalibrated:
                raise SettingError(
                    f"the rule for {rule.metric!r} has no threshold and its head is not calibrated; give a threshold"
                )
            if rule.edit is not None and rule.edit not in edits:
                known = ", ".join(edits) or "none: give the engine edits={NAME: [Edit, …]}"
                raise SettingError(f"the rule for {rule.metric!r} steers with edit {rule.edit!r}; there are {known}")
        if self.uses("defer") and not has_draft:
            raise SettingError("a rule defers to the draft, but this pair has none; load one, or take another action")
        if self.uses("escalate") and not has_judge:
            raise SettingError("a rule escalates, but there is no judge; give the engine judge=…")


@dataclass(frozen=True, slots=True)
class Verdict:
    """What was decided about one token, and why."""

    position: int
    metric: str
    action: Action
    score: float | None
    threshold: float | None
    reason: str
    rule: int | None = None
    """Index in the policy's rules; None where the policy as a whole asks for it."""
    is_early: bool = False
    """About a drafted token that is not verified yet."""
