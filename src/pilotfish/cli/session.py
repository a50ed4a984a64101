"""Model settings in, a monitored engine and its labels out; shared by the verbs that generate."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from pilotfish.actions import Policy, Rule
from pilotfish.cli.terminal import legend, paint, summary, uses_colour
from pilotfish.cli.verbs import Models
from pilotfish.core import Message
from pilotfish.engines import Drafting, EmbeddedEngine, Generation, Request, TokenEvent, VerdictEvent
from pilotfish.errors import SettingError
from pilotfish.heads import HeadBank, load_bank, shipped_banks
from pilotfish.models import Identity, Pair, load_pair


def load(models: Models) -> Pair:
    return load_pair(models.pair, draft=models.draft, device=models.device, dtype=models.dtype)


def find_banks(folders: tuple[Path, ...], readers: tuple[Identity | None, ...]) -> list[HeadBank]:
    """The banks that were named, else those that ship for one of these readers.

    Raises:
        SettingError: none was named and none ships.
    """
    if folders:
        return [load_bank(folder) for folder in folders]
    banks = [bank for identity in readers if identity is not None for bank in shipped_banks(identity)]
    if not banks:
        names = " or ".join(identity.name for identity in readers if identity is not None)
        raise SettingError(f"no bank ships for {names}; make one with `pilotfish fit` and name its folder with --banks")
    return banks


def start_engine(
    models: Models, drafting: Drafting | None = None, *, score_limit_s: float | None = None
) -> EmbeddedEngine:
    pair = load(models)
    banks = find_banks(models.banks, (pair.draft_identity, pair.target_identity))
    return EmbeddedEngine(pair, banks, drafting=drafting, score_limit_s=score_limit_s)


def flag_policy(
    banks: Collection[HeadBank], *, action: str = "flag", threshold: float | None = None, hold: bool = False
) -> Policy:
    """One rule a metric, for the side, prompt or answer, that its threshold was set on; the other is shown alone."""
    limits = {metric: limit for bank in banks for metric, limit in bank.card.thresholds.items()}
    rules = tuple(
        Rule(metric=m, action=action, threshold=threshold, scope=limits[m].scope if m in limits else "answer")  # type: ignore[arg-type]
        for m in dict.fromkeys(metric for bank in banks for metric in bank.metrics)
    )
    return Policy(rules=rules, hold=hold)


def thresholds(engine: EmbeddedEngine, policy: Policy) -> dict[str, float]:
    calibrated = {metric: value for bank in engine.banks.values() for metric, value in bank.thresholds.items()}
    return calibrated | {rule.metric: rule.threshold for rule in policy.rules if rule.threshold is not None}


def show(engine: EmbeddedEngine, prompt: str | Sequence[Message], request: Request, metric: str) -> Generation:
    """Streams one answer to the terminal, coloured by `metric`, and says where it was flagged and why."""
    colour = uses_colour()
    limit = thresholds(engine, request.policy).get(metric)
    stream = engine.stream(prompt, request)
    verdicts = []
    for event in stream:
        if isinstance(event, TokenEvent):
            print(paint(event.token.delta, event.scores.get(metric), limit, colour=colour), end="", flush=True)
        elif isinstance(event, VerdictEvent):
            verdicts.append(event.verdict)
    generation = stream.generation
    print(f"\n\n[{summary(generation.to_dict('')['stats'], finish=str(generation.finish_reason))}]")
    for note in generation.notes:
        print(f"[{note}]")
    for verdict in verdicts[:3]:
        text = generation.tokens[verdict.position].text
        print(f"[{verdict.action} at token {verdict.position} {text!r}: {verdict.reason}]")
    if len(verdicts) > 3:
        print(f"[… and {len(verdicts) - 3} more tokens]")
    return generation


def describe(engine: EmbeddedEngine, generation: Generation, title: str, policy: Policy) -> dict[str, Any]:
    """An exchange as a report takes it."""
    pair = engine.pair
    return generation.to_dict(
        title,
        target=pair.target_identity.name,
        draft=pair.draft_identity.name if pair.draft_identity else None,
        thresholds=thresholds(engine, policy),
        policy={rule.metric: rule.action for rule in policy.rules},
    )


__all__ = ["describe", "find_banks", "flag_policy", "legend", "load", "show", "start_engine", "thresholds"]
