"""The proxy in front of other servers, as OpenAI's own client meets it."""

from __future__ import annotations

import asyncio
import logging
import random
import re
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest
from conftest import seeded_bank
from hypothesis import given, settings
from hypothesis import strategies as st
from server_kit import FAST, running, serving, until
from upstream_kit import DONE, Hang, chunk, event, scripted, told

from pilotfish.actions import Policy, Rule
from pilotfish.cli import main
from pilotfish.engines import EmbeddedEngine
from pilotfish.errors import EngineFailed, SettingError
from pilotfish.models import LoadedModel, tiny_tokenizer
from pilotfish.server import ProxyBackend, ServerSettings, Store, Upstream, proxy_text
from pilotfish.server.proxy_text import GrowingText

KEY = "sk-secret-of-the-upstream"
HOLD = Policy(rules=(Rule(metric="wide", action="flag", threshold=1.0, scope="answer"),), hold=True)
"""As the default policy does: flag, and hold every token until it is scored."""
TEXT = "return the value of x = 10, naïve 💡 and 这是一个句子。\n\n    import ing, and to the end."


@pytest.fixture(scope="module")
def upstream():
    with scripted() as found:
        yield found


def beside(pair) -> LoadedModel:
    return LoadedModel(pair.draft, pair.tokenizer, pair.draft_identity, "")


def proxy(pair, bank, url, folder, *, policy=HOLD, model="big", timeout_s=20.0, **options):
    chosen = ServerSettings(port=0, retrying=FAST)
    target = Upstream(url, model, api_key=KEY, timeout_s=timeout_s)
    return serving(ProxyBackend(target, beside(pair), bank, **options), folder, chosen, policy=policy)


@pytest.fixture(scope="module")
def server(pair, bank, upstream, tmp_path_factory):
    with proxy(pair, bank, upstream[0], tmp_path_factory.mktemp("proxy")) as found:
        yield found


@pytest.fixture
def script(upstream):
    return upstream[1]


def client_of(server, *, timeout=60) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=timeout)


@pytest.fixture
def client(server):
    with client_of(server) as found:
        yield found


MESSAGES = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "hello"}]


def asked(client, *, model="big", max_tokens=200, temperature=0, **more):
    return client.chat.completions.create(
        model=model, messages=MESSAGES, max_tokens=max_tokens, temperature=temperature, **more
    )


def text_of(chunks) -> str:
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)


def scored_whole(server, answer: str) -> list[dict]:
    """What /v1/monitor/score says of the whole conversation; the template's tokens after the answer are left out."""
    messages = [*MESSAGES, {"role": "assistant", "content": answer}]
    reply = httpx.post(f"{server.url}/v1/monitor/score", json={"texts": [{"messages": messages}]}).json()
    tokens = reply["results"][0]["tokens"]
    last = max(token["position"] for token in tokens if token["message"] == len(MESSAGES))
    return tokens[: last + 1]


def same_scores(said: list[dict], whole: list[dict]) -> None:
    assert [token["position"] for token in said] == [token["position"] for token in whole]
    for kind in ("scores", "running"):
        for metric in ("wide", "narrow"):
            expected = [token[kind][metric] for token in whole]
            assert [token[kind][metric] for token in said] == pytest.approx(expected, abs=1e-5)


def cut(text: str, seed: int) -> list[str]:
    """A text in pieces of one to nine characters."""
    random_numbers, pieces = random.Random(seed), []
    while text:
        size = random_numbers.randint(1, 9)
        pieces.append(text[:size])
        text = text[size:]
    return pieces


# A well-behaved upstream.


@pytest.mark.parametrize("policy", [HOLD, Policy()], ids=["hold", "observe"])
def test_in_front_of_our_own_server_text_and_scores_are_those_of_the_whole_text(pair, bank, tmp_path, policy):
    engine = EmbeddedEngine(pair)
    name = pair.target_identity.name
    (tmp_path / "origin").mkdir()
    with (
        running(engine, tmp_path / "origin") as origin,
        proxy(pair, bank, f"{origin.url}/v1", tmp_path, policy=policy, model=name) as server,
        client_of(origin) as direct,
        client_of(server) as client,
    ):
        expected = asked(direct, model=name, max_tokens=24).choices[0].message.content
        reply = asked(client, model=name, max_tokens=24, extra_body={"monitor": {"prompt": True}})
        assert reply.choices[0].message.content == expected
        same_scores(reply.choices[0].monitor["tokens"], scored_whole(server, expected))
        chunks = list(asked(client, model=name, max_tokens=24, stream=True))
        assert text_of(chunks) == expected
        assert chunks[-1].choices[0].finish_reason == asked(direct, model=name, max_tokens=24).choices[0].finish_reason
        raw = direct.completions.create(model=name, prompt="def f(", max_tokens=12, temperature=0).choices[0].text
        assert (
            client.completions.create(model=name, prompt="def f(", max_tokens=12, temperature=0).choices[0].text == raw
        )
        assert server.backend.load == (0, 0)


