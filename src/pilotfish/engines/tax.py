"""A pair and prompts in; what monitoring costs out: arms timed in turn on the same prompts, as ratios with intervals.

Absolute times drift with the machine, so in every repetition the arms answer one prompt side by side, a token each in
turn, and only ratios within a repetition are reported: their median, with a bootstrap interval over repetitions.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from pilotfish.core import Message
from pilotfish.engines.drafting import Drafting
from pilotfish.engines.embedded import EmbeddedEngine
from pilotfish.engines.reader import CachedModel
from pilotfish.engines.records import TokenEvent
from pilotfish.engines.request import Request
from pilotfish.heads import Form, Head, HeadBank
from pilotfish.models import Pair, evenly_spaced_sites
from pilotfish.runs import progress
from pilotfish.texts import encode, render

Arm = Callable[[str], Iterator[int]]
"""Answers a prompt step by step; yields the number of tokens generated so far."""

NUM_RESAMPLES = 4000

CODE_PROMPTS = (
    "Write a Python function that checks whether a string is a palindrome, ignoring case and punctuation.",
    "Write a C function that reverses a singly linked list in place and returns the new head.",
    "Write a Python class for a bank account with deposit, withdraw and a transaction history.",
    "Write a JavaScript function that groups an array of objects by a key.",
)
POOR_PROMPTS = (
    "Kirjoita lyhyt runo syksystä.",
    "Írj egy rövid levelet a nagymamádnak.",
    "Andika shairi fupi kuhusu bahari.",
    "Idatzi ipuin labur bat azeri bati buruz.",
)
"""Languages that the demo draft hardly knows: few of its tokens are accepted."""
PROSE_PROMPTS = (
    "Explain to a ten-year-old why the seasons change.",
    "Write a short letter to a neighbour about a tree that has fallen over the fence.",
    "What should one think of before moving to another country?",
    "Describe a morning in a small fishing village.",
)


class Timing(NamedTuple):
    wall_s: float
    cpu_s: float
    num_tokens: int


class Ratio(NamedTuple):
    """Median over repetitions of time per token of one arm over that of another, with a 95 % bootstrap interval."""

    value: float
    low: float
    high: float
    num_pairs: int

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


@dataclass(frozen=True, slots=True, kw_only=True)
class TaxSetting:
    """What every arm shares."""

    max_new_tokens: int = 48
    fixed_length: int = 4
    """Drafted tokens a round in the arms that are held against transformers' loop."""
    reread_every: int = 16
    """Tokens between two readings of the lagging monitors."""


def arms(pair: Pair, bank: HeadBank, setting: TaxSetting) -> dict[str, Arm]:
    """The arms of the table, by name; all greedy, and all give the target's own text.

    The separate monitor is the draft's model a second time with a cache of its own: same size, same heads, its own
    passes.
    """
    request = Request(max_new_tokens=setting.max_new_tokens, flush=False)
    flushed = Request(max_new_tokens=setting.max_new_tokens)
    fixed = Drafting(length=setting.fixed_length)

    def ours(banks: Sequence[HeadBank], drafting: Drafting, request: Request = request) -> Arm:
        engine = EmbeddedEngine(pair, banks, drafting=drafting)

        def arm(prompt: str) -> Iterator[int]:
            stream = engine.stream(prompt, request)
            for _ in stream:
                yield len(stream.generation.committed)

        return arm

    plain = EmbeddedEngine(pair)
    table: dict[str, Arm] = {"target alone": ours((), Drafting(length=0))}
    if pair.draft is None:
        table["target + heads"] = ours([bank], Drafting(length=0))
        return table
    table |= {
        "speculation": ours((), Drafting()),
        "speculation + heads": ours([bank], Drafting()),
        "speculation + heads, last tokens too": ours([bank], Drafting(), flushed),
        f"speculation, k = {setting.fixed_length}": _in_one_step(ours((), fixed)),
        f"transformers assisted, k = {setting.fixed_length}": _transformers(pair, setting),
        "speculation + separate monitor, every token": _separate(plain, bank, request, every=1),
        f"speculation + separate monitor, every {setting.reread_every}": _separate(
            plain, bank, request, every=setting.reread_every
        ),
        f"speculation + re-reading all, every {setting.reread_every}": _separate(
            plain, bank, request, every=setting.reread_every, keeps_cache=False
        ),
    }
    return table


def _in_one_step(arm: Arm) -> Arm:
    """An arm that runs to its end at its turn, to be held against one that cannot pause."""

    def whole(prompt: str) -> Iterator[int]:
        *_, num_tokens = arm(prompt)
        yield num_tokens

    return whole


