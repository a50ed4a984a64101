"""Plain frozen data that every stage passes on, and the axis words used in every shape.

Axis words: *batch* (sequences), *token* (positions of one sequence, 0-based, the chat template's tokens included),
*layer* (blocks, 0-based), *hidden* (a site's width), *feature* (hidden of several sites, concatenated), *metric*
(heads), *vocab* (token ids).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

from pilotfish.errors import SettingError, TextError

Role = Literal["system", "user", "assistant", "tool"]
Stream = Literal["resid_pre", "resid_post", "attn_out", "mlp_out", "final"]
Reader = Literal["draft", "target"]

ROLES: tuple[str, ...] = get_args(Role)
STREAMS: tuple[str, ...] = get_args(Stream)


@dataclass(frozen=True, slots=True, order=True)
class Site:
    """A named place in a model where activations are read or written; every family uses the same names."""

    layer: int
    """Block, 0-based. For the stream `final` (after the last norm) it is -1."""
    stream: Stream

    def __post_init__(self) -> None:
        if self.stream not in STREAMS:
            raise SettingError(f"site stream {self.stream!r} is unknown; use one of {', '.join(STREAMS)}")
        if (self.stream == "final") != (self.layer == -1):
            raise SettingError(
                f"site layer {self.layer} does not go with stream {self.stream!r}; `final` has layer -1, all others 0 "
                f"or more"
            )
        if self.layer < -1:
            raise SettingError(f"site layer {self.layer} is negative; count blocks from 0")

    def __str__(self) -> str:
        return "final" if self.stream == "final" else f"{self.layer}.{self.stream}"

    @classmethod
    def parse(cls, text: str) -> Site:
        """Reads `final` or `LAYER.STREAM`, the inverse of `str(site)`; raises `SettingError` on anything else."""
        if text == "final":
            return cls(-1, "final")
        layer, _, stream = text.partition(".")
        if not layer.isdigit() or stream not in STREAMS:
            raise SettingError(f"site {text!r} is not `final` or LAYER.STREAM, for example `12.resid_post`")
        return cls(int(layer), stream)  # type: ignore[arg-type]  # __post_init__ checks the name


@dataclass(frozen=True, slots=True)
class Span:
    """A labelled half-open character range of one message."""

    message: int
    """Index of the message in its conversation."""
    start: int
    end: int
    metric: str
    value: float
    """Label in [0, 1]: 1 when the metric's property holds."""

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.end:
            raise TextError(
                f"span [{self.start}, {self.end}) of metric {self.metric!r} is empty or negative; characters count "
                f"from 0, end is exclusive"
            )
        if not 0.0 <= self.value <= 1.0:
            raise TextError(f"span value {self.value} of metric {self.metric!r} is outside [0, 1]")


@dataclass(frozen=True, slots=True)
class Message:
    role: Role
    content: str

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise TextError(f"role {self.role!r} is unknown; use one of {', '.join(ROLES)}")


@dataclass(frozen=True, slots=True)
class Conversation:
    """Text with roles, labelled spans and labels of whole responses."""

    id: str
    group: str
    """The source document; rows of one group never stand on two sides of a split."""
    messages: tuple[Message, ...]
    spans: tuple[Span, ...] = ()
    labels: Mapping[str, float] = field(default_factory=dict)
    """Metric to a label in [0, 1] for the whole response. A metric in neither `spans` nor `labels` is unlabelled."""
    source: str = ""
    license: str = ""

    def __post_init__(self) -> None:
        if not any(message.content for message in self.messages):
            raise TextError(f"conversation {self.id!r} has no text; give at least one message with content")
        for span in self.spans:
            if span.message not in range(len(self.messages)):
                raise TextError(
                    f"conversation {self.id!r}: span of metric {span.metric!r} points at message {span.message}, but "
                    f"there are {len(self.messages)}"
                )
            size = len(self.messages[span.message].content)
            if span.end > size:
                raise TextError(
                    f"conversation {self.id!r}: span [{span.start}, {span.end}) of metric {span.metric!r} ends outside "
                    f"message {span.message} ({size} characters); offsets count characters, not bytes or tokens"
                )


@dataclass(frozen=True, slots=True)
class TokenScore:
    """What a head says of one token: a calibrated probability, or `pending`, or why there is none. Never 0 for that."""

    state: Literal["scored", "pending", "unscored"]
    value: float | None = None
    """Calibrated probability in [0, 1] of the token itself; only when `state` is `scored`."""
    running: float | None = None
    """That of the text so far, which thresholds are held against; only when `state` is `scored`."""
    reason: str = ""
    reader: Reader = "draft"
    """The model whose states were read."""

    def __post_init__(self) -> None:
        known = (self.value is not None, self.running is not None)
        assert known == (self.state == "scored",) * 2, "values go with state `scored` alone"
        assert (self.reason != "") == (self.state == "unscored"), "a reason goes with state `unscored` alone"

    @classmethod
    def scored(cls, value: float, reader: Reader = "draft", *, running: float | None = None) -> TokenScore:
        """Makes a score; a value that is not a probability becomes `unscored`, never a number.

        `running` is `value` where it is not given: a head that looks at single tokens.
        """
        running = value if running is None else running
        for given in (value, running):
            if not 0.0 <= given <= 1.0:  # also false for NaN
                return cls.unscored(f"head gave {given}, not a probability", reader)
        return cls("scored", value, running, reader=reader)

    @classmethod
    def unscored(cls, reason: str, reader: Reader = "draft") -> TokenScore:
        return cls("unscored", reason=reason, reader=reader)


PENDING = TokenScore("pending")
"""The score is due with the next step of the reader."""
