"""The embedded engine: a prompt in, tokens with scores out, in one process.

One round of speculation:

    draft reads what it has not consumed ──► its scores are due: judge, emit
    draft proposes d1 … dk                   (reads d1 … d(k-1), scored in the same passes)
    target reads the last token and d1 … dk ──► accept a prefix, add its own next token
    both caches roll back to what was committed

A drafted token's score counts once the token is committed; scores of rejected ones stay in the round's record as
look-ahead.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from pilotfish.actions import GATING, Policy, Verdict, decide
from pilotfish.core import Message, Reader, TokenScore
from pilotfish.engines.detokenize import TextStream, text_of
from pilotfish.engines.drafting import Drafting, DraftLength, weight_ratio
from pilotfish.engines.reader import CachedModel
from pilotfish.engines.records import (
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
from pilotfish.engines.speculate import Acceptance, Sampling, accept, distribution, likeliest, sample
from pilotfish.errors import BankMismatch, GenerationError, SettingError
from pilotfish.heads import HeadBank, joined
from pilotfish.models import Identity, Pair
from pilotfish.runs import generator
from pilotfish.texts import encode, render

CATCH_UP = 16
"""While speculation is paused, the draft reads for the scores alone each time this many tokens wait."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What is asked of one generation."""

    max_new_tokens: int = 256
    sampling: Sampling = field(default_factory=Sampling)
    stop: tuple[str, ...] = ()
    """Strings that end the answer; they are not part of it."""
    policy: Policy = field(default_factory=Policy)
    seed: int = 0
    """The same seed gives the same answer; without effect on greedy decoding."""
    flush: bool = True
    """Whether one more draft step at the end scores the last token or two; else they are declared misses."""

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise SettingError(f"max_new_tokens {self.max_new_tokens} is not allowed; give at least 1")
        if any(not word for word in self.stop):
            raise SettingError("an empty stop string ends every answer before it begins; leave it out")


class EmbeddedEngine:
    """A pair and its banks, ready for requests."""

    def __init__(self, pair: Pair, banks: Sequence[HeadBank] = (), *, drafting: Drafting | None = None) -> None:
        """Each bank goes to the model that it was made for: the draft, or the target itself; those of one are joined.

        Raises:
            BankMismatch: a bank was made for neither.
            SettingError: two of one model have a head for one metric.
        """
        self.pair = pair
        self.drafting = drafting or Drafting()
        by_reader: dict[Reader, list[HeadBank]] = {}
        for bank in banks:
            by_reader.setdefault(self._reader_of(bank), []).append(bank)
        self.banks = {reader: joined(group) for reader, group in by_reader.items()}
        both = [model for model in (pair.target, pair.draft) if model is not None]
        self.max_tokens = min(model.config.max_position_embeddings for model in both)
        self.weight_ratio = weight_ratio(pair)

    def _reader_of(self, bank: HeadBank) -> Reader:
        problems = []
        readers: tuple[tuple[Reader, Identity | None], ...] = (
            ("draft", self.pair.draft_identity),
            ("target", self.pair.target_identity),
        )
        for reader, identity in readers:
            if identity is None:
                continue
            try:
                bank.check(identity)
            except BankMismatch as error:
                problems.append(f"as a reader of the {reader}: {error}")
            else:
                return reader
        raise BankMismatch("the bank fits no model of this pair; " + "; ".join(problems))

    @property
    def metrics(self) -> tuple[str, ...]:
        """Every metric that some reader scores."""
        return tuple(dict.fromkeys(metric for bank in self.banks.values() for metric in bank.metrics))

    def stream(self, prompt: str | Sequence[Message], request: Request | None = None) -> GenerationStream:
        """Begins a generation; nothing is computed until the stream is iterated.

        Raises:
            SettingError: the policy names a metric without a head, or a threshold that is nowhere given.
            GenerationError: the prompt is empty, or prompt and answer do not fit the models.
        """
        request = request or Request()
        banks = self.banks.values()
        uncalibrated = {metric for bank in banks for metric in bank.metrics if metric not in bank.thresholds}
        request.policy.check(self.metrics, uncalibrated)
        if request.policy.holds and not self.banks:
            raise SettingError(
                "the policy holds tokens until they are scored, but no bank is loaded; give a bank, or turn hold off"
            )
        messages = (Message("user", prompt),) if isinstance(prompt, str) else tuple(prompt)
        if not any(message.content.strip() for message in messages):
            raise GenerationError("the prompt is empty; give at least one message with text")
        rendered = render(messages, self.pair.tokenizer, add_generation_prompt=True)
        ids = encode(rendered, self.pair.tokenizer).token_ids
        if len(ids) + request.max_new_tokens > self.max_tokens:
            raise GenerationError(
                f"the prompt has {len(ids):,} tokens and the answer may have {request.max_new_tokens:,}; together at "
                f"most "
                f"{self.max_tokens:,} fit these models. Shorten the prompt or lower max_new_tokens"
            )
        return GenerationStream(self, rendered.text, ids, request)

    def generate(self, prompt: str | Sequence[Message], request: Request | None = None) -> Generation:
        """Runs a generation to its end."""
        stream = self.stream(prompt, request)
        for _ in stream:
            pass
        return stream.generation


