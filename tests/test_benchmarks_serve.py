"""The soak's judgement: it shows growth, lost and doubled alerts, and streams that were mixed up."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def _beside_the_benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))


def samples(mb_per_hour: float):
    """Half an hour, a sample in 3 s, with noise of 1 MB and a steep start."""
    from serve_soak import Sample

    draw = random.Random(0)
    for number in range(600):
        at_s = 3.0 * number
        start = min(at_s, 300.0) / 10
        yield Sample(at_s, 500.0 + start + mb_per_hour * at_s / 3600 + draw.gauss(0.0, 1.0), 20, 7, number)


@pytest.mark.parametrize("mb_per_hour", [0.0, 30.0])
def test_growth_is_told_from_noise_and_from_warming_up(mb_per_hour):
    from serve_soak import slope

    found = slope(list(samples(mb_per_hour)), "rss_mb")
    assert found.low <= mb_per_hour <= found.high
    assert found.high - found.low < 10
    assert (found.low > 0) == (mb_per_hour > 0)


def test_each_fault_misses_its_target():
    from serve_soak import Seen, judged

    def met(seen: Seen, arrived: dict[str, Counter[str]], stored: Counter[str]) -> list[bool]:
        found = list(samples(0.0))
        return [target["met"] for target in judged(found, found[-1], seen, arrived, stored)["targets"]]

    seen, arrived = Seen(flagged={"a", "b"}), {"a": Counter({"alert": 2}), "b": Counter({"alert": 1})}
    assert met(seen, arrived, Counter("ab")) == [True, True, True, True]
    assert met(seen, {"a": arrived["a"]}, Counter("ab")) == [False, True, True, True]
    assert met(seen, arrived, Counter("aab")) == [False, True, True, True]
    assert met(Seen(crossed=["another's"]), arrived, Counter("ab")) == [True, False, True, True]
    assert met(Seen(statuses=Counter({500: 1})), arrived, Counter("ab")) == [True, True, False, True]
    assert met(Seen(failures=["a stream broke"]), arrived, Counter("ab")) == [True, True, False, True]
