"""Committed tokens and their scores in; judged, emitted, withheld or taken-back tokens out. Runs no model.

The loop that runs the models, for one answer or for many, tells an `Exchange` what was committed and read, drains
`advance`, and asks what comes next: whether it has ended (`finish`), how many tokens stay where some were taken back
(`take_back`), what must not be sampled (`banned`), whether the draft decides (`defers`), which edits are on (`edits`).
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from pilotfish.actions import Rule, Verdict, Watch
from pilotfish.actions.watch import REASONING, REPLY, Gate, Part, Reasoning
from pilotfish.core import TokenScore
from pilotfish.engines.detokenize import TextStream, text_of
from pilotfish.engines.escalate import Escalation
from pilotfish.engines.records import (
    Attempt,
    Drafted,
    Event,
    FinishReason,
    Generation,
    Origin,
    Pending,
    Round,
    RoundEvent,
    ScoreEvent,
    Scores,
    Token,
    TokenEvent,
    VerdictEvent,
)
from pilotfish.engines.request import Prompt, Request, Setup
from pilotfish.engines.signals import PROMPT_TOKEN, Signals
from pilotfish.engines.speculate import Acceptance
from pilotfish.runs import generator


class Exchange:
    """One exchange as it grows."""

    def __init__(self, setup: Setup, prompt: Prompt, request: Request) -> None:
        self._policy = request.policy
        self._max_new_tokens = request.max_new_tokens
        self._stop = request.stop
        self._tokenizer, self._eos_ids = setup.pair.tokenizer, setup.pair.eos_ids
        self._metrics = setup.metrics
        self._thresholds = {reader: bank.thresholds for reader, bank in setup.banks.items()}
        self._wants_signals = request.wants_signals
        self._standing_edits = request.standing_edits
        self._watch = Watch(request.policy)
        self._escalation = Escalation(setup.judge, generator=generator(request.seed, "escalate"))
        self._reasoning = Reasoning("inside" if prompt.starts_reasoning else "start")
        self._text = TextStream(self._tokenizer, request.stop)
        self.ids = list(prompt.ids)
        self.number = 0
        """Of the round of speculation."""
        self.finish: FinishReason | None = None
        self._num_judged = 0
        self._num_emitted = len(prompt.ids)
        self._is_warned = False
        self._before: list[tuple[tuple[Gate, ...], Reasoning]] = []
        """Of each judged token, what the rules remembered before it; kept where tokens may be taken back."""
        self._taken_back: int | None = None
        self._banned: dict[int, set[int]] = {}
        self._tries: dict[int, int] = {}
        """Of each rule to resample, by its index: times that it went back."""
        self._hidden: set[int] = set()
        """Places in the answer's text that a redaction covers."""
        tokens = [
            Token(i, token, text_of(self._tokenizer, [token]), "prompt", 0, is_emitted=True)
            for i, token in enumerate(prompt.ids)
        ]
        if self._wants_signals:
            for token in tokens:
                token.signals = Signals(reason=PROMPT_TOKEN)
                token.scores = None if self._thresholds else {}  # without a bank there is nothing else to wait for
        self.generation = Generation(prompt.text, tokens, len(tokens), starts_reasoning=prompt.starts_reasoning)

    # What the loop asks.

    @property
    def holds(self) -> bool:
        """Whether tokens wait for their scores."""
        return self._policy.holds or self._is_warned

    @property
    def room(self) -> int:
        """Tokens that the answer may still have."""
        return self._max_new_tokens - len(self.generation.committed)

    @property
    def banned(self) -> frozenset[int]:
        """Ids that must not be sampled as the next token."""
        return frozenset(self._banned.get(len(self.ids), ()))

    @property
    def defers(self) -> bool:
        """Whether the next token is the draft's."""
        return bool(self._watch.raised("defer"))

    @property
    def edits(self) -> tuple[str, ...]:
        """Names of the edits that are on."""
        raised = (rule.edit for rule in self._watch.raised("steer") if rule.edit is not None)
        return tuple(dict.fromkeys((*self._standing_edits, *raised)))

    def take_back(self) -> int | None:
        """How many tokens stay, where some were taken back since the last call: caches must forget the rest."""
        kept, self._taken_back = self._taken_back, None
        return kept

    # What the loop tells.

    def commit(
        self,
        drafted: Sequence[int],
        scores: Sequence[Scores],
        acceptance: Acceptance,
        signals: Sequence[Signals | None] = (),
        edits: tuple[str, ...] = (),
    ) -> int:
        """Appends the accepted tokens and the target's own; returns how many of the drafted were kept.

        They are fewer than were accepted where the answer ends among them.

        Args:
            scores: of drafted tokens, as far as the draft has read them.
            signals: of the tokens to commit; None where they are still to come.
        """
        accepted = drafted[: acceptance.num_accepted]
        for index, token_id in enumerate([*accepted, acceptance.next_token]):
            origin: Origin = "draft" if index < len(accepted) else "target"
            known = scores[index] if index < min(len(accepted), len(scores)) else None
            token = self.append(token_id, origin, known, signals[index] if signals else None)
            token.edits = edits
            if self.finish is not None:
                return min(index + 1, len(accepted))
        return len(accepted)

    def append(
        self, token_id: int, origin: Origin, scores: Scores | None = None, signals: Signals | None = None
    ) -> Token:
        """Commits one token. Without any bank there is no score to wait for."""
        text = text_of(self._tokenizer, [token_id])
        known: Mapping[str, TokenScore] | None = scores if self._thresholds else {}
        token = Token(len(self.ids), token_id, text, origin, self.number, scores=known, signals=signals)
        is_eos, is_full = token_id in self._eos_ids, self.room == 1
        token.delta = self._text.push(token_id, is_last=is_eos or is_full)
        self.ids.append(token_id)
        self.generation.tokens.append(token)
        if self._text.is_stopped:
            self.finish = "stop_string"
        elif is_eos:
            self.finish = "eos"
        elif is_full:
            self.finish = "length"
        return token

    def record(self, start: int, drafted: Sequence[int], scores: Sequence[Scores], num_accepted: int) -> RoundEvent:
        """Keeps what was drafted in a round, scores of rejected tokens included."""
        items = tuple(
            Drafted(token, text_of(self._tokenizer, [token]), i < num_accepted, scores[i] if i < len(scores) else None)
            for i, token in enumerate(drafted)
        )
        self.generation.rounds.append(Round(self.number, start, items))
        return RoundEvent(self.generation.rounds[-1])

    def foresee(self, scores: Sequence[Scores]) -> Iterator[Event]:
        """Judges drafted tokens for the rules that look ahead."""
        stage = self._reasoning.stage if self._policy.asks_parts else "over"
        parts = {"over": REPLY, "inside": REASONING, "start": REASONING | REPLY}[stage]
        early = self._watch.foresee(len(self.ids), scores, self._thresholds.get("draft", {}), parts=parts)
        held = [rule for rule in self._watch.raised("hold") if rule.look_ahead]
        self._is_warned = bool(held) or any(verdict.action == "hold" for verdict in early)
        for verdict in early:
            self.generation.verdicts.append(verdict)
            yield VerdictEvent(verdict)

    def advance(self) -> Iterator[Event]:
        """Judges, in order, every token whose scores have come, and emits what may leave."""
        if self.finish == "content_filter":
            return
        tokens = self.generation.tokens
        while self._num_judged < len(tokens) and self._is_ready(tokens[self._num_judged]):
            token = tokens[self._num_judged]
            if token.is_emitted:
                yield ScoreEvent(token)
            verdicts = self._judge(token)
            self._num_judged += 1
            for verdict in verdicts:
                self.generation.verdicts.append(verdict)
                yield VerdictEvent(verdict)
            if verdicts and self._carry_out(token, verdicts):
                return
            yield from self._release(self._num_judged)
        if not self.holds:
            yield from self._release(len(tokens))

    def _is_ready(self, token: Token) -> bool:
        return token.scores is not None and (token.signals is not None or not self._wants_signals)

    # Emission.

    def _release(self, end: int) -> Iterator[Event]:
        """Emits what comes before `end`, but for the policy's margin while the answer goes on."""
        tokens = self.generation.tokens
        if self.finish is None or end < len(tokens):
            end -= self._policy.margin
        while self._num_emitted < end:
            token = tokens[self._num_emitted]
            self._num_emitted += 1
            token.is_emitted = True
            if self._hidden:
                index = token.position - self.generation.num_prompt_tokens
                token.delta = self._text.without(self._hidden, index, self._policy.mark)
            yield TokenEvent(token, token.scores if token.scores is not None else Pending(self._metrics))

    def _withhold_from(self, position: int) -> None:
        """Ends the answer before a token; what was committed after it is dropped as if it had never been."""
        end = max(position + 1, self.generation.num_prompt_tokens)
        del self.generation.tokens[end:], self.ids[end:]
        self.finish = "content_filter"

    def _go_back(self, start: int, action: str) -> None:
        """Takes all tokens from `start` on back; none of them has been emitted."""
        assert self._num_emitted <= start, "an emitted token cannot be taken back"
        dropped, first = self.generation.tokens[start:], self.generation.num_prompt_tokens
        texts = tuple(token.text for token in dropped)
        self.generation.attempts.append(Attempt(start, tuple(token.id for token in dropped), texts, action))
        del self.generation.tokens[start:], self.ids[start:]
        self._watch.gates, self._reasoning = self._before[start]
        del self._before[start:]
        self._num_judged = start
        self._text = TextStream.of(self._tokenizer, self._stop, self.ids[first:])
        self.finish = None
        self._banned = {place: ids for place, ids in self._banned.items() if place <= start}
        self._taken_back = start

    # Verdicts.

    def _judge(self, token: Token) -> Sequence[Verdict]:
        """What the rules say of the next token, actions that are used up turned into a stop."""
        policy = self._policy
        if not policy.rules and not policy.hold:
            return ()
        before = self._watch.gates
        if policy.goes_back:
            self._before.append((before, self._reasoning))
        scores = token.scores or {}
        limits = self._thresholds.get(scores.reader, {}) if isinstance(scores, Scores) else {}
        if token.signals is not None:
            scores = ChainMap(token.signals.scores(), scores)  # type: ignore[arg-type]  # it is only read
        verdicts = self._watch.judge(token.position, scores, limits, parts=self._parts(token))
        if not verdicts:
            return ()
        settled = [self._settled(verdict, before) for verdict in verdicts]
        return sorted((each for each in settled if each is not None), key=lambda each: each.action != "stop")

    def _parts(self, token: Token) -> frozenset[Part]:
        is_prompt = token.origin == "prompt"
        self._reasoning, parts = self._reasoning.parts(token.text, self._policy, is_prompt=is_prompt)
        return parts

    def _settled(self, verdict: Verdict, before: tuple[Gate, ...]) -> Verdict | None:
        """A verdict as it is carried out; None where the judge's word still stands."""
        if verdict.action not in {"resample", "escalate"}:
            return verdict
        assert verdict.rule is not None, "a rule's verdict names it"
        rule = self._policy.rules[verdict.rule]
        if verdict.action == "resample":
            if self._tries.get(verdict.rule, 0) < rule.tries:
                return verdict
            reason = f"{verdict.reason}; all {rule.tries} tries are used up"
            return replace(verdict, action="stop", reason=reason)
        return self._escalated(rule, verdict, rises=not before[verdict.rule].is_up)

    def _escalated(self, rule: Rule, verdict: Verdict, *, rises: bool) -> Verdict | None:
        if not self._escalation.is_occasion(rule, verdict, rises=rises):
            return None
        ids = self.ids[self.generation.num_prompt_tokens : verdict.position + 1]
        action, said = self._escalation.settle(rule, verdict, self.generation.prompt, text_of(self._tokenizer, ids))
        self.generation.num_asked = self._escalation.num_asked
        self.generation.num_unanswered = self._escalation.num_unanswered
        return replace(verdict, action=action, reason=f"{verdict.reason}; {said}")

    def _carry_out(self, token: Token, verdicts: Sequence[Verdict]) -> bool:
        """Does what the verdicts on a token ask for; returns whether it and what follows it is gone."""
        by_action = {verdict.action: verdict for verdict in reversed(verdicts)}
        if "stop" in by_action:
            self._withhold_from(token.position)
            return True
        if "resample" in by_action:
            self._resample(by_action["resample"])
            return True
        if "defer" in by_action and not token.is_deferred:
            index = by_action["defer"].rule
            assert index is not None, "a rule's verdict names it"
            self._go_back(token.position, "defer")
            self._watch.raise_gate(index)
            return True
        if "redact" in by_action:
            token.is_redacted = True
            piece = self._text.pieces[token.position - self.generation.num_prompt_tokens]
            self._hidden.update(range(piece.start, piece.end))
        return False

    def _resample(self, verdict: Verdict) -> None:
        """Goes back to the last safe point, where the rule's value lay under its release; excludes what came next."""
        index, start = verdict.rule, verdict.position
        assert index is not None, "a rule's verdict names it"
        release = self._policy.rules[index].release
        floor = verdict.threshold if release is None else release
        while start > self._num_emitted and _is_over(self._before[start][0][index].value, floor):
            start -= 1
        self._tries[index] = self._tries.get(index, 0) + 1
        excluded = self.ids[start]
        self._go_back(start, "resample")
        self._banned.setdefault(start, set()).add(excluded)


def _is_over(value: float | None, floor: float | None) -> bool:
    return value is not None and floor is not None and value >= floor
