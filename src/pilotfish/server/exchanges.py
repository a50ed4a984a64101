"""What an engine has done so far for one request in; the rows that the store keeps of it out."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Literal, NamedTuple
from uuid import NAMESPACE_URL, uuid5

from pilotfish.actions import Verdict
from pilotfish.core import TokenScore
from pilotfish.engines import Generation, Round, Token

State = Literal["running", "done", "cancelled", "failed", "interrupted"]

EXCERPT_TOKENS = 24
"""Tokens up to the flagged one that an alert quotes."""
EXCERPT_CHARACTERS = 240

_MARKS = re.compile(r"<\|[^|<>]{1,64}\|>|<(?:start|end)_of_turn>")
"""Of the chat templates that the family table knows: what stands between turns."""
_ROLES = ("system", "user", "assistant", "model")
ASKED_CHARACTERS = 400
_TAIL_CHARACTERS = 8000
"""Of a long prompt only so much of its end is looked at."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Exchange:
    """A request and its answer, as far as they have come."""

    id: str
    created_s: float
    endpoint: str
    model: str
    key_id: str | None
    state: State
    prompt: str
    tokens: Sequence[Token]
    """The prompt's first."""
    num_prompt_tokens: int
    verdicts: Sequence[Verdict] = ()
    rounds: Sequence[Round] = ()
    finish_reason: str | None = None
    finished_s: float | None = None
    stats: Mapping[str, Any] = field(default_factory=dict)
    own_rules: range = range(0)
    """Indices of rules that are the client's own gates."""
    traceparent: str | None = None
    """Its place in a trace, where there is one: alerts name it."""

    @property
    def alerts(self) -> list[Verdict]:
        """The first verdict for each metric and action: what somebody is told about."""
        first: dict[tuple[str, str], Verdict] = {}
        for verdict in self.verdicts:
            if not is_wished(verdict, self.own_rules):
                first.setdefault((verdict.metric, verdict.action), verdict)
        return list(first.values())


def is_wished(verdict: Verdict, own_rules: range) -> bool:
    """Whether it says no more than that a gate of the client's own went up, which is nobody else's concern."""
    return verdict.action == "steer" and verdict.rule in own_rules


class Tally(NamedTuple):
    """What a generation's scores come to, from one look at each."""

    num_scored: int
    """Tokens that every head scored."""
    in_prompt: Mapping[str, float]
    """Metric to its highest running score; a metric that no token has is left out."""
    in_answer: Mapping[str, float]

    @property
    def metrics(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys((*self.in_prompt, *self.in_answer)))


def tally(generation: Generation) -> Tally:
    num_scored = 0
    highest: tuple[dict[str, float], dict[str, float]] = ({}, {})
    for token in generation.tokens:
        side = highest[token.position >= generation.num_prompt_tokens]
        found = dict((token.scores or {}).items())
        num_scored += bool(found) and all(score.state == "scored" for score in found.values())
        for metric, score in found.items():
            if score.running is not None and score.running > side.get(metric, -1.0):
                side[metric] = score.running
    return Tally(num_scored, *highest)


def exchange_row(exchange: Exchange, *, redact: bool) -> dict[str, Any]:
    answered = (t for t in exchange.tokens if t.position >= exchange.num_prompt_tokens and t.is_emitted)
    return {
        "id": exchange.id,
        "created_s": exchange.created_s,
        "finished_s": exchange.finished_s,
        "endpoint": exchange.endpoint,
        "model": exchange.model,
        "key_id": exchange.key_id,
        "state": exchange.state,
        "finish_reason": exchange.finish_reason,
        "is_redacted": redact,
        "prompt": None if redact else storable(exchange.prompt),
        "answer": None if redact else storable("".join(token.delta for token in answered)),
        "num_prompt_tokens": exchange.num_prompt_tokens,
        "stats": dict(exchange.stats),
        "rounds": [round_json(item, redact=redact) for item in exchange.rounds],
    }


