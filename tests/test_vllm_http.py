"""The middleware and the records behind it, with a stand-in for vLLM's application."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import numpy as np
import pytest

from pilotfish.actions import Policy, Rule, Verdict
from pilotfish.errors import SettingError
from pilotfish.models import tiny_tokenizer
from pilotfish.server import EngineInfo, HeadInfo
from pilotfish.server.schemas import MonitorOut
from pilotfish.vllm import read_settings
from pilotfish.vllm.asked import current
from pilotfish.vllm.http import MonitorMiddleware
from pilotfish.vllm.record import GONE, About, Record
from pilotfish.vllm.wire import Miss, News

TOKENIZER = tiny_tokenizer()
HEAD = HeadInfo(metric="m", reader="draft", threshold=0.5, card={})
ABOUT = About(
    metrics=("m",),
    reader="draft",
    tokenizer=TOKENIZER,
    policy=Policy(rules=(Rule(metric="m", action="stop"),)),
    info=EngineInfo(model="target", draft="draft", max_tokens=99, heads=(HEAD,)),
)
PROMPT, ANSWER = TOKENIZER.encode("def f"), TOKENIZER.encode("(x): return x")


def news(start: int, size: int, **more: Any) -> News:
    values = np.linspace(0.1, 0.2, size, dtype=np.float32)
    return News(start, np.stack([values, values + 0.5], axis=1), **more)


def record(*, stop: tuple[str, ...] = ()) -> Record:
    """The prompt and the first three tokens of the answer have been told of."""
    made = Record(ABOUT, "def f", PROMPT, stop)
    made.add(news(0, len(PROMPT) + 3, num_drafted=2), ANSWER[:3])
    return made


def test_a_record_is_the_generation_that_our_own_engine_would_have_made():
    made = record()
    made.add(news(len(PROMPT) + 3, len(ANSWER) - 3, num_drafted=0), ANSWER[3:])
    made.finish("length")
    generation = made.generation
    assert generation.answer == "(x): return x" and generation.prompt == "def f"
    assert [token.origin for token in generation.committed][:4] == ["draft", "draft", "target", "target"]
    assert generation.tokens[0].scores["m"].running == pytest.approx(0.6)
    assert not generation.misses() and made.counts == {"": len(generation.tokens)}


def test_nothing_is_said_of_tokens_that_have_not_been_sent():
    made = record()
    made.add(news(len(PROMPT) + 3, 2), ANSWER[3:5])
    assert len(made.generation.committed) == 5, "the store is told all of it"
    for limit, expected in ((4, ANSWER[:3]), (5, ANSWER[3:5]), (5, [])):
        assert [event.token.id for event in made.advance(limit) if hasattr(event, "scores")] == expected


def test_tokens_beyond_what_the_front_end_kept_are_dropped_with_their_verdicts():
    made = Record(ABOUT, "def f", PROMPT)
    late = Verdict(len(PROMPT) + 2, "m", "flag", 0.9, 0.5, "m")
    made.add(news(0, len(PROMPT) + 3, verdicts=[late]), ANSWER[:2])
    made.finish("stop_string")
    assert len(made.generation.committed) == 2 and made.generation.verdicts == [] and not made.first_flags


def test_misses_are_counted_by_reason_and_shown():
    made = Record(ABOUT, None, PROMPT)
    said = news(0, len(PROMPT) + 1, misses=[Miss(1, 2, "hole")])
    said.scores[1] = np.nan
    made.add(said, ANSWER[:1])
    made.finish(None)
    assert made.counts == {"": len(PROMPT), "hole": 1} and made.generation.misses() == {"hole": 1}
    assert made.generation.prompt == "def f" and made.highest == pytest.approx([0.7])


def test_what_was_never_told_of_is_unscored_for_a_reason():
    made = Record(ABOUT, "def f", PROMPT)
    made.add(news(0, len(PROMPT)), ANSWER[:2])
    made.finish(None)
    assert made.generation.misses() == {GONE: 2}


class Vllm:
    """Answers with one recorded choice, in the way that the request asks for."""

    def __init__(self) -> None:
        self.body: dict[str, Any] = {}

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.body = json.loads((await receive())["body"])
        asked = current.get()
        made = record()
        if self.body.get("stopped"):
            stop = Verdict(len(PROMPT) + 3, "m", "stop", 0.9, 0.5, "m 0.900 reached")
            made.add(news(len(PROMPT) + 3, 1, verdicts=[stop], withheld=[ANSWER[3]]), [])
        told = asked.told(0, made, "chatcmpl-1")
        told.hear(made.advance())
        made.finish("length")
        kind = b"text/event-stream" if self.body.get("stream") else b"application/json"
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", kind)]})
        if self.body.get("stream"):
            await self._stream(send)
        else:
            choice = {"index": 0, "message": {"content": "(x"}, "finish_reason": "stop"}
            await send({"type": "http.response.body", "body": json.dumps({"choices": [choice]}).encode()})

    async def _stream(self, send: Any) -> None:
        for text, finish in (("(x", None), ("", "stop")):
            chunk = {"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": finish}]}
            data = f"data: {json.dumps(chunk)}\n\n".encode()
            for part in (data[:9], data[9:]):  # cut where a proxy might cut
                await send({"type": "http.response.body", "body": part, "more_body": True})
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n", "more_body": False})


def ask(body: dict[str, Any], path: str = "/v1/chat/completions") -> tuple[Vllm, int, bytes, int]:
    """The stand-in, and what came back: status, body, the length that its header claims (-1: none)."""
    app, sent = Vllm(), []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": path, "headers": []}
    asyncio.run(MonitorMiddleware(app)(scope, receive, send))
    content = b"".join(message.get("body", b"") for message in sent[1:])
    return app, sent[0]["status"], content, int(dict(sent[0]["headers"]).get(b"content-length", b"-1"))


def test_the_monitor_object_is_taken_out_of_the_request_and_put_into_the_answer():
    app, _, content, length = ask({"model": "target", "monitor": {"prompt": True}})
    assert app.body == {"model": "target"} and length == len(content)
    monitor = MonitorOut.model_validate(json.loads(content)["choices"][0]["monitor"])
    assert monitor.exchange == "chatcmpl-1" and len(monitor.tokens) == len(PROMPT) + 3


def test_a_client_that_does_not_ask_gets_the_very_answer():
    _, _, content, _ = ask({"model": "target"})
    assert json.loads(content) == {"choices": [{"index": 0, "message": {"content": "(x"}, "finish_reason": "stop"}]}


def test_chunks_are_put_together_before_they_are_read():
    _, _, content, _ = ask({"stream": True, "monitor": {}})
    events = [json.loads(line[6:]) for line in content.decode().splitlines() if line.startswith("data: {")]
    first, last = (event["choices"][0]["monitor"] for event in events)
    assert "".join(token["text"] for token in first["tokens"]) == TOKENIZER.decode(ANSWER[:3])
    assert "stats" not in first and last["stats"]["committed"] == len(PROMPT) + 3
    assert content.endswith(b"data: [DONE]\n\n")


@pytest.mark.parametrize("body", [{"stopped": True}, {"stopped": True, "stream": True}])
def test_every_client_is_told_that_its_answer_was_stopped(body):
    _, _, content, _ = ask(body)
    text = content.decode()
    assert '"finish_reason":"content_filter"' in text and "m 0.900 reached" in text


def test_what_is_asked_wrongly_is_refused_before_vllm_sees_it():
    app, status, content, _ = ask({"monitor": {"token": 1}})
    assert status == 400 and "monitor.token" in json.loads(content)["error"]["message"] and app.body == {}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("bank = 1", "unknown key 'bank'"),
        ("banks = 1", "a list of folders"),
        ('reader = "both"', "use one of auto, draft, target"),
        ('webhook = "http://x"', "set store"),
        ("banks = [", "neither TOML nor JSON"),
    ],
)
def test_settings_that_make_no_sense_are_refused(tmp_path, text, words):
    (tmp_path / "s.toml").write_text(text)
    with pytest.raises(SettingError, match=words):
        read_settings(tmp_path / "s.toml")


def test_paths_in_settings_are_relative_to_their_file(tmp_path):
    (tmp_path / "s.toml").write_text('banks = ["a"]\npolicy = "p.toml"\nstore = "sqlite:///x.db"\n')
    settings = read_settings(tmp_path / "s.toml")
    assert settings.banks == (str(tmp_path / "a"),) and settings.policy == str(tmp_path / "p.toml")
    assert settings.store == "sqlite:///x.db"


def test_the_entry_point_imports_nothing_heavy():
    import subprocess
    import sys

    code = "import sys, pilotfish.vllm.plugin as p; p.register(); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env={})
    assert done.stdout.strip() == "False"
