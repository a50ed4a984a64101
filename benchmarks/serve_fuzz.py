"""Well-formed requests to a server in; as many malformed ones as are asked for, and what came back, out."""

from __future__ import annotations

import json
import random
import socket
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import httpx

ANSWER_S = 60.0
PAGES = (("GET", "/"), ("GET", "/page/app.js"), ("GET", "/grafana.json"), ("GET", "/openapi.json"))
HUGE_NUMBER = "a number of 5,000 digits"
VALUES: tuple[Any, ...] = (
    *(None, True, -1, 0, 2**63, 10**40, 1e308, -1e308, 5e-324, float("nan"), float("inf"), HUGE_NUMBER),
    *("", " ", "\x00", "\ud800", "\U0010ffff", "a" * 100_000, "9" * 5000, "<|im_start|>", "'; drop table tokens; --"),
    *([], {}, [[]], [None] * 2000, {"": {}}, [{"role": "user"}], {"\ud83d": 1}, {"role": "user", "content": [1]}),
)
KEYS = ("", "\x00", "\ud800", "n", "tools", "messages", "steer", "gate", "a" * 1000)
HEADERS = (
    *("Content-Length: -1", "Content-Length: 99999999999999999999", "Content-Length: x", "Content-Length: 0"),
    *("Transfer-Encoding: chunked", "Transfer-Encoding: rubbish", "Content-Type: text/xml", "Content-Type: \x00"),
    *("Host: elsewhere.example", "Host: [::", "Origin: null", "Origin: http://[", "Authorization: Bearer \xff"),
    *("Authorization: Basic Og==", f"X: {'y' * 70_000}", "No colon", ": no name", "A b: c", "Expect: 100-continue"),
    *("Upgrade: websocket", "Accept: \xff\xfe", "If-None-Match: \x80", "Content-Encoding: gzip", "Range: bytes=9-1"),
)
METHODS = ("GET", "POST", "PUT", "DELETE", "PATCH", "HEAD", "OPTIONS", "TRACE", "CONNECT", "get", "\xff", "A" * 99)
PIECES = ("%00", "%ff", "%", "%2e%2e%2f", "../", "//", "\\", "%ed%a0%80", "a" * 5000, "{}", "*", "\u00e9", "?", "#")
QUERIES = (
    *("limit=-1", "limit=1e9", "limit=", "limit=%00", f"limit={'9' * 5000}", "before_s=nan", "text=%00"),
    *("text=%25%5f%ff", "metric=%ed%a0%80", f"text={'a' * 300}", "flagged=2", "delivery=x", "exchange=,", "=&&="),
)


class Malformed(NamedTuple):
    """One request as it goes over the wire."""

    kind: str
    data: bytes
    is_cut: bool = False
    """Whether the client stops sending before the server may have all."""


class Fuzzed(NamedTuple):
    """What a server made of malformed requests."""

    statuses: Counter[int]
    """0 where the connection was closed without an answer."""
    broken: list[tuple[Malformed, bytes]]
    """Those that were answered with a 5xx or with a server's error within a stream, or not at all in time."""


class _Request(NamedTuple):
    method: str
    path: str
    body: Any = None


def well_formed(url: str) -> list[_Request]:
    """A valid request to every route of a server, an own one for each of its operations with a body."""
    with httpx.Client(base_url=url, timeout=ANSWER_S) as http:
        schema = http.get("/openapi.json").json()
        heads = http.get("/v1/monitor/heads").json()
        directions = http.get("/v1/steer/directions").json()["directions"]
    bodies = _bodies(heads["model"], heads["heads"][0]["metric"], directions)
    found = [_Request(*page) for page in PAGES]
    for path, operations in schema["paths"].items():
        for method, operation in operations.items():
            takes_body = "requestBody" in operation
            found += [_Request(method.upper(), path, body) for body in (bodies[path] if takes_body else [None])]
    return found


