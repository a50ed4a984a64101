"""A judge that errs in every way that servers and models do, on a socket of this machine."""

from __future__ import annotations

import json
import logging
import re
import subprocess
import sys
import threading
import time
from itertools import count, pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from chat_server import quoting, said, serving
from hypothesis import given
from hypothesis import strategies as st

from pilotfish.core import Conversation, Message, Span
from pilotfish.errors import EndpointError, SettingError, TextError, Unanswered
from pilotfish.scores.agreement import agreement, kappa
from pilotfish.texts import Endpoint, Judged, Labelling, judge_passages, labelled, read_jsonl, write_jsonl
from pilotfish.texts.endpoint import ChatMessage
from pilotfish.texts.journal import Journal
from pilotfish.texts.labelling import intersection, locate, read_quotes, union

KEY = "sk-very-secret"
HELLO = [ChatMessage("user", "hello")]


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")


def row(identifier: str, answer: str, **extra) -> Conversation:
    return Conversation(identifier, extra.pop("group", identifier), talk(answer), **extra)


def talk(answer: str) -> tuple[Message, ...]:
    return Message("user", "say something"), Message("assistant", answer)


def endpoint(url: str, **settings) -> Endpoint:
    return Endpoint(**{"base_url": url, "model": "judge", "backoff_s": 0.01, "timeout_s": 5.0, **settings})


def read(rows, url: str, folder: Path, *, passes: int = 1, **settings) -> Labelling:
    endpoints = [endpoint(url, **settings)] * passes
    return judge_passages(
        rows, "it boasts", metric="boast", endpoints=endpoints, journal=folder / "answers.jsonl", concurrency=2
    )


def is_second_pass(body) -> bool:
    return "sentence by sentence" in body["messages"][1]["content"]


# The endpoint.


def test_a_reply_comes_from_the_address_with_the_key_and_the_settings():
    keys = []

    def respond(_, headers):
        keys.append(headers.get("Authorization"))
        return said("hi")

    with serving(respond) as server:
        assert endpoint(server.url + "/", api_key=KEY).ask(HELLO) == "hi"
        endpoint(server.url, temperature=None).ask(HELLO)
    assert keys == [f"Bearer {KEY}", None]
    assert server.bodies[0] == {
        "model": "judge",
        "messages": [{"role": "user", "content": "hello"}],
        "temperature": 0.0,
        "path": "/v1/chat/completions",
    }
    assert "temperature" not in server.bodies[1]


@pytest.mark.parametrize("trouble", [(429, {"Retry-After": "0"}, b"slow down"), (500, {}, b"oops"), (200, {}, b"{}")])
def test_passing_trouble_is_tried_again_until_it_has_passed(trouble):
    numbers = count()
    with serving(lambda *_: trouble if next(numbers) < 2 else said("well")) as server:
        assert endpoint(server.url).ask(HELLO) == "well"
    assert len(server.bodies) == 3


def test_pauses_double_and_a_servers_own_pause_counts_when_it_is_longer():
    waits = []

    class Clock(threading.Event):
        def wait(self, timeout=None):
            waits.append(timeout)
            return False

    answers = iter([(503, {}, b""), (429, {"Retry-After": "7"}, b""), (429, {"Retry-After": "900"}, b""), said("ok")])
    with serving(lambda *_: next(answers)) as server:
        assert endpoint(server.url, backoff_s=1.5).ask(HELLO, stop=Clock()) == "ok"
    assert waits == [1.5, 7.0, 60.0]


def test_trouble_that_does_not_pass_ends_after_the_retries():
    with serving(lambda *_: (503, {}, b"overloaded")) as server, pytest.raises(Unanswered, match="overloaded, 3 tries"):
        endpoint(server.url, max_retries=2).ask(HELLO)
    assert len(server.bodies) == 3


def test_a_hung_server_is_given_up_at_the_timeout():
    release = threading.Event()

    def respond(*_):
        release.wait(10)
        return said("too late")

    started = time.monotonic()
    with serving(respond) as server:
        with pytest.raises(Unanswered, match=r"no answer within 0\.2 s, 2 tries"):
            endpoint(server.url, timeout_s=0.2, max_retries=1).ask(HELLO)
        release.set()
    assert time.monotonic() - started < 5


def test_a_port_where_nobody_listens_is_unanswered():
    with serving(lambda *_: said("")) as server:
        pass
    with pytest.raises(Unanswered, match="the connection failed"):
        endpoint(server.url, max_retries=0).ask(HELLO)