def test_eight_answers_at_a_time_do_not_mix(server, client, script):
    texts = {f"w{i}": " ".join(f"{i} {word}" for word in TEXT.split()) for i in range(8)}
    script.say()
    script.write = lambda body: told(cut(texts[body["stop"][0]], 0))

    def ask(name: str):
        return asked(client, stop=[name], extra_body={"monitor": {"prompt": True}}).choices[0]

    with ThreadPoolExecutor(8) as pool:
        choices = list(pool.map(ask, texts))
    for choice, text in zip(choices, texts.values(), strict=True):
        assert choice.message.content == text
        same_scores(choice.monitor["tokens"], scored_whole(server, text))


def test_any_legal_form_of_server_sent_events_is_read(client, script):
    text = "na\u00efve \U0001f4a1 \u2028the end"
    whole = b": hello\n\nevent: x\n" + b"".join(told([text[:8], text[8:]]))
    whole = whole.replace(b"\n", b"\r\n")
    script.say(*(whole[i : i + 7] for i in range(0, len(whole), 7)))
    assert asked(client).choices[0].message.content == text
    script.say(b'data:{"choices": [{"index": 0,\ndata: "delta": {"content": "fine"}, "finish_reason": "stop"}]}')
    assert asked(client).choices[0].message.content == "fine"


@pytest.mark.parametrize("seed", range(3))
def test_scores_do_not_depend_on_how_the_text_arrived(server, client, script, seed):
    script.say(*told(cut(TEXT, seed)))
    choice = asked(client, extra_body={"monitor": {"prompt": True}}).choices[0]
    assert choice.message.content == TEXT
    same_scores(choice.monitor["tokens"], scored_whole(server, TEXT))
    answered = choice.monitor["tokens"][choice.monitor["stats"]["committed"] - len(scored_whole(server, TEXT)) :]
    assert "".join(token["text"] for token in answered).endswith(TEXT)
    assert choice.monitor["stats"]["coverage"] == 1.0


def test_streamed_text_leaves_before_the_upstream_has_ended(client, script):
    script.say(chunk("the value "), chunk("of x "), Hang())
    stream = asked(client, stream=True)
    got = ""
    while got != "the value of x":  # the space after it is open
        got += next(stream).choices[0].delta.content or ""
    stream.close()
    assert script.was_left.wait(20)  # and the upstream's request has ended with the client's


def test_the_answer_says_that_its_monitor_is_paid_for(server, client, script):
    script.say(*told(["one ", "two ", "three"]))
    before = taxed_reads(server)
    choice = asked(client, extra_body={"monitor": {}}).choices[0]
    assert choice.monitor["reader"] == {"model": "tiny-llama-0-draft", "taxed": True}
    assert choice.monitor["stats"]["taxed_reads"] >= 2
    assert "made for the scores alone" in choice.monitor["stats"]["notes"][0]
    assert choice.monitor["stats"]["acceptance"] is None
    until(lambda: taxed_reads(server) == before + choice.monitor["stats"]["taxed_reads"])
    assert [model.id for model in client.models.list()] == ["big"]


def taxed_reads(server) -> float:
    lines = httpx.get(f"{server.url}/metrics").text.splitlines()
    return next(
        float(line.split()[1]) for line in lines if line.startswith("pilotfish:monitor_tax_mode_forwards_total")
    )


def test_the_request_is_handed_on_with_its_settings_and_the_key(client, script):
    script.say(*told(["fine"]))
    asked(client, temperature=0.5, top_p=0.9, stop=["END"], seed=7, max_tokens=33, extra_body={"top_k": 5})
    (body,) = script.bodies
    assert body == {
        "model": "big", "messages": MESSAGES, "stream": True, "max_tokens": 33, "temperature": 0.5, "top_p": 0.9,
        "top_k": 5, "stop": ["END"], "seed": 7,
    }  # fmt: skip
    assert script.asked[0]["authorization"] == f"Bearer {KEY}"
    assert script.paths == ["/v1/chat/completions"]


