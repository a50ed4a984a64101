"""The monitor's own routes, and who may use them."""

from __future__ import annotations

import logging

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from server_kit import running, until

from pilotfish.actions import Policy, Rule
from pilotfish.core import Conversation, Message
from pilotfish.engines import EmbeddedEngine, Request
from pilotfish.errors import SettingError, StoreError
from pilotfish.scores import score_tokens
from pilotfish.server import EmbeddedBackend, Limits, ServerSettings, Service, Store, new_key
from pilotfish.server.settings import is_loopback
from pilotfish.texts import tokenize

FLAG = Policy(rules=(Rule(metric="wide", threshold=0.0, scope="answer"),), hold=True)
BODY = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 6, "temperature": 0}


@pytest.fixture(scope="module")
def engine(pair, bank):
    return EmbeddedEngine(pair, [bank])


@pytest.fixture(scope="module")
def server(engine, tmp_path_factory):
    limits = Limits(body_bytes=20_000, texts=4)
    with running(engine, tmp_path_factory.mktemp("monitor"), policy=FLAG, limits=limits) as found:
        yield found


@pytest.fixture
def http(server):
    with httpx.Client(base_url=server.url, timeout=60) as client:
        yield client


def chat(http, engine, **more):
    body = {"model": engine.pair.target_identity.name, **BODY, **more}
    return http.post("/v1/chat/completions", json=body)


def test_heads_are_told_with_their_cards(http):
    said = http.get("/v1/monitor/heads").json()
    assert not said["taxed"]
    assert [(head["metric"], head["reader"], head["threshold"]) for head in said["heads"]] == [
        ("wide", "draft", 0.5),
        ("narrow", "draft", 0.5),
    ]
    assert said["heads"][0]["card"]["identity"]["hidden_size"] > 0


def test_texts_are_scored_as_one_offline_pass_scores_them(http, engine):
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "def f(): return"}]
    said = http.post("/v1/monitor/score", json={"texts": [{"messages": turns}, {"text": "naïve 💡"}]}).json()
    messages = tuple(Message(turn["role"], turn["content"]) for turn in turns)
    for result, expected in zip(said["results"], [messages, (Message("assistant", "naïve 💡"),)], strict=True):
        text = tokenize(Conversation("x", "x", expected), engine.pair.tokenizer)
        boundary = text.messages.index(len(expected) - 1)
        found = score_tokens(engine.pair.draft, engine.banks["draft"], text.token_ids, boundary=boundary)
        assert [token["text"] for token in result["tokens"]] == list(text.pieces)
        running_scores = [token["running"]["wide"] for token in result["tokens"]]
        assert running_scores == pytest.approx(found.running[:, 0].tolist(), abs=1e-6)
        assert result["heads"]["wide"]["max"] == max(running_scores)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"texts": []}, "texts"),
        ({"texts": [{"text": "x"}] * 5}, "at most 4"),
        ({"texts": [{}]}, "either as `messages` or as `text`"),
        ({"texts": [{"text": "x" * 9000}]}, "Cut the text"),
        ({"texts": [{"text": "x"}], "heads": ["scheming"]}, "has no head"),
    ],
)
def test_texts_that_cannot_be_scored_are_refused(http, body, words):
    reply = http.post("/v1/monitor/score", json=body)
    assert reply.status_code == 400
    assert words in reply.json()["error"]["message"]


def test_lookahead_has_no_text_under_a_gate(engine, tmp_path):
    gate = Policy(rules=(Rule(metric="wide", action="stop", threshold=1.0, scope="answer"),))
    for policy, has_text in ((Policy(), True), (gate, False)):
        folder = tmp_path / str(has_text)
        folder.mkdir()
        with running(engine, folder, policy=policy) as server, httpx.Client(base_url=server.url, timeout=60) as http:
            choice = chat(http, engine, monitor={"lookahead": True}).json()["choices"][0]
        drafted = [token for item in choice["monitor"]["rounds"] for token in item["drafted"]]
        assert drafted
        assert all((token["text"] is not None) == has_text for token in drafted)


