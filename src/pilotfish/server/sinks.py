"""Alerts in; webhooks, lines of a file and OpenTelemetry events out."""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import json
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable
from urllib.parse import urlsplit

import httpx

from pilotfish.errors import DeliveryError, SettingError

SECRET_PREFIX = "whsec_"
LEAST_SECRET_BYTES = 24


@runtime_checkable
class Sink(Protocol):
    """Somewhere that alerts are sent to."""

    name: str
    """Also its key in the outbox: the same name goes on with what was left undelivered."""

    def deliver(self, payload: Mapping[str, Any]) -> None:
        """Sends one alert; returns once it has arrived. It may be sent again: receivers tell repeats by their id.

        Raises:
            DeliveryError: it has not arrived, as far as is known.
        """

    def close(self) -> None:
        """Lets go of what is held open."""


class WebhookSink:
    """Posts each alert as JSON, signed as the Standard Webhooks specification says (standardwebhooks.com, version 1).

    `webhook-signature` is `v1,` with the base64 of HMAC-SHA256 over `ID.TIMESTAMP.BODY`; ID is the alert's own, and
    stays the same when an alert is sent again.
    """

    def __init__(
        self,
        url: str,
        secret: str,
        *,
        name: str = "webhook",
        timeout_s: float = 10.0,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """`secret` is `whsec_` and at least 24 bytes in base64.

        Raises:
            SettingError: the URL is not http(s), or the secret is not of that form.
        """
        parts = urlsplit(url)
        if parts.scheme not in {"http", "https"} or not parts.hostname:
            raise SettingError(f"webhook {parts.scheme}://{parts.hostname or ''} is no address; give https://HOST/PATH")
        self.name = name
        self._url, self._key, self._clock = url, decode_secret(secret), clock
        self._client = httpx.Client(timeout=timeout_s, follow_redirects=False, trust_env=False)

    def deliver(self, payload: Mapping[str, Any]) -> None:
        body = json.dumps(payload, ensure_ascii=False, separators=(",", ":")).encode()
        message_id, timestamp = str(payload["data"]["id"]), str(int(self._clock()))
        headers = {
            "content-type": "application/json",
            "webhook-id": message_id,
            "webhook-timestamp": timestamp,
            "webhook-signature": sign(self._key, message_id, timestamp, body),
        }
        try:
            with self._client.stream(
                "POST", self._url, content=body, headers=headers
            ) as response:  # its body is not read
                status = response.status_code
        except httpx.HTTPError as error:
            raise DeliveryError(f"the webhook could not be reached: {type(error).__name__}") from error
        if not 200 <= status < 300:
            raise DeliveryError(f"the webhook answered {status}; it should answer 2xx")

    def close(self) -> None:
        self._client.close()


def sign(key: bytes, message_id: str, timestamp: str, body: bytes) -> str:
    """The value of `webhook-signature`."""
    digest = hmac.digest(key, b".".join((message_id.encode(), timestamp.encode(), body)), hashlib.sha256)
    return f"v1,{base64.b64encode(digest).decode()}"


def decode_secret(secret: str) -> bytes:
    """The key of a `whsec_…` secret; raises `SettingError`, without repeating it, when it is not one."""
    try:
        key = base64.b64decode(secret.removeprefix(SECRET_PREFIX), validate=True)
    except binascii.Error:
        key = b""
    if not secret.startswith(SECRET_PREFIX) or len(key) < LEAST_SECRET_BYTES:
        raise SettingError(
            f"the webhook's secret is not {SECRET_PREFIX} with at least {LEAST_SECRET_BYTES} bytes in base64; "
            "make one with `pilotfish keys secret`"
        )
    return key


class JsonlSink:
    """Appends each alert to a file as a line of JSON, and has the disk confirm it."""

    def __init__(self, path: Path, *, name: str = "jsonl") -> None:
        """Raises StoreError through `deliver`'s kind alone: an unwritable file shows as undelivered alerts."""
        self.name = name
        self._path = path

    def deliver(self, payload: Mapping[str, Any]) -> None:
        line = json.dumps(payload, ensure_ascii=False).encode() + b"\n"
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            handle = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
            try:
                if os.write(handle, line) != len(line):
                    raise DeliveryError(f"{self._path} took only a part of the line; free some space")
                os.fsync(handle)
            finally:
                os.close(handle)
        except OSError as error:
            raise DeliveryError(f"{self._path} cannot be written: {error.strerror}") from error

    def close(self) -> None:
        pass
