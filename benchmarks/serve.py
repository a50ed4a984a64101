"""What the server costs over its engine, a proxy's reader beside another's; whether a kill loses alerts; and abuse.

    python benchmarks/serve.py [--quick] [--seed 0] [--json PATH] [--parts overheads proxy kills soak fuzz]
                               [--pair demo:qwen-coder] [--reader demo:smollm2] [--pairs 20] [--tokens 48]
                               [--kills 50] [--minutes 30] [--requests 10000]

Overhead: the same prompts, greedy, to the same number of tokens, through the engine alone and through the server, in
turn; a client in a process of its own. Proxy: what reading the target's texts costs, which come a token at a time, as
fast as it gave them, from an upstream in a process of its own. Kills: a server with a tiny pair under load is ended by
SIGKILL at random moments, on SQLite and, where it is installed, on PostgreSQL. Soak: eight streams whose clients
finish, leave, stall or send rubbish. Fuzz: malformed requests to all routes. Takes about two hours on two cores,
`--quick` about two minutes (the small demo model, three kills, a soak of 20 s, 500 requests).
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import httpx
import torch
from serve_fuzz import fuzz, status_to, well_formed
from serve_kit import hook_server, none_wanted, serve_tiny, tiny_engine, tiny_server
from serve_proxy import proxy_part
from serve_soak import soak
from shown import targets_table

from pilotfish.actions import Policy
from pilotfish.cli.terminal import quieten_transformers, table
from pilotfish.engines import EmbeddedEngine, Request, generate_together
from pilotfish.engines.tax import CODE_PROMPTS, PROSE_PROMPTS, Timing, random_bank, ratio
from pilotfish.models import load_pair
from pilotfish.runs import generator, run_card, write_json
from pilotfish.server import EmbeddedBackend, ServerSettings, Service, Store, make_server

PARTS = ("overheads", "proxy", "kills", "soak", "fuzz")
STREAMS = (1, 8)
PROMPTS = (*CODE_PROMPTS, *PROSE_PROMPTS)
SEEN_S = 30.0
FULL: Mapping[str, Any] = {
    "pair": "demo:qwen-coder",
    "reader": "demo:smollm2",
    "num_pairs": 20,
    "num_tokens": 48,
    "kills": 50,
    "minutes": 30.0,
    "requests": 10_000,
}
QUICK: Mapping[str, Any] = {
    "pair": "demo:smollm2",
    "reader": "demo:smollm2",
    "num_pairs": 4,
    "num_tokens": 24,
    "kills": 3,
    "minutes": 1 / 3,
    "requests": 500,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--pair")
    parser.add_argument("--reader")
    parser.add_argument("--pairs", type=int, dest="num_pairs", help="repetitions of each arm of overheads and proxy")
    parser.add_argument("--tokens", type=int, dest="num_tokens", help="of each answer there")
    parser.add_argument("--kills", type=int)
    parser.add_argument("--minutes", type=float)
    parser.add_argument("--requests", type=int)
    parser.add_argument("--client", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.client is not None:
        _client(args.client)
        return
    quieten_transformers()
    usual = QUICK if args.quick else FULL
    chosen = {name: getattr(args, name, None) or value for name, value in usual.items()}
    found: dict[str, Any] = {"targets": []}
    # First the kills: their servers are forked, which wants a process without threads.
    for part in (part for part in ("kills", "soak", "fuzz", "overheads", "proxy") if part in args.parts):
        found[part] = _RUN[part](chosen, args.seed)
        found["targets"] += found[part].pop("targets")
        if "table" in found[part]:
            print(found[part].pop("table") + "\n")
    if args.json is not None:
        settings = {"quick": args.quick, "parts": list(args.parts), **chosen}
        write_json(args.json, {**found, "card": run_card("benchmarks/serve.py", settings, args.seed)})
    if found["targets"]:
        print(targets_table(found["targets"]))


# Overhead.


def _overhead_part(chosen: Mapping[str, Any], seed: int) -> dict[str, Any]:
    targets, rows, cells = [], [], []
    for streams, alone, served in _overheads(chosen["pair"], chosen["num_pairs"], chosen["num_tokens"], seed):
        random = generator(seed, f"overhead {streams}")
        speed, speed_cpu = (ratio(alone, served, generator=random, cpu=cpu) for cpu in (False, True))
        extra = median(
            1e6 * (s.cpu_s / s.num_tokens - a.cpu_s / a.num_tokens) for a, s in zip(alone, served, strict=True)
        )
        row = {
            "streams": streams,
            "speed": speed._asdict(),
            "speed_cpu": speed_cpu._asdict(),
            "cpu_us_per_token": extra,
        }
        rows.append(row)
        cells.append([str(streams), str(speed), str(speed_cpu), f"{extra:.0f}"])
        named = {"name": f"server overhead at {streams} streams, share of tokens/s", "value": 1 - speed.value}
        interval = {"low": 1 - speed.high, "high": 1 - speed.low}
        targets.append({**named, **interval, "target": "<= 0.03", "met": 1 - speed.value <= 0.03})
    columns = [f"streams of {chosen['pair']}", "speed over the engine's", "in CPU time", "CPU µs a token more"]
    return {"targets": targets, "rows": rows, "table": table(columns, cells)}


def _overheads(
    pair_name: str, num_pairs: int, num_tokens: int, seed: int
) -> Iterator[tuple[int, list[Timing], list[Timing]]]:
    """Per number of streams, repetitions through the engine alone and through the server; the first is left out."""
    pair = load_pair(pair_name)
    bank = random_bank(pair, num_heads=8, num_sites=3, generator=generator(seed, "heads"))
    engine = EmbeddedEngine(pair, [bank])
    policy = Policy(hold=True)
    with _served(engine, policy) as url, _client_process(url) as ask:
        model = pair.target_identity.name
        for streams in STREAMS:
            alone, served = [], []
            for number in range(num_pairs + 1):
                prompts = [PROMPTS[(number + i) % len(PROMPTS)] for i in range(streams)]
                arms = [
                    (alone, lambda prompts=prompts: _alone(engine, prompts, num_tokens, policy)),
                    (served, lambda prompts=prompts: ask(model, prompts, num_tokens)),
                ]
                for timings, run in arms if number % 2 else arms[::-1]:
                    started, cpu = time.perf_counter(), time.process_time()
                    count = run()
                    timings.append(Timing(time.perf_counter() - started, time.process_time() - cpu, count))
            yield streams, alone[1:], served[1:]


def _alone(engine: EmbeddedEngine, prompts: Sequence[str], num_tokens: int, policy: Policy) -> int:
    """The engine's batch and nothing else; returns the tokens."""
    request = Request(max_new_tokens=num_tokens, policy=policy)
    found = generate_together(engine, prompts, request, max_streams=len(prompts))
    return sum(len(generation.committed) for generation in found)


