"""What a proxy's reader costs beside a model that is elsewhere, held against heads on a draft that reads anyway."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from statistics import mean
from typing import Any, NamedTuple

from pilotfish.cli.terminal import table
from pilotfish.core import Message
from pilotfish.engines import Drafting, EmbeddedEngine, Generation, Request
from pilotfish.engines.tax import CODE_PROMPTS, PROSE_PROMPTS, Timing, random_bank, ratio
from pilotfish.models import LoadedModel, Pair, load_model, load_pair
from pilotfish.runs import generator
from pilotfish.server import Call, ProxyBackend, Upstream

PROMPTS = (*CODE_PROMPTS, *PROSE_PROMPTS)
ALONE, PLAIN, HEADS, READER = "target alone", "speculation", "speculation + heads", "proxy's reader"


class Told(NamedTuple):
    """What the upstream is to say next, a piece a token of the target's."""

    pieces: list[str]
    pace_s: float
    """Between two pieces."""


def proxy_part(chosen: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """CPU time for each token of the target's, by arm, on the same texts; all arms run in turn."""
    pair = load_pair(chosen["pair"])
    reader = load_model(chosen["reader"])
    timings, reads = _timings(pair, reader, chosen["num_pairs"], chosen["num_tokens"], seed)
    heads = HEADS if HEADS in timings else "target + heads"
    compared = [(READER, ALONE), (heads, PLAIN if PLAIN in timings else ALONE)]
    rows, cells = [], []
    for arm, other in compared:
        random = generator(seed, f"proxy {arm} {other}")
        found = ratio(timings[arm], timings[other], generator=random, cpu=True)
        rows.append({"arm": arm, "over": other, "cpu_per_token": found._asdict()})
        cells.append([arm, other, str(found)])
    title = f"{chosen['reader']} beside {chosen['pair']}, {mean(reads):.2f} passes a token"
    shown = table([title, "over", "CPU time a token"], cells)
    return {"targets": [], "rows": rows, "reads_per_token": reads, "table": shown}


def _timings(
    pair: Pair, reader: LoadedModel, num_pairs: int, num_tokens: int, seed: int
) -> tuple[dict[str, list[Timing]], list[float]]:
    """Repetitions of each arm, and the reader's passes a token; the first repetition is left out."""
    bank = random_bank(pair, num_heads=8, num_sites=3, generator=generator(seed, "heads"))
    request = Request(max_new_tokens=num_tokens)
    alone = Drafting(length=0)
    if pair.draft is None:
        arms = {ALONE: EmbeddedEngine(pair, drafting=alone), "target + heads": EmbeddedEngine(pair, [bank])}
    else:
        arms = {ALONE: EmbeddedEngine(pair, drafting=alone), PLAIN: EmbeddedEngine(pair)}
        arms[HEADS] = EmbeddedEngine(pair, [bank])
    timings: dict[str, list[Timing]] = {name: [] for name in (*arms, READER)}
    reads = []
    with _upstream() as (url, tell):
        proxy = _Proxy(url, reader, seed)
        for number in range(num_pairs + 1):
            prompt = PROMPTS[number % len(PROMPTS)]
            text, told = _timed(lambda prompt=prompt: arms[ALONE].generate(prompt, request))
            size = len(text.committed)
            timings[ALONE].append(told._replace(num_tokens=size))
            tell(Told([token.delta for token in text.committed], told.wall_s / size))
            rest = [name for name in timings if name != ALONE]
            for name in rest if number % 2 else rest[::-1]:
                if name == READER:
                    found, timing = _timed(lambda prompt=prompt: proxy.answer(prompt, request))
                    assert found.answer == text.answer, "the proxy hands on what the upstream says"
                    reads.append(found.num_taxed_reads / size)
                else:
                    found, timing = _timed(lambda prompt=prompt, name=name: arms[name].generate(prompt, request))
                timings[name].append(timing._replace(num_tokens=size if name == READER else len(found.committed)))
    return {name: found[1:] for name, found in timings.items()}, reads[1:]


def _timed(run: Any) -> tuple[Generation, Timing]:
    started, cpu = time.perf_counter(), time.process_time()
    found = run()
    return found, Timing(time.perf_counter() - started, time.process_time() - cpu, 0)


class _Proxy:
    """The proxy's engine without a server around it."""

    def __init__(self, url: str, reader: LoadedModel, seed: int) -> None:
        own = Pair(reader.model, None, reader.tokenizer, reader.identity, None)
        self._url, self._reader = url, reader
        self._bank = random_bank(own, num_heads=8, num_sites=3, generator=generator(seed, "reader's heads"))

    def answer(self, prompt: str, request: Request) -> Generation:
        return asyncio.run(self._answer(Call(messages=(Message("user", prompt),), request=request)))

    async def _answer(self, call: Call) -> Generation:
        backend = ProxyBackend(Upstream(self._url, "elsewhere"), self._reader, self._bank)
        stream = backend.submit(call)
        generation = await stream.opened()
        async for _ in stream:
            pass
        await asyncio.to_thread(backend.close)
        return generation


@contextmanager
def _upstream() -> Iterator[tuple[str, Any]]:
    """A server in a process of its own, whose work is not the proxy's: its URL, and how it is told what to say."""
    command = [sys.executable, __file__]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1) as process:

        def tell(told: Told) -> None:
            process.stdin.write(json.dumps(told) + "\n")
            process.stdout.readline()

        try:
            yield f"http://127.0.0.1:{int(process.stdout.readline())}/v1", tell
        finally:
            process.stdin.close()


def _serve() -> None:
    """Says to each request what it was told last."""
    last: list[Told] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            self.end_headers()
            for piece in last[-1].pieces:
                time.sleep(last[-1].pace_s)
                self._say({"content": piece}, None)
            self._say({}, "stop")
            self.wfile.write(b"data: [DONE]\n\n")

        def _say(self, delta: dict[str, str], finish: str | None) -> None:
            said = {"choices": [{"index": 0, "delta": delta, "finish_reason": finish}]}
            self.wfile.write(f"data: {json.dumps(said)}\n\n".encode())

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print(server.server_address[1], flush=True)
    for line in sys.stdin:
        last.append(Told(*json.loads(line)))
        print("heard", flush=True)


if __name__ == "__main__":
    _serve()
