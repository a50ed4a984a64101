"""Inspect evaluates a tiny monitored pair through its own machinery: the real package, or the tests are skipped."""

from __future__ import annotations

import asyncio
import math
import warnings

import pytest

from pilotfish.actions import Policy, Rule
from pilotfish.engines import EmbeddedEngine, Request
from pilotfish.errors import SettingError

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # its dependencies' own
    pytest.importorskip("inspect_ai", reason="the extra `inspect` is not installed")
    from inspect_ai import Task
    from inspect_ai import eval as evaluate
    from inspect_ai.dataset import Sample
    from inspect_ai.model import ChatMessageAssistant, ChatMessageUser, GenerateConfig, ModelName, get_model
    from inspect_ai.scorer import Target
    from inspect_ai.solver import TaskState, generate, use_tools
    from inspect_ai.tool import Tool, tool

    from pilotfish.engines.inspect import monitor

pytestmark = pytest.mark.filterwarnings("ignore")
PROMPTS = ("def add(a, b):", "def sub(a, b):")


def run(tmp_path, engine, *, scorer=None, model=None, solver=None, **options):
    task = Task(
        dataset=[Sample(prompt) for prompt in PROMPTS], solver=solver or generate(), scorer=scorer or monitor("wide")
    )
    model = model or get_model("pilotfish/tiny", memoize=False, engine=engine, **options)
    (log,) = evaluate(task, model=model, log_dir=str(tmp_path), display="none", max_tokens=12)
    return log


def test_an_eval_runs_and_its_scores_are_those_of_the_engine(tmp_path, pair, bank):
    engine = EmbeddedEngine(pair, [bank])
    log = run(tmp_path, engine)
    assert log.status == "success", log.error
    for sample, prompt in zip(log.samples, PROMPTS, strict=True):
        own = engine.generate(prompt, Request(max_new_tokens=12))
        running = [token.scores["wide"].running for token in own.committed]
        score = sample.scores["monitor"]
        assert sample.output.completion == own.answer
        assert score.value == pytest.approx(max(running))
        assert score.metadata["flagged"] == (max(running) >= 0.5)
        assert sample.output.stop_reason == "max_tokens"
        assert sample.output.usage.output_tokens == 12
    figures = log.results.scores[0].metrics
    assert figures["mean"].value == pytest.approx(sum(sample.scores["monitor"].value for sample in log.samples) / 2)
    assert figures["flagged"].value == sum(sample.scores["monitor"].metadata["flagged"] for sample in log.samples) / 2


def test_a_stop_is_a_content_filter_with_its_reason(tmp_path, pair, bank):
    policy = Policy(rules=(Rule(metric="wide", action="stop", threshold=0.0, scope="answer"),))
    log = run(tmp_path, EmbeddedEngine(pair, [bank]), policy=policy)
    for sample in log.samples:
        assert sample.output.stop_reason == "content_filter"
        assert sample.output.choices[0].stop_details.category == "wide"
        assert "reached the threshold 0.000" in sample.output.choices[0].stop_details.explanation
        assert sample.output.completion == ""


def test_a_head_that_scores_nothing_is_flagged(tmp_path, pair, bank, monkeypatch):
    monkeypatch.setattr(type(bank), "score", lambda *_, **__: 1 / 0)
    log = run(tmp_path, EmbeddedEngine(pair, [bank]))
    for sample in log.samples:
        assert sample.scores["monitor"].metadata["flagged"] is True
        assert "no token is scored" in sample.scores["monitor"].explanation


def test_answers_of_another_model_are_unscored_not_0():
    messages = [ChatMessageUser(content="hi"), ChatMessageAssistant(content="hello")]
    state = TaskState(model=ModelName("other/model"), sample_id=1, epoch=1, input="hi", messages=messages)
    score = asyncio.run(monitor("wide")(state, Target("")))
    assert math.isnan(score.value)
    assert "carries a monitor's scores" in score.reason


def test_a_threshold_of_ones_own_counts(tmp_path, pair, bank):
    log = run(tmp_path, EmbeddedEngine(pair, [bank]), scorer=monitor("wide", threshold=0.0))
    assert all(sample.scores["monitor"].metadata["flagged"] for sample in log.samples)


def test_what_the_engine_cannot_do_is_refused(tmp_path, pair, bank):
    @tool
    def clock() -> Tool:
        async def execute() -> str:
            """Tells the time."""
            return "noon"

        return execute

    engine = EmbeddedEngine(pair, [bank])
    log = run(tmp_path, engine, solver=[use_tools(clock()), generate()])
    assert "calls no tools" in log.error.message
    log = run(tmp_path, engine, scorer=monitor("narow"))
    assert "asks for metric 'narow'; the monitor has narrow, wide" in log.error.message
    with pytest.raises(SettingError, match="'bank' is unknown; use banks"):
        get_model("pilotfish/tiny", memoize=False, bank="x")
    log = run(tmp_path, engine, solver=generate(frequency_penalty=1.0))
    assert "does not take frequency_penalty" in log.error.message


def test_the_settings_of_inspect_reach_the_engine(tmp_path, pair, bank):
    engine = EmbeddedEngine(pair, [bank])
    hot, other = (
        get_model(
            "pilotfish/tiny",
            memoize=False,
            engine=engine,
            config=GenerateConfig(temperature=1.5, seed=seed, max_tokens=12),
        )
        for seed in (3, 4)
    )
    answers = [run(tmp_path, engine, model=each).samples[0].output for each in (hot, hot, other)]
    assert answers[0].completion == answers[1].completion != answers[2].completion
