"""The server's page in a real browser: it shows all that the server said, and no script runs but its own."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest
from browser_kit import HOSTILE, Visit, ask, page_server, scores, stored, texts
from conftest import seeded_bank
from server_kit import pausing, running, serving, until
from upstream_kit import scripted, told

from pilotfish.engines import EmbeddedEngine
from pilotfish.heads import HeadBank, SourceCard, ThresholdCard
from pilotfish.models import LoadedModel
from pilotfish.server import ProxyBackend, ServerSettings, Upstream

CARD = ThresholdCard(
    threshold=0.5,
    budget=0.01,
    num_benign=500,
    num_flagged=1,
    fpr_upper=0.00945,
    benign_source="code, plain talk",
    by_source={
        "code": SourceCard(num_benign=200, num_flagged=1, fpr_upper=0.0235),
        "plain talk": SourceCard(num_benign=300, num_flagged=0, fpr_upper=0.0099),
    },
)


@pytest.fixture(scope="module")
def engine(pair):
    bank = seeded_bank(pair, reader="draft")
    card = replace(bank.card, thresholds={"wide": CARD})
    return EmbeddedEngine(pair, [HeadBank(bank.heads, bank.identity, card=card)])


@pytest.fixture(scope="module")
def server(engine, tmp_path_factory):
    with page_server(engine, tmp_path_factory.mktemp("page")) as found:
        yield found


def test_an_answer_comes_token_by_token_and_every_score_is_the_servers(visit, server):
    began = visit()
    began.context.add_init_script(
        "window.counts = new Set(); new MutationObserver(() => counts.add(document.querySelectorAll('.token').length))"
        ".observe(document, { childList: true, subtree: true });"
    )
    page = began.open()
    ask(page, tokens=96)
    assert page.evaluate("counts.size") > 5
    (row,) = server.store.exchanges(limit=1)
    exchange = server.store.exchange(row["id"])
    assert row["asked"] == "hello"
    assert page.locator(".token.pending:not(.key *)").count() == 0
    for side, selector in (("prompt", ".asked .token"), ("answer", ".pane section .token")):
        tokens = [token for token in exchange["tokens"] if (token["origin"] == "prompt") == (side == "prompt")]
        assert scores(page, selector) == pytest.approx([token["scores"]["wide"] for token in tokens], abs=1e-5)
    shown = "".join(texts(page, ".pane section .token"))
    assert shown == re.sub(r"[\x00-\x08\x0b-\x1f\x7f]", "", exchange["answer"])  # a control has a mark instead
    over = [token["position"] for token in exchange["tokens"] if token["running"]["wide"] >= 0.5]
    assert page.locator(".pane .token.over").count() == len(over)
    rejected = [token for item in exchange["rounds"] for token in item["drafted"] if not token["accepted"]]
    assert page.locator(".pane .lookahead").count() == len(rejected) > 0
    assert page.locator(".pane .lookahead").first.is_hidden()
    page.keyboard.press("Tab")
    page.check("#drafts")
    assert page.locator(".pane .lookahead").first.is_visible()
    assert "answer has ended" in page.inner_text("#spoken")
    assert len(exchange["verdicts"]) > 0
    assert page.locator(".verdicts li").count() > 0


def test_a_conversation_goes_on_and_can_begin_anew(visit, server):
    page = visit().open()
    ask(page, "first", tokens=8)
    ask(page, "second", tokens=8)
    assert page.locator(".pane").count() == 2
    newest = server.store.exchange(server.store.exchanges(limit=1)[0]["id"])
    assert "first" in newest["prompt"]
    assert newest["asked"] == "second"
    page.click("#anew")
    assert page.locator(".pane").count() == 0
    assert page.locator("#opening").is_visible()


def test_an_answer_can_be_stopped(visit, server):
    page = visit().open()
    with pausing(server.backend, passes=12):
        page.fill("#question", "go on and on")
        page.keyboard.press("Enter")
        page.wait_for_selector(".pane section .token")
        page.keyboard.press("Escape")
        page.wait_for_selector("#exports:not([hidden])")
    assert "stopped by you" in page.inner_text(".pane .stats")
    assert page.locator("#send").is_visible()
    until(lambda: server.store.exchanges(limit=1)[0]["state"] == "cancelled")


def test_what_the_server_refuses_is_said_in_its_words(visit):
    began = visit()
    began.expects_refusals = True
    page = began.open()
    ask(page, tokens=4097)
    assert "4,097 is more than the 4,096" in page.inner_text(".pane .stats")
    page.click("#save-html")
    assert "nothing to save" in page.inner_text("#save-note")


def test_pointing_shows_a_tokens_scores_and_a_click_pins_them(visit):
    page = visit().open("#exchange=x-one")
    panel = page.locator("#panel")
    assert "Point at a token" in panel.inner_text()
    page.hover(".pane section .token")
    assert "Token 2, round 0: drafted" in panel.inner_text()
    assert "0.667" in panel.inner_text()
    page.click(".pane section .token")
    page.click(".asked summary")
    page.hover(".asked .token")
    assert "Token 2" in panel.inner_text()
    page.keyboard.press("Escape")
    page.hover(".asked .token >> nth=1")
    assert "Token 1: in the prompt" in panel.inner_text()


def test_on_a_narrow_screen_a_pinned_token_covers_the_composer_and_not_the_other_way_round(visit):
    page = visit(viewport={"width": 390, "height": 844}).open()
    ask(page, tokens=24)
    page.click(".pane section .token")
    where = page.locator("#panel").bounding_box()
    for part in (0.1, 0.5, 0.9):
        place = [where["x"] + where["width"] / 2, where["y"] + part * where["height"]]
        assert page.evaluate("([x, y]) => document.elementFromPoint(x, y).closest('#panel') !== null", place)
    page.click("#panel button")
    page.click("#question")
    assert page.evaluate("document.documentElement.scrollWidth") == 390


def test_a_target_without_a_draft_offers_nothing_of_drafts(browser, pair, tmp_path):
    alone = replace(pair, draft=None, draft_identity=None)
    with running(EmbeddedEngine(alone, [seeded_bank(pair, reader="target")]), tmp_path) as server:
        began = Visit(browser, server.url)
        page = began.open()
        ask(page, tokens=8)
        assert page.locator("#drafts").is_hidden()
        assert page.locator("#metric option").all_inner_texts() == ["wide", "narrow"]
        page.wait_for_selector("#budget:has-text('Of the last 1 exchange here')")
        began.close()


def test_the_slider_says_at_once_what_would_be_flagged_and_what_that_costs(visit, server):
    server.store.record(stored("x-many", "w", size=18))
    page = visit().open("#exchange=x-many")
    page.wait_for_selector("#budget:has-text('exchanges here')")
    for limit, promise in (
        (
            0.75,
            "False positives: at most 0.95 % of benign answers (95 % bound; 1 of 200 in code, 0 of 300 in plain talk).",
        ),
        (0.25, "the card promises nothing below 0.50"),
    ):
        page.fill("#threshold", f"{limit}")
        tokens = server.store.exchange("x-many")["tokens"]
        over = [token["running"]["wide"] >= limit for token in tokens]
        assert page.locator(".pane .token.over").count() == sum(over)
        expected = (
            f"At {limit:.2f}, {sum(over[2:])} tokens of the answer and {sum(over[:2])} of the prompt would be flagged."
        )
        assert page.inner_text("#flaggable") == expected
        assert promise in page.inner_text("#budget")
        rows = [row["stats"].get("highest", {}).get("wide") for row in server.store.exchanges(limit=200)]
        known = [row for row in rows if row is not None]
        flagged = sum(row >= limit for row in known)
        assert f"Of the last {len(known)} exchanges here it would flag {flagged}," in page.inner_text("#budget")
    page.click("#reset")
    assert page.input_value("#threshold") == "0.5"
    page.select_option("#metric", "narrow")
    assert "promises nothing" in page.inner_text("#budget")
    page.select_option("#metric", "signal.divergence")
    assert "no calibration" in page.inner_text("#budget")


def test_the_maximum_is_jumped_to_and_several_metrics_show_at_once(visit, server):
    server.store.record(stored("x-tall", "w", size=400))
    page = visit().open("#exchange=x-tall")
    page.keyboard.press("m")
    assert "Token 401" in page.inner_text("#panel")
    page.wait_for_function("document.activeElement.getBoundingClientRect().bottom < innerHeight")  # it may lay out more
    page.click("#also summary")
    page.check("#lanes input[value=narrow]")
    assert page.eval_on_selector(".pane section .token", "node => node.style.getPropertyValue('--lane-0')") == "0.1"
    assert "narrow" in page.inner_text("#key-lanes")
    assert page.locator("#lanes input[value=wide]").is_disabled()


def test_everything_can_be_done_from_the_keyboard(visit):
    page = visit().open()
    assert page.evaluate("document.activeElement.id") == "question"
    ask(page, tokens=24)
    for _ in range(60):
        page.keyboard.press("Shift+Tab")
        if page.evaluate("document.activeElement.matches('.pane section .token')"):
            break
    else:
        pytest.fail("the text cannot be reached")
    page.keyboard.press("End")
    last = page.evaluate("document.activeElement.getAttribute('aria-label')")
    page.keyboard.press("ArrowLeft")
    before = page.evaluate("document.activeElement.getAttribute('aria-label')")
    number = re.search(r"Token (\d+)", last)
    assert f"Token {int(number[1]) - 1}" in before
    assert re.search(r"wide (0\.\d\d|1\.00)", before)
    page.keyboard.press("Enter")
    assert "Pinned" in page.inner_text("#panel")
    page.keyboard.press("d")
    assert page.is_checked("#drafts")
    page.keyboard.press("Escape")
    assert "Pinned" not in page.inner_text("#panel")
    page.keyboard.press("/")
    assert page.evaluate("document.activeElement.id") == "question"
    page.keyboard.type("md/")  # letters, where one writes
    assert page.input_value("#question") == "md/"


def test_markup_in_a_models_output_stays_text(visit):
    began = visit()
    page = began.open()
    token = {"position": 2, "text": HOSTILE, "origin": "draft", "scores": {"wide": 0.9}, "running": {"wide": 0.9}}
    verdict = {"position": 2, "metric": HOSTILE, "action": "flag", "score": 0.9, "threshold": 0.5, "reason": HOSTILE}
    said = {"tokens": [{**token, "unscored": {"narrow": HOSTILE}}], "verdicts": [{**verdict, "is_early": False}]}
    drafted = [{"text": HOSTILE, "accepted": False, "scores": {}}]
    said["rounds"] = [{"round": 1, "start": 2, "drafted": drafted}]
    choice = {"index": 0, "delta": {"content": HOSTILE}, "finish_reason": None, "monitor": said}
    body = f"data: {json.dumps({'id': 'x', 'choices': [choice]})}\n\ndata: [DONE]\n\n"
    page.route("**/v1/chat/completions", lambda route: route.fulfill(body=body, content_type="text/event-stream"))
    ask(page, HOSTILE)
    page.hover(".pane .token.draft")
    assert texts(page, ".pane .token.draft") == [HOSTILE.replace("\u202e", "")]
    assert HOSTILE in page.text_content(".verdicts")
    assert HOSTILE in page.text_content("#panel")
    assert page.locator("main img, main script").count() == 0
    assert page.evaluate("window.pwned") is None


def test_behind_a_proxy_it_shows_what_a_model_elsewhere_says(browser, pair, bank, tmp_path):
    with scripted() as (upstream, script):
        reader = LoadedModel(pair.draft, pair.tokenizer, pair.draft_identity, "")
        backend = ProxyBackend(Upstream(upstream, "big"), reader, bank)
        with serving(backend, tmp_path, ServerSettings(port=0)) as server:
            began = Visit(browser, server.url)
            page = began.open()
            assert "big answers, elsewhere." in page.inner_text("#models")
            script.say(*told(["return ", "the value", " of x"]))
            ask(page)
            assert "".join(texts(page, ".pane section .token")) == "return the value of x"
            assert page.locator("#drafts").is_hidden()
            assert page.locator(".strip .acceptance").is_hidden()
            began.close()


def test_a_stream_that_breaks_off_is_said_to_have_broken_off(visit):
    page = visit().open()
    body = 'data: {"id": "x", "choices": []}\n\n'
    page.route("**/v1/chat/completions", lambda route: route.fulfill(body=body, content_type="text/event-stream"))
    ask(page)
    assert "ended before the answer did" in page.inner_text(".pane .stats")