def test_an_exchange_and_its_alert_can_be_read_back(http, engine):
    reply = chat(http, engine).json()
    rows = http.get("/v1/monitor/exchanges", params={"limit": 1}).json()["exchanges"]
    assert [row["id"] for row in rows] == [reply["id"]]
    found = http.get(f"/v1/monitor/exchanges/{reply['id']}").json()
    assert found["answer"] == reply["choices"][0]["message"]["content"]
    assert len(found["tokens"]) == reply["usage"]["total_tokens"]
    (alert,) = http.get("/v1/monitor/alerts", params={"limit": 1}).json()["alerts"]
    assert alert["exchange_id"] == reply["id"]
    assert http.get("/v1/monitor/exchanges/none").status_code == 404
    assert http.post(f"/v1/monitor/alerts/{alert['id']}/retry").json() == {"num_revived": 0}


def test_a_policy_is_read_tried_and_replaced(engine, tmp_path):
    strict = {"rules": [{"metric": "wide", "action": "stop", "threshold": 0.0, "scope": "answer"}]}
    with running(engine, tmp_path) as server, httpx.Client(base_url=server.url, timeout=60) as http:
        assert http.get("/v1/monitor/policy").json() == {"policy": {}}
        chat(http, engine)
        tried = http.post("/v1/monitor/policy/dry-run", json={"policy": strict}).json()
        assert (tried["num_exchanges"], tried["num_flagged_before"], tried["num_flagged_after"]) == (1, 0, 1)
        assert tried["changed"][0]["after"] == ["wide:stop"]
        assert http.get("/v1/monitor/policy").json() == {"policy": {}}
        assert http.put("/v1/monitor/policy", json={"policy": strict}).json() == {"policy": strict}
        assert chat(http, engine).json()["choices"][0]["finish_reason"] == "content_filter"
        again = http.post("/v1/monitor/policy/dry-run", json={"policy": strict, "last": 1}).json()
        assert (again["num_flagged_before"], again["changed"]) == (1, [])
    with running(engine, tmp_path) as server, httpx.Client(base_url=server.url, timeout=60) as http:
        assert http.get("/v1/monitor/policy").json() == {"policy": strict}  # after a restart, too


@pytest.mark.parametrize(
    ("policy", "words"),
    [
        ({"rules": [{"metric": "scheming"}]}, "no head scores it"),
        ({"rules": [{"metric": "wide", "action": "explode"}]}, "use one of"),
        ({"rulez": []}, "unknown key 'rulez'"),
        ({"rules": [{"metric": "wide", "threshold": 7}]}, "outside [0, 1]"),
    ],
)
def test_a_policy_that_could_not_be_carried_out_is_refused_and_the_old_one_holds(http, policy, words):
    before = http.get("/v1/monitor/policy").json()
    for method, path in (("PUT", "/v1/monitor/policy"), ("POST", "/v1/monitor/policy/dry-run")):
        reply = http.request(method, path, json={"policy": policy})
        assert reply.status_code == 400
        assert words in reply.json()["error"]["message"]
    assert http.get("/v1/monitor/policy").json() == before


def test_metrics_are_named_after_vllms(http, engine):
    chat(http, engine)
    families = {family.name: family for family in text_string_to_metric_families(http.get("/metrics").text)}
    names = ("num_drafts", "num_draft_tokens", "num_accepted_tokens", "num_accepted_tokens_per_pos")
    for name in names:
        assert f"pilotfish:spec_decode_{name}" in families

    def total(name: str) -> float:
        return sum(s.value for s in families[f"pilotfish:{name}"].samples if not s.name.endswith("_created"))

    assert total("spec_decode_num_accepted_tokens") <= total("spec_decode_num_draft_tokens")
    assert total("spec_decode_num_accepted_tokens") == total("spec_decode_num_accepted_tokens_per_pos")
    assert total("prompt_tokens") + total("generation_tokens") == total("monitor_tokens_scored") + total(
        "monitor_tokens_missed"
    )
    assert total("monitor_flags") >= 1
    assert total("num_requests_running") == total("num_requests_waiting") == 0


