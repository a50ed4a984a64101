"""A secret in, who it belongs to and what they may do out. Of a key only its hash is kept."""

from __future__ import annotations

import hashlib
import hmac
import secrets
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

from pilotfish.errors import SettingError
from pilotfish.server.tables import KeyRow

Scope = Literal["use", "read", "admin"]

SCOPES: tuple[str, ...] = get_args(Scope)
PREFIX = "pf"
NOBODY = hashlib.sha256(b"").hexdigest()
"""What an unknown key's hash is compared with, so that it takes as long as a known one's."""


class Caller(NamedTuple):
    """Who asks."""

    key_id: str | None
    """None on a loopback address without keys."""
    scopes: frozenset[str]


LOCAL = Caller(None, frozenset(SCOPES))
"""Whoever can reach a server that has no keys: only this machine."""


class NewKey(NamedTuple):
    secret: str
    """To be shown once; it cannot be had again."""
    row: dict[str, Any]


def new_key(name: str, scopes: Sequence[str]) -> NewKey:
    """Draws a key of 256 random bits.

    Raises:
        SettingError: there is no scope, or an unknown one.
    """
    unknown = [scope for scope in scopes if scope not in SCOPES]
    if unknown or not scopes:
        raise SettingError(f"scopes {list(scopes)} are not allowed; give one or more of {', '.join(SCOPES)}")
    key_id, secret = secrets.token_hex(6), secrets.token_urlsafe(32)
    full = f"{PREFIX}_{key_id}_{secret}"
    ordered = " ".join(scope for scope in SCOPES if scope in scopes)
    return NewKey(full, {"id": key_id, "name": name, "digest": digest(full), "scopes": ordered})


def digest(secret: str) -> str:
    """SHA-256, enough for a secret of 256 random bits: there is nothing to guess that stretching would slow down."""
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).hexdigest()


class KeyRing:
    """The keys in force, read again from the store at intervals, so that a revoked one stops working everywhere."""

    def __init__(
        self,
        read: Callable[[], Iterable[KeyRow]],
        *,
        refresh_s: float = 5.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._read, self._refresh_s, self._clock = read, refresh_s, clock
        self._keys: dict[str, KeyRow] = {}
        self._read_at = -float("inf")

    @property
    def is_stale(self) -> bool:
        return self._clock() - self._read_at >= self._refresh_s

    def refresh(self) -> None:
        """Reads the store; raises StoreError, and then the keys read before hold on."""
        self._keys = {row.id: row for row in self._read() if row.revoked_s is None}
        self._read_at = self._clock()

    def __len__(self) -> int:
        return len(self._keys)

    def caller(self, secret: str) -> Caller | None:
        """Who a secret belongs to; None when to nobody. Takes the same time either way."""
        parts = secret.split("_", 2)
        row = self._keys.get(parts[1]) if len(parts) == 3 else None
        is_right = hmac.compare_digest(digest(secret), row.digest if row is not None else NOBODY)
        return Caller(row.id, frozenset(row.scopes.split())) if row is not None and is_right else None


@dataclass(slots=True)
class _Bucket:
    tokens: float
    filled_at: float


class RateLimit:
    """A token bucket for each caller: `per_minute` requests on average, up to as many at once."""

    def __init__(self, per_minute: int, *, clock: Callable[[], float] = time.monotonic) -> None:
        if per_minute < 1:
            raise SettingError(f"a rate of {per_minute} requests a minute is not allowed; give at least 1")
        self._per_minute, self._clock = per_minute, clock
        self._buckets: dict[str, _Bucket] = {}

    def wait_s(self, who: str) -> float:
        """Takes one request out of the bucket: 0 when it may go on, else seconds until it may."""
        now, rate = self._clock(), self._per_minute / 60.0
        bucket = self._buckets.setdefault(who, _Bucket(float(self._per_minute), now))
        bucket.tokens = min(float(self._per_minute), bucket.tokens + (now - bucket.filled_at) * rate)
        bucket.filled_at = now
        if bucket.tokens >= 1.0:
            bucket.tokens -= 1.0
            return 0.0
        return (1.0 - bucket.tokens) / rate
