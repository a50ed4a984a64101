"""Scores of one token after another in, verdicts out; what the rules remember is a value that can be put back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from pilotfish.actions.aggregate import Aggregation, Memory
from pilotfish.actions.policy import ACTIONS, GATING, SIGNAL, Policy, Rule, Verdict
from pilotfish.core import TokenScore

Thresholds = Mapping[str, float]
Part = str
"""One of the scopes that a token lies in."""

PROMPT: frozenset[Part] = frozenset({"all", "prompt"})
REPLY: frozenset[Part] = frozenset({"all", "answer", "reply"})
REASONING: frozenset[Part] = frozenset({"all", "answer", "reasoning"})

_STRICTNESS = {action: -rank for rank, action in enumerate(ACTIONS)}


class Gate(NamedTuple):
    """What one rule remembers of the tokens so far."""

    is_up: bool = False
    value: float | None = None
    """What was held against the threshold at the last scored token of its scope."""
    num_over: int = 0
    """Consecutive tokens at or over the threshold."""
    memory: Memory = ()


class Reasoning(NamedTuple):
    """How far an answer's reasoning has come. It can only stand at the very beginning: a tag later on is mere text."""

    stage: str = "start"
    """start, inside or over."""
    seen: str = ""
    """Text in which a tag may have begun."""

    def read(self, text: str, tags: tuple[str, str]) -> tuple[Reasoning, frozenset[Part]]:
        """Takes the next token; returns what it is part of, both parts where that is not clear yet."""
        seen = self.seen + text
        if self.stage == "over":
            return self, REPLY
        if self.stage == "start":
            begun = seen.lstrip()
            if not begun.startswith(tags[0]):
                if tags[0].startswith(begun):
                    return Reasoning("start", seen), REASONING | REPLY
                return Reasoning("over"), REPLY
            seen = begun[len(tags[0]) :]
        before, closed, after = seen.partition(tags[1])
        if closed:
            return Reasoning("over"), REASONING | REPLY if after.strip() else REASONING
        return Reasoning("inside", before[-len(tags[1]) :]), REASONING

    def parts(self, text: str, policy: Policy, *, is_prompt: bool) -> tuple[Reasoning, frozenset[Part]]:
        """As `read`, of any token of an exchange; an answer is looked through where the policy asks for its parts."""
        if is_prompt:
            return self, PROMPT
        return self.read(text, policy.reasoning_tags) if policy.asks_parts else (self, REPLY)