def test_health_and_readiness(engine, tmp_path):
    class Gone(Store):
        is_gone = False

        def ping(self) -> None:
            if self.is_gone:
                raise StoreError("the store at secret-place could not be read")

    store = Gone(f"sqlite:///{tmp_path / 's.db'}")
    with running(engine, tmp_path, store=store) as server, httpx.Client(base_url=server.url) as http:
        assert http.get("/readyz").json() == {"status": "ok", "reasons": []}
        store.is_gone = True
        reply = http.get("/readyz")
        assert (reply.status_code, reply.json()["reasons"]) == (503, ["the store does not answer"])
        assert http.get("/healthz").status_code == 200


# Who may do what.

ROUTES = {
    "use": [("GET", "/v1/models"), ("GET", "/v1/monitor/heads"), ("GET", "/v1/monitor/policy")],
    "read": [("GET", "/v1/monitor/exchanges"), ("GET", "/v1/monitor/alerts"), ("GET", "/metrics")],
    "admin": [("PUT", "/v1/monitor/policy"), ("POST", "/v1/monitor/alerts/x/retry")],
}


def test_each_route_wants_its_scope_and_the_keys_stay_out_of_the_log(engine, tmp_path, caplog):
    caplog.set_level(logging.DEBUG)
    store = Store(f"sqlite:///{tmp_path / 's.db'}")
    keys = {scope: new_key(scope, [scope]) for scope in ROUTES}
    for key in keys.values():
        store.add_key(key.row)
    with running(engine, tmp_path, store=store) as server, httpx.Client(base_url=server.url) as http:
        for needed, routes in ROUTES.items():
            for method, path in routes:
                body = {"json": {"policy": {}}} if method != "GET" else {}
                assert http.request(method, path, **body).status_code == 401
                for scope, key in keys.items():
                    headers = {"authorization": f"Bearer {key.secret}"}
                    status = http.request(method, path, headers=headers, **body).status_code
                    assert status == (200 if scope == needed else 403), (path, scope)
        wrong = {"authorization": f"Bearer {keys['use'].secret[:-1]}"}
        reply = http.get("/v1/models", headers=wrong)
        assert (reply.status_code, reply.headers["www-authenticate"]) == (401, "Bearer")
        assert http.get("/healthz").status_code == 200
        store.revoke_key(keys["use"].row["id"])
        right = {"authorization": f"Bearer {keys['use'].secret}"}
        server.service.ring._read_at = -float("inf")  # as after five seconds
        assert http.get("/v1/models", headers=right).status_code == 401
    logged = caplog.text
    assert not any(key.secret in logged or key.row["digest"] in logged for key in keys.values())


def test_a_key_that_asks_too_often_is_told_when_to_come_back(engine, tmp_path):
    with running(engine, tmp_path, requests_per_minute=2) as server, httpx.Client(base_url=server.url) as http:
        assert [http.get("/v1/models").status_code for _ in range(3)] == [200, 200, 429]
        reply = http.get("/v1/models")
        assert 1 <= int(reply.headers["retry-after"]) <= 30
        assert reply.json()["error"]["code"] == "rate_limit"


def test_an_address_that_others_can_reach_needs_a_key(engine, tmp_path):
    store = Store(f"sqlite:///{tmp_path / 's.db'}")
    backend = EmbeddedBackend(engine)
    settings = ServerSettings(host="0.0.0.0")
    with pytest.raises(SettingError, match="there is no API key; make one with `pilotfish keys add`"):
        Service(backend, store, settings, policy=Policy())
    key = new_key("x", ["use"])
    store.add_key(key.row)
    Service(backend, store, settings, policy=Policy())
    store.revoke_key(key.row["id"])
    with pytest.raises(SettingError, match="there is no API key"):
        Service(backend, store, settings, policy=Policy())
    backend.close()
    store.close()