@contextmanager
def _served(engine: EmbeddedEngine, policy: Policy) -> Iterator[str]:
    with tempfile.TemporaryDirectory() as folder:
        store = Store(f"sqlite:///{folder}/store.db")
        settings = ServerSettings(port=0, requests_per_minute=1_000_000)
        service = Service(EmbeddedBackend(engine), store, settings, policy=policy)
        urls: list[str] = []
        started = threading.Event()
        server = make_server(service, lambda url: (urls.append(url), started.set())[-1])
        thread = threading.Thread(target=server.run)
        thread.start()
        started.wait(60)
        try:
            yield urls[0]
        finally:
            server.should_exit = True
            thread.join()


@contextmanager
def _client_process(url: str) -> Iterator[Any]:
    """A client that is asked over its standard input, so that its work is not the server's."""
    command = [sys.executable, __file__, "--client", url]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1) as process:

        def ask(model: str, prompts: Sequence[str], num_tokens: int) -> int:
            process.stdin.write(json.dumps([model, list(prompts), num_tokens]) + "\n")
            return int(process.stdout.readline())

        yield ask
        process.stdin.close()


def _client(url: str) -> None:
    with httpx.Client(base_url=url, timeout=600) as http, ThreadPoolExecutor(max(STREAMS)) as pool:
        for line in sys.stdin:
            model, prompts, num_tokens = json.loads(line)

            def ask(prompt: str, model: str = model, num_tokens: int = num_tokens) -> int:
                body = {"model": model, "messages": [{"role": "user", "content": prompt}], "max_tokens": num_tokens}
                body |= {"temperature": 0, "stream": True, "monitor": {}, "stream_options": {"include_usage": True}}
                last = ""
                with http.stream("POST", "/v1/chat/completions", json=body) as reply:
                    for each in reply.iter_lines():
                        last = each if "usage" in each else last
                return int(json.loads(last.removeprefix("data: "))["usage"]["completion_tokens"])

            print(sum(pool.map(ask, prompts)), flush=True)


# Kills.


def _kills_part(chosen: Mapping[str, Any], seed: int) -> dict[str, Any]:
    found = [_kills(kind, chosen["kills"], seed) for kind in ("sqlite", "postgresql")]
    return {"targets": [each for each in found if each is not None]}