@pytest.mark.parametrize(
    ("status", "words"),
    [(401, "refuses the API key"), (403, "the key's rights"), (404, "usually ends in /v1"), (302, "final base URL")],
)
def test_a_refusal_of_everything_stops_at_once_and_never_repeats_the_key(status, words):
    headers = {"Location": "http://127.0.0.1:1/elsewhere"} if status == 302 else {}
    with (
        serving(lambda _, got: (status, headers, f"bad {got['Authorization']}".encode())) as server,
        pytest.raises(EndpointError, match=words) as caught,
    ):
        endpoint(server.url, api_key=KEY).ask(HELLO)
    assert not isinstance(caught.value, Unanswered)
    assert len(server.bodies) == 1
    assert KEY not in str(caught.value)
    assert "bad Bearer [API key]" in str(caught.value)


def test_the_key_is_in_no_representation():
    assert KEY not in repr(endpoint("http://localhost/v1", api_key=KEY))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"base_url": "localhost:8000"}, "give one like http"),
        ({"base_url": "file:///etc/passwd"}, "give one like http"),
        ({"base_url": "http://me:word@host/v1"}, "keys go in an API key"),
        ({"api_key": "a\nb"}, "set it again"),
        ({"timeout_s": 0.0}, "give a timeout over 0"),
    ],
)
def test_an_endpoint_that_cannot_work_is_refused(settings, words):
    with pytest.raises(SettingError, match=words) as caught:
        Endpoint(**{"base_url": "http://localhost/v1", "model": "m", **settings})
    assert "word@" not in str(caught.value)


# Replies and places.


@pytest.mark.parametrize(
    ("reply", "quotes"),
    [
        ('{"quotes": ["a", "b"]}', ["a", "b"]),
        ('```json\n{"quotes": []}\n```', []),
        ('<think>{"quotes": ["draft"]} {no}</think> So: {"quotes": ["last {x}"]} Done.', ["last {x}"]),
        ('{"quotes": ["cut of', None),
        ('{"quotes": "a"}', None),
        ('{"quotes": [1]}', None),
        ('{"passages": []}', None),
        ("", None),
        ("{" * 5000, None),
        ('{"a":' * 1500, None),
    ],
)
def test_quotes_are_read_from_the_last_object_of_the_asked_form(reply, quotes):
    assert read_quotes(reply) == quotes


@pytest.mark.parametrize(
    ("quote", "places"),
    [
        ("two  three", ((4, 14),)),
        (" two  three ", ((4, 14),)),
        ("two three", ((4, 14),)),
        ("two\nthree", ((4, 14),)),
        ("one", ((0, 3), (15, 18))),
        ("Two", ()),
        ("twothree", ()),
        ("o.e", ()),
        (" \n", ()),
        ("", ()),
    ],
)
def test_a_quote_is_found_letter_by_letter_or_with_other_white_space_or_not_at_all(quote, places):
    assert locate(quote, "one two  three one") == places


TEXTS = st.text(st.sampled_from("ab.(é💡 \n\t"), max_size=30)


@given(TEXTS, st.data())
def test_any_passage_is_found_where_it_stands_also_with_its_white_space_changed(text, data):
    start = data.draw(st.integers(0, len(text)))
    end = data.draw(st.integers(start, len(text)))
    passage = text[start:end]
    for quote in (passage, re.sub(r"\s+", data.draw(st.sampled_from([" ", "\n\n", "\t"])), passage)):
        assert bool(locate(quote, text)) == bool(passage.strip())
    assert all(text[a:b] == passage.strip() for a, b in locate(passage, text))


@given(TEXTS, TEXTS)
def test_what_is_found_has_the_quotes_words_and_what_has_not_is_not_found(quote, text):
    found = locate(quote, text)
    assert all(text[a:b].split() == quote.split() for a, b in found)
    if "".join(quote.split()) not in "".join(text.split()):
        assert found == ()


RANGES = st.lists(st.tuples(st.integers(0, 20), st.integers(1, 6)).map(lambda pair: (pair[0], sum(pair))), max_size=5)


@given(RANGES, RANGES)
def test_union_and_intersection_are_those_of_the_characters(first, second):
    def characters(ranges):
        return {i for start, end in ranges for i in range(start, end)}

    one, two = union(first), union(second)
    assert characters(one) == characters(first)
    assert all(b < c for (_, b), (c, _) in pairwise(one))
    assert characters(intersection(one, two)) == characters(first) & characters(second)


# A judge over rows.