def test_a_server_that_had_keys_does_not_open_when_they_are_revoked(engine, tmp_path):
    store = Store(f"sqlite:///{tmp_path / 's.db'}")
    key = new_key("x", ["use"])
    store.add_key(key.row)
    store.revoke_key(key.row["id"])
    with running(engine, tmp_path, store=store) as server:
        assert httpx.get(f"{server.url}/v1/models").status_code == 401


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("127.0.0.1", True),
        ("127.8.8.8", True),
        ("localhost", True),
        ("::1", True),
        ("[::1]", True),
        ("0.0.0.0", False),
        ("::", False),
        ("10.0.0.1", False),
        ("example.org", False),
        ("", False),
        ("127.0.0.1.example.org", False),
    ],
)
def test_loopback_is_known_for_certain_or_not_at_all(host, expected):
    assert is_loopback(host) == expected


# What browsers and rude clients may do.


def test_every_answer_has_its_security_headers_and_none_opens_to_other_sites(http, engine):
    replies = [http.get("/healthz"), http.get("/nothing"), http.get("/openapi.json"), chat(http, engine)]
    for reply in replies:
        policy = reply.headers["content-security-policy"]
        assert "script-src 'self'" in policy
        assert "unsafe-inline" not in policy
        assert reply.headers["x-content-type-options"] == "nosniff"
        assert not [name for name in reply.headers if name.startswith("access-control")]


def test_a_page_of_another_site_is_refused(http, engine, server):
    own = server.url
    assert http.get("/v1/models", headers={"origin": own}).status_code == 200
    for origin in ("https://evil.example", "null", "http://127.0.0.1:1"):
        assert http.get("/v1/models", headers={"origin": origin}).status_code == 403
    preflight = {"origin": "https://evil.example", "access-control-request-method": "POST"}
    assert http.options("/v1/chat/completions", headers=preflight).status_code == 403


def test_a_name_that_was_rebound_to_this_machine_is_refused(http):
    assert http.get("/v1/models", headers={"host": "evil.example:8000"}).status_code == 421
    assert http.get("/v1/models", headers={"host": "localhost"}).status_code == 200


def test_a_form_cannot_pass_for_json(http):
    reply = http.post("/v1/monitor/score", content='{"texts": [{"text": "x"}]}', headers={"content-type": "text/plain"})
    assert reply.status_code == 400


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_is_cut_off_at_its_limit(http, chunked):
    body = b'{"texts": [{"text": "' + b"x" * 30_000 + b'"}]}'
    content = iter([body[:10_000], body[10_000:]]) if chunked else body
    reply = http.post("/v1/monitor/score", content=content, headers={"content-type": "application/json"})
    assert reply.status_code == 413
    assert "20,000 bytes" in reply.json()["error"]["message"]


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b'{"texts": NaN}', b"[" * 5000, b'{"a":"\\ud800"}'])
def test_rubbish_is_refused_in_one_form(http, content):
    for path in ("/v1/chat/completions", "/v1/completions", "/v1/monitor/score", "/v1/monitor/policy/dry-run"):
        reply = http.post(path, content=content, headers={"content-type": "application/json"})
        assert reply.status_code == 400
        assert set(reply.json()["error"]) == {"message", "type", "param", "code"}


def test_after_all_that_the_engine_is_idle_and_serves(http, engine, server):
    until(lambda: server.backend.load == (0, 0))
    assert (
        chat(http, engine).json()["choices"][0]["message"]["content"]
        == engine.generate("hello", Request(max_new_tokens=6)).answer
    )
