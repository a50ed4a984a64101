"""One answer's passes of draft and target, round by round; what is judged and emitted of them is the `Exchange`'s.

One round of speculation:

    draft reads what it has not consumed ──► its scores are due: judge, emit
    draft proposes d1 … dk                   (reads d1 … d(k-1), scored in the same passes)
    target reads the last token and d1 … dk ──► accept a prefix, add its own next token
    both caches roll back to what was committed

A drafted token's score counts once the token is committed; scores of rejected ones stay in the round's record as
look-ahead. Whenever the answer takes tokens back, the round ends there and both caches roll back to what stays.

The loop makes no pass itself: it yields the `Pass` that it needs and is sent its logits, so that the passes of many
answers can be one (`batch`).
"""

from __future__ import annotations

import time
from collections import ChainMap
from collections.abc import Generator, Iterator, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from pilotfish.engines.drafting import DraftLength
from pilotfish.engines.exchange import Exchange
from pilotfish.engines.reader import CachedModel, Pass, chunks_of
from pilotfish.engines.records import Event, Scores, Token
from pilotfish.engines.request import Prompt, Request, Setup
from pilotfish.engines.signals import NO_DRAFT, NO_TARGET, Signals, compare
from pilotfish.engines.speculate import accept, distribution, likeliest, sample
from pilotfish.runs import generator
from pilotfish.taps import Edit

CATCH_UP = 16
"""While speculation is paused, the draft reads for the scores alone each time this many tokens wait."""

Logits = Float[Tensor, "token vocab"]
Row = Float[Tensor, "1 vocab"]
Step = Event | Pass | None
"""Of an answer's loop: something to tell, a pass to make, or the end of a round."""
Steps = Generator[Step, Logits | None, None]
"""It is sent the logits of a pass, and None after all else."""


class Proposal(NamedTuple):
    """What the draft proposes in a round."""

    tokens: list[int]
    probs: list[Tensor]
    """That they were drawn from; empty when greedy."""
    logits: list[Tensor]
    """Of the draft at their places, as far as it ran; kept where signals are asked for."""
    scores: list[Scores]
    """Of all but the last, which is proposed and not read."""