def test_the_upstream_is_told_the_callers_trace(client, script):
    script.say(*told(["fine"]))
    trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    asked(client, extra_headers={"traceparent": trace})
    assert script.asked[0]["traceparent"] == trace


def test_an_upstream_that_does_not_stream_is_read_in_one_piece(server, client, script):
    message = {"role": "assistant", "content": TEXT}
    whole = {"choices": [{"index": 0, "message": message, "finish_reason": "length"}]}
    script.say(event(whole).removeprefix(b"data: "), kind="application/json")
    choice = asked(client, extra_body={"monitor": {"prompt": True}}).choices[0]
    assert (choice.message.content, choice.finish_reason) == (TEXT, "length")
    same_scores(choice.monitor["tokens"], scored_whole(server, TEXT))


def test_an_empty_answer_and_the_upstreams_own_filter_are_handed_on(client, script):
    script.say(*told([], "content_filter"))
    choice = asked(client, extra_body={"monitor": {}}).choices[0]
    assert (choice.message.content, choice.finish_reason) == ("", "content_filter")
    assert choice.monitor["verdicts"] == []


# Policies.


def over(server, count: int) -> tuple[float, list[dict]]:
    """The highest score of the answer's first tokens, and the tokens before the one that has it."""
    tokens = [token for token in scored_whole(server, TEXT) if token["message"] == len(MESSAGES)][:count]
    values = [token["running"]["wide"] for token in tokens]
    top = max(range(len(values)), key=values.__getitem__)
    return values[top], tokens[:top]


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_leaks_nothing_and_ends_the_upstreams_request(pair, bank, upstream, server, tmp_path, stream):
    url, script = upstream
    threshold, before = over(server, 40)
    policy = Policy(rules=(Rule(metric="wide", action="stop", threshold=threshold - 1e-6, scope="answer"),))
    script.say(*map(chunk, cut(TEXT, 0)), Hang())
    with proxy(pair, bank, url, tmp_path, policy=policy) as gated, client_of(gated) as client:
        reply = asked(client, stream=stream)
        chunks = list(reply) if stream else []
        choice = chunks[-1].choices[0] if stream else reply.choices[0]
        said = text_of(chunks) if stream else choice.message.content
        assert script.was_left.wait(20)
        (alert,) = gated.store.alerts(limit=5)
        stored = gated.store.exchange(alert["exchange_id"])
    assert said == "".join(token["text"] for token in before) == stored["answer"]
    assert choice.finish_reason == "content_filter"
    (verdict,) = choice.monitor["verdicts"]
    assert verdict["position"] == alert["position"] == stored["num_prompt_tokens"] + len(before)


def test_a_prompt_that_is_stopped_never_reaches_the_upstream(pair, bank, upstream, tmp_path):
    url, script = upstream
    script.say(*told(["fine"]))
    policy = Policy(rules=(Rule(metric="wide", action="stop", threshold=0.0, scope="prompt"),))
    with proxy(pair, bank, url, tmp_path, policy=policy) as gated, client_of(gated) as client:
        choice = asked(client).choices[0]
    assert (choice.message.content, choice.finish_reason) == ("", "content_filter")
    assert script.bodies == []


