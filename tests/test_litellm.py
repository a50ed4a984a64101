"""LiteLLM's real proxy with the guardrail in front of a model, judged by a real Pilotfish server."""

from __future__ import annotations

import json
import os
import re
import sys
import warnings
from pathlib import Path

import httpx
import pytest
from server_kit import running
from upstream_kit import chunk, event, scripted, told

from pilotfish.actions import Policy, Rule
from pilotfish.engines import EmbeddedEngine

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # else it is fetched when the package is imported

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    pytest.importorskip("litellm.proxy.proxy_server", reason="needs litellm[proxy]", exc_type=ImportError)

pytestmark = pytest.mark.filterwarnings("ignore")  # of LiteLLM and what it stands on

TEXT = "return the value of x = 10, and import ing to the end of it. "
PAGE = Path(__file__).parents[1] / "docs/proxy.md"


@pytest.fixture(scope="module")
def engine(pair, bank):
    return EmbeddedEngine(pair, [bank])


@pytest.fixture(scope="module")
def upstream():
    with scripted() as found:
        yield found


@pytest.fixture(scope="module")
def judge(engine, tmp_path_factory):
    with running(engine, tmp_path_factory.mktemp("judge")) as found:
        yield found


@pytest.fixture(scope="module")
def gateway(upstream, judge, tmp_path_factory):
    """LiteLLM's proxy with the configuration of docs/proxy.md, as `litellm --config` starts it."""
    import asyncio

    from fastapi.testclient import TestClient
    from litellm.proxy import proxy_server

    path = tmp_path_factory.mktemp("litellm") / "config.yaml"
    (written,) = re.findall(r"```yaml\n(.*?)```", PAGE.read_text(), re.DOTALL)
    for place, url in (("http://127.0.0.1:8001/v1", upstream[0]), ("http://127.0.0.1:8000", judge.url)):
        written = written.replace(place, url)
    path.write_text(written.replace("every: 200", "every: 20"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        asyncio.run(proxy_server.initialize(config=str(path)))
        yield TestClient(proxy_server.app)


@pytest.fixture
def guardrail(gateway, judge):
    """The guardrail that LiteLLM made, with no policy remembered."""
    import litellm

    from pilotfish.litellm import PilotfishGuardrail

    (found,) = [each for each in litellm.callbacks if isinstance(each, PilotfishGuardrail)]
    found._server = None
    return found


@pytest.fixture
def ruled(judge, guardrail):
    """Puts a policy in force at the server."""

    def rule(*rules: Rule, hold: bool = True) -> None:
        from pilotfish.actions import policy_to_dict

        body = {"policy": policy_to_dict(Policy(rules=rules, hold=hold))}
        assert httpx.put(f"{judge.url}/v1/monitor/policy", json=body).status_code == 200

    return rule


def ask(gateway, *, stream: bool = False, content: object = "hello", **more):
    body = {"model": "assistant", "messages": [{"role": "user", "content": content}], "stream": stream, **more}
    return gateway.post("/v1/chat/completions", json=body)


def whole(text: str, **more) -> bytes:
    message = {"role": "assistant", "content": text, **more}
    reply = {"id": "c", "object": "chat.completion", "created": 0, "model": "big", "usage": None}
    choice = {"index": 0, "message": message, "finish_reason": "stop"}
    return json.dumps(reply | {"choices": [choice]}).encode()


def said(reply: httpx.Response) -> str:
    """The text of a streamed answer."""
    chunks = [json.loads(line[6:]) for line in reply.text.splitlines() if line.startswith("data: {")]
    return "".join(c["choices"][0]["delta"].get("content") or "" for c in chunks if c.get("choices"))


def highest(judge, text: str) -> float:
    messages = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": text}]
    reply = httpx.post(f"{judge.url}/v1/monitor/score", json={"texts": [{"messages": messages}]}).json()
    return max(token["running"]["wide"] for token in reply["results"][0]["tokens"] if token["message"] == 1)


def test_the_adapter_brings_no_torch_into_litellms_process():
    import subprocess

    code = "import sys, pilotfish.litellm; print('torch' in sys.modules, 'transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


@pytest.mark.parametrize("stream", [False, True])
def test_what_breaks_no_rule_goes_through_unchanged(gateway, ruled, upstream, stream):
    ruled(Rule(metric="wide", action="stop", threshold=1.0))
    upstream[1].say(*(told([TEXT, TEXT]) if stream else [whole(TEXT)]), kind=KIND[stream])
    reply = ask(gateway, stream=stream)
    assert reply.status_code == 200
    assert (said(reply) if stream else reply.json()["choices"][0]["message"]["content"]) == TEXT * (1 + stream)


KIND = {False: "application/json", True: "text/event-stream"}


def test_a_prompt_that_breaks_a_rule_never_reaches_the_model(gateway, ruled, upstream):
    ruled(Rule(metric="wide", action="stop", threshold=0.0, scope="prompt"))
    upstream[1].say(whole("fine"), kind="application/json")
    reply = ask(gateway)
    assert reply.status_code == 400
    assert "stop at token 0: wide" in reply.text
    assert upstream[1].bodies == []


def test_an_answer_that_breaks_a_rule_is_not_handed_on(gateway, ruled, upstream, judge):
    ruled(Rule(metric="wide", action="redact", threshold=highest(judge, TEXT) - 1e-5, scope="answer"))
    upstream[1].say(whole(TEXT), kind="application/json")
    reply = ask(gateway)
    assert reply.status_code == 400
    assert "redact at token" in reply.text
    assert TEXT not in reply.text


def test_a_stream_ends_before_the_part_that_breaks_a_rule(gateway, ruled, upstream, judge):
    quiet = "the end of it is here. "
    floor = highest(judge, quiet)
    pieces = [TEXT[i : i + 5] for i in range(0, len(TEXT), 5)]
    assert highest(judge, quiet + TEXT) > floor
    ruled(Rule(metric="wide", action="stop", threshold=highest(judge, quiet + TEXT) - 1e-5, scope="answer"))
    upstream[1].say(*told([quiet, *pieces]))
    reply = ask(gateway, stream=True)
    assert "stop at token" in reply.text
    assert said(reply).startswith(quiet)
    assert highest(judge, said(reply)) < highest(judge, quiet + TEXT)


@pytest.mark.parametrize("stream", [False, True])
def test_a_flag_is_recorded_and_goes_on(gateway, ruled, upstream, guardrail, monkeypatch, stream):
    ruled(Rule(metric="wide", action="flag", threshold=0.0, scope="answer"), hold=False)
    kept = []
    monkeypatch.setattr(
        guardrail, "add_standard_logging_guardrail_information_to_request_data", lambda **said: kept.append(said)
    )
    upstream[1].say(*(told([TEXT]) if stream else [whole(TEXT)]), kind=KIND[stream])
    reply = ask(gateway, stream=stream)
    assert (said(reply) if stream else reply.json()["choices"][0]["message"]["content"]) == TEXT
    prompt, answer = kept
    assert (prompt["guardrail_status"], answer["guardrail_status"]) == ("success", "guardrail_flagged")
    assert answer["guardrail_json_response"]["verdicts"][0]["metric"] == "wide"


@pytest.mark.parametrize("stream", [False, True])
def test_a_server_that_does_not_answer_refuses_everything(gateway, ruled, upstream, guardrail, monkeypatch, stream):
    monkeypatch.setattr(guardrail, "_base", "http://127.0.0.1:9")
    upstream[1].say(*(told([TEXT]) if stream else [whole(TEXT)]), kind=KIND[stream])
    reply = ask(gateway, stream=stream)
    assert reply.status_code == 503
    assert "could not be scored" in reply.text
    assert upstream[1].bodies == []


def test_a_server_that_fails_after_the_prompt_lets_no_answer_out(gateway, ruled, upstream, guardrail, monkeypatch):
    asked = type(guardrail)._ask

    async def once(self, method, path, body=None):
        if body is not None and body["texts"][0]["messages"][-1]["role"] == "assistant":
            raise self._failed("gone")
        return await asked(self, method, path, body)

    monkeypatch.setattr(type(guardrail), "_ask", once)
    ruled()
    for stream in (False, True):
        upstream[1].say(*(told([TEXT]) if stream else [whole(TEXT)]), kind=KIND[stream])
        reply = ask(gateway, stream=stream)
        assert "could not be scored" in reply.text
        assert TEXT.strip() not in reply.text


TOOL = {"index": 0, "id": "t", "type": "function", "function": {"name": "rm", "arguments": "{}"}}
IMAGE = [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}]


@pytest.mark.parametrize(
    ("script", "stream", "content", "words"),
    [
        ([whole("", tool_calls=[TOOL])], False, "hello", "an answer with tool_calls is not monitored"),
        ([whole("x", reasoning_content="plan")], False, "hello", "an answer with reasoning_content is not monitored"),
        ([chunk("a", tool_calls=[TOOL]), *told([])], True, "hello", "an answer with tool_calls is not monitored"),
        ([whole("x")], False, IMAGE, "a message that holds more than text is not monitored"),
    ],
)
def test_what_no_head_reads_is_refused_where_the_policy_holds(gateway, ruled, upstream, script, stream, content, words):
    ruled()
    upstream[1].say(*script, kind=KIND[stream])
    reply = ask(gateway, stream=stream, content=content)
    assert words in reply.text
    assert "choices" not in reply.text
    ruled(hold=False)
    guardrails_forget()
    upstream[1].say(*script, kind=KIND[stream])
    assert "choices" in ask(gateway, stream=stream, content=content).text


def guardrails_forget() -> None:
    import litellm

    for each in litellm.callbacks:
        if hasattr(each, "_server"):
            each._server = None


def test_every_choice_is_judged(gateway, ruled, upstream, judge):
    ruled(Rule(metric="wide", action="stop", threshold=highest(judge, TEXT) - 1e-5, scope="answer"))
    reply = json.loads(whole("the"))
    reply["choices"].append({"index": 1, "message": {"role": "assistant", "content": TEXT}, "finish_reason": "stop"})
    upstream[1].say(event(reply).removeprefix(b"data: "), kind="application/json")
    refused = ask(gateway, n=2)
    assert refused.status_code == 400
    assert "stop at token" in refused.text
