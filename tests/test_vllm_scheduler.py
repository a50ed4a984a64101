"""Judging laid over a stand-in for vLLM's scheduler: what is cut, when, and what the front end is told."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from pilotfish.actions import Policy, Rule, policy_to_dict
from pilotfish.vllm.plan import KEY as PLAN
from pilotfish.vllm.plan import Plan
from pilotfish.vllm.scheduler import NO_SCORES, judged
from pilotfish.vllm.wire import KEY, News, StepScores, no_scores

PROMPT = [10, 11, 12]


class Scheduler:
    """Keeps a request's tokens and ends it after seven, or at token 99, as vLLM's does."""

    def __init__(self, config: Any) -> None:
        self.vllm_config = config
        self.requests: dict[str, Any] = {}
        self.seen: list[list[int]] = []

    def add(self, name: str) -> Any:
        request = SimpleNamespace(
            request_id=name, all_token_ids=list(PROMPT), num_prompt_tokens=3, status="running", stop_reason=None
        )
        request.is_finished = lambda: request.status != "running"
        self.requests[name] = request
        return Request(request)

    def update_from_output(self, step: Any, output: Any) -> dict[int, Any]:
        told = []
        for name in step.num_scheduled_tokens:
            request = self.requests.get(name)
            new = output.sampled_token_ids[output.req_id_to_index[name]]
            if request is None or not new:
                continue
            new, stopped = self._update_request_with_output(request, new, is_stale=False)
            told.append(SimpleNamespace(request_id=name, new_token_ids=new, kv_transfer_params=None))
            if stopped:
                del self.requests[name]
        return {0: SimpleNamespace(outputs=told)}

    def _update_request_with_output(self, request: Any, new: list[int], is_stale: bool = False) -> Any:
        self.seen.append(list(new))
        for count, token in enumerate(new, 1):
            request.all_token_ids.append(token)
            request.num_tokens += 1
            if token == 99 or request.num_tokens == 10:
                del new[count:]
                request.status = "ended"
                return new, True
        return new, False


def Request(given: Any) -> Any:  # noqa: N802  # it stands for vLLM's class
    given.num_tokens = len(given.all_token_ids)
    return given


@pytest.fixture
def scheduler(pair, bank, tmp_path, monkeypatch):
    """Judges by two rules: it stops at a score of 0.8 in an answer, and flags at 0.7."""
    module = ModuleType("vllm.v1.request")
    module.RequestStatus = SimpleNamespace(FINISHED_STOPPED="stopped")
    for name in ("vllm", "vllm.v1"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, "vllm.v1.request", module)
    rules = (
        Rule(metric="narrow", action="stop", threshold=0.8, scope="answer"),
        Rule(metric="wide", action="flag", threshold=0.7),
    )
    plan = Plan(
        banks=(str(bank.save(tmp_path / "bank")),),
        policy=policy_to_dict(Policy(rules=rules)),
        reader="draft",
        shift=0,
    )
    return judged(Scheduler)(SimpleNamespace(additional_config={PLAN: plan.as_dict()}))


def step(scheduler: Any, tokens: dict[str, list[int]], scores: Any) -> dict[str, tuple[list[int], News]]:
    """Runs one step; returns each request's tokens that leave, with what is told of them."""
    names = list(tokens)
    output = SimpleNamespace(
        req_ids=names,
        req_id_to_index={name: index for index, name in enumerate(names)},
        sampled_token_ids=[list(new) for new in tokens.values()],
    )
    if scores is not None:
        setattr(output, KEY, scores)
    groups = scheduler.update_from_output(SimpleNamespace(num_scheduled_tokens=dict.fromkeys(names, 1)), output)
    return {
        told.request_id: (told.new_token_ids, News.unpacked(told.kv_transfer_params[KEY])) for told in groups[0].outputs
    }


def table(*rows: tuple[int, int, int, float]) -> StepScores:
    """Rows of request, position, token and one score for both metrics."""
    return StepScores(np.array([[*row[:3], *[row[3]] * 4] for row in rows], dtype=np.float32))


READ = tuple((0, place, token, 0.1) for place, token in enumerate([*PROMPT, 20]))


def test_tokens_are_cut_before_vllm_takes_note_of_them(scheduler):
    request = scheduler.add("a")
    step(scheduler, {"a": [20]}, table(*READ))
    ((left, news),) = step(
        scheduler, {"a": [21, 22, 23]}, table((0, 4, 21, 0.1), (0, 5, 22, 0.9), (0, 6, 23, 0.1))
    ).values()
    assert left == [21] and scheduler.seen[-1] == [21] and request.all_token_ids == [*PROMPT, 20, 21]
    assert news.stops and news.withheld == [22] and len(news.scores) == 2
    assert request.status == "stopped" and request.stop_reason == "monitor:narrow" and not request.resumable


def test_an_end_that_vllm_finds_first_is_vllm_s(scheduler):
    request = scheduler.add("a")
    step(scheduler, {"a": [20]}, table(*READ))
    ((left, news),) = step(scheduler, {"a": [99, 22]}, table((0, 4, 99, 0.1), (0, 5, 22, 0.9))).values()
    assert left == [99] and request.status == "ended" and not news.stops and len(news.scores) == 1


def test_a_prompt_in_chunks_is_told_of_with_the_first_token(scheduler):
    scheduler.add("a")
    assert step(scheduler, {"a": []}, table(*READ[:2])) == {}
    ((_, news),) = step(scheduler, {"a": [20]}, table(*READ[1:])).values()
    assert news.start == 0 and len(news.scores) == 4 and not news.misses


def test_requests_do_not_mix(scheduler):
    for name in ("a", "b"):
        scheduler.add(name)
    rows = [(owner, *row[1:3], 0.2 + 0.55 * owner) for owner in (0, 1) for row in READ]
    told = step(scheduler, {"a": [20], "b": [20]}, table(*rows))
    assert not told["a"][1].verdicts and {verdict.action for verdict in told["b"][1].verdicts} == {"flag"}


@pytest.mark.parametrize(
    ("scores", "words"), [(None, NO_SCORES), (no_scores(2, "head failed: X"), "head failed"), (no_scores(2), "read")]
)
def test_a_step_without_scores_lets_nothing_out_under_a_gate(scheduler, scores, words):
    scheduler.add("a")
    step(scheduler, {"a": [20]}, table(*READ))
    ((left, news),) = step(scheduler, {"a": [21, 22]}, scores).values()
    assert left == [] and news.withheld == [21] and words in news.misses[0].reason


def test_a_request_that_was_aborted_meanwhile_is_left_alone(scheduler):
    scheduler.add("a")
    del scheduler.requests["a"]
    assert step(scheduler, {"a": [20]}, table(*READ)) == {}
