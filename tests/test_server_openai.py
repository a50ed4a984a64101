"""The server as OpenAI's own client meets it."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
from server_kit import held, running, until

from pilotfish.actions import Policy, Rule
from pilotfish.engines import EmbeddedEngine, GenerationStream, Request, Sampling
from pilotfish.errors import StoreError
from pilotfish.server import Store
from pilotfish.texts import Rendered, encode

FLAGGED = Policy(rules=(Rule(metric="wide", action="flag", threshold=0.0, scope="answer"),), hold=True)
"""Broken by the first token of every answer."""


@pytest.fixture(scope="module")
def engine(pair, bank):
    return EmbeddedEngine(pair, [bank])


@pytest.fixture(scope="module")
def server(engine, tmp_path_factory):
    with running(engine, tmp_path_factory.mktemp("openai")) as found:
        yield found


def client_of(server, *, timeout=60) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=timeout)


@pytest.fixture
def client(server):
    with client_of(server) as found:
        yield found


def asked(client, engine, prompt="hello", *, max_tokens=12, temperature=0, **more):
    return client.chat.completions.create(
        model=engine.pair.target_identity.name,
        messages=[{"role": "user", "content": prompt}],
        max_tokens=max_tokens,
        temperature=temperature,
        **more,
    )


def text_of(chunks) -> str:
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)


def test_an_answer_in_one_piece_is_the_engines_answer(client, engine):
    expected = engine.generate("hello", Request(max_new_tokens=12))
    reply = asked(client, engine)
    assert reply.choices[0].message.content == expected.answer
    assert reply.usage.prompt_tokens == expected.num_prompt_tokens
    assert reply.usage.completion_tokens == len(expected.committed)
    assert not hasattr(reply.choices[0], "monitor")


def test_a_streamed_answer_is_the_same_answer(client, engine):
    expected = engine.generate("hello", Request(max_new_tokens=12))
    chunks = list(asked(client, engine, stream=True, stream_options={"include_usage": True}))
    assert text_of(chunks) == expected.answer
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-2].choices[0].finish_reason in {"stop", "length"}
    assert chunks[-1].usage.completion_tokens == len(expected.committed)
    assert len({chunk.id for chunk in chunks}) == 1


def test_a_sampled_answer_follows_its_seed(client, engine):
    sampling = Sampling(temperature=0.9, top_p=0.8, top_k=20)
    expected = engine.generate("hello", Request(max_new_tokens=12, sampling=sampling, seed=5))
    reply = asked(client, engine, temperature=0.9, top_p=0.8, seed=5, extra_body={"top_k": 20})
    assert reply.choices[0].message.content == expected.answer


def test_a_stop_string_ends_the_answer(client, engine):
    whole = engine.generate("hello", Request(max_new_tokens=40)).answer
    word = whole[5:8]
    reply = asked(client, engine, max_tokens=40, stop=[word])
    assert reply.choices[0].message.content == whole[: whole.index(word)]
    assert reply.choices[0].finish_reason == "stop"


def test_a_completion_goes_on_with_the_text_itself(client, engine):
    ids = encode(Rendered("def f(", (0,), (6,), (0,), False), engine.pair.tokenizer).token_ids
    stream = GenerationStream(engine, "def f(", ids, Request(max_new_tokens=12))
    for _ in stream:
        pass
    model = engine.pair.target_identity.name
    reply = client.completions.create(model=model, prompt="def f(", max_tokens=12, temperature=0)
    assert reply.choices[0].text == stream.generation.answer
    chunks = client.completions.create(model=model, prompt="def f(", max_tokens=12, temperature=0, stream=True)
    assert "".join(chunk.choices[0].text for chunk in chunks) == stream.generation.answer


def test_scores_come_as_one_object_on_the_choice(client, engine):
    expected = engine.generate("hello", Request(max_new_tokens=12))
    choice = asked(client, engine, extra_body={"monitor": {"prompt": True}}).choices[0]
    monitor = choice.monitor
    assert set(monitor["heads"]) == {"wide", "narrow"}
    assert len(monitor["tokens"]) == len(expected.tokens)
    for said, token in zip(monitor["tokens"], expected.tokens, strict=True):
        assert said["position"] == token.position
        assert said["scores"]["wide"] == pytest.approx(token.scores["wide"].value, abs=1e-6)
        assert said["running"]["wide"] == pytest.approx(token.scores["wide"].running, abs=1e-6)
    answered = [said["text"] for said in monitor["tokens"][expected.num_prompt_tokens :]]
    assert "".join(answered) == choice.message.content
    assert monitor["stats"]["committed"] == monitor["stats"]["scored"] == len(expected.tokens)


def test_scores_come_with_each_chunk_pending_ones_later(client, engine):
    chunks = list(asked(client, engine, stream=True, extra_body={"monitor": {"heads": ["wide"], "lookahead": True}}))
    said = [chunk.choices[0].monitor for chunk in chunks if getattr(chunk.choices[0], "monitor", None)]
    tokens = [token for each in said for token in each.get("tokens", [])]
    last = {token["position"]: token for token in tokens}
    expected = engine.generate("hello", Request(max_new_tokens=12))
    assert list(last) == [token.position for token in expected.committed]
    assert any(token.get("pending") for token in tokens)
    for token in expected.committed:
        found = last[token.position]
        assert set(found["scores"]) == {"wide"}
        assert found["scores"]["wide"] == pytest.approx(token.scores["wide"].value, abs=1e-6)
        assert not found.get("pending")
    assert any(each.get("rounds") for each in said)
    assert set(said[-1]["heads"]) == {"wide"}


def test_how_draft_and_target_disagreed_comes_where_it_is_asked_for_and_is_stored(client, engine, server):
    reply = asked(client, engine, extra_body={"monitor": {"signals": True, "prompt": True}})
    said = reply.choices[0].monitor["tokens"]
    expected = engine.generate("hello", Request(max_new_tokens=12, signals=True))
    stored = server.store.exchange(reply.id)
    for row, kept, token in zip(said, stored["tokens"], expected.tokens, strict=True):
        known = {name for name, score in token.signals.scores().items() if score.value is not None}
        assert {name for name in row["scores"] if name.startswith("signal.")} == known
        assert kept["scores"]["wide"] == token.scores["wide"].value
        if token.origin != "prompt":
            assert row["scores"]["signal.target_surprise"] == pytest.approx(
                token.signals.scores()["signal.target_surprise"].value, abs=1e-6
            )
            assert kept["scores"].keys() == row["scores"].keys()
    top = reply.choices[0].monitor["heads"]["wide"]["max_answer"]
    assert stored["stats"]["highest"]["wide"] == pytest.approx(top, abs=1e-6)


def test_eight_streams_at_a_time_are_each_what_they_are_alone(engine, tmp_path):
    def request(i: int) -> Request:
        sampling = Sampling(temperature=1.0 if i % 2 else 0.0)
        return Request(max_new_tokens=12 + i, sampling=sampling, seed=i)

    expected = [engine.generate(f"prompt {i}", request(i)) for i in range(10)]
    with running(engine, tmp_path, max_streams=8) as server, client_of(server) as client:

        def ask(i: int):
            options = {"seed": i, "temperature": 1 if i % 2 else 0, "max_tokens": 12 + i}
            monitor = {"extra_body": {"monitor": {}}}
            return list(asked(client, engine, f"prompt {i}", stream=True, **options, **monitor))

        with ThreadPoolExecutor(10) as pool:
            answers = list(pool.map(ask, range(10)))
    for generation, chunks in zip(expected, answers, strict=True):
        assert text_of(chunks) == generation.answer
        last = {}
        for chunk in chunks:
            for token in getattr(chunk.choices[0], "monitor", {}).get("tokens", []):
                last[token["position"]] = token["scores"]
        for token in generation.committed:
            assert last[token.position]["wide"] == pytest.approx(token.scores["wide"].value, abs=1e-6)


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_is_a_content_filter_with_its_reason(engine, tmp_path, stream):
    free = engine.generate("hello", Request(max_new_tokens=40))
    running_scores = [token.scores["wide"].running for token in free.committed]
    place = max(range(len(running_scores)), key=running_scores.__getitem__)
    rule = Rule(metric="wide", action="stop", threshold=running_scores[place], scope="answer")
    with running(engine, tmp_path, policy=Policy(rules=(rule,))) as server, client_of(server) as client:
        reply = asked(client, engine, max_tokens=40, stream=stream)
        choice = list(reply)[-1].choices[0] if stream else reply.choices[0]
        (alert,) = server.store.alerts(limit=5)
        stored = server.store.exchange(alert["exchange_id"])
    assert choice.finish_reason == "content_filter"
    (verdict,) = choice.monitor["verdicts"]
    assert (verdict["metric"], verdict["action"]) == ("wide", "stop")
    assert verdict["position"] == free.num_prompt_tokens + place == alert["position"]
    assert stored["answer"] == "".join(token.delta for token in free.committed[:place])
    assert stored["state"] == "done"


@pytest.mark.parametrize("stream", [False, True])
def test_whoever_sees_a_token_of_a_flag_finds_its_alert(engine, tmp_path, stream):
    with running(engine, tmp_path, policy=FLAGGED) as server, client_of(server) as client:
        reply = asked(client, engine, stream=stream)
        if not stream:
            assert len(server.store.alerts(limit=5)) == 1
            return
        seen = 0
        for chunk in reply:
            if chunk.choices[0].delta.content:
                seen += 1
                (alert,) = server.store.alerts(limit=5)
                assert alert["exchange_id"] == chunk.id
        assert seen
        assert len(server.store.alerts(limit=5)) == 1


class Slow(Store):
    """Keeps an exchange with an alert waiting."""

    def __init__(self, *args, **options) -> None:
        super().__init__(*args, **options)
        self.entered, self.release = threading.Event(), threading.Event()

    def record(self, exchange):
        if exchange.verdicts:
            self.entered.set()
            assert self.release.wait(30)
        return super().record(exchange)


def test_a_flagged_token_waits_until_its_alert_is_committed(engine, tmp_path):
    store = Slow(f"sqlite:///{tmp_path / 's.db'}")
    with running(engine, tmp_path, policy=FLAGGED, store=store) as server, client_of(server) as client:
        texts: list[str] = []

        def read() -> None:
            texts.extend(c.choices[0].delta.content or "" for c in asked(client, engine, stream=True))

        reader = threading.Thread(target=read)
        reader.start()
        assert store.entered.wait(30)
        until(lambda: server.backend.load == (0, 0))  # the engine has long gone on
        assert "".join(texts) == ""
        store.release.set()
        reader.join(30)
        assert "".join(texts) != ""


class Full(Store):
    """A disk without room for alerts."""

    def record(self, exchange):
        if exchange.verdicts:
            raise StoreError("the store at sqlite:///secret-place could not be written: disk full")
        return super().record(exchange)


def test_an_answer_whose_alert_cannot_be_kept_does_not_go_on(engine, tmp_path):
    store = Full(f"sqlite:///{tmp_path / 's.db'}")
    with running(engine, tmp_path, policy=FLAGGED, store=store) as server, client_of(server) as client:
        with pytest.raises(openai.APIStatusError) as refused:
            asked(client, engine)
        assert refused.value.status_code == 503
        assert "secret-place" not in str(refused.value)
        got = []
        with pytest.raises(openai.APIError, match="nothing could be recorded"):
            got.extend(asked(client, engine, stream=True))
        assert text_of(got) == ""
        until(lambda: server.backend.load == (0, 0))


def test_a_full_queue_is_429_with_a_time_to_come_back(engine, tmp_path):
    with running(engine, tmp_path, max_streams=1, max_queue=0) as server, client_of(server) as client:
        with held(server.backend), pytest.raises(openai.RateLimitError) as refused:
            asked(client, engine)
        assert int(refused.value.response.headers["retry-after"]) >= 1
        assert refused.value.code == "queue_full"
        assert asked(client, engine).choices[0].message.content


def test_a_request_that_waits_too_long_is_given_up_and_frees_its_seat(engine, tmp_path):
    limits = {"max_streams": 1, "max_queue": 1, "request_timeout_s": 0.3}
    with running(engine, tmp_path, **limits) as server, client_of(server) as client, held(server.backend):
        with pytest.raises(openai.APIStatusError) as refused:
            asked(client, engine)
        assert refused.value.status_code == 504
        assert server.backend.load == (1, 0)


def test_an_answer_that_takes_too_long_is_ended_with_an_error(engine, tmp_path):
    with running(engine, tmp_path, request_timeout_s=2.0) as server, client_of(server) as client:
        stream = asked(client, engine, max_tokens=400, stream=True, stop=["\u2603"])
        next(stream)
        with held(server.backend), pytest.raises(openai.APIError, match="longer than 2 s"):
            list(stream)
        until(lambda: server.store.exchanges(limit=1))
        (stored,) = server.store.exchanges(limit=1)
        assert stored["state"] == "failed"


def test_a_client_that_leaves_gives_its_place_to_others(engine, tmp_path):
    with running(engine, tmp_path) as server, client_of(server) as client:
        stream = asked(client, engine, max_tokens=400, stream=True)
        next(stream)
        with held(server.backend):
            ended = server.backend.load == (1, 0)  # only what holds the engine: the answer was over before
            stream.close()
            if not ended:
                until(lambda: any(job.cancelled for job in server.backend._running))
        until(lambda: server.backend.load == (0, 0) and server.store.exchanges(limit=1))
        (stored,) = server.store.exchanges(limit=1)
        assert stored["state"] == ("done" if ended else "cancelled")


def test_a_client_that_leaves_the_queue_frees_its_seat(engine, tmp_path):
    with running(engine, tmp_path, max_streams=1, max_queue=1) as server, held(server.backend):
        with client_of(server, timeout=0.3) as client, pytest.raises(openai.APITimeoutError):
            asked(client, engine)
        until(lambda: server.backend.load == (1, 0))


def test_an_answer_in_flight_is_finished_when_the_server_is_told_to_end(engine, tmp_path):
    expected = engine.generate("hello", Request(max_new_tokens=60))
    with running(engine, tmp_path) as server, client_of(server) as client:
        stream = asked(client, engine, max_tokens=60, stream=True)
        first = next(stream)
        server.server.should_exit = True
        assert text_of([first, *stream]) == expected.answer
    store = Store(f"sqlite:///{tmp_path / 'store.db'}")
    assert store.exchanges(limit=1)[0]["state"] == "done"
    store.close()


def test_a_head_that_breaks_stops_a_gated_answer_and_never_fails_open(pair, tmp_path, monkeypatch):
    from conftest import seeded_bank

    bank = seeded_bank(pair, reader="draft")
    rule = Rule(metric="wide", action="stop", threshold=0.99, scope="answer")
    with running(EmbeddedEngine(pair, [bank]), tmp_path, policy=Policy(rules=(rule,))) as server:
        monkeypatch.setattr(bank, "weight", bank.weight[:3])  # no matmul fits now
        with client_of(server) as client:
            choice = asked(client, EmbeddedEngine(pair)).choices[0]
    assert choice.finish_reason == "content_filter"
    assert choice.message.content == ""
    assert "head failed" in choice.monitor["verdicts"][0]["reason"]


@pytest.mark.parametrize(
    ("change", "status", "words"),
    [
        ({"model": "gpt-5"}, 404, "this server has the model"),
        ({"messages": []}, 400, "messages"),
        ({"messages": [{"role": "robot", "content": "x"}]}, 400, "messages.0.role"),
        ({"messages": [{"role": "user", "content": "   "}]}, 400, "the prompt is empty"),
        ({"messages": [{"role": "user", "content": "word " * 5000}]}, 400, "Shorten the prompt"),
        ({"messages": [{"role": "user", "content": "x"}] * 600}, 400, "at most 512"),
        ({"max_tokens": 100_000}, 400, "max_tokens"),
        ({"max_tokens": 0}, 400, "max_tokens"),
        ({"temperature": 9}, 400, "temperature"),
        ({"n": 2}, 400, "n"),
        ({"stop": ["x"] * 5}, 400, "stop"),
        ({"tools": []}, 400, "tools"),
        ({"logit_bias": {"1": 1}}, 400, "logit_bias"),
        ({"extra_body": {"monitor": {"heads": ["scheming"]}}}, 400, "has no head; there are wide, narrow"),
        ({"extra_body": {"monitor": {"everything": True}}}, 400, "monitor.everything"),
    ],
)
def test_what_cannot_be_done_is_refused_with_words(client, engine, change, status, words):
    asking = {
        "model": engine.pair.target_identity.name,
        "messages": [{"role": "user", "content": "hello"}],
        "max_tokens": 4,
        **change,
    }
    with pytest.raises(openai.APIStatusError) as refused:
        client.chat.completions.create(**asking)
    assert refused.value.status_code == status
    assert words in str(refused.value)


def test_the_model_is_listed_by_its_name(client, engine):
    assert [model.id for model in client.models.list()] == [engine.pair.target_identity.name]
