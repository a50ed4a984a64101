"""The embedded engine: a prompt in, tokens with scores out, in one process."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from pilotfish.core import Message, Reader
from pilotfish.engines.drafting import Drafting, weight_ratio
from pilotfish.engines.escalate import Judge
from pilotfish.engines.loop import Loop, driven
from pilotfish.engines.records import Event, Generation
from pilotfish.engines.request import Prompt, Request, Setup
from pilotfish.engines.signals import SIGNALS
from pilotfish.errors import BankMismatch, GenerationError, SettingError
from pilotfish.heads import HeadBank, joined
from pilotfish.models import Identity, Pair
from pilotfish.taps import Edit, check_edits
from pilotfish.texts import Rendered, encode, render


class EmbeddedEngine:
    """A pair and its banks, ready for requests."""

    def __init__(
        self,
        pair: Pair,
        banks: Sequence[HeadBank] = (),
        *,
        drafting: Drafting | None = None,
        edits: Mapping[str, Sequence[Edit]] | None = None,
        judge: Judge | None = None,
        score_limit_s: float | None = None,
    ) -> None:
        """Each bank goes to the model that it was made for: the draft, or the target itself; those of one are joined.

        Args:
            edits: what rules may switch on, by name; all on the target.
            judge: whom rules may escalate to.
            score_limit_s: where scores take longer than that the tokens are unscored, and the policy decides. Which
                tokens those are depends on the machine; without a limit nothing does.

        Raises:
            BankMismatch: a bank was made for neither.
            SettingError: two of one model have a head for one metric, an edit does not fit the target, or the limit is
                not positive.
        """
        if score_limit_s is not None and score_limit_s <= 0:
            raise SettingError(
                f"a limit of {score_limit_s} s for scores is not allowed; give a positive number, or none"
            )
        self.pair = pair
        self.drafting = drafting or Drafting()
        by_reader: dict[Reader, list[HeadBank]] = {}
        for bank in banks:
            by_reader.setdefault(self._reader_of(bank), []).append(bank)
        self.banks = {reader: joined(group) for reader, group in by_reader.items()}
        both = [model for model in (pair.target, pair.draft) if model is not None]
        self.max_tokens = min(model.config.max_position_embeddings for model in both)
        self.setup = Setup(
            pair=pair,
            banks=self.banks,
            drafting=self.drafting,
            weight_ratio=weight_ratio(pair),
            edits=dict(edits or {}),
            judge=judge,
            score_limit_s=score_limit_s,
        )
        for each in self.setup.edits.values():
            check_edits(pair.target, each)

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
        """Every metric that some reader's head scores."""
        return self.setup.metrics

    def stream(self, prompt: str | Sequence[Message], request: Request | None = None) -> GenerationStream:
        """Begins a generation; nothing is computed until the stream is iterated.

        Raises:
            SettingError: the policy names a metric without a head, a threshold that is nowhere given, or an action
                whose edit, judge or draft is not there; or an edit of the request has the name of one of the engine's,
                or does not fit the target.
            GenerationError: the prompt is empty, or prompt and answer do not fit the models.
        """
        request = request or Request()
        self._check(request)
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
        starts_reasoning = _starts_reasoning(rendered, request.policy.reasoning_tags)
        return GenerationStream(self, rendered.text, ids, request, starts_reasoning=starts_reasoning)

    def _check(self, request: Request) -> None:
        policy, banks = request.policy, self.banks.values()
        for name, edits in request.edits.items():
            if name in self.setup.edits:
                raise SettingError(f"the request's edit {name!r} has the name of one of the engine's; give it another")
            check_edits(self.pair.target, edits)
        uncalibrated = {metric for bank in banks for metric in bank.metrics if metric not in bank.thresholds}
        policy.check(
            (*self.metrics, *(SIGNALS if policy.asks_signals else ())),
            uncalibrated.union(SIGNALS),
            edits={**self.setup.edits, **request.edits},
            has_draft=self.pair.draft is not None,
            has_judge=self.setup.judge is not None,
        )
        if policy.holds and not self.banks and (policy.hold or not policy.asks_signals):
            raise SettingError(
                "the policy holds tokens until they are scored, but no bank is loaded; give a bank, or turn hold off"
            )

    def generate(self, prompt: str | Sequence[Message], request: Request | None = None) -> Generation:
        """Runs a generation to its end."""
        stream = self.stream(prompt, request)
        for _ in stream:
            pass
        return stream.generation


class GenerationStream(Iterator[Event]):
    """One generation: iterate it for events; `generation` holds what is known so far."""

    def __init__(
        self, engine: EmbeddedEngine, prompt: str, ids: list[int], request: Request, *, starts_reasoning: bool = False
    ) -> None:
        loop = Loop(engine.setup, Prompt(prompt, ids, starts_reasoning), request)
        self.generation = loop.exchange.generation
        self.setup = engine.setup
        self.steps = loop.steps()
        """For a `Batch`, which makes its passes together with those of other streams."""
        self._events = driven(self.steps)

    def __next__(self) -> Event:
        return next(self._events)


def _starts_reasoning(rendered: Rendered, tags: tuple[str, str]) -> bool:
    """Whether the template itself, after the last message, opens the reasoning and leaves it open."""
    after = rendered.text[rendered.starts[-1] + rendered.lengths[-1] :]
    return after.rfind(tags[0]) > after.rfind(tags[1])
