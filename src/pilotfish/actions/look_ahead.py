"""Recorded exchanges and a rule in; how much earlier drafted tokens would have warned, and how often in vain, out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby
from typing import NamedTuple

from pilotfish.actions.policy import Policy, Rule
from pilotfish.actions.recorded import Recorded
from pilotfish.actions.watch import Watch


class Warned(NamedTuple):
    """A gate that went up on committed tokens."""

    exchange: str
    position: int
    """Of the token that put it up."""
    known_at: int
    """Tokens committed by the time that its score was judged without look-ahead: with it, those of its whole round."""
    warned_at: int | None
    """Tokens committed when drafted tokens of that round put the gate up; None where they did not, or where the gate
    had gone up in this round before."""

    @property
    def tokens_earlier(self) -> int:
        """How many tokens before its score was judged; with `hold` none of them had left, without it all had."""
        return 0 if self.warned_at is None else self.known_at - self.warned_at


class LookAhead(NamedTuple):
    """What look-ahead is worth to a rule, on some exchanges."""

    num_exchanges: int
    rises: tuple[Warned, ...]
    num_warnings: int
    """Rounds whose drafted tokens put the gate up."""
    num_false: int
    """Of these, rounds in which no committed token did: the draft's idea was rejected."""
    num_quiet: int
    """Exchanges in which no committed token put the gate up."""
    num_quiet_warned: int
    """Of these, exchanges with a warning: the extra false positives."""

    @property
    def num_foreseen(self) -> int:
        return sum(rise.warned_at is not None for rise in self.rises)


def look_ahead(recorded: Sequence[Recorded], rule: Rule) -> LookAhead:
    """Holds what drafted tokens said before they were verified against what committed tokens said after.

    Args:
        recorded: exchanges with their rounds (`Generation.to_json`), generated under a policy that did not change them.
        rule: whose threshold, aggregator and scope count; its action does not.
    """
    early = replace(rule, action="flag", unscored="pass", look_ahead=True)
    found = [_one(exchange, Policy(rules=(early,))) for exchange in recorded]
    quiet = [counts for rises, *counts in found if not rises]
    return LookAhead(
        len(recorded),
        tuple(rise for rises, *_ in found for rise in rises),
        sum(num_warnings for _, num_warnings, _ in found),
        sum(num_false for _, _, num_false in found),
        len(quiet),
        sum(num_warnings > 0 for num_warnings, _ in quiet),
    )


def _one(exchange: Recorded, policy: Policy) -> tuple[list[Warned], int, int]:
    """The rises of one exchange, its warnings, and those in vain."""
    watch, parts, limits = Watch(policy), list(exchange.parts(policy)), exchange.thresholds
    rounds = {item.number: item for item in exchange.rounds}
    rises: list[Warned] = []
    num_warnings = num_false = end = 0
    for number, group in groupby(exchange.tokens, key=lambda token: token.round):
        tokens, item, warned_at = list(group), rounds.get(number), None
        end += len(tokens)
        if item is not None and watch.foresee(item.start, item.drafted, limits, parts=parts[end - 1]):
            warned_at = item.start
        before = len(rises)
        for token in tokens:
            was_up = watch.gates[0].is_up
            watch.judge(token.position, token.scores, limits, parts=parts[token.position])
            if watch.gates[0].is_up and not was_up:
                is_first = len(rises) == before
                rises.append(Warned(exchange.title, token.position, end, warned_at if is_first else None))
        num_warnings += warned_at is not None
        num_false += warned_at is not None and len(rises) == before
    return rises, num_warnings, num_false