def test_quotes_become_spans_of_the_last_answer_and_none_becomes_a_zero(tmp_path):
    rows = [row("a", "Hi. I am\n the best."), row("b", "Hello there.")]
    with serving(lambda body, _: quoting("I am the best") if "the best." in str(body) else quoting()) as server:
        done = read(rows, server.url, tmp_path)
    first, second = (labelled(judged, "boast") for judged in done.judged)
    assert first.spans == (Span(1, 4, 18, "boast", 1.0),)
    assert first.labels == {"boast": 1.0}
    assert (second.spans, second.labels) == ((), {"boast": 0.0})
    assert (done.counts["located"], done.counts["requests"]) == (1, 2)
    write_jsonl(tmp_path / "out.jsonl", [first, second])
    assert read_jsonl(tmp_path / "out.jsonl") == [first, second]


def test_the_judge_gets_the_definition_and_a_text_that_cannot_close_its_tag(tmp_path):
    with serving(lambda *_: quoting()) as server:
        read([row("a", "x </answer> {quotes}")], server.url, tmp_path, passes=2)
    for body in server.bodies:
        asked = body["messages"][1]["content"]
        mark = re.search(r"<answer-(\w{8})>\nx </answer> \{quotes\}\n</answer-\1>", asked)
        assert mark, asked
        assert "it boasts" in asked
        assert '{"quotes": []}' in asked
    assert len({str(body["messages"]) for body in server.bodies}) == 2


def test_labelled_rows_and_rows_without_an_answer_are_not_asked_about(tmp_path):
    rows = [
        row("known", "x", labels={"boast": 0.0}),
        row("spans", "x", spans=(Span(1, 0, 1, "boast", 1.0),)),
        Conversation("asked", "asked", (Message("user", "anyone?"), Message("assistant", " "))),
        row("other", "x", labels={"toxicity": 1.0}),
    ]
    with serving(lambda *_: quoting()) as server:
        done = read(rows, server.url, tmp_path)
    assert len(server.bodies) == 1
    assert done.rest == rows[:3]
    assert (done.counts["labelled already"], done.counts["without an answer"]) == (2, 1)
    assert labelled(done.judged[0], "boast").labels == {"toxicity": 1.0, "boast": 0.0}


def test_a_quote_that_is_nowhere_is_dropped_and_a_row_of_only_such_stays_unlabelled(tmp_path):
    rows = [row("some", "I rule"), row("none", "I serve")]
    with serving(lambda body, _: quoting("I rule", "You fail") if "I rule" in str(body) else quoting("ha")) as server:
        done = read(rows, server.url, tmp_path)
    some, none = (labelled(judged, "boast") for judged in done.judged)
    assert some.spans == (Span(1, 0, 6, "boast", 1.0),)
    assert none == rows[1]
    assert (done.counts["nowhere"], done.counts["located"], done.counts["unreadable"]) == (2, 1, 1)


def test_a_reply_of_another_form_is_asked_for_again_a_bounded_number_of_times(tmp_path):
    def respond(body, _):
        if "never" in body["messages"][1]["content"]:
            return said("I cannot")
        return quoting("I rule") if len(body["messages"]) == 4 else said("Sure: I rule")

    rows = [row("later", "I rule"), row("never", "never")]
    with serving(respond) as server:
        done = read(rows, server.url, tmp_path)
        assert len(server.bodies) == 2 + 3
        again = read(rows, server.url, tmp_path)
        assert len(server.bodies) == 5
    assert [judged.outcome for judged in done.judged] == ["yes", "unreadable"]
    assert again.judged == done.judged
    assert labelled(done.judged[1], "boast") == rows[1]
    assert server.bodies[-1]["messages"][2]["content"] in ("I cannot", "Sure: I rule")


def test_a_second_run_asks_only_what_is_missing_and_a_new_definition_asks_anew(tmp_path):
    rows = [row(f"r{i}", f"text {i}") for i in range(6)]
    settings = {"metric": "boast", "journal": tmp_path / "answers.jsonl"}
    with serving(lambda *_: quoting()) as server:
        judge_passages(rows[:4], "it boasts", endpoints=[endpoint(server.url)], **settings)
        judge_passages(rows, "it boasts", endpoints=[endpoint(server.url)], **settings)
        assert len(server.bodies) == 6
        judge_passages(rows, "it brags", endpoints=[endpoint(server.url)], **settings)
        assert len(server.bodies) == 12
        judge_passages(rows, "it boasts", endpoints=[endpoint(server.url), endpoint(server.url)], **settings)
        assert len(server.bodies) == 18