def _bodies(model: str, metric: str, directions: Sequence[Mapping[str, Any]]) -> Mapping[str, Sequence[Any]]:
    asked: dict[str, Any] = {"model": model, "max_tokens": 4, "seed": 1, "temperature": 0.5, "stop": ["x"]}
    monitor = {"heads": [metric], "tokens": True, "prompt": True, "lookahead": True, "signals": True}
    parts = [{"type": "text", "text": "an answer"}]
    turns = [{"role": "user", "content": "a question"}, {"role": "assistant", "content": parts}]
    streamed = {"stream": True, "stream_options": {"include_usage": True}, "monitor": monitor}
    policy = {"policy": {"hold": True, "rules": [{"metric": metric, "threshold": 0.5, "scope": "answer"}]}}
    gated = {"scope": "generation", "gate": {"metric": metric, "threshold": 0.5}}
    steer = [{"name": each["name"], "dose": each["dose"] / 2} | gated for each in directions]
    steered = {"steer": steer} | {"monitor": monitor}
    ways: list[Any] = [{}, streamed, *([steered, streamed | steered] if steer else [])]
    return {
        "/v1/chat/completions": [asked | {"messages": turns} | way for way in ways],
        "/v1/completions": [asked | {"prompt": "a text"} | way for way in ways],
        "/v1/monitor/score": [{"texts": [{"text": "a text"}, {"messages": turns}], "heads": [metric]}],
        "/v1/monitor/policy": [policy],
        "/v1/monitor/policy/dry-run": [policy | {"last": 5}],
    }


def malformed(url: str, requests: Sequence[_Request], number: int, *, seed: int) -> Iterator[Malformed]:
    """Seeded mutations, of one kind each; a few of them happen to be valid all the same."""
    draw, host = random.Random(seed), urlsplit(url).netloc
    for _ in range(number):
        kind = draw.choice(list(KINDS))
        yield KINDS[kind](draw, host, draw.choice([r for r in requests if r.body is not None or kind not in OF_BODIES]))


def _values(draw: random.Random, host: str, request: _Request) -> Malformed:
    """One to three places of the body hold something else, are missing, or are too many."""
    body = deepcopy(request.body)
    for _ in range(draw.randint(1, 3)):
        holder = draw.choice(list(_holders(body)))
        at = draw.choice(list(holder) if isinstance(holder, dict) else range(len(holder)))
        value = deepcopy(draw.choice(VALUES))  # a later turn may change it in place
        match draw.randrange(4):
            case 0 if len(holder) > 1:
                del holder[at]
            case 1 if isinstance(holder, dict):
                holder[draw.choice(KEYS)] = value
            case 2 if isinstance(holder, list):
                holder *= draw.choice([2, 600])
            case _:
                holder[at] = value
    return Malformed("values", _wire(request, host, _json(body)))


def _holders(value: Any) -> Iterator[Any]:
    if isinstance(value, dict | list) and value:
        yield value
        for each in value.values() if isinstance(value, dict) else value:
            yield from _holders(each)


def _json(value: Any) -> bytes:
    return json.dumps(value).replace(json.dumps(HUGE_NUMBER), "9" * 5000).encode()


def _bytes(draw: random.Random, host: str, request: _Request) -> Malformed:
    """Bytes of the body are others, more or fewer; UTF-8 is broken."""
    body = bytearray(_json(request.body))
    for _ in range(draw.randint(1, 5)):
        at = draw.randrange(len(body) + 1)
        match draw.randrange(4):
            case 0:
                body[at : at + 1] = bytes([draw.randrange(256)])
            case 1:
                body[at:at] = draw.choice([b"\xff\xfe", b"\xed\xa0\x80", b"\xc0\xaf", b"\x00", b"\\u", b'"', b"{"])
            case 2:
                del body[at : at + draw.randint(1, 8)]
            case _:
                del body[at:]
    return Malformed("bytes", _wire(request, host, bytes(body)))


def _deep(draw: random.Random, host: str, request: _Request) -> Malformed:
    """Nesting without end, as the whole body or within it."""
    opening, closing = draw.choice([(b"[", b"]"), (b'{"a":', b"}"), (b'[{"messages":', b"}]")])
    depth = draw.choice([64, 900, 1100, 20_000, 60_000])
    deep = opening * depth + b"1" + (closing * depth if draw.random() < 0.7 else b"")
    key = draw.choice([json.dumps(key).encode() for key in request.body])
    body = deep if draw.random() < 0.5 else b"{" + key + b":" + deep + b"," + _json(request.body)[1:]
    return Malformed("deep", _wire(request, host, body))


