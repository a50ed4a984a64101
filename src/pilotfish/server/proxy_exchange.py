"""The text of a model that runs elsewhere in; the same text out, read by a small model, scored and judged."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from pilotfish.actions import Rule, Verdict, Watch
from pilotfish.actions.watch import Part, Reasoning
from pilotfish.core import Conversation, Message, TokenScore
from pilotfish.engines import Event, Generation, ScoreEvent, Token, TokenEvent, VerdictEvent
from pilotfish.engines.reader import CHUNK, CachedModel
from pilotfish.engines.records import FinishReason, Pending, Scores
from pilotfish.errors import GenerationError, TextError
from pilotfish.heads import HeadBank
from pilotfish.models import LoadedModel
from pilotfish.scores import score_tokens
from pilotfish.server.backend import Call, ScoredText
from pilotfish.server.proxy_text import GrowingText, Piece
from pilotfish.texts import render, tokenize

logger = logging.getLogger(__name__)

PLACEHOLDER = "x"
"""Stands for the answer where only the text before it is wanted."""
NOT_READ = "not read: the answer ended before"


class Beside(NamedTuple):
    """A small model that reads what another one writes, and its heads."""

    model: LoadedModel
    bank: HeadBank
    score_limit_s: float | None = None
    """Scores of an answer that take longer count as none."""

    @property
    def name(self) -> str:
        return self.model.identity.name

    @property
    def max_tokens(self) -> int:
        longest: int = self.model.model.config.max_position_embeddings
        return longest

    def score(self, messages: tuple[Message, ...], name: str) -> ScoredText:
        """One pass over a text that is there already.

        Raises:
            TextError: it does not fit.
        """
        text = tokenize(Conversation(name, name, messages), self.model.tokenizer)
        if len(text.token_ids) > self.max_tokens:
            raise TextError(
                f"{name} has {len(text.token_ids):,} tokens; {self.name} reads at most {self.max_tokens:,}. "
                "Cut the text"
            )
        answers = [i for i, message in enumerate(messages) if message.role == "assistant"]
        boundary = text.messages.index(answers[-1]) if answers and answers[-1] in text.messages else 0
        found = score_tokens(self.model.model, self.bank, text.token_ids, boundary=boundary)
        rows = zip(found.tokens.tolist(), found.running.tolist(), strict=True)
        scores = [
            {
                metric: TokenScore.scored(value, running=running)
                for metric, value, running in zip(self.bank.metrics, *row, strict=True)
            }
            for row in rows
        ]
        return ScoredText(text.pieces, tuple(text.messages), tuple(scores))


class ReadExchange:
    """One exchange as its text comes.

    Where the policy holds, no token leaves before it is scored and judged; else it leaves once it is final and its
    score follows. Whatever goes wrong in the reader becomes `unscored(reason)`, for the policy to decide about.
    """

    def __init__(self, beside: Beside, call: Call) -> None:
        """Raises `GenerationError` or `TextError` for a prompt that the reader cannot take."""
        self._beside, self._policy = beside, call.request.policy
        prefix, templated = _prefix(call, beside)
        self._text = GrowingText(beside.model.tokenizer, prefix, templated=templated)
        self._start = len(prefix)
        """Character where the answer begins."""
        if len(self._text) + call.request.max_new_tokens > beside.max_tokens:
            raise GenerationError(
                f"the prompt has {len(self._text):,} tokens and the answer may have "
                f"{call.request.max_new_tokens:,}; {beside.name}, which reads along, takes at most "
                f"{beside.max_tokens:,} together. Shorten the prompt or lower max_tokens"
            )
        self._model = CachedModel(
            beside.model.model, "draft", beside.bank, boundary=sys.maxsize, score_limit_s=beside.score_limit_s
        )
        self._watch = Watch(self._policy)
        self._reasoning = Reasoning()
        self._pieces: list[Piece] = []
        self._ranges: list[tuple[int, int]] = []
        """Of each token, the characters of the answer that are shown with it."""
        self._hidden: set[int] = set()
        """Characters that a redaction covers."""
        self._num_judged = self._num_emitted = 0
        self._shown = 0
        self._failure = ""
        """Why the reader cannot go on."""
        self._ending: FinishReason | None = None
        self._started = time.perf_counter()
        self.generation = Generation(prefix, [], 0)
        self.generation.notes.append(f"{beside.name} reads along; each of its passes is made for the scores alone")
        self._take()

    @property
    def holds(self) -> bool:
        """Whether tokens wait for their scores."""
        return self._policy.holds

    @property
    def is_over(self) -> bool:
        return self.generation.finish_reason is not None

    def push(self, text: str, ending: FinishReason | None = None) -> list[Event]:
        """Takes what has come; `ending` with the last of it.

        Raises:
            TextError, EngineFailed: the text cannot be told in tokens.
        """
        self._text.push(text, is_last=ending is not None)
        self._ending = ending
        self._take()
        return list(self._advance())

    @property
    def is_behind(self) -> bool:
        """Whether there are final tokens that the reader has not read."""
        return not self.is_over and self._num_judged < len(self.generation.tokens)

    def read(self) -> list[Event]:
        """Lets the reader read on, up to 512 tokens."""
        tokens, first = self.generation.tokens, self._num_judged
        ids = [token.id for token in tokens[first : first + CHUNK]]
        for token, scores in zip(tokens[first:], self._scores(ids), strict=False):
            token.scores = scores
        return list(self._advance())

    def note(self, words: str) -> None:
        self.generation.notes.append(words)

    # Tokens.

    def _take(self) -> None:
        """Makes records of the tokens that have become final."""
        generation = self.generation
        for piece in self._text.take():
            position = len(generation.tokens)
            is_prompt = piece.end <= self._start or piece.start == piece.end
            if is_prompt and generation.num_prompt_tokens == position:
                generation.num_prompt_tokens += 1
            elif generation.num_prompt_tokens == position:
                self._model.boundary = position
            begin, self._shown = self._shown, max(self._shown, piece.shown)
            text = self._text.text[begin : self._shown]
            origin = "prompt" if position < generation.num_prompt_tokens else "target"
            token = Token(position, piece.id, text, origin, 0, is_emitted=origin == "prompt")  # type: ignore[arg-type]
            self._ranges.append((max(begin, self._start), self._shown))
            token.delta = self._text.text[slice(*self._ranges[-1])]
            generation.tokens.append(token)
            self._pieces.append(piece)
        self._num_emitted = max(self._num_emitted, generation.num_prompt_tokens)

    def _scores(self, ids: Sequence[int]) -> list[Scores]:
        """Of the next tokens, from one pass; without one where the reader cannot go on."""
        longest = self._beside.max_tokens
        if not self._failure and self._model.length + len(ids) > longest:
            self._failure = f"{self._beside.name} reads at most {longest:,} tokens"
        if not self._failure:
            try:
                self._model.read(ids, 0)
                self.generation.num_taxed_reads += 1
                return self._model.take_scores()
            except Exception as error:
                logger.exception("the reader failed")
                self._failure = f"the reader failed: {type(error).__name__}"
        return [Scores(self._beside.bank.metrics, None, "draft", self._failure) for _ in ids]

    # Verdicts and emission.

    def _advance(self) -> Iterator[Event]:
        """Judges, in order, every token whose scores have come, and emits what may leave."""
        tokens = self.generation.tokens
        if not self.holds:
            yield from self._release(len(tokens))
        while self._num_judged < len(tokens) and tokens[self._num_judged].scores is not None:
            token = tokens[self._num_judged]
            self._num_judged += 1
            if token.is_emitted:
                yield ScoreEvent(token)
            verdicts = self._judge(token)
            for verdict in verdicts:
                self.generation.verdicts.append(verdict)
                yield VerdictEvent(verdict)
            if any(verdict.action == "stop" for verdict in verdicts):
                del tokens[max(self._num_judged, self.generation.num_prompt_tokens) :]
                self._finish("content_filter")
                return
            if any(verdict.action == "redact" for verdict in verdicts):
                self._redact(token)
            if self.holds:
                yield from self._release(self._num_judged)
        if self._ending is not None and self._num_judged == len(tokens):
            yield from self._release(len(tokens), margin=0)
            self._finish(self._ending)

    def _judge(self, token: Token) -> tuple[Verdict, ...]:
        if not self._policy.rules and not self._policy.hold:
            return ()
        assert token.scores is not None, "a token is judged by its scores"
        thresholds = self._beside.bank.thresholds
        verdicts = self._watch.judge(token.position, token.scores, thresholds, parts=self._parts(token))
        return tuple(sorted(verdicts, key=lambda verdict: verdict.action != "stop"))

    def _parts(self, token: Token) -> frozenset[Part]:
        is_prompt = token.origin == "prompt"
        self._reasoning, parts = self._reasoning.parts(token.text, self._policy, is_prompt=is_prompt)
        return parts

    def _redact(self, token: Token) -> None:
        token.is_redacted = True
        piece = self._pieces[token.position]
        self._hidden.update(range(piece.start, piece.end))

    def _release(self, end: int, *, margin: int | None = None) -> Iterator[Event]:
        """Emits what comes before `end`, but for the policy's margin while the answer goes on."""
        end -= self._policy.margin if margin is None else margin
        while self._num_emitted < end:
            token = self.generation.tokens[self._num_emitted]
            self._num_emitted += 1
            token.is_emitted = True
            if self._hidden:
                token.delta = self._without_hidden(token)
            yield TokenEvent(token, token.scores if token.scores is not None else Pending(self._beside.bank.metrics))

    def _without_hidden(self, token: Token) -> str:
        """The token's part of the text; each run of hidden characters becomes one mark."""
        said = []
        for place in range(*self._ranges[token.position]):
            if place not in self._hidden:
                said.append(self._text.text[place])
            elif place - 1 not in self._hidden:
                said.append(self._policy.mark)
        return "".join(said)

    def _finish(self, reason: FinishReason) -> None:
        self._close()
        self.generation.finish_reason = reason

    def _close(self) -> None:
        self.generation.seconds = time.perf_counter() - self._started
        for token in self.generation.tokens:
            if token.scores is None:
                token.scores = Scores(self._beside.bank.metrics, None, "draft", self._failure or NOT_READ)


def _prefix(call: Call, beside: Beside) -> tuple[str, bool]:
    """All that stands before the answer in the text that is read, and whether a chat template wrote it."""
    if not any(message.content.strip() for message in call.messages):
        raise GenerationError("the prompt is empty; give at least one message with text")
    if call.is_raw:
        return call.messages[0].content, False
    rendered = render((*call.messages, Message("assistant", PLACEHOLDER)), beside.model.tokenizer)
    return rendered.text[: rendered.starts[-1]], rendered.templated


def cannot_judge(rule: Rule) -> str | None:
    """Why a rule cannot be carried out on text alone; None where it can."""
    within = {
        "resample": "samples again",
        "defer": "lets the draft go on",
        "steer": "writes into the model's activations",
        "escalate": "asks a judge, which this server has not",
    }
    if rule.action in within:
        return f"action {rule.action} {within[rule.action]}"
    return "look_ahead needs drafted tokens" if rule.look_ahead else None