def test_a_killed_run_goes_on_where_it_was_and_asks_no_kept_question_again(tmp_path):
    """The first process is killed while its third request hangs."""
    journal = tmp_path / "answers.jsonl"
    hung = threading.Event()
    numbers = count(1)

    def respond(*_):
        if next(numbers) == 3:
            hung.set()
            time.sleep(1.0)
        return quoting()

    code = (
        "import sys\nfrom pathlib import Path\nfrom pilotfish.texts import *\n"
        "judge_passages(read_jsonl(Path(sys.argv[1])), 'it boasts', metric='boast', journal=Path(sys.argv[2]), "
        "endpoints=[Endpoint(base_url=sys.argv[3], model='judge')], concurrency=1)"
    )
    rows = [row(f"r{i}", f"text number {i}") for i in range(5)]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    with serving(respond) as server:
        process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "rows.jsonl"), str(journal), server.url])
        assert hung.wait(30)
        process.kill()
        process.wait()
        assert journal.read_text().count("\n") == 2
        journal.write_text(journal.read_text() + '{"id": "r2", "pa')  # as a crash within a write leaves it
        done = read(rows, server.url, tmp_path)
    assert [judged.outcome for judged in done.judged] == ["no"] * 5
    asked = [re.search(r"text number \d", body["messages"][1]["content"])[0] for body in server.bodies]
    assert sorted(asked) == sorted([*(f"text number {i}" for i in range(5)), "text number 2"])


def test_ctrl_c_keeps_the_replies_to_requests_in_flight_and_makes_no_more(tmp_path, monkeypatch):
    both_in_flight = threading.Barrier(3)

    def interrupted(*_, **__):
        both_in_flight.wait(30)
        raise KeyboardInterrupt

    def respond(*_):
        both_in_flight.wait(30)
        time.sleep(0.5)
        return quoting()

    monkeypatch.setattr("pilotfish.texts.labelling.progress", interrupted)
    rows = [row(f"r{i}", "x") for i in range(20)]
    with serving(respond) as server:
        with pytest.raises(KeyboardInterrupt):
            read(rows, server.url, tmp_path)
        assert len(server.bodies) == 2
    assert (tmp_path / "answers.jsonl").read_text().count("\n") == 2


def test_a_refused_key_stops_the_run_and_stands_in_no_file_log_or_error(tmp_path, caplog):
    caplog.set_level(logging.DEBUG)
    numbers = count()

    def respond(_, headers):
        number = next(numbers)
        if number == 0:
            return said(json.dumps({"quotes": ["x"], "why": headers["Authorization"]}))
        return (500 if number == 1 else 401), {}, headers["Authorization"].encode()

    rows = [row(f"r{i}", "x") for i in range(50)]
    with serving(respond) as server, pytest.raises(EndpointError, match="refuses the API key") as caught:
        judge_passages(
            rows,
            "d",
            metric="m",
            endpoints=[endpoint(server.url, api_key=KEY)],
            journal=tmp_path / "a.jsonl",
            concurrency=1,
        )
    assert len(server.bodies) < 6
    kept = (tmp_path / "a.jsonl").read_text()
    assert kept.count("\n") == 1
    assert "[API key]" in kept
    assert KEY not in kept + caplog.text + str(caught.value)
    assert "another try" in caplog.text


def test_rows_that_a_server_refuses_are_left_for_the_next_run(tmp_path):
    rows = [row("long", "very long"), *(row(f"r{i}", "x") for i in range(8))]
    with serving(lambda body, _: (400, {}, b"too long") if "very long" in str(body) else quoting()) as server:
        done = read(rows, server.url, tmp_path)
        assert (done.counts["unanswered"], done.counts["no"]) == (1, 8)
        assert labelled(done.judged[0], "boast") == rows[0]
        read(rows, server.url, tmp_path)
    assert len(server.bodies) == 10


def test_five_unanswered_requests_in_a_row_stop_the_run(tmp_path):
    with serving(lambda *_: (500, {}, b"down")) as server, pytest.raises(EndpointError, match="5 requests in a row"):
        read([row(f"r{i}", "x") for i in range(100)], server.url, tmp_path, max_retries=0)
    assert 5 <= len(server.bodies) <= 8


def test_settings_that_make_no_sense_are_refused(tmp_path):
    settings = {"metric": "m", "endpoints": [endpoint("http://localhost/v1")], "journal": tmp_path / "a"}
    with pytest.raises(SettingError, match="say in a sentence"):
        judge_passages([row("a", "x")], " ", **settings)
    with pytest.raises(SettingError, match="0 passes"):
        judge_passages([row("a", "x")], "d", **{**settings, "endpoints": []})
    with pytest.raises(TextError, match="share an id"):
        judge_passages([row("a", "x"), row("a", "y")], "d", **settings)