class GenerationStream(Iterator[Event]):
    """One generation: iterate it for events; `generation` holds what is known so far."""

    def __init__(self, engine: EmbeddedEngine, prompt: str, ids: list[int], request: Request) -> None:
        pair, banks = engine.pair, engine.banks
        self._request = request
        self._tokenizer = pair.tokenizer
        self._eos_ids = pair.eos_ids
        self._bank_of = banks
        options = {"vocab_size": pair.vocab_size, "boundary": len(ids)}
        self._target = CachedModel(pair.target, "target", banks.get("target"), **options)
        self._draft = None
        if pair.draft is not None:
            self._draft = CachedModel(pair.draft, "draft", banks.get("draft"), **options)
        self._length = DraftLength(engine.drafting, engine.weight_ratio)
        self._text = TextStream(pair.tokenizer, request.stop)
        self._ids = list(ids)
        self._draft_random = generator(request.seed, "draft")
        self._accept_random = generator(request.seed, "accept")
        self._metrics = engine.metrics
        self._number = 0
        self._num_judged = 0
        self._due: list[Token] = []
        """Tokens that a model has read whose scores it has not been asked for."""
        self._was_paused = False
        self._finish: FinishReason | None = None
        tokens = [
            Token(i, token, text_of(self._tokenizer, [token]), "prompt", 0, is_emitted=True)
            for i, token in enumerate(ids)
        ]
        self.generation = Generation(prompt, tokens, len(ids))
        self._events = self._run()

    def __next__(self) -> Event:
        return next(self._events)

    # The run, top down.

    def _run(self) -> Generator[Event, None, None]:
        started = time.perf_counter()
        while self._finish is None:
            yield from self._round()
        yield from self._close()
        self.generation.finish_reason = self._finish
        self.generation.seconds = time.perf_counter() - started

    def _round(self) -> Generator[Event, None, None]:
        self._number += 1
        paused = self._draft is None or self._length.is_paused
        self._note(paused)
        logits = None
        if self._draft is not None and (not paused or self._must_read_for_scores()):
            logits = self._read(self._draft, num_logits=0 if paused else 1)
            self.generation.num_taxed_reads += paused
            yield from self._advance()
            if self._finish is not None:
                return
        drafted, probs, scores = self._propose(logits) if not paused and logits is not None else ([], [], [])
        committed = len(self._ids)
        target_logits = self._read(self._target, drafted, num_logits=len(drafted) + 1)
        acceptance = accept(drafted, probs, target_logits, self._request.sampling, generator=self._accept_random)
        num_kept = self._commit(drafted, scores, acceptance)
        self._target.rollback(min(self._target.length, committed + num_kept))
        if self._draft is not None:
            self._draft.rollback(min(self._draft.length, committed + num_kept))
        self._length.observe(len(drafted), acceptance.num_accepted)
        if drafted:
            yield RoundEvent(self._record(committed, drafted, scores, acceptance))
        yield from self._advance()

    def _close(self) -> Generator[Event, None, None]:
        """Scores the tokens that no later round will read: one more step of the draft."""
        if self._bank_of and any(token.scores is None for token in self.generation.tokens):
            target_reads = "target" in self._bank_of and (self._was_paused or "draft" not in self._bank_of)
            if self._draft is not None and not target_reads and (self._request.flush or self._request.policy.holds):
                self._read(self._draft, num_logits=0)
            elif self._request.policy.holds:
                self._read(self._target, num_logits=0)
                self.generation.num_taxed_reads += 1
            reason = "the last tokens: reading them would cost one more pass"
            for token in self.generation.tokens:
                if token.scores is None:
                    token.scores = Scores(self._metrics, None, "target", reason)
        yield from self._advance()

    # One model pass each.

    def _read(
        self, model: CachedModel, drafted: Sequence[int] = (), *, num_logits: int
    ) -> Float[Tensor, "token vocab"]:
        """Lets a model consume what it has not yet, drafted tokens last, and fills in the scores that no reader gave
        before.
        """
        first = model.length
        unread = self._ids[first:]
        logits = model.read([*unread, *drafted], num_logits)
        self._due += self.generation.tokens[first : first + len(unread)]
        if model is not self._draft or self._request.policy.holds or num_logits == 0:
            self._collect(model)
        return logits

    def _collect(self, model: CachedModel) -> list[Scores]:
        """Fills in the scores due from a model that no reader gave before; returns those of drafted tokens.

        Where no token waits for its score, that is once a round, for all that the draft has read by then.
        """
        scores, due = model.take_scores(), self._due
        for token, found in zip(due, scores, strict=False):
            if token.scores is None:
                token.scores = found
        self._due = []
        return scores[len(due) :]

    def _propose(self, logits: Float[Tensor, "1 vocab"]) -> tuple[list[int], list[Tensor], list[Scores]]:
        """Drafts tokens for as long as it pays. The last one is proposed, not read: it has no score yet."""
        assert self._draft is not None
        drafted: list[int] = []
        probs: list[Tensor] = []
        room = self._request.max_new_tokens - len(self.generation.committed) - 1
        confidence = 1.0
        while len(drafted) < room and self._length.wants_more(len(drafted), confidence):
            if drafted:
                logits = self._draft.read(drafted[-1:])
            if self._request.sampling.greedy:
                drafted += likeliest(logits)
            else:
                probs.append(distribution(logits, self._request.sampling)[0])
                drafted.append(sample(probs[-1], generator=self._draft_random))
            if self._length.needs_confidence:
                confidence *= float(torch.exp(logits[0].max() - logits[0].float().logsumexp(-1)))
        return drafted, probs, self._collect(self._draft)

    # Bookkeeping.

    def _commit(self, drafted: list[int], scores: list[Scores], acceptance: Acceptance) -> int:
        """Appends the accepted tokens and the target's own; returns how many of the drafted were kept.

        They are fewer than were accepted where the answer ends among them.
        """
        accepted = drafted[: acceptance.num_accepted]
        unread: Mapping[str, TokenScore] | None = None if self._bank_of else {}
        for index, token_id in enumerate([*accepted, acceptance.next_token]):
            origin: Origin = "draft" if index < len(accepted) else "target"
            known = scores[index] if index < min(len(accepted), len(scores)) else unread
            text = text_of(self._tokenizer, [token_id])
            self._append(Token(len(self._ids), token_id, text, origin, self._number, scores=known))
            if self._finish is not None:
                return min(index + 1, len(accepted))
        return len(accepted)

    def _append(self, token: Token) -> None:
        is_eos = token.id in self._eos_ids
        is_full = len(self.generation.committed) + 1 == self._request.max_new_tokens
        token.delta = self._text.push(token.id, is_last=is_eos or is_full)
        self._ids.append(token.id)
        self.generation.tokens.append(token)
        if self._text.is_stopped:
            self._finish = "stop_string"
        elif is_eos:
            self._finish = "eos"
        elif is_full:
            self._finish = "length"

    def _record(self, start: int, drafted: list[int], scores: list[Scores], acceptance: Acceptance) -> Round:
        items = tuple(
            Drafted(
                token,
                text_of(self._tokenizer, [token]),
                i < acceptance.num_accepted,
                scores[i] if i < len(scores) else None,
            )
            for i, token in enumerate(drafted)
        )
        self.generation.rounds.append(Round(self._number, start, items))
        return self.generation.rounds[-1]

    def _advance(self) -> Generator[Event, None, None]:
        """Judges, in order, every token whose score has come, and emits what may leave."""
        tokens, policy = self.generation.tokens, self._request.policy
        while self._num_judged < len(tokens) and tokens[self._num_judged].scores is not None:
            token = tokens[self._num_judged]
            self._num_judged += 1
            if token.is_emitted:
                yield ScoreEvent(token)
            for verdict in self._judge(token):
                self.generation.verdicts.append(verdict)
                yield VerdictEvent(verdict)
                if verdict.action in GATING:
                    self._withhold_from(token)
                    return
            if not token.is_emitted:
                yield self._emit(token)
        if not policy.holds:
            for token in tokens[self._num_judged :]:
                if not token.is_emitted:
                    yield self._emit(token)

    def _judge(self, token: Token) -> Sequence[Verdict]:
        if not self._request.policy.rules:
            return ()
        scores = token.scores or {}
        reader = scores.reader if isinstance(scores, Scores) else "target"
        thresholds = self._bank_of[reader].thresholds if reader in self._bank_of else {}
        in_prompt = token.position < self.generation.num_prompt_tokens
        return decide(self._request.policy, token.position, scores, thresholds, in_prompt=in_prompt)

    def _emit(self, token: Token) -> TokenEvent:
        token.is_emitted = True
        return TokenEvent(token, token.scores if token.scores is not None else Pending(self._metrics))

    def _withhold_from(self, token: Token) -> None:
        """Ends the answer before `token`; what was verified after it is dropped as if it had never been committed."""
        end = max(token.position + 1, self.generation.num_prompt_tokens)
        del self.generation.tokens[end:], self._ids[end:]
        self._finish = "content_filter"

    def _must_read_for_scores(self) -> bool:
        """While speculation is paused: whether the draft must read for the scores alone, since no other reader gives
        them.
        """
        if self._bank_of.keys() != {"draft"}:
            return False
        assert self._draft is not None
        waiting = len(self._ids) - self._draft.length
        return waiting >= (1 if self._request.policy.holds else CATCH_UP)

    def _note(self, paused: bool) -> None:
        """Says in the record when speculation is switched, and who scores then."""
        if self._draft is None or paused == self._was_paused:
            return
        self._was_paused = paused
        position = len(self._ids)
        if not paused:
            self.generation.notes.append(f"token {position}: speculation is tried again")
            return
        why = "speculation is off" if self._length.is_off else "speculation does not pay and is paused"
        scorer = "nobody scores: no bank is loaded"
        if "target" in self._bank_of:
            scorer = "the heads on the target's own states score"
        elif "draft" in self._bank_of:
            scorer = "the draft reads on for the scores alone, which costs extra"
        self.generation.notes.append(f"token {position}: {why}; {scorer}")