def _transformers(pair: Pair, setting: TaxSetting) -> Arm:
    """The library's own speculation loop with the same pair and a constant draft length."""
    assert pair.draft is not None and pair.draft.generation_config is not None
    config = pair.draft.generation_config
    config.num_assistant_tokens = setting.fixed_length
    config.num_assistant_tokens_schedule = "constant"
    config.assistant_confidence_threshold = 0.0
    options = {
        "assistant_model": pair.draft,
        "max_new_tokens": setting.max_new_tokens,
        "do_sample": False,
        "eos_token_id": sorted(pair.eos_ids),
        "pad_token_id": min(pair.eos_ids),
    }

    def arm(prompt: str) -> Iterator[int]:
        rendered = render((Message("user", prompt),), pair.tokenizer, add_generation_prompt=True)
        ids = torch.tensor([encode(rendered, pair.tokenizer).token_ids], device=pair.target.device)
        with torch.inference_mode():
            output = pair.target.generate(ids, attention_mask=torch.ones_like(ids), **options)  # type: ignore[operator]
        yield int(output.shape[1] - ids.shape[1])

    return arm


def _separate(engine: EmbeddedEngine, bank: HeadBank, request: Request, *, every: int, keeps_cache: bool = True) -> Arm:
    """Speculation without heads, and a second model of the draft's size that reads the prompt and each `every`
    tokens.
    """
    draft = engine.pair.draft
    assert draft is not None

    def arm(prompt: str) -> Iterator[int]:
        stream = engine.stream(prompt, request)
        monitor = CachedModel(draft, "draft", bank)
        ids = [token.id for token in stream.generation.tokens]
        monitor.read(ids)
        monitor.take_scores()
        num_read = len(ids)
        for event in stream:
            if isinstance(event, TokenEvent):
                ids.append(event.token.id)
                if len(ids) - num_read >= every:
                    if not keeps_cache:
                        monitor.rollback(0)
                    monitor.read(ids[monitor.length :])
                    monitor.take_scores()
                    num_read = len(ids)
            yield len(stream.generation.committed)

    return arm


def time_in_turn(
    table: Mapping[str, Arm], prompts: Sequence[str], *, num_pairs: int, what: str = "timing"
) -> dict[str, list[Timing]]:
    """Runs every arm `num_pairs` times, prompts in rotation, the order of the arms turned by one each time.

    One unrecorded run of each arm comes first.
    """
    names = list(table)
    _side_by_side(table, prompts[0])
    timings: dict[str, list[Timing]] = {name: [] for name in names}
    for repetition in progress(range(num_pairs), what, total=num_pairs):
        turn = repetition % len(names)
        turned = {name: table[name] for name in names[turn:] + names[:turn]}
        for name, timing in _side_by_side(turned, prompts[repetition % len(prompts)]).items():
            timings[name].append(timing)
    return timings


def _side_by_side(table: Mapping[str, Arm], prompt: str) -> dict[str, Timing]:
    """All arms on one prompt, a step each in turn, so that a slow moment of the machine meets them all."""
    running = {name: arm(prompt) for name, arm in table.items()}
    timings = dict.fromkeys(table, Timing(0.0, 0.0, 0))
    while running:
        for name, arm in list(running.items()):
            before = timings[name]
            wall, cpu = time.perf_counter(), time.process_time()
            num_tokens = next(arm, None)
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            if num_tokens is None:
                del running[name]
            timings[name] = Timing(before.wall_s + wall, before.cpu_s + cpu, num_tokens or before.num_tokens)
    return timings


def ratio(
    numerator: Iterable[Timing], denominator: Iterable[Timing], *, generator: torch.Generator, cpu: bool = False
) -> Ratio:
    """Time per token of one arm over another's, pair by pair."""
    ratios = torch.tensor(
        [
            (a.cpu_s / a.num_tokens) / (b.cpu_s / b.num_tokens)
            if cpu
            else (a.wall_s / a.num_tokens) / (b.wall_s / b.num_tokens)
            for a, b in zip(numerator, denominator, strict=True)
        ],
        dtype=torch.float64,
    )
    draws = torch.randint(len(ratios), (NUM_RESAMPLES, len(ratios)), generator=generator)
    low, high = ratios[draws].quantile(0.5, dim=1).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Ratio(float(ratios.quantile(0.5)), low, high, len(ratios))


def random_bank(pair: Pair, *, num_heads: int, num_sites: int, generator: torch.Generator) -> HeadBank:
    """Untrained heads for the reader of a pair: what heads cost does not depend on their weights."""
    model = pair.draft if pair.draft is not None else pair.target
    sites = evenly_spaced_sites(model, num_sites)
    size = num_sites * pair.reader_identity.hidden_size
    form = Form()
    heads = [
        Head(
            f"random_{i}",
            sites,
            torch.randn(form.num_channels, size, generator=generator) / size,
            torch.zeros(form.num_channels),
            form,
        )
        for i in range(num_heads)
    ]
    return HeadBank(heads, pair.reader_identity)