def test_redacted_characters_do_not_leave(pair, bank, upstream, server, tmp_path):
    url, script = upstream
    threshold, before = over(server, 80)
    policy = Policy(rules=(Rule(metric="wide", action="redact", threshold=threshold - 1e-6, scope="answer"),))
    script.say(*told(cut(TEXT, 1)))
    tokens = [token for token in scored_whole(server, TEXT) if token["message"] == len(MESSAGES)]
    hidden = [token["running"]["wide"] >= threshold - 1e-6 for token in tokens]
    with proxy(pair, bank, url, tmp_path, policy=policy) as gated, client_of(gated) as client:
        said = text_of(asked(client, stream=True))
    expected = "".join("\0" if is_hidden else token["text"] for token, is_hidden in zip(tokens, hidden, strict=True))
    assert said == re.sub("\0+", policy.mark, expected)
    assert 0 < sum(hidden) < len(hidden)
    assert len(before) == hidden.index(True)


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        (Rule(metric="wide", action="resample", threshold=0.5, scope="answer"), "action resample samples again"),
        (Rule(metric="wide", action="defer", threshold=0.5, scope="answer"), "action defer lets the draft go on"),
        (Rule(metric="wide", action="steer", threshold=0.5, edit="calm"), "action steer writes into"),
        (Rule(metric="wide", action="escalate", threshold=0.5), "action escalate asks a judge"),
        (Rule(metric="wide", action="flag", threshold=0.5, look_ahead=True), "look_ahead needs drafted tokens"),
        (Rule(metric="signal.distance", threshold=0.5, scope="answer"), "second signal"),
        (Rule(metric="scheming"), "no head scores it"),
    ],
)
def test_what_needs_the_models_inside_is_refused_by_name(server, rule, words):
    with pytest.raises(SettingError, match=words):
        asyncio.run(server.backend.check(Policy(rules=(rule,))))


# Faults.


def test_a_reader_that_breaks_lets_nothing_out_under_the_default_policy(pair, upstream, tmp_path, monkeypatch):
    url, script = upstream
    script.say(*told(["one ", "two ", "three"]))
    for policy, words in ((HOLD, ""), (Policy(), "one two three")):
        folder = tmp_path / str(len(words))
        folder.mkdir()
        broken = proxy(pair, seeded_bank(pair, reader="draft"), url, folder, policy=policy)
        with broken as server, client_of(server) as client, monkeypatch.context() as patch:
            patch.setattr(type(pair.draft.base_model), "forward", broken_forward)
            choice = asked(client, extra_body={"monitor": {"prompt": True}}).choices[0]
        assert choice.message.content == words
        if words:
            reasons = {token["unscored"]["wide"] for token in choice.monitor["tokens"]}
            assert reasons == {"the reader failed: RuntimeError"}
            assert choice.monitor["stats"]["scored"] == 0
        else:
            assert choice.finish_reason == "content_filter"
            assert "the reader failed" in choice.monitor["verdicts"][0]["reason"]


def test_scores_that_come_too_late_stop_a_held_answer(pair, bank, upstream, tmp_path):
    url, script = upstream
    script.say(*told(["fine"]))
    with proxy(pair, bank, url, tmp_path, score_limit_s=1e-9) as late, client_of(late) as client:
        choice = asked(client).choices[0]
    assert (choice.message.content, choice.finish_reason) == ("", "content_filter")
    assert "more than the 1e-09 s" in choice.monitor["verdicts"][0]["reason"]


def broken_forward(*_, **__):
    raise RuntimeError("out of memory")


def test_text_beyond_the_readers_context_is_unscored_and_stops_where_the_policy_holds(client, script):
    script.say(*told(["word " for _ in range(600)]))
    choice = asked(client, max_tokens=100).choices[0]
    assert choice.finish_reason == "content_filter"
    assert "reads at most 512 tokens" in choice.monitor["verdicts"][0]["reason"]
    assert choice.message.content


TOOL = [{"index": 0, "id": "t", "type": "function", "function": {"name": "rm", "arguments": "{}"}}]
TWO = {"choices": [{"index": 0, "delta": {"content": "a"}}, {"index": 1, "delta": {"content": "b"}}]}


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ([b"data: {nonsense\n\n"], "it is not JSON"),
        ([b"data: \xff\xfe\n\n"], "it is not JSON"),
        ([event([1])], "it is no object"),
        ([event({})], "it has no choices"),
        ([event({"choices": [{"index": 0}]})], "a choice says nothing"),
        ([chunk(None, content=["a"])], "its text is no string"),
        ([b'data: {"choices": [{"index": 0, "delta": {"content": "\\ud83d"}}]}\n\n'], "half a character"),
        ([event({"error": {"message": f"bad key {KEY}"}})], "ended its answer with an error"),
        ([event(TWO)], "several choices"),
        ([chunk("a", tool_calls=TOOL)], "calls a tool, which is not monitored"),
        ([chunk("a"), chunk(finish="tool_calls")], "a reason that is not known"),
        ([chunk("a b c"), DONE], "broke its answer off"),
        ([chunk("a b c")], "broke its answer off"),
        ([b"data: " + b"x" * 1_100_000], "a line is too long"),
    ],
)
def test_what_cannot_be_read_ends_the_answer_with_an_error(server, client, script, said, words):
    script.say(*said)
    with pytest.raises(openai.APIStatusError) as refused:
        asked(client)
    assert (refused.value.status_code, refused.value.code) == (502, "upstream")
    assert words in str(refused.value)
    assert KEY not in str(refused.value)
    script.say(chunk("before "), *said)
    with pytest.raises(openai.APIError, match=words):
        list(asked(client, stream=True))
    until(lambda: server.backend.load == (0, 0))


