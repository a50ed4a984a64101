"""How much a server takes on, and for how long; plain data."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, field

from pilotfish.errors import SettingError
from pilotfish.server.outbox import Retrying

LOOPBACK_NAMES = ("localhost", "127.0.0.1", "[::1]", "::1")
DAY_S = 86_400.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What one request may ask for; more is refused with 400 or 413."""

    body_bytes: int = 1_000_000
    header_bytes: int = 16_384
    prompt_characters: int = 400_000
    """Of all messages together."""
    messages: int = 512
    new_tokens: int = 4096
    """The longest answer; also the one given where none is asked for, as far as the models' context allows."""
    texts: int = 32
    """Of one request for scores."""
    rows: int = 200
    """Of a list of exchanges or alerts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSettings:
    """All but the engine, the store and the sinks."""

    host: str = "127.0.0.1"
    port: int = 8000
    """0 takes a free one."""
    keep_days: float | None = 30.0
    """Exchanges are deleted after this; None keeps them."""
    max_streams: int = 8
    """Answers that are generated at the same time."""
    max_queue: int = 32
    """Requests that wait for their turn; one more is refused with 429."""
    request_timeout_s: float = 600.0
    """From the moment a request is taken to its last token, the wait included."""
    send_timeout_s: float = 30.0
    """How much longer a client may take to read an answer."""
    drain_s: float = 30.0
    """After SIGTERM answers in flight have so long to end."""
    requests_per_minute: int = 600
    """Of one key."""
    limits: Limits = field(default_factory=Limits)
    retrying: Retrying = field(default_factory=Retrying)

    def __post_init__(self) -> None:
        for name in ("max_streams", "request_timeout_s", "send_timeout_s", "drain_s", "requests_per_minute"):
            if getattr(self, name) <= 0:
                raise SettingError(f"{name} {getattr(self, name)} is not allowed; give a positive number")
        if self.max_queue < 0:
            raise SettingError(f"max_queue {self.max_queue} is not allowed; 0 refuses whatever cannot start at once")
        if self.keep_days is not None and self.keep_days <= 0:
            raise SettingError(
                f"keep_days {self.keep_days} is not allowed; give a positive number, or none to keep all"
            )

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach the server."""
        return is_loopback(self.host)


def is_loopback(host: str) -> bool:
    if host in LOOPBACK_NAMES:
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False  # a name that may mean anything
