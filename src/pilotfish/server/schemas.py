"""What goes over the wire, as pydantic models: the OpenAPI schema is made from these."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from pilotfish.core import Message
from pilotfish.server.steer_schemas import MAX_STEERS, SteerIn, SteeringOut

MAX_STOPS = 4
Role = Literal["system", "developer", "user", "assistant", "tool"]
Stop = Annotated[str, StringConstraints(min_length=1, max_length=256)]
Name = Annotated[str, StringConstraints(min_length=1, max_length=256)]


class _Asked(BaseModel):
    """A body that a client sends: what it does not know, it refuses."""

    model_config = ConfigDict(extra="forbid")


class TextPart(_Asked):
    type: Literal["text"]
    text: str


class ChatTurn(_Asked):
    role: Role
    content: str | list[TextPart]
    name: str | None = Field(default=None, max_length=256, description="Taken and not used.")

    @property
    def message(self) -> Message:
        """As the engine takes it; `developer` is OpenAI's newer word for `system`."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return Message("system" if self.role == "developer" else self.role, text)


class MonitorOptions(_Asked):
    """What to say of the monitor; the policy holds whether it is asked for or not."""

    heads: list[Name] | None = Field(default=None, max_length=256, description="Metrics to report; all when left out.")
    tokens: bool = Field(default=True, description="Scores of every token of the answer.")
    prompt: bool = Field(default=False, description="And of the prompt's tokens.")
    lookahead: bool = Field(default=False, description="And of drafted tokens, rejected ones included.")
    signals: bool = Field(
        default=False, description="And how draft and target disagreed, as metrics `signal.divergence`, … in [0, 1]."
    )


class StreamOptions(_Asked):
    include_usage: bool = False
    include_obfuscation: bool = Field(default=False, description="Taken and not used.")


class TextFormat(_Asked):
    type: Literal["text"]


class _Generation(_Asked):
    model: Name
    max_tokens: int | None = Field(default=None, ge=1)
    temperature: float = Field(default=1.0, ge=0.0, le=2.0)
    top_p: float = Field(default=1.0, gt=0.0, le=1.0)
    top_k: int | None = Field(default=None, ge=1, description="Not OpenAI's: keep the k likeliest tokens.")
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63, description="The same seed gives the same answer.")
    stop: Stop | Annotated[list[Stop], Field(max_length=MAX_STOPS)] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    monitor: MonitorOptions | None = Field(default=None, description="Not OpenAI's: asks for scores.")
    steer: list[SteerIn] = Field(default=[], max_length=MAX_STEERS, description="Not OpenAI's.")
    n: Literal[1] = Field(default=1, description="One answer a request.")
    frequency_penalty: Literal[0] | None = None
    presence_penalty: Literal[0] | None = None
    user: str | None = Field(default=None, max_length=512, description="Taken and not used.")