def _headers(draw: random.Random, host: str, request: _Request) -> Malformed:
    lines = [draw.choice(HEADERS) for _ in range(draw.randint(1, 3))]
    is_cut = any(line.startswith(("Content-Length", "Transfer-Encoding")) for line in lines)
    return Malformed("headers", _wire(request, host, _json(request.body), extra=lines), is_cut=is_cut)


def _method(draw: random.Random, host: str, request: _Request) -> Malformed:
    return Malformed("method", _wire(request._replace(method=draw.choice(METHODS)), host, _json(request.body)))


def _path(draw: random.Random, host: str, request: _Request) -> Malformed:
    path, piece = request.path, draw.choice(PIECES)
    if "{" in path:
        path = f"{path[: path.index('{')]}{piece}{path[path.index('}') + 1 :]}"
    elif draw.random() < 0.5:
        at = draw.randrange(1, len(path) + 1)
        path = path[:at] + piece + path[at:]
    path += "?" + "&".join(draw.choice(QUERIES) for _ in range(draw.randint(1, 3)))
    return Malformed("path", _wire(request._replace(path=path), host, _json(request.body)))


def _cut(draw: random.Random, host: str, request: _Request) -> Malformed:
    whole = _wire(request, host, _json(request.body))
    return Malformed("cut", whole[: draw.randrange(len(whole))], is_cut=True)


def _noise(draw: random.Random, host: str, request: _Request) -> Malformed:
    start = draw.choice([b"", b"\r\n\r\n", b"\x16\x03\x01", b"GET / HTTP/9\r\n", b"POST /v1/completions HTTP/1.1\r\n"])
    return Malformed("noise", start + draw.randbytes(draw.choice([1, 40, 3000, 100_000])), is_cut=True)


KINDS: Mapping[str, Callable[[random.Random, str, _Request], Malformed]] = {
    "values": _values,
    "bytes": _bytes,
    "deep": _deep,
    "headers": _headers,
    "method": _method,
    "path": _path,
    "cut": _cut,
    "noise": _noise,
}
OF_BODIES = ("values", "bytes", "deep")


def _wire(request: _Request, host: str, body: bytes, *, extra: Sequence[str] = ()) -> bytes:
    lines = [f"{request.method} {request.path} HTTP/1.1", *extra]
    given = {line.partition(":")[0].lower() for line in extra}
    usual = {"Host": host, "Connection": "close", "Content-Type": "application/json", "Content-Length": str(len(body))}
    lines += [f"{name}: {value}" for name, value in usual.items() if name.lower() not in given]
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + body


def send(url: str, request: Malformed, *, answer_s: float = ANSWER_S) -> bytes:
    """All that came back; raises `TimeoutError` when the server neither answers nor closes."""
    parts = urlsplit(url)
    with socket.create_connection((parts.hostname, parts.port), timeout=answer_s) as connection:
        received = b""
        try:
            connection.sendall(request.data)
            if request.is_cut:
                connection.shutdown(socket.SHUT_WR)
            while more := connection.recv(65_536):
                received += more
        except (ConnectionError, BrokenPipeError):  # closed before it had read all
            pass
        return received


def status_of(answer: bytes) -> int:
    line = answer.removeprefix(b"HTTP/1.1 100 Continue\r\n\r\n").split(b"\r\n", 1)[0].split()
    return int(line[1]) if len(line) > 1 and line[0].startswith(b"HTTP/") else 0


def status_to(url: str, request: _Request) -> int:
    """What a well-formed request is answered."""
    return status_of(send(url, Malformed("none", _wire(request, urlsplit(url).netloc, _json(request.body)))))


def fuzz(url: str, number: int, *, seed: int, num_clients: int = 4) -> Fuzzed:
    """Sends malformed requests to all routes, several at a time."""
    requests = list(malformed(url, well_formed(url), number, seed=seed))

    def answer_to(request: Malformed) -> bytes | None:
        try:
            return send(url, request)
        except TimeoutError:
            return None

    with ThreadPoolExecutor(num_clients) as pool:
        answers = list(pool.map(answer_to, requests))
    pairs = list(zip(requests, answers, strict=True))
    broken = [(r, a or b"") for r, a in pairs if a is None or status_of(a) >= 500 or b'"server_error"' in a]
    return Fuzzed(Counter(status_of(answer or b"") for answer in answers), broken)
