"""An answer's events in; what the `monitor` object says of them out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pilotfish.actions import Policy, Verdict
from pilotfish.core import TokenScore
from pilotfish.engines import Event, Generation, RoundEvent, ScoreEvent, Token, TokenEvent, VerdictEvent
from pilotfish.errors import SettingError
from pilotfish.server.backend import Call, EngineInfo
from pilotfish.server.exchanges import Tally, is_wished, scores_json, verdict_json
from pilotfish.server.schemas import MonitorOptions
from pilotfish.server.steering import steering_json

DIGITS = 6
"""Of a probability on the wire; the store keeps all of them."""
FINISH = {"eos": "stop", "stop_string": "stop", "length": "length"}
"""The engine's reasons in OpenAI's words; any other one is a gate's."""


def chosen_metrics(info: EngineInfo, heads: Sequence[str] | None) -> tuple[str, ...]:
    """The metrics that a client asked for, all when it named none; raises `SettingError` when one has no head."""
    unknown = [metric for metric in heads or () if metric not in info.metrics]
    if unknown:
        raise SettingError(f"metric {unknown[0]!r} has no head; there are {', '.join(info.metrics) or 'none'}")
    return info.metrics if heads is None else tuple(dict.fromkeys(heads))


class Report:
    """What one client is told of one answer: only of tokens that left, and only text that left."""

    def __init__(self, options: MonitorOptions, info: EngineInfo, policy: Policy, call: Call | None = None) -> None:
        """`policy` is the server's own, without the gates of the steering that a call asks for."""
        self._options, self._info, self._policy = options, info, policy
        self._steering, self._own_rules = (call.steering, call.own_rules) if call is not None else ((), range(0))
        self._metrics = chosen_metrics(info, options.heads)

    def of(self, events: Iterable[Event], num_prompt_tokens: int) -> dict[str, Any]:
        """What a chunk says; empty when there is nothing to say."""
        tokens: list[dict[str, Any]] = []
        rounds: list[dict[str, Any]] = []
        verdicts: list[dict[str, Any]] = []
        for event in events:
            match event:
                case TokenEvent(token, scores):
                    tokens.append(self._token(token, scores, in_prompt=False))
                case ScoreEvent(token):
                    in_prompt = token.position < num_prompt_tokens
                    if self._options.prompt or not in_prompt:
                        tokens.append(self._token(token, token.scores or {}, in_prompt=in_prompt))
                case RoundEvent(item) if self._options.lookahead:
                    rounds.append(self._round(item))
                case VerdictEvent(verdict) if verdict.metric in self._metrics:
                    verdicts.append(verdict_json(verdict))
        said = {"tokens": tokens if self._options.tokens else [], "rounds": rounds, "verdicts": verdicts}
        return {name: value for name, value in said.items() if value}

    def summary(self, generation: Generation, exchange_id: str, found: Tally) -> dict[str, Any]:
        """What is said once, at the end."""
        more: dict[str, Any] = {}
        if self._info.is_taxed:
            more["reader"] = {"model": self._info.draft, "taxed": True}
        if self._steering:
            more["steering"] = steering_json(self._steering, generation)
        return more | {
            "exchange": exchange_id,
            "heads": self._heads(generation, found),
            "stats": {
                "committed": len(generation.tokens),
                "scored": found.num_scored,
                "coverage": found.num_scored / len(generation.tokens),
                "acceptance": generation.acceptance,
                "taxed_reads": generation.num_taxed_reads,
                "notes": list(generation.notes),
            },
        }

    def whole(self, generation: Generation, exchange_id: str, found: Tally) -> dict[str, Any]:
        """All of it, for an answer that is sent in one piece."""
        start = generation.num_prompt_tokens
        shown = [t for t in generation.tokens if t.is_emitted and (t.position >= start or self._options.prompt)]
        said = self.summary(generation, exchange_id, found)
        said["verdicts"] = [verdict_json(v) for v in generation.verdicts if v.metric in self._metrics]
        if self._options.tokens:
            said["tokens"] = [self._token(t, t.scores or {}, in_prompt=t.position < start) for t in shown]
        if self._options.lookahead:
            said["rounds"] = [self._round(item) for item in generation.rounds]
        return said

    def _heads(self, generation: Generation, found: Tally) -> dict[str, dict[str, Any]]:
        """Per metric how high it got on each side, and whether a rule of the server's was broken."""
        flagged = {verdict.metric for verdict in generation.verdicts if not is_wished(verdict, self._own_rules)}
        return {
            metric: {
                "max_prompt": _short(found.in_prompt.get(metric)),
                "max_answer": _short(found.in_answer.get(metric)),
                "threshold": threshold_of(self._info, self._policy, metric),
                "actions": [rule.action for rule in self._policy.rules if rule.metric == metric],
                "flagged": metric in flagged,
            }
            for metric in self._metrics
        }

    def _token(self, token: Token, scores: Mapping[str, TokenScore], *, in_prompt: bool) -> dict[str, Any]:
        """The text is the answer's own, which a gate may have changed; the token's would say what it hid."""
        found = {metric: scores[metric] for metric in self._metrics if metric in scores}
        if self._options.signals and not in_prompt and token.signals is not None:
            found |= token.signals.scores()
        said = {
            "position": token.position,
            "text": token.text if in_prompt else token.delta,
            "origin": token.origin,
            **rounded(found),
        }
        return said | {"pending": True} if any(score.state == "pending" for score in found.values()) else said

    def _round(self, item: Any) -> dict[str, Any]:
        """Look-ahead; without its texts under a gate, since drafts may hold what the gate keeps back."""
        drafted = [
            {
                "text": None if self._policy.is_gating else token.text,
                "accepted": token.is_accepted,
                "scores": rounded({m: s for m, s in (token.scores or {}).items() if m in self._metrics})["scores"],
            }
            for token in item.drafted
        ]
        return {"round": item.number, "start": item.start, "drafted": drafted}


def rounded(found: Mapping[str, TokenScore]) -> dict[str, dict[str, Any]]:
    said = scores_json(found)
    for kind in ("scores", "running"):
        said[kind] = {metric: round(value, DIGITS) for metric, value in said[kind].items()}
    return said


def stop_of(generation: Generation) -> Verdict | None:
    """The verdict that ended an answer."""
    stops = [verdict for verdict in generation.verdicts if verdict.action == "stop"]
    return stops[-1] if stops else None


def finish_of(generation: Generation) -> str:
    """Why an answer ended, in OpenAI's words."""
    return FINISH.get(generation.finish_reason or "", "content_filter")


def usage_of(generation: Generation) -> dict[str, int]:
    """Tokens of the prompt, and of the answer those that left."""
    sent = sum(token.is_emitted for token in generation.committed)
    prompt = generation.num_prompt_tokens
    return {"prompt_tokens": prompt, "completion_tokens": sent, "total_tokens": prompt + sent}


def _short(value: float | None) -> float | None:
    return None if value is None else round(value, DIGITS)


def threshold_of(info: EngineInfo, policy: Policy, metric: str) -> float | None:
    """The first rule's own threshold, else the calibrated one."""
    own = (rule.threshold for rule in policy.rules if rule.metric == metric and rule.threshold is not None)
    calibrated = (head.threshold for head in info.heads if head.metric == metric)
    return next(own, next(calibrated, None))