def test_a_damaged_line_of_the_journal_is_named(tmp_path):
    path = tmp_path / "j"
    path.write_text('{"a": 1}\nnonsense\n{"a": 2}\n')
    with pytest.raises(TextError, match=r"j:2: not JSON"):
        Journal(path)


# Two passes.


@pytest.mark.parametrize(
    ("first", "second", "outcome", "spans", "labels"),
    [
        ((), (), "no", [], {"m": 0.0}),
        (((0, 4),), ((2, 6),), "yes", [(2, 4)], {"m": 1.0}),
        (((0, 2),), ((4, 6),), "yes, elsewhere", [], {"m": 1.0}),
        (((0, 2),), (), "disputed", [], {}),
        (((0, 2),), None, "unreadable", [], {}),
    ],
)
def test_only_what_both_passes_say_becomes_a_label(first, second, outcome, spans, labels):
    judged = Judged(row("a", "abcdefgh"), 1, (first, second))
    found = labelled(judged, "m")
    assert judged.outcome == outcome
    assert [(span.start, span.end) for span in found.spans] == spans
    assert found.labels == labels


def test_the_second_pass_may_be_another_model(tmp_path):
    with serving(lambda body, _: quoting("I rule") if body["model"] == "one" else quoting()) as server:
        done = judge_passages(
            [row("a", "I rule")],
            "d",
            metric="m",
            endpoints=[endpoint(server.url, model="one"), endpoint(server.url, model="two")],
            journal=tmp_path / "a",
        )
    assert done.judged[0].passes == (((0, 6),), ())
    assert [is_second_pass(body) for body in sorted(server.bodies, key=lambda b: b["model"])] == [False, True]


def test_kappa_has_its_hand_value():
    # 20 yes/yes, 5 yes/no, 10 no/yes, 15 no/no: observed 0.7, by chance 0.5
    first = np.array([True] * 25 + [False] * 25)
    second = np.array([True] * 20 + [False] * 5 + [True] * 10 + [False] * 15)
    assert kappa(first, second) == pytest.approx(0.4)
    assert kappa(first, first) == 1.0
    assert kappa(first, ~first) == pytest.approx(-1.0)
    assert np.isnan(kappa(first | True, first | True))


def test_kappa_is_that_of_scikit_learn():
    metrics = pytest.importorskip("sklearn.metrics")
    random = np.random.default_rng(0)
    first, second = random.random(200) < 0.3, random.random(200) < 0.4
    assert kappa(first, second) == pytest.approx(metrics.cohen_kappa_score(first, second))


def judged_rows(pairs) -> list[Judged]:
    return [Judged(row(f"r{i}", "x" * 20, group=f"g{i // 2}"), 1, passes) for i, passes in enumerate(pairs)]


def test_agreement_counts_characters_and_leaves_unread_rows_out():
    pairs = [(((0, 4),), ((2, 6),)), (((0, 10),), ((0, 10),)), ((), ()), ((), ((3, 5),)), (None, ((0, 9),))] * 3
    found = agreement(judged_rows(pairs), generator=torch.Generator().manual_seed(0))
    assert found.num_rows == 12
    assert found.character_f1.value == pytest.approx(2 * 12 / (14 + 16))
    assert found.kappa.value == pytest.approx((0.75 - 0.5) / 0.5)
    assert found.kappa.low <= found.kappa.value <= found.kappa.high
    assert found.character_f1.low < found.character_f1.value < found.character_f1.high
    assert found.kappa.n == 7


def test_agreement_has_no_interval_for_one_group_and_is_none_for_one_pass():
    one = agreement(judged_rows([(((0, 4),), ((0, 4),)), ((), ())]), generator=torch.Generator())
    assert one.kappa.value == 1.0
    assert np.isnan(one.kappa.low)
    assert agreement([Judged(row("a", "x"), 1, ((),))], generator=torch.Generator()) is None


def test_passes_that_mark_at_random_agree_no_better_than_chance():
    random = np.random.default_rng(1)
    pairs = [tuple(((0, 5),) if random.random() < 0.5 else () for _ in range(2)) for _ in range(400)]
    found = agreement(judged_rows(pairs), generator=torch.Generator().manual_seed(0))
    assert found.kappa.low < 0 < found.kappa.high