class Watch:
    """The rules of a policy over the tokens of one exchange."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._rules = tuple(
            (index, rule, rule.aggregation) for index, rule in enumerate(policy.rules) if rule.action != "observe"
        )
        self._may_miss = {rule.metric for rule in policy.rules if rule.unscored in {"pass", "flag"}}
        self.gates: tuple[Gate, ...] = tuple(Gate() for _ in policy.rules)
        """The memory of every rule; keep it to go back to here."""

    def judge(
        self, position: int, scores: Mapping[str, TokenScore], thresholds: Thresholds, *, parts: frozenset[Part]
    ) -> tuple[Verdict, ...]:
        """Judges the next token, which is scored or unscored, never pending.

        Args:
            scores: what the reader says of the token.
            thresholds: the reader's calibrated thresholds, for rules that name none.
            parts: the scopes that the token lies in.

        Returns:
            A verdict for each rule whose gate is up, the strictest action first. An unscored token, and one of a reader
            without a threshold, breaks every gating rule, which then stops; under `hold` a missing score of any metric
            does.
        """
        verdicts: list[Verdict] = []
        if self._rules:
            self.gates, verdicts = self._judged(self.gates, position, scores, thresholds, parts)
        if self._policy.hold:
            verdicts += self._missing(position, scores)
        if len(verdicts) > 1:
            verdicts.sort(key=lambda verdict: _STRICTNESS[verdict.action])
        return tuple(verdicts)

    def foresee(
        self, start: int, drafted: Sequence[Mapping[str, TokenScore]], thresholds: Thresholds, *, parts: frozenset[Part]
    ) -> tuple[Verdict, ...]:
        """Judges drafted tokens as if they followed, and remembers nothing.

        Args:
            start: position that the first of them would take.

        Returns:
            The first verdict of each rule that looks ahead and whose gate they would put up.
        """
        gates, found = self.gates, {}
        for offset, scores in enumerate(drafted):
            before = gates
            gates, verdicts = self._judged(gates, start + offset, scores, thresholds, parts)
            for verdict in verdicts:
                index = verdict.rule
                assert index is not None, "a rule's verdict names it"
                rises = gates[index].is_up and not before[index].is_up
                if rises and self._policy.rules[index].look_ahead and index not in found:
                    found[index] = replace(verdict, reason=f"{verdict.reason} in the draft", is_early=True)
        return tuple(found.values())

    def raised(self, action: str) -> tuple[Rule, ...]:
        """The rules with this action whose gates are up."""
        return tuple(rule for index, rule, _ in self._rules if rule.action == action and self.gates[index].is_up)

    def raise_gate(self, index: int) -> None:
        """Puts a gate up whatever its last value: the token that did so has been taken back."""
        self.gates = tuple(gate._replace(is_up=gate.is_up or i == index) for i, gate in enumerate(self.gates))

    def _judged(
        self,
        gates: tuple[Gate, ...],
        position: int,
        scores: Mapping[str, TokenScore],
        thresholds: Thresholds,
        parts: frozenset[Part],
    ) -> tuple[tuple[Gate, ...], list[Verdict]]:
        after, verdicts = list(gates), []
        for index, rule, aggregation in self._rules:
            if rule.scope not in parts:
                continue
            score = scores.get(rule.metric) or TokenScore.unscored(f"the reader has no head for {rule.metric}")
            assert score.state != "pending", "a pending token is not judged"
            threshold = thresholds.get(rule.metric) if rule.threshold is None else rule.threshold
            verdict = None
            if score.running is None or (threshold is None and rule.judges):
                verdict = _of_unscored(rule, position, score, threshold, is_up=gates[index].is_up)
            elif rule.judges:
                assert threshold is not None, "judged without a threshold"
                after[index] = gate = _stepped(rule, aggregation, gates[index], score, threshold)
                verdict = _of_scored(rule, position, gate, threshold) if gate.is_up else None
            if verdict is not None:
                verdicts.append(replace(verdict, rule=index))
        return tuple(after), verdicts

    def _missing(self, position: int, scores: Mapping[str, TokenScore]) -> list[Verdict]:
        """Under `hold`: the first head's metric without a score that no rule lets pass."""
        for metric, score in scores.items():
            if score.running is None and metric not in self._may_miss and not metric.startswith(SIGNAL):
                reason = f"{metric} unscored ({score.reason}); under hold a token without a score stops the answer"
                return [Verdict(position, metric, "stop", None, None, reason)]
        return []


def _stepped(rule: Rule, aggregation: Aggregation, gate: Gate, score: TokenScore, threshold: float) -> Gate:
    assert score.value is not None and score.running is not None, "an unscored token takes no step"
    given = score.running if rule.aggregate == "running" else score.value
    memory, value = aggregation.step(gate.memory, given)
    num_over = gate.num_over + 1 if value >= threshold else 0
    release = threshold if rule.release is None else rule.release
    return Gate(num_over >= rule.min_tokens or (gate.is_up and value >= release), value, num_over, memory)


def _of_scored(rule: Rule, position: int, gate: Gate, threshold: float) -> Verdict:
    assert gate.value is not None, "a gate is put up by a value"
    reason = f"{_name(rule)} {gate.value:.3f} reached the threshold {threshold:.3f}"
    if gate.value < threshold:
        reason = f"{_name(rule)} {gate.value:.3f} has not fallen under the release {rule.release:.3f}"
    return Verdict(position, rule.metric, rule.action, gate.value, threshold, reason)


def _of_unscored(
    rule: Rule, position: int, score: TokenScore, threshold: float | None, *, is_up: bool
) -> Verdict | None:
    if score.running is None:
        why = f"{rule.metric} unscored ({score.reason})"
    else:  # this reader's head is not calibrated: as good as no score
        why = f"{rule.metric} has no threshold for the {score.reader}'s states"
    if rule.on_unscored == "stop":
        reason = f"{why}; a gated token without a score stops the answer"
        return Verdict(position, rule.metric, "stop", score.running, threshold, reason)
    if is_up and rule.action in GATING:
        return Verdict(position, rule.metric, rule.action, score.running, threshold, f"{why} while the gate is up")
    if rule.on_unscored == "flag":
        return Verdict(position, rule.metric, "flag", score.running, threshold, why)
    return None


def _name(rule: Rule) -> str:
    return rule.metric if rule.aggregate == "running" else f"{rule.metric} ({rule.aggregate})"
