"""A request in; the text that another OpenAI-compatible server answers with out, as it comes."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import AsyncIterator, Iterator, Mapping
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import httpx

from pilotfish.engines.records import FinishReason
from pilotfish.errors import SettingError, UpstreamError
from pilotfish.server.backend import Call
from pilotfish.server.settings import is_loopback

logger = logging.getLogger(__name__)

LINE_BYTES = 1_000_000
"""A longer line, or whole answer, is refused."""
SHOWN = 300
"""Characters of the upstream's own words that an error repeats."""
CONNECT_S = 10.0
_FINISH: dict[str, FinishReason] = {"stop": "eos", "length": "length", "content_filter": "content_filter"}
_DROPPED = ("reasoning_content", "reasoning", "refusal", "audio")
"""Fields of an answer beside its text: they are not read, so they do not leave either."""


class Arrival(NamedTuple):
    """What one piece of an answer brings."""

    text: str = ""
    ending: FinishReason | None = None
    dropped: tuple[str, ...] = ()
    """Fields that are neither read nor handed on."""


class Upstream:
    """A model behind a URL. The key is sent to it and nowhere else, and stands in no error and no log."""

    def __init__(self, base_url: str, model: str, *, api_key: str = "", timeout_s: float = 120.0) -> None:
        """`timeout_s`: longest silence before an answer is given up.

        Raises:
            SettingError: the URL, the key or the timeout cannot be used.
        """
        url = urlsplit(base_url)
        if url.username is not None:
            raise SettingError("the upstream's URL holds a user name or password; keys go in an environment variable")
        if url.scheme not in {"http", "https"} or not url.hostname or url.query or url.fragment:
            raise SettingError(f"upstream {base_url!r} is not usable; give one like https://HOST/v1")
        if not (api_key.isascii() and api_key.isprintable()):
            raise SettingError("the upstream's key holds characters that no key has (a line break?); set it again")
        if timeout_s <= 0:
            raise SettingError(f"upstream_timeout_s {timeout_s} is not allowed; give a positive number")
        self.model = model
        self._url, self._api_key, self._timeout_s = base_url.rstrip("/"), api_key, timeout_s
        self._through_proxies = not is_loopback(url.hostname)
        self._client: httpx.AsyncClient | None = None

    @contextlib.asynccontextmanager
    async def answering(self, call: Call) -> AsyncIterator[AsyncIterator[Arrival]]:
        """The pieces of an answer, once the upstream has begun it; leaving the block ends the request there.

        Raises:
            UpstreamError: it refuses the request, or breaks off; also while the pieces are read.
        """
        path = "/completions" if call.is_raw else "/chat/completions"
        headers = {} if call.traceparent is None else {"traceparent": call.traceparent}
        request = self._connected().build_request("POST", self._url + path, json=self._body(call), headers=headers)
        with self._said_plainly():
            response = await self._connected().send(request, stream=True)
        try:
            with self._said_plainly():
                if response.status_code != 200:
                    raise self._refusal(response, await _read_some(response))
                kind = response.headers.get("content-type", "").partition(";")[0].strip().lower()
            if kind not in {"text/event-stream", "application/json"}:
                raise UpstreamError(f"the upstream answers with {kind or 'no content type'}, not with an answer")
            yield self._pieces(response, is_raw=call.is_raw, streams=kind == "text/event-stream")
        finally:
            await response.aclose()

    async def close(self) -> None:
        if self._client is not None:
            await self._client.aclose()

    def _connected(self) -> httpx.AsyncClient:
        if self._client is None:
            headers = {"authorization": f"Bearer {self._api_key}"} if self._api_key else {}
            timeout = httpx.Timeout(self._timeout_s, connect=CONNECT_S)
            limits = httpx.Limits(max_connections=None)
            self._client = httpx.AsyncClient(
                headers=headers, timeout=timeout, limits=limits, trust_env=self._through_proxies
            )
        return self._client

    def _body(self, call: Call) -> dict[str, Any]:
        request, sampling = call.request, call.request.sampling
        asked: dict[str, Any] = {
            "model": self.model,
            "stream": True,
            "max_tokens": request.max_new_tokens,
            "temperature": sampling.temperature,
            "seed": request.seed,
        }
        if call.is_raw:
            asked["prompt"] = call.messages[0].content
        else:
            asked["messages"] = [{"role": message.role, "content": message.content} for message in call.messages]
        if sampling.top_p is not None and sampling.top_p < 1.0:
            asked["top_p"] = sampling.top_p
        if sampling.top_k is not None:
            asked["top_k"] = sampling.top_k
        if request.stop:
            asked["stop"] = list(request.stop)
        return asked

    async def _pieces(self, response: httpx.Response, *, is_raw: bool, streams: bool) -> AsyncIterator[Arrival]:
        ended = False
        with self._said_plainly():
            async for line in _payloads(response) if streams else _whole(response):
                if line == b"[DONE]":
                    break
                found = arrival(_decoded(line), is_raw=is_raw, streams=streams)
                if found is None:
                    continue
                if ended and found.text:
                    raise UpstreamError("the upstream went on after the end of its answer")
                if not ended:
                    yield found
                ended = ended or found.ending is not None
        if not ended:
            raise UpstreamError("the upstream broke its answer off without saying why it ended")

    @contextlib.contextmanager
    def _said_plainly(self) -> Iterator[None]:
        """Failures of the connection as errors that hold no key."""
        try:
            yield
        except httpx.TimeoutException as error:
            what = f"could not be reached within {CONNECT_S:.0f} s"
            if not isinstance(error, httpx.ConnectTimeout):
                what = f"sent nothing for {self._timeout_s:.0f} s"
            raise UpstreamError(f"the upstream {what}", status=504) from None
        except httpx.ConnectError:
            raise UpstreamError("the upstream could not be reached") from None
        except httpx.HTTPError as error:
            raise UpstreamError(f"the connection to the upstream broke: {type(error).__name__}") from None

    def _refusal(self, response: httpx.Response, body: bytes) -> UpstreamError:
        status, words = response.status_code, self._words(body)
        logger.warning("the upstream answers %d: %s", status, words)
        if status in {401, 402, 403}:
            return UpstreamError(f"the upstream refuses this server's key ({status}); its operator must look")
        if status == 429:
            wait = response.headers.get("retry-after", "")
            retry_s = float(wait) if wait.isdigit() else 1.0
            return UpstreamError("the upstream takes no more requests at present", status=429, retry_after_s=retry_s)
        if status in {400, 413, 422}:
            return UpstreamError(f"the upstream refuses the request ({status}): {words}", status=400)
        if status == 404:
            return UpstreamError("the upstream knows no such address or model (404); its operator must look")
        return UpstreamError(f"the upstream failed ({status})")

    def _words(self, body: bytes) -> str:
        """What an error says, short and without the key."""
        text = body.decode("utf-8", "replace")
        with contextlib.suppress(ValueError, TypeError, KeyError):
            text = str(json.loads(text)["error"]["message"])
        cleaned = text.replace(self._api_key, "[API key]") if self._api_key else text
        return " ".join(cleaned.split())[:SHOWN]