class Loop:
    """The models of one answer, and what drives them."""

    def __init__(self, setup: Setup, prompt: Prompt, request: Request) -> None:
        pair, banks = setup.pair, setup.banks
        self.exchange = Exchange(setup, prompt, request)
        self._setup, self._request = setup, request
        self._edits = ChainMap(dict(request.edits), dict(setup.edits))
        options: dict[str, Any] = {"vocab_size": pair.vocab_size, "boundary": len(prompt.ids)}
        options["score_limit_s"] = setup.score_limit_s
        self._target = CachedModel(pair.target, "target", banks.get("target"), **options)
        self._draft = None
        if pair.draft is not None:
            self._draft = CachedModel(pair.draft, "draft", banks.get("draft"), **options)
        self._length = DraftLength(setup.drafting, setup.weight_ratio)
        self._draft_random = generator(request.seed, "draft")
        self._accept_random = generator(request.seed, "accept")
        self._due: list[Token] = []
        """Tokens that a model has read whose scores it has not been asked for."""
        self._open: tuple[Token, Row] | None = None
        """The last token, if the draft has yet to say what it thought of it, with the target's logits before it."""
        self._was_paused = False

    def run(self) -> Iterator[Event]:
        """The events of the whole generation, its passes made one by one."""
        return driven(self.steps())

    def steps(self) -> Steps:
        """The whole generation, for whoever makes its passes."""
        started = time.perf_counter()
        exchange = self.exchange
        while exchange.finish is None:
            while exchange.finish is None:
                yield from self._round()
                yield None
            yield from self._close()  # may take tokens back, and then the answer goes on
        exchange.generation.finish_reason = exchange.finish
        exchange.generation.seconds = time.perf_counter() - started

    def _round(self) -> Steps:
        exchange = self.exchange
        exchange.number += 1
        paused = self._draft is None or self._length.is_paused
        self._note(paused)
        logits = None
        if self._draft is not None and (not paused or exchange.defers or self._must_read_for_scores()):
            logits = yield from self._read_draft(num_logits=int(not paused or exchange.defers))
            exchange.generation.num_taxed_reads += paused and not exchange.defers
            if (yield from self._advance()):
                return
        self._settle(NO_DRAFT)
        if exchange.defers:
            assert logits is not None, "a gate goes up by taking tokens back, which ends a round"
            yield from self._deferred(logits)
            return
        proposal = Proposal([], [], [], [])
        if not paused and logits is not None:
            proposal = yield from self._propose(logits)
        if self._request.policy.looks_ahead and proposal.scores:
            if (yield from self._advance()):
                return
            yield from exchange.foresee(proposal.scores)
        yield from self._verified(proposal)

    def _verified(self, proposal: Proposal) -> Steps:
        """The second half of a round: what the target keeps of a proposal, and its own next token."""
        exchange, drafted, start = self.exchange, proposal.tokens, len(self.exchange.ids)
        edits = exchange.edits
        own = yield from self._read(self._target, drafted, num_logits=len(drafted) + 1)
        allowed = _without(own, exchange.banned)
        acceptance = accept(drafted, proposal.probs, allowed, self._request.sampling, generator=self._accept_random)
        committed = [*drafted[: acceptance.num_accepted], acceptance.next_token]
        signals = self._signals(committed, own, proposal.logits)
        num_kept = exchange.commit(drafted, proposal.scores, acceptance, signals, edits)
        if signals and signals[-1] is None and exchange.generation.tokens[-1].signals is None:
            self._open = exchange.generation.tokens[-1], own[len(committed) - 1 :]
        self._roll_back(start + num_kept)
        self._length.observe(len(drafted), acceptance.num_accepted)
        if drafted:
            yield exchange.record(start, drafted, proposal.scores, acceptance.num_accepted)
        yield from self._advance()

    def _deferred(self, logits: Row) -> Steps:
        """The draft's own token, drawn as the request asks; the target reads it later."""
        exchange, sampling = self.exchange, self._request.sampling
        allowed = _without(logits, exchange.banned)
        chosen = sample(distribution(allowed, sampling)[0], generator=self._draft_random)
        signals = compare([chosen], None, logits, NO_TARGET)[0] if self._request.wants_signals else None
        exchange.append(chosen, "draft", signals=signals).is_deferred = True
        yield from self._advance()

    def _close(self) -> Steps:
        """Scores the tokens that no later round will read: one more step of the draft."""
        generation, banks, holds = self.exchange.generation, self._setup.banks, self.exchange.holds
        if banks and any(token.scores is None for token in generation.tokens):
            target_reads = "target" in banks and (self._was_paused or "draft" not in banks)
            if self._draft is not None and not target_reads and (self._request.flush or holds):
                yield from self._read_draft(num_logits=0)
            elif holds:
                yield from self._read(self._target, num_logits=0)
                generation.num_taxed_reads += 1
            reason = "the last tokens: reading them would cost one more pass"
            for token in generation.tokens:
                if token.scores is None:
                    token.scores = Scores(self._setup.metrics, None, "target", reason)
        self._settle(NO_DRAFT)
        yield from self._advance()

    def _advance(self) -> Generator[Event, None, bool]:
        """Lets the answer judge and emit; returns whether the round ends here."""
        yield from self.exchange.advance()
        kept = self.exchange.take_back()
        if kept is not None:
            self._due, self._open = [], None
            self._roll_back(kept - 1)  # the last token that stays is read again, for the logits after it
        return kept is not None or self.exchange.finish is not None

    # One model pass each.

    def _read(
        self, model: CachedModel, drafted: Sequence[int] = (), *, num_logits: int
    ) -> Generator[Pass | None, Logits | None, Logits]:
        """Lets a model consume what it has not yet, drafted tokens last, and fills in the scores that no reader gave
        before. Of a long prompt each chunk is a round of its own, so that other answers never wait for all of it.
        """
        first = model.length
        unread = self.exchange.ids[first:]
        edits = self._edits_on(model)
        *before, last = chunks_of([*unread, *drafted], num_logits)
        for chunk in before:
            yield Pass(model, chunk, 0, edits)
            yield None
        logits = yield Pass(model, last, num_logits, edits)
        assert logits is not None, "a pass is answered with its logits"
        self._due += self.exchange.generation.tokens[first : first + len(unread)]
        if model is not self._draft or self.exchange.holds or num_logits == 0:
            self._collect(model)
        return logits

    def _read_draft(self, *, num_logits: int) -> Generator[Pass | None, Logits | None, Logits]:
        """The draft's reading at the beginning of a round; an open token's signals come with it."""
        assert self._draft is not None
        if self._open is None:
            return (yield from self._read(self._draft, num_logits=num_logits))
        (token, target), self._open = self._open, None
        logits = yield from self._read(self._draft, num_logits=2)
        self._collect(self._draft)
        token.signals = compare([token.id], target, logits[:1])[0]
        return logits[2 - num_logits :]

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

    def _propose(self, logits: Row) -> Generator[Pass, Logits | None, Proposal]:
        """Drafts tokens for as long as it pays. The last one is proposed, not read: it has no score yet."""
        assert self._draft is not None
        drafted: list[int] = []
        probs: list[Tensor] = []
        seen = [logits] if self._request.wants_signals else []
        room = self.exchange.room - 1
        banned = self.exchange.banned
        confidence = 1.0
        while len(drafted) < room and self._length.wants_more(len(drafted), confidence):
            if drafted:
                found = yield Pass(self._draft, drafted[-1:], 1)
                assert found is not None, "a pass is answered with its logits"
                logits = found
                seen += [logits] if seen else []
            allowed = logits if drafted else _without(logits, banned)
            if self._request.sampling.greedy:
                drafted += likeliest(allowed)
            else:
                probs.append(distribution(allowed, self._request.sampling)[0])
                drafted.append(sample(probs[-1], generator=self._draft_random))
            if self._length.needs_confidence:
                confidence *= float(torch.exp(allowed[0].max() - allowed[0].float().logsumexp(-1)))
        return Proposal(drafted, probs, seen, self._collect(self._draft))

    def _roll_back(self, length: int) -> None:
        for model in (self._target, self._draft):
            if model is not None:
                model.rollback(min(model.length, length))

    def _edits_on(self, model: CachedModel) -> list[Edit]:
        """What a model's passes are to write: edits are on the target."""
        if model is not self._target:
            return []
        return [edit for name in self.exchange.edits for edit in self._edits[name]]

    # The second signals.

    def _signals(self, committed: Sequence[int], target: Logits, draft: Sequence[Row]) -> list[Signals | None]:
        """Those of committed tokens; None for the last one where the draft is still to run on its place."""
        if not self._request.wants_signals:
            return []
        num = min(len(committed), len(draft))
        found: list[Signals | None] = []
        if num:
            found += compare(committed[:num], target[:num], torch.cat(list(draft[:num])))
        if num < len(committed) and (self._draft is None or not draft):
            found += compare(committed[num:], target[num : len(committed)], None, NO_DRAFT)
        return found + [None] * (len(committed) - len(found))

    def _settle(self, reason: str) -> None:
        """Gives up waiting for the draft's side of an open token's signals."""
        if self._open is not None:
            (token, target), self._open = self._open, None
            token.signals = compare([token.id], target, None, reason)[0]

    # Pauses.

    def _must_read_for_scores(self) -> bool:
        """While speculation is paused: whether the draft must read for the scores alone, since no other reader gives
        them.
        """
        if self._setup.banks.keys() != {"draft"}:
            return False
        assert self._draft is not None
        waiting = len(self.exchange.ids) - self._draft.length
        return waiting >= (1 if self.exchange.holds else CATCH_UP)

    def _note(self, paused: bool) -> None:
        """Says in the record when speculation is switched, and who scores then."""
        if self._draft is None or paused == self._was_paused:
            return
        self._was_paused = paused
        notes, banks, position = self.exchange.generation.notes, self._setup.banks, len(self.exchange.ids)
        if not paused:
            notes.append(f"token {position}: speculation is tried again")
            return
        why = "speculation is off" if self._length.is_off else "speculation does not pay and is paused"
        scorer = "nobody scores: no bank is loaded"
        if "target" in banks:
            scorer = "the heads on the target's own states score"
        elif "draft" in banks:
            scorer = "the draft reads on for the scores alone, which costs extra"
        notes.append(f"token {position}: {why}; {scorer}")


def driven(steps: Steps) -> Iterator[Event]:
    """The events of one answer, each of its passes made as soon as it is asked for."""
    logits: Logits | None = None
    with suppress(StopIteration):
        while True:
            step = steps.send(logits)
            logits = step.run() if isinstance(step, Pass) else None
            if step is not None and not isinstance(step, Pass):
                yield step


def _without(logits: Logits, banned: frozenset[int]) -> Logits:
    """Logits with some tokens of the first row made impossible."""
    if not banned:
        return logits
    allowed = logits.clone()
    allowed[0, sorted(banned)] = -torch.inf
    return allowed
