"""Chat messages in, a reply out, from any server that speaks OpenAI's chat completions."""

from __future__ import annotations

import json
import logging
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass, field
from http.client import HTTPException, HTTPResponse
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from pilotfish.errors import EndpointError, SettingError, Unanswered

logger = logging.getLogger(__name__)

_PASSING = frozenset({408, 409, 425, 429})
"""Refusals that another try may lift, beside those from 500 on."""
_HOPELESS = {
    401: "refuses the API key; check the key in the environment variable that you named",
    402: "asks for payment; top the account up, or use another server",
    403: "does not let this API key use the model; check the key's rights",
    404: "knows no such address or model; check the base URL (it usually ends in /v1) and the model's name",
    405: "does not answer chat completions there; check the base URL (it usually ends in /v1)",
}
_LONGEST_WAIT_S = 60.0
_SHOWN = 300
"""Characters of a server's own words that an error repeats."""


class ChatMessage(NamedTuple):
    """A message as the server takes it; unlike `core.Message` it is never labelled."""

    role: str
    content: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """A model behind a URL. The key is sent to it and nowhere else: it is cut out of replies and errors."""

    base_url: str
    """Up to and without `/chat/completions`, for example `http://localhost:8000/v1`."""
    model: str
    api_key: str = field(default="", repr=False)
    temperature: float | None = 0.0
    """None leaves the choice to the server; some models take no other."""
    timeout_s: float = 120.0
    """Longest wait for one reply."""
    max_retries: int = 5
    """After 429, 5xx, a broken connection or a timeout."""
    backoff_s: float = 1.0
    """First pause before another try; each later one is twice as long, a minute at most."""

    def __post_init__(self) -> None:
        url = urlsplit(self.base_url)
        if url.scheme not in ("http", "https") or not url.hostname or url.query or url.fragment:
            raise SettingError(f"base URL {self.base_url!r} is not usable; give one like http://localhost:8000/v1")
        if url.username is not None:
            raise SettingError("the base URL holds a user name or password; leave it out, keys go in an API key")
        if not (self.api_key.isascii() and self.api_key.isprintable()):
            raise SettingError("the API key holds characters that no key has (a line break?); set it again")
        if self.timeout_s <= 0 or self.max_retries < 0 or self.backoff_s < 0:
            raise SettingError(
                f"timeout {self.timeout_s} s, {self.max_retries} retries, pause {self.backoff_s} s: give a timeout "
                "over 0, and 0 or more for the others"
            )

    def ask(self, messages: Sequence[ChatMessage], *, stop: threading.Event | None = None) -> str:
        """Sends one request, again after passing trouble; `stop` ends the waiting between tries.

        Raises:
            EndpointError: the server refuses every request of this kind (401, 402, 403, 404, 405, a redirect).
            Unanswered: this request got no answer: refused (400, 413, 422 …), or all tries failed.
        """
        stop = stop or threading.Event()
        body: dict[str, Any] = {"model": self.model, "messages": [message._asdict() for message in messages]}
        if self.temperature is not None:
            body["temperature"] = self.temperature
        payload = json.dumps(body).encode("ascii")
        for attempt in range(self.max_retries + 1):
            try:
                return self._post(payload)
            except _Passing as trouble:
                wait = min(max(self.backoff_s * 2.0**attempt, trouble.retry_after_s), _LONGEST_WAIT_S)
                last = trouble
            if attempt < self.max_retries:
                logger.info("%s: %s; another try in %.1f s", self.base_url, last, wait)
                if stop.wait(wait):
                    break
        raise Unanswered(f"{self.base_url}: {last}, {attempt + 1} tries; see whether the server is well")

    def _post(self, payload: bytes) -> str:
        request = urllib.request.Request(
            self.base_url.rstrip("/") + "/chat/completions",
            payload,
            {"Content-Type": "application/json", "User-Agent": "pilotfish"},
        )
        if self.api_key:
            request.add_unredirected_header("Authorization", f"Bearer {self.api_key}")
        deadline = time.monotonic() + self.timeout_s
        try:
            with urllib.request.build_opener(_NoRedirect).open(request, timeout=self.timeout_s) as response:
                raw = _read(response, deadline)
        except urllib.error.HTTPError as error:
            with error:
                raise self._refusal(error) from None
        except TimeoutError as error:
            raise _Passing(f"no answer within {self.timeout_s:g} s") from error
        except (OSError, HTTPException) as error:
            raise _Passing(self._clean(f"the connection failed: {error}")) from error
        return self._clean(_content(raw))

    def _refusal(self, error: urllib.error.HTTPError) -> Exception:
        try:
            words = self._clean(error.read(1 << 16).decode("utf-8", "replace"))[:_SHOWN]
        except (OSError, HTTPException):
            words = ""
        said = f"status {error.code}: {' '.join(words.split())}"
        if error.code in _PASSING or error.code >= 500:
            return _Passing(said, _seconds(error.headers.get("Retry-After")))
        if error.code in _HOPELESS:
            return EndpointError(f"{self.base_url} (model {self.model}) {_HOPELESS[error.code]} ({said})")
        if error.code < 400:
            return EndpointError(f"{self.base_url} sends requests elsewhere ({said}); give the final base URL")
        return Unanswered(f"{self.base_url} refuses this request ({said}); see what it says")

    def _clean(self, text: str) -> str:
        return text.replace(self.api_key, "[API key]") if self.api_key else text


class _Passing(Exception):
    """Trouble that another try may lift."""

    def __init__(self, words: str, retry_after_s: float = 0.0) -> None:
        super().__init__(words)
        self.retry_after_s = retry_after_s


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A key must not follow a redirect to another host, and a POST would arrive there as a GET."""

    def redirect_request(self, *_: Any) -> None:
        return None


def _read(response: HTTPResponse, deadline: float) -> bytes:
    """The whole body; a socket's own timeout would let a server that sends a byte a minute hold us for ever."""
    parts = []
    while part := response.read1(1 << 16):
        parts.append(part)
        if time.monotonic() > deadline:
            raise TimeoutError
    return b"".join(parts)


def _content(raw: bytes) -> str:
    """The reply's text; a refusal or silence of the model is an empty one."""
    try:
        content = json.loads(raw)["choices"][0]["message"].get("content")
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise _Passing("the answer is no chat completion") from error
    return content if isinstance(content, str) else ""


def _seconds(header: str | None) -> float:
    """Of a Retry-After header; a date in it is left to our own pauses."""
    return float(header) if header is not None and header.strip().isdecimal() else 0.0
