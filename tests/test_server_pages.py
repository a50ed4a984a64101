"""What the page is made of, and what is made of exchanges for it; without a browser."""

from __future__ import annotations

import re
from importlib import resources

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from server_kit import FLAG_ALL, running, until

from pilotfish.engines import EmbeddedEngine
from pilotfish.server import JsonlSink, Store, new_key
from pilotfish.server.exchanges import last_turn
from pilotfish.server.pages import _files

FOLDER = resources.files("pilotfish.server").joinpath("page")


@pytest.fixture(scope="module")
def engine(pair, bank):
    return EmbeddedEngine(pair, [bank])


@pytest.fixture(scope="module")
def server(engine, tmp_path_factory):
    with running(engine, tmp_path_factory.mktemp("pages")) as found:
        yield found


@pytest.fixture
def http(server):
    with httpx.Client(base_url=server.url, timeout=60) as client:
        yield client


def chat(http, engine) -> str:
    body = {"model": engine.pair.target_identity.name, "max_tokens": 6, "temperature": 0}
    body["messages"] = [{"role": "user", "content": "hello"}]
    return http.post("/v1/chat/completions", json=body).json()["id"]


def test_every_file_that_the_page_asks_for_is_there_with_its_type(http):
    html = http.get("/").text
    asked = {name.removeprefix("page/") for name in re.findall(r'(?:src|href)="([^"#]+)"', html)}
    for name in (name for name in _files() if name.endswith(".js")):
        asked |= {name} | set(re.findall(r'^import .* from "\./([^"]+)";', _files()[name].content.decode(), re.M))
    asked |= set(re.findall(r'url\("([^"]+)"\)', _files()["style.css"].content.decode()))
    kinds = {"js": "text/javascript", "css": "text/css", "svg": "image/svg+xml", "woff2": "font/woff2"}
    assert len(asked) > 15
    for name in asked:
        reply = http.get(f"/page/{name}")
        assert reply.status_code == 200, name
        assert reply.headers["content-type"].startswith(kinds[name.rsplit(".", 1)[1]])
    assert not re.search(r"<style|<script>|style=|\son[a-z]+=", html)  # the policy would stop it


def test_a_bundled_font_comes_with_its_licence(http):
    assert "SIL OPEN FONT LICENSE Version 1.1" in http.get("/page/fonts/OpenDyslexic-LICENSE.txt").text


@pytest.mark.parametrize(
    "name", ["", "none.js", "../pages.py", "%2e%2e/pages.py", "live.css", "fonts", "fonts/../../app.py"]
)
def test_other_names_lead_nowhere(http, name):
    assert http.get(f"/page/{name}").status_code == 404


def test_a_file_that_has_not_changed_is_not_sent_again(http):
    first = http.get("/page/live.js")
    again = http.get("/page/live.js", headers={"if-none-match": first.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")


def test_the_page_needs_no_key_and_says_nothing_of_anybody(engine, tmp_path):
    store = Store(f"sqlite:///{tmp_path / 'k.db'}")
    store.add_key(new_key("x", ["use"]).row)
    with running(engine, tmp_path, store=store) as server, httpx.Client(base_url=server.url) as http:
        assert http.get("/").content == FOLDER.joinpath("index.html").read_bytes()
        assert http.get("/v1/monitor/report", params={"exchange": "x"}).status_code == 401


def test_exchanges_are_given_as_one_page_to_save(http, engine):
    ids = [chat(http, engine), chat(http, engine)]
    reply = http.get("/v1/monitor/report", params={"exchange": ",".join(ids)})
    assert reply.headers["content-disposition"].startswith("attachment")
    assert all(name in reply.text for name in ids)
    assert "default-src 'none'" in reply.text
    for wrong, status in (
        ({"exchange": "none"}, 404),
        ({}, 400),
        ({"exchange": "a b"}, 400),
        ({"exchange": ",".join(["x"] * 33)}, 400),
    ):
        assert http.get("/v1/monitor/report", params=wrong).status_code == status


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        (
            "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi\nthere<|im_end|>\n<|im_start|>assistant\n",
            "Hi\nthere",
        ),
        (
            "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
            "Hi",
        ),
        ("<bos><start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\n", "Hi"),
        ("def f(", "def f("),
        ("a < b and <|c", "a < b and <|c"),
        ("<|im_start|>assistant\n", ""),
        ("", ""),
    ],
)
def test_a_prompt_is_labelled_by_its_last_turn(prompt, expected):
    assert last_turn(prompt) == expected


def test_a_label_is_short_however_long_the_prompt():
    assert last_turn("<|im_start|>user\n" + "x" * 1_000_000) == "x" * 400


def test_the_dashboard_asks_for_all_metrics_that_the_server_has_and_for_no_others(engine, tmp_path):
    sink = JsonlSink(tmp_path / "alerts.jsonl")
    with (
        running(engine, tmp_path, policy=FLAG_ALL, sinks=[sink]) as server,
        httpx.Client(base_url=server.url, timeout=60) as http,
    ):
        chat(http, engine)
        until(lambda: 'outcome="delivered"' in http.get("/metrics").text)
        families = text_string_to_metric_families(http.get("/metrics").text)
        exported = [family for family in families if not family.name.endswith("_created")]
        panels = http.get("/grafana.json").json()["panels"]
    suffixes = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count"), "gauge": ("",)}
    labels = {
        family.name + suffix: {label for sample in family.samples for label in sample.labels}
        for family in exported
        for suffix in suffixes[family.type]
    }
    queries = [target["expr"] for panel in panels for target in panel.get("targets", [])]
    shown = {name for query in queries for name in re.findall(r"pilotfish:\w+", query)}
    assert shown <= set(labels)
    assert {re.sub("_(total|bucket)$", "", name) for name in shown} == {family.name for family in exported}
    for query in queries:
        wanted = {label for group in re.findall(r"by \(([\w, ]+)\)", query) for label in group.split(", ")}
        for name in set(re.findall(r"pilotfish:\w+", query)) - {"pilotfish:monitor_errors_total"}:  # none so far
            assert wanted <= labels[name], query