class ChatBody(_Generation):
    messages: list[ChatTurn] = Field(min_length=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    response_format: TextFormat | None = None
    metadata: dict[str, str] | None = Field(default=None, max_length=16, description="Taken and not used.")
    store: bool | None = Field(default=None, description="Taken and not used: what is kept is the server's to say.")
    logprobs: Literal[False] | None = None


class CompletionBody(_Generation):
    prompt: str = Field(description="Text to go on with; no chat template is put around it.")
    echo: Literal[False] | None = None
    best_of: Literal[1] | None = None
    logprobs: None = None


class ScoreText(_Asked):
    """A text that is there already: a conversation, or an answer alone."""

    messages: list[ChatTurn] | None = Field(default=None, min_length=1)
    text: str | None = Field(default=None, min_length=1)


class ScoreBody(_Asked):
    texts: list[ScoreText] = Field(min_length=1)
    heads: list[Name] | None = Field(default=None, max_length=256)
    tokens: bool = True


class PolicyIn(_Asked):
    policy: dict[str, Any]


class DryRunBody(_Asked):
    policy: dict[str, Any]
    last: int = Field(default=100, ge=1, description="Stored exchanges, newest first, that the policy is held against.")


# Answers.


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorBody(BaseModel):
    error: ErrorDetail


class VerdictOut(BaseModel):
    position: int
    metric: str
    action: str
    score: float | None
    threshold: float | None
    reason: str
    is_early: bool


class TokenOut(BaseModel):
    """A token of the answer (or prompt): scored, pending (its score follows in a later chunk) or unscored."""

    position: int
    text: str
    origin: str
    scores: dict[str, float] = Field(description="Probability at the token itself.")
    running: dict[str, float] = Field(description="Of the text so far: what thresholds are held against.")
    unscored: dict[str, str] = Field(description="Metric to why it has no score.")
    pending: bool = False


class DraftedOut(BaseModel):
    text: str | None
    accepted: bool
    scores: dict[str, float]


class RoundOut(BaseModel):
    round: int
    start: int
    drafted: list[DraftedOut]


class HeadSummary(BaseModel):
    max_prompt: float | None = Field(description="Highest running score of the prompt; null when nothing was scored.")
    max_answer: float | None
    threshold: float | None
    actions: list[str] = Field(description="Of the policy's rules for this metric.")
    flagged: bool


class MonitorStats(BaseModel):
    committed: int
    scored: int
    coverage: float
    acceptance: float | None
    taxed_reads: int
    notes: list[str]


class ReaderOut(BaseModel):
    """A model that reads along for the scores alone, beside one that is elsewhere."""

    model: str | None
    taxed: bool


class MonitorOut(BaseModel):
    """The one thing that is added to OpenAI's answers."""

    exchange: str | None = None
    reader: ReaderOut | None = Field(default=None, description="Behind a proxy alone.")
    heads: dict[str, HeadSummary] | None = None
    steering: list[SteeringOut] | None = Field(default=None, description="Where the request steered.")
    tokens: list[TokenOut] | None = None
    rounds: list[RoundOut] | None = None
    verdicts: list[VerdictOut] | None = None
    stats: MonitorStats | None = None


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class ChatReply(BaseModel):
    role: Literal["assistant"]
    content: str


class ChatChoice(BaseModel):
    index: int
    message: ChatReply
    finish_reason: Literal["stop", "length", "content_filter"]
    logprobs: None = None
    monitor: MonitorOut | None = None


class ChatCompletion(BaseModel):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class TextChoice(BaseModel):
    index: int
    text: str
    finish_reason: Literal["stop", "length", "content_filter"]
    logprobs: None = None
    monitor: MonitorOut | None = None


class TextCompletion(BaseModel):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[TextChoice]
    usage: Usage


class ModelOut(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "pilotfish"


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelOut]


class HeadOut(BaseModel):
    metric: str
    reader: str
    threshold: float | None
    card: dict[str, Any]


class HeadList(BaseModel):
    model: str
    draft: str | None
    taxed: bool = Field(description="Whether the draft runs for the scores alone, as behind a proxy.")
    heads: list[HeadOut]


class ScoredTokenOut(BaseModel):
    position: int
    text: str
    message: int = Field(description="Index of its message; -1 for the chat template's own.")
    scores: dict[str, float]
    running: dict[str, float]
    unscored: dict[str, str]


class ScoredHead(BaseModel):
    max: float | None = Field(description="Highest running score; null when nothing was scored.")
    threshold: float | None
    flagged: bool


class ScoredOut(BaseModel):
    heads: dict[str, ScoredHead]
    tokens: list[ScoredTokenOut] | None = None


class ScoreReply(BaseModel):
    model: str
    results: list[ScoredOut]


class PolicyOut(BaseModel):
    policy: dict[str, Any]


class DryRunRow(BaseModel):
    exchange: str
    created_s: float
    before: list[str] = Field(description="Metrics and actions that were taken, as `metric:action`.")
    after: list[str] = Field(description="Those that the policy would have taken on the stored scores.")


class DryRunReply(BaseModel):
    num_exchanges: int
    num_flagged_before: int
    num_flagged_after: int
    changed: list[DryRunRow]


class ExchangeRowOut(BaseModel):
    id: str
    created_s: float
    finished_s: float | None
    endpoint: str
    model: str
    key_id: str | None
    state: str
    finish_reason: str | None
    is_redacted: bool
    num_prompt_tokens: int
    asked: str | None = Field(description="How the prompt's last turn begins; null when the store redacts.")
    stats: dict[str, Any]


class ListedExchange(ExchangeRowOut):
    answer_start: str | None = Field(description="The first characters of the answer.")
    alerts: list[str] = Field(description="Metrics and actions of its alerts, as `metric:action`.")


class ExchangeList(BaseModel):
    exchanges: list[ListedExchange]


class StoredToken(BaseModel):
    """Text and id are null when the store redacts."""

    position: int
    token_id: int | None
    text: str | None
    origin: str
    round: int
    is_emitted: bool
    reader: str
    scores: dict[str, float]
    running: dict[str, float]
    unscored: dict[str, str]


class ExchangeOut(ExchangeRowOut):
    prompt: str | None
    answer: str | None
    rounds: list[RoundOut]
    tokens: list[StoredToken]
    verdicts: list[VerdictOut]


class DeliveryOut(BaseModel):
    sink: str
    state: str
    attempts: int
    due_s: float
    error: str | None
    delivered_s: float | None


class AlertOut(BaseModel):
    id: str
    exchange_id: str
    created_s: float
    metric: str
    action: str
    position: int
    score: float | None
    threshold: float | None
    reason: str
    is_early: bool
    deliveries: list[DeliveryOut]


class AlertList(BaseModel):
    alerts: list[AlertOut]


class Revived(BaseModel):
    num_revived: int


class Health(BaseModel):
    status: Literal["ok", "not ready"]
    reasons: list[str] = []