def token_row(exchange_id: str, token: Token, *, redact: bool) -> dict[str, Any]:
    """One row of scores, second signals among them where they were asked for; under redaction neither text nor id,
    since an id is a text.
    """
    found = dict((token.scores or {}).items())
    reader = next((score.reader for score in found.values()), "draft")
    if token.signals is not None and token.origin != "prompt":  # a prompt has none
        found |= token.signals.scores()
    return {
        "exchange_id": exchange_id,
        "position": token.position,
        "token_id": None if redact else token.id,
        "text": None if redact else storable(token.text),
        "origin": token.origin,
        "round": token.round,
        "is_emitted": token.is_emitted,
        "reader": reader,
        **scores_json(found),
    }


def scores_json(found: Mapping[str, TokenScore]) -> dict[str, dict[str, Any]]:
    """Per metric the score of the token, that of the text so far, or why there is none."""
    return {
        "scores": {metric: score.value for metric, score in found.items() if score.value is not None},
        "running": {metric: score.running for metric, score in found.items() if score.running is not None},
        "unscored": {metric: score.reason for metric, score in found.items() if score.state == "unscored"},
    }


def round_json(item: Round, *, redact: bool) -> dict[str, Any]:
    """A round of speculation with its look-ahead scores."""
    drafted = [
        {
            "text": None if redact else storable(token.text),
            "accepted": token.is_accepted,
            "scores": {m: s.value for m, s in (token.scores or {}).items() if s.value is not None},
        }
        for token in item.drafted
    ]
    return {"round": item.number, "start": item.start, "drafted": drafted}


def verdict_row(exchange_id: str, number: int, verdict: Verdict) -> dict[str, Any]:
    return {"exchange_id": exchange_id, "number": number, **verdict_json(verdict)}


def verdict_json(verdict: Verdict) -> dict[str, Any]:
    kept = ("position", "metric", "action", "score", "threshold", "reason", "is_early")
    return {name: getattr(verdict, name) for name in kept}


def alert_row(exchange: Exchange, verdict: Verdict, *, now_s: float, redact: bool) -> dict[str, Any]:
    """An alert with what its sinks are sent. Its id follows from what it says, so that a receiver can tell repeats."""
    name = uuid5(NAMESPACE_URL, f"pilotfish:{exchange.id}/{verdict.metric}/{verdict.action}")
    alert_id = f"alert_{name.hex}"
    said = verdict_json(verdict)
    in_prompt = verdict.position < exchange.num_prompt_tokens
    data = {"id": alert_id, "exchange": exchange.id, "model": exchange.model, "in_prompt": in_prompt, **said}
    if not redact:
        data["excerpt"] = _excerpt(exchange.tokens, verdict.position)
    if exchange.traceparent is not None:
        data["traceparent"] = exchange.traceparent
    timestamp = datetime.fromtimestamp(now_s, UTC).isoformat(timespec="milliseconds")
    payload = {"type": "monitor.alert", "timestamp": timestamp, "data": data}
    return {"id": alert_id, "exchange_id": exchange.id, "created_s": now_s, "payload": payload, **said}


def _excerpt(tokens: Sequence[Token], position: int) -> str:
    near = [t.text for t in tokens if position - EXCERPT_TOKENS < t.position <= position]
    return storable("".join(near)[-EXCERPT_CHARACTERS:])


def last_turn(prompt: str) -> str:
    """How the last turn of a rendered prompt begins, without the chat template's marks: a label."""
    turns = []
    for part in _MARKS.split(prompt[-_TAIL_CHARACTERS:]):
        role, _, rest = part.strip().partition("\n")
        said = rest.strip() if role in _ROLES else part.strip()
        if said:
            turns.append(said)
    return turns[-1][:ASKED_CHARACTERS] if turns else ""


def storable(text: str) -> str:
    """Text as every database takes it: PostgreSQL refuses the character of value 0."""
    return text.replace("\x00", "\ufffd")