@pytest.mark.parametrize(
    ("status", "headers", "then", "words"),
    [
        (401, {}, 502, "refuses this server's key"),
        (404, {}, 502, "no such address or model"),
        (429, {"retry_after": "7"}, 429, "no more requests"),
        (400, {}, 400, "refuses the request (400): too long [API key]"),
        (500, {}, 502, "the upstream failed (500)"),
        (307, {"location": "http://elsewhere/"}, 502, "the upstream failed (307)"),
    ],
)
def test_a_refusal_of_the_upstream_is_told_without_its_key(client, script, caplog, status, headers, then, words):
    caplog.set_level(logging.DEBUG)
    script.say(
        b'{"error": {"message": "too long %s"}}' % KEY.encode(), status=status, kind="application/json", **headers
    )
    with pytest.raises(openai.APIStatusError) as refused:
        asked(client)
    assert refused.value.status_code == then
    assert words in str(refused.value)
    assert refused.value.response.headers.get("retry-after") == ("7" if status == 429 else None)
    assert KEY not in str(refused.value) + caplog.text


def test_an_upstream_that_is_not_there_or_stalls_is_given_up(pair, bank, upstream, tmp_path):
    url, script = upstream
    for name in ("gone", "stalled"):
        (tmp_path / name).mkdir()
    lost = proxy(pair, bank, "http://127.0.0.1:9/v1", tmp_path / "gone")
    with (
        lost as server,
        client_of(server) as client,
        pytest.raises(openai.APIStatusError, match="could not be reached"),
    ):
        asked(client)
    script.say(chunk("one two "), Hang())
    with proxy(pair, bank, url, tmp_path / "stalled", timeout_s=0.3) as slow, client_of(slow) as client:
        got = []
        with pytest.raises(openai.APIError, match="sent nothing for"):
            got.extend(asked(client, stream=True))
        assert text_of(got) == "one two"  # what comes after it was still open
        (stored,) = slow.store.exchanges(limit=5)
    assert stored["state"] == "failed"
    assert script.was_left.wait(20)


def test_an_alert_is_kept_when_the_upstream_fails_after_it(pair, bank, upstream, tmp_path):
    url, script = upstream
    script.say(status=500)
    policy = Policy(rules=(Rule(metric="wide", threshold=0.0, scope="prompt"),), hold=True)
    with proxy(pair, bank, url, tmp_path, policy=policy) as flagged, client_of(flagged) as client:
        with pytest.raises(openai.APIStatusError, match="the upstream failed"):
            asked(client)
        (alert,) = flagged.store.alerts(limit=5)
    assert alert["position"] == 0


def test_reasoning_beside_the_text_is_not_handed_on_and_that_is_said(client, script):
    script.say(chunk(None, reasoning_content="secret plan "), chunk("fine"), chunk(finish="stop"), DONE)
    chunks = list(asked(client, stream=True, extra_body={"monitor": {}}))
    assert text_of(chunks) == "fine"
    assert "secret" not in "".join(chunk.model_dump_json() for chunk in chunks)
    notes = chunks[-1].choices[0].monitor["stats"]["notes"]
    assert "the upstream sent reasoning_content, which is neither read nor handed on" in notes


def test_a_client_that_leaves_ends_the_upstreams_request_and_frees_the_place(pair, bank, upstream, tmp_path):
    url, script = upstream
    script.say(chunk("one two three "), Hang())
    with proxy(pair, bank, url, tmp_path, max_streams=1, max_queue=0) as server, client_of(server) as client:
        stream = asked(client, stream=True)
        next(stream)
        with pytest.raises(openai.RateLimitError) as refused:
            asked(client)
        assert int(refused.value.response.headers["retry-after"]) >= 1
        stream.close()
        assert script.was_left.wait(20)
        until(lambda: server.backend.load == (0, 0) and server.store.exchanges(limit=1))
        (stored,) = server.store.exchanges(limit=1)
        script.say(*told(["fine"]))
        assert asked(client).choices[0].message.content == "fine"
    assert stored["state"] == "cancelled"


