"""What steps brought for one answer in; the generation that stores, reports and clients know out. No vLLM.

Steps are only noted. Tokens, their texts and scores are made when somebody asks, which is never for a request that
nobody wants to hear about.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from pilotfish.actions import Policy, policy_from_dict
from pilotfish.core import Reader
from pilotfish.engines import Event, Generation, ScoreEvent, Token, TokenEvent, VerdictEvent
from pilotfish.engines.detokenize import TextStream, text_of
from pilotfish.engines.records import FinishReason, Pending, Scores
from pilotfish.server import EngineInfo, HeadInfo
from pilotfish.vllm.plan import Plan
from pilotfish.vllm.wire import News

GONE = "the answer had ended before it was read"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class About:
    """What all answers of a server have in common."""

    metrics: tuple[str, ...]
    reader: Reader
    tokenizer: Any
    policy: Policy
    info: EngineInfo

    @classmethod
    def of(cls, plan: Plan, config: Any, tokenizer: Any) -> About:
        """`config`: vLLM's."""
        bank, spec = plan.bank(), config.speculative_config
        card = asdict(bank.card)
        heads = (
            HeadInfo(metric=metric, reader=plan.reader, threshold=bank.thresholds.get(metric), card=card)
            for metric in bank.metrics
        )
        info = EngineInfo(
            model=config.model_config.model,
            draft=spec.draft_model_config.model if plan.reader == "draft" else None,
            max_tokens=config.model_config.max_model_len,
            heads=tuple(heads),
        )
        policy = policy_from_dict(plan.policy)
        return cls(metrics=bank.metrics, reader=plan.reader, tokenizer=tokenizer, policy=policy, info=info)


class Record:
    """One answer, or one of several to the same prompt."""

    def __init__(self, about: About, prompt: str | None, prompt_ids: Sequence[int], stop: Sequence[str] = ()) -> None:
        self.about = about
        self._prompt, self._prompt_ids = prompt, prompt_ids
        self._steps: deque[tuple[News, list[int]]] = deque()
        self._made: Generation | None = None
        self._text = TextStream(about.tokenizer, stop)
        self._untold: deque[tuple[int, list[Event]]] = deque()
        """Events of each step, and the answer's tokens after it."""
        self._started = time.monotonic()
        self.num_tokens = 0
        """Of the answer, that have left the engine."""
        self.stopped_by = ""
        """The metric that ended the answer, if one did."""
        self.counts: Counter[str] = Counter()
        """Tokens by why they have no score; under the empty string those that have one."""
        self.first_flags: dict[tuple[str, str], int] = {}
        """Metric and action of each kind of verdict, and the position of its first."""
        self.highest = np.full(len(about.metrics), np.nan, dtype=np.float32)
        """Of each metric the highest running score; NaN where there is none."""

    def add(self, news: News, token_ids: Sequence[int]) -> None:
        """A step has brought these tokens, which have left, and news of tokens up to them."""
        self.num_tokens += len(token_ids)
        self._steps.append((news, list(token_ids)))
        end = len(self._prompt_ids) + self.num_tokens + len(news.withheld)
        values = news.scores[: max(0, end - news.start)]
        missed = Counter[str]()
        for miss in news.misses:
            missed[miss.reason] += max(0, min(miss.end, end) - miss.start)
        finite = int(np.isfinite(values).all(axis=1).sum())
        missed["head gave no finite number"] += len(values) - finite - missed.total()
        self.counts += missed
        self.counts[""] += finite
        if len(values):
            running = values[:, len(self.about.metrics) :]
            self.highest = np.fmax(self.highest, np.fmax.reduce(running, axis=0))
        for verdict in news.verdicts:
            if verdict.position < end:
                self.first_flags.setdefault((verdict.metric, verdict.action), verdict.position)
                if verdict.action == "stop":
                    self.stopped_by = verdict.metric

    @property
    def generation(self) -> Generation:
        """As far as it has come."""
        if self._made is None:
            self._made = self._begun()
        while self._steps:
            events = self._step(self._made, *self._steps.popleft())
            self._untold.append((len(self._made.committed), events))
        return self._made

    def advance(self, limit: int | None = None) -> list[Event]:
        """What has happened since the last time, as an engine of ours would have told it.

        Args:
            limit: tokens of the answer that the client has been sent; of later ones nothing is said. None: all.
        """
        size = len(self.generation.committed) if limit is None else limit
        events: list[Event] = []
        while self._untold and self._untold[0][0] <= size:
            events += self._untold.popleft()[1]
        return events

    def finish(self, reason: FinishReason | None) -> None:
        """No step comes any more; `reason` is None for an answer that nobody waited for."""
        generation = self.generation
        generation.finish_reason = "content_filter" if self.stopped_by else reason
        generation.seconds = time.monotonic() - self._started
        missing = Scores(self.about.metrics, None, self.about.reader, GONE)
        for token in generation.tokens:
            if token.scores is None:
                token.scores = missing

    def _begun(self) -> Generation:
        tokenizer = self.about.tokenizer
        tokens = [
            Token(i, token, text_of(tokenizer, [token]), "prompt", 0, is_emitted=True)
            for i, token in enumerate(self._prompt_ids)
        ]
        prompt = text_of(tokenizer, self._prompt_ids) if self._prompt is None else self._prompt
        return Generation(prompt, tokens, len(tokens))

    def _step(self, generation: Generation, news: News, token_ids: Sequence[int]) -> list[Event]:
        tokens = generation.tokens
        number, begin = (tokens[-1].round if tokens else 0) + 1, len(tokens)
        for index, token_id in enumerate(token_ids):
            self._append(tokens, token_id, number, is_drafted=index < news.num_drafted, is_emitted=True)
        end = len(tokens)
        for token_id in news.withheld:
            self._append(tokens, token_id, number, is_drafted=len(token_ids) < news.num_drafted, is_emitted=False)
        events: list[Event] = []
        reasons = {place: miss.reason for miss in news.misses for place in range(miss.start, miss.end)}
        num = len(self.about.metrics)
        for position, row in enumerate(news.scores.tolist(), news.start):
            if position >= len(tokens):
                break  # beyond a stop string that only the front end saw
            token, reason = tokens[position], reasons.get(position, "")
            values = (None, None) if reason else (row[:num], row[num:])
            token.scores = Scores(self.about.metrics, values[0], self.about.reader, reason, running=values[1])
            if position < begin:
                events.append(ScoreEvent(token))
        pending = Pending(self.about.metrics)
        events += [TokenEvent(token, pending if token.scores is None else token.scores) for token in tokens[begin:end]]
        for verdict in news.verdicts:
            if verdict.position < len(tokens):
                generation.verdicts.append(verdict)
                events.append(VerdictEvent(verdict))
        return events

    def _append(self, tokens: list[Token], token_id: int, number: int, *, is_drafted: bool, is_emitted: bool) -> None:
        text = text_of(self.about.tokenizer, [token_id])
        token = Token(len(tokens), token_id, text, "draft" if is_drafted else "target", number)
        token.is_emitted = is_emitted
        token.delta = self._text.push(token_id) if is_emitted else ""
        tokens.append(token)
