"""`pilotfish chat`: prompts in, coloured answers out."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

from pilotfish.cli.session import describe, flag_policy, legend, show, start_engine, thresholds
from pilotfish.cli.terminal import uses_colour
from pilotfish.cli.verbs import Chat
from pilotfish.core import Message
from pilotfish.engines import Drafting, Request, Sampling
from pilotfish.errors import SettingError, TextError
from pilotfish.reports import write_page


def run(config: Chat) -> int:
    sampling = Sampling(temperature=config.temperature, top_p=config.top_p)
    engine = start_engine(config, Drafting(length=config.draft_length))
    metric = config.metric or engine.metrics[0]
    if metric not in engine.metrics:
        raise SettingError(f"metric {metric!r} has no head; there are {', '.join(engine.metrics)}")
    policy = flag_policy(engine.banks.values(), action=config.action, threshold=config.threshold, hold=True)
    request = Request(max_new_tokens=config.max_new_tokens, sampling=sampling, policy=policy, seed=config.seed)
    print(legend(metric, thresholds(engine, policy).get(metric), colour=uses_colour()))
    history: list[Message] = []
    exchanges: list[dict[str, Any]] = []
    for prompt in _prompts(config):
        history.append(Message("user", prompt))
        generation = show(engine, tuple(history), request, metric)
        history.append(Message("assistant", generation.answer))
        exchanges.append(describe(engine, generation, prompt[:60], policy))
        if config.page is not None:
            write_page(config.page, exchanges)
    return 0


def _prompts(config: Chat) -> Iterator[str]:
    if config.prompt is not None:
        yield config.prompt
        return
    is_terminal = sys.stdin.isatty()
    if is_terminal:
        print("Write a prompt and press Enter; an empty line ends the chat.")
    while True:
        if is_terminal:
            print("> ", end="", flush=True)
        try:
            line = sys.stdin.readline()
        except UnicodeDecodeError as error:
            raise TextError(f"standard input is not UTF-8 at byte {error.start}; convert it first") from error
        if not line.strip():
            return
        yield line.strip()