def _kills(kind: str, num_kills: int, seed: int) -> dict[str, Any] | None:
    """Kills a server again and again; how many alerts that a client knows of are lost, doubled or undelivered."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        store_url = f"sqlite:///{folder / 'store.db'}" if kind == "sqlite" else stack.enter_context(_postgres())
        if store_url is None:
            print("no PostgreSQL server here: its kills are left out", file=sys.stderr)
            return None
        engine = tiny_engine(seed)
        hook, arrived = stack.enter_context(hook_server())
        moments = generator(seed, f"kills {kind}")
        seen: set[str] = set()
        for number in range(num_kills + 1):
            is_last = number == num_kills
            _one_life(engine, store_url, hook, folder / f"url{number}", seen, None if is_last else moments)
        store = Store(store_url)
        alerts = store.alerts(limit=1_000_000)
        store.close()
    stored = [alert["exchange_id"] for alert in alerts]
    lost = len(seen - set(stored))
    doubled = len(stored) - len(set(stored))
    undelivered = len(seen & set(stored) - set(arrived))
    found = none_wanted(
        f"{num_kills} kills on {kind}: alerts lost, doubled or undelivered, of {len(seen)}",
        lost + doubled + undelivered,
    )
    return {**found, "met": found["met"] and bool(seen)}


def _one_life(
    engine: EmbeddedEngine,
    store_url: str,
    hook: str,
    note: Path,
    seen: set[str],
    moments: torch.Generator | None,
) -> None:
    """From start to kill under load; without `moments`, until all alerts are delivered."""
    child = os.fork()
    if not child:
        try:
            serve_tiny(engine, store_url, hook, note)
        finally:
            os._exit(1)
    try:
        deadline = time.monotonic() + SEEN_S
        while not note.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        url, stop = note.read_text(), threading.Event()
        if moments is None:
            store = Store(store_url)
            while store.outbox().get(("webhook", "pending")) and time.monotonic() < deadline + SEEN_S:
                time.sleep(0.1)
            store.close()
            return
        threads = [threading.Thread(target=_load, args=(url, i, seen, stop)) for i in range(4)]
        for thread in threads:
            thread.start()
        before = len(seen)
        while len(seen) == before and time.monotonic() < deadline:
            time.sleep(0.002)
        time.sleep(float(torch.rand((), generator=moments)) * 0.5)
        os.kill(child, signal.SIGKILL)
        stop.set()
        for thread in threads:
            thread.join()
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def _load(url: str, number: int, seen: set[str], stop: threading.Event) -> None:
    """A client that notes each exchange of which it has seen a token, all of which come after the flag."""
    try:
        with httpx.Client(base_url=url, timeout=30) as http:
            model = http.get("/v1/models").json()["data"][0]["id"]
            turns = [{"role": "user", "content": f"prompt {number}"}]
            body = {"model": model, "messages": turns, "max_tokens": 60, "temperature": 0, "stream": True}
            while not stop.is_set():
                with http.stream("POST", "/v1/chat/completions", json=body) as reply:
                    for line in reply.iter_lines():
                        if line.startswith('data: {"id"') and '"content":"' in line and '"content":""' not in line:
                            seen.add(json.loads(line.removeprefix("data: "))["id"])
    except (httpx.HTTPError, KeyError, json.JSONDecodeError):  # the server is gone
        return


@contextmanager
def _postgres() -> Iterator[str | None]:
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    from _pytest.outcomes import Skipped
    from server_kit import postgres

    try:
        with postgres() as url:
            yield url
    except Skipped:
        yield None


# Malformed requests.


def _fuzz_part(chosen: Mapping[str, Any], seed: int) -> dict[str, Any]:
    number = chosen["requests"]
    with tempfile.TemporaryDirectory() as name, hook_server() as (hook, _):
        with tiny_server(Path(name), hook, seed) as (url, _process):
            before = [status_to(url, request) for request in well_formed(url)]
            found = fuzz(url, number, seed=seed)
            after = [status_to(url, request) for request in well_formed(url)]
        num_tracebacks = (Path(name) / "log").read_text().count("Traceback")
    wrong = {
        f"{number:,} malformed requests: 5xx, no end, or a traceback": len(found.broken) + num_tracebacks,
        "after them: routes that answer otherwise": sum(a != b for a, b in zip(before, after, strict=True)),
    }
    targets = [none_wanted(name, count) for name, count in wrong.items()]
    examples = [[request.kind, repr(request.data[:500]), repr(answer[:500])] for request, answer in found.broken[:20]]
    return {"targets": targets, "statuses": {str(k): n for k, n in sorted(found.statuses.items())}, "broken": examples}


_RUN: Mapping[str, Callable[[Mapping[str, Any], int], dict[str, Any]]] = {
    "kills": _kills_part,
    "soak": lambda chosen, seed: soak(chosen["minutes"], seed),
    "fuzz": _fuzz_part,
    "overheads": _overhead_part,
    "proxy": proxy_part,
}


if __name__ == "__main__":
    main()