def test_a_server_that_is_told_to_end_ends_the_upstreams_request(pair, bank, upstream, tmp_path):
    url, script = upstream
    script.say(chunk("one two three "), Hang())
    backend = ProxyBackend(Upstream(url, "big"), beside(pair), bank)
    chosen = ServerSettings(port=0, retrying=FAST, drain_s=1.0)
    with serving(backend, tmp_path, chosen, policy=HOLD) as server, client_of(server) as client:
        stream = asked(client, stream=True)
        next(stream)
        server.server.should_exit = True
        assert script.was_left.wait(20)
    store = Store(f"sqlite:///{tmp_path / 'store.db'}")
    assert [row["state"] for row in store.exchanges(limit=5)] == ["cancelled"]
    store.close()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--model", "big"], "give --upstream too"),
        (["--upstream", "http://127.0.0.1:9/v1"], "--model NAME"),
        (["--upstream", "http://127.0.0.1:9/v1", "--model", "big", "--draft", "d"], "name the --reader"),
        (["--upstream", "127.0.0.1:9", "--model", "big"], "not usable"),
    ],
)
def test_flags_that_do_not_go_together_are_refused_before_a_model_is_loaded(tmp_path, capsys, flags, words):
    assert main(["serve", "--store", f"sqlite:///{tmp_path / 'store.db'}", *flags]) == 1
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "words"),
    [({"tools": []}, "tools"), ({"n": 2}, "n"), ({"extra_body": {"monitor": {"signals": True}}}, "second signals")],
)
def test_what_the_proxy_cannot_monitor_is_refused(client, script, change, words):
    script.say(*told(["fine"]))
    with pytest.raises(openai.BadRequestError, match=words):
        asked(client, **change)
    assert script.bodies == []


@pytest.mark.parametrize(
    ("url", "key", "words"),
    [
        ("ftp://host/v1", "", "not usable"),
        ("https://me:secret@host/v1", "", "user name or password"),
        ("https://host/v1?key=secret", "", "not usable"),
        ("https://host/v1", "sk\n", "characters that no key has"),
    ],
)
def test_an_upstream_that_cannot_be_used_is_refused(url, key, words):
    with pytest.raises(SettingError, match=words):
        Upstream(url, "big", api_key=key)


# The text.


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.text(alphabet=st.sampled_from("aehint <|im_end>\n\t=é💡这\u0301"), max_size=9), max_size=40),
    st.sampled_from(["<|im_start|>assistant\n", "User: x\n\nAssistant: ", "def f("]),
)
def test_a_growing_text_has_the_tokens_of_the_whole_and_none_changes(pieces, prefix):
    tokenizer = tiny_tokenizer()
    text = GrowingText(tokenizer, prefix, templated=True)
    found = text.take()
    for piece in pieces:
        text.push(piece)
        found += text.take()
    text.push("", is_last=True)
    found += text.take()
    whole = prefix + "".join(pieces)
    assert [piece.id for piece in found] == tokenizer(whole, add_special_tokens=False)["input_ids"]
    assert found[-1].shown == len(whole)
    assert [piece.shown for piece in found] == sorted(piece.shown for piece in found)


def test_a_long_text_is_tokenized_by_its_last_part_alone_and_stays_exact():
    tokenizer = tiny_tokenizer()
    text = GrowingText(tokenizer, "<|im_start|>assistant\n", templated=True)
    said = (TEXT + " ") * 30
    for piece in cut(said, 3):
        text.push(piece)
    text.push("", is_last=True)
    assert text._window[1] > len(said) - 1000
    expected = tokenizer("<|im_start|>assistant\n" + said, add_special_tokens=False)["input_ids"]
    assert [piece.id for piece in text.take()] == expected


def test_a_final_token_that_changes_all_the_same_is_an_error(monkeypatch):
    monkeypatch.setattr(proxy_text, "TAIL", 1)  # too few: these ten characters become one token
    text = GrowingText(tiny_tokenizer(), "<|im_start|>assistant\n", templated=True)

    def spell() -> None:
        for character in "<|im_end|>":
            text.push(character)

    with pytest.raises(EngineFailed, match="split a text otherwise"):
        spell()