def arrival(payload: Any, *, is_raw: bool = False, streams: bool = True) -> Arrival | None:
    """What a chunk, or a whole answer, brings; None for one without a choice, as that with the usage.

    Raises:
        UpstreamError: it is malformed, an error, or holds what cannot be monitored: several choices, tool calls.
    """
    if not isinstance(payload, Mapping):
        raise _malformed("it is no object")
    if payload.get("error"):
        raise UpstreamError("the upstream ended its answer with an error")
    choices = payload.get("choices")
    if not isinstance(choices, list):
        raise _malformed("it has no choices")
    if not choices:
        return None
    choice = choices[0]
    if len(choices) > 1 or not isinstance(choice, Mapping) or choice.get("index", 0) != 0:
        raise UpstreamError("the upstream gives several choices; one alone can be monitored")
    said = choice if is_raw else choice.get("delta" if streams else "message")
    if not isinstance(said, Mapping):
        raise _malformed("a choice says nothing")
    if said.get("tool_calls") or said.get("function_call"):
        raise UpstreamError("the upstream calls a tool, which is not monitored; ask it for text alone")
    text = _text(said.get("text" if is_raw else "content"))
    reason = choice.get("finish_reason")
    if reason is not None and (not isinstance(reason, str) or reason not in _FINISH):
        raise UpstreamError("the upstream ended its answer for a reason that is not known here")
    return Arrival(text, None if reason is None else _FINISH[reason], tuple(n for n in _DROPPED if said.get(n)))


def _text(given: Any) -> str:
    if not isinstance(given, str | None):
        raise _malformed("its text is no string")
    if any("\ud800" <= character <= "\udfff" for character in given or ""):
        raise _malformed("its text holds half a character")
    return given or ""


async def _payloads(response: httpx.Response) -> AsyncIterator[bytes]:
    """The data of server-sent events. Lines end at line feeds alone: JSON may hold other separators as they are."""
    rest, data = b"", list[bytes]()
    async for part in response.aiter_bytes():
        *lines, rest = (rest + part).split(b"\n")
        if len(rest) > LINE_BYTES:
            raise _malformed("a line is too long")
        for line in (each.removesuffix(b"\r") for each in lines):
            if line.startswith(b"data:"):
                data.append(line[5:].removeprefix(b" "))
            elif not line and data:
                yield b"\n".join(data)
                data = []
    if data or rest.startswith(b"data:"):  # the last event without the blank line after it
        yield b"\n".join([*data, *([rest[5:].strip()] if rest.startswith(b"data:") else [])])


async def _whole(response: httpx.Response) -> AsyncIterator[bytes]:
    """An answer in one piece, from an upstream that does not stream."""
    body = await _read_some(response)
    if len(body) > LINE_BYTES:
        raise _malformed("it is too long")
    yield body


async def _read_some(response: httpx.Response) -> bytes:
    """A body, up to a little over the longest that is taken."""
    parts, size = [], 0
    async for part in response.aiter_bytes():
        parts.append(part)
        size += len(part)
        if size > LINE_BYTES:
            break
    return b"".join(parts)


def _decoded(line: bytes) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):  # bad UTF-8 too
        raise _malformed("it is not JSON") from None


def _malformed(why: str) -> UpstreamError:
    return UpstreamError(f"the upstream's answer cannot be read: {why}")
