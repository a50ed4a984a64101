"""The server's page in a real browser: it shows all that the server said, and no script runs but its own."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from dataclasses import replace

import pytest
from browser_kit import Visit, chromium
from conftest import seeded_bank
from server_kit import running, serving
from upstream_kit import scripted, told

from pilotfish.actions import Policy, Rule
from pilotfish.engines import EmbeddedEngine, Token
from pilotfish.engines.records import Scores
from pilotfish.heads import HeadBank
from pilotfish.heads.card import ThresholdCard
from pilotfish.models import LoadedModel
from pilotfish.server import ProxyBackend, ServerSettings, Store, Upstream, new_key
from pilotfish.server.exchanges import Exchange

HOSTILE = "</script><img src=x onerror='window.pwned=1'><svg onload=window.pwned=1>\u202e{{data}}"
CARD = ThresholdCard(
    threshold=0.5, budget=0.01, num_benign=500, num_flagged=1, fpr_upper=0.00945, benign_source="plain talk"
)
FLAG = Policy(rules=(Rule(metric="wide", scope="answer"),))


@pytest.fixture(scope="module")
def browser():
    with chromium() as found:
        yield found


@pytest.fixture(scope="module")
def engine(pair):
    bank = seeded_bank(pair, reader="draft")
    card = replace(bank.card, thresholds={"wide": CARD})
    return EmbeddedEngine(pair, [HeadBank(bank.heads, bank.identity, card=card)])


@pytest.fixture(scope="module")
def server(engine, tmp_path_factory):
    with running(engine, tmp_path_factory.mktemp("page"), policy=FLAG, requests_per_minute=100_000) as found:
        found.store.record(stored("x-one", "plain"))
        found.store.record(stored("x-two", HOSTILE, prompt=f"<|im_start|>user\n{HOSTILE}<|im_end|>"))
        yield found


@pytest.fixture
def visit(browser, server):
    visits = []

    def begin(*, url=server.url, **options) -> Visit:
        visits.append(Visit(browser, url, **options))
        return visits[-1]

    yield begin
    for each in visits:
        each.close()


def stored(name: str, text: str, *, size: int = 1, **changes) -> Exchange:
    """Two tokens of a prompt and an answer of `size` words whose scores rise from 0 to nearly 1."""
    words = ["<|im_start|>", f"{text} ", *[text if i == 0 else f" word{i}\n" for i in range(size)]]
    tokens = [
        Token(
            position=i,
            id=i,
            text=word,
            origin="prompt" if i < 2 else ("draft", "target")[i % 2],
            round=i // 4,
            scores=Scores(("wide", "narrow"), [i / len(words), 0.1], "draft"),
            delta=word,
            is_emitted=True,
        )
        for i, word in enumerate(words)
    ]
    made = Exchange(
        id=name,
        created_s=time.time(),
        finished_s=time.time(),
        endpoint="chat.completions",
        model="tiny",
        key_id=None,
        state="done",
        prompt=text,
        tokens=tokens,
        num_prompt_tokens=2,
        finish_reason="length",
        stats={"seconds": 1.0, "acceptance": 0.5, "highest": {"wide": tokens[-1].scores["wide"].running}},
    )
    return replace(made, **changes)


def ask(page, question: str = "hello", *, tokens: int = 48) -> None:
    """Asks, and waits until the answer has ended."""
    page.evaluate(f"document.getElementById('max-tokens').value = {tokens}")
    page.fill("#question", question)
    page.keyboard.press("Enter")
    page.wait_for_selector("#exports:not([hidden])")


def texts(page, selector: str) -> list[str]:
    """What tokens say, without the marks for what is invisible."""
    return page.eval_on_selector_all(selector, "nodes => nodes.map(node => node.textContent)")


def scores(page, selector: str) -> list[float]:
    return page.eval_on_selector_all(
        selector, "nodes => nodes.map(node => Number(node.style.getPropertyValue('--score')))"
    )


def test_an_answer_comes_token_by_token_and_every_score_is_the_servers(visit, server):
    began = visit()
    began.context.add_init_script(
        "window.counts = new Set(); const look = () => { counts.add(document.querySelectorAll('.token').length);"
        "requestAnimationFrame(look); }; requestAnimationFrame(look);"
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
    page.evaluate("document.getElementById('max-tokens').value = 200")
    page.fill("#question", "go on and on")
    page.keyboard.press("Enter")
    page.wait_for_selector(".pane section .token")
    page.keyboard.press("Escape")
    page.wait_for_selector("#exports:not([hidden])")
    assert "stopped by you" in page.inner_text(".pane .stats")
    assert page.locator("#send").is_visible()


def test_what_the_server_refuses_is_said_in_its_words(visit):
    began = visit()
    began.expects_refusals = True
    page = began.open()
    ask(page, tokens=4097)
    assert "4,097 is more than the 4,096" in page.inner_text(".pane .stats")


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


def test_the_slider_says_at_once_what_would_be_flagged_and_what_that_costs(visit, server):
    server.store.record(stored("x-many", "w", size=18))
    page = visit().open("#exchange=x-many")
    page.wait_for_selector("#budget:has-text('exchanges here')")
    for limit, promise in (
        (0.75, "False positives: at most 0.95 % of benign answers (95 % bound; 1 of 500 in plain talk)."),
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
    assert page.evaluate("document.activeElement.getBoundingClientRect().bottom < innerHeight")
    page.click("#also summary")
    page.check("#lanes input[value=narrow]")
    assert page.eval_on_selector(".pane section .token", "node => node.style.getPropertyValue('--lane-0')") == "0.1"
    assert "narrow" in page.inner_text("#key-lanes")
    assert page.locator("#lanes input[value=wide]").is_disabled()


@pytest.mark.parametrize("system", ["light", "dark", "no-preference"])
def test_the_theme_is_the_stored_choice_else_the_systems_else_light(visit, system):
    for stored_choice in (None, "light", "dark"):
        began = visit(color_scheme=system)
        if stored_choice is not None:
            began.context.add_init_script(f"localStorage.setItem('pilotfish-theme', '{stored_choice}')")
        began.context.add_init_script(
            "new MutationObserver((_, watch) => { if (!document.body) return;"
            "window.atFirst = getComputedStyle(document.documentElement).colorScheme; watch.disconnect(); })"
            ".observe(document, { childList: true, subtree: true });"
        )
        page = began.open()
        expected = stored_choice or ("dark" if system == "dark" else "light")
        assert page.evaluate("atFirst") == expected  # before there was anything to paint
        assert page.evaluate("document.documentElement.dataset.theme") == expected
        label = page.locator("#theme :checked + span").inner_text()
        assert label == (stored_choice.title() if stored_choice else f"Auto: {expected}")


def test_a_chosen_theme_is_kept_and_auto_follows_the_system_and_says_so(visit):
    page = visit(color_scheme="light").open()
    page.click("#theme label:has-text('Dark')")
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"
    page.reload()
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"
    page.click("#theme label:has-text('Auto')")
    assert page.locator("#theme :checked + span").inner_text() == "Auto: light"
    page.emulate_media(color_scheme="dark")
    assert page.locator("#theme :checked + span").inner_text() == "Auto: dark"
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"


def test_the_reading_font_is_kept_and_the_bundled_one_comes_from_here(visit):
    page = visit().open("#exchange=x-one")
    with page.expect_response(lambda reply: reply.url.endswith("OpenDyslexic-400.woff2")) as reply:
        page.select_option("#font", "dyslexic")
    assert reply.value.status == 200
    page.reload()
    page.wait_for_selector(".pane .token.draft")
    assert page.input_value("#font") == "dyslexic"
    assert "OpenDyslexic" in page.eval_on_selector(".tokens", "node => getComputedStyle(node).fontFamily")


def test_a_saved_page_shows_the_same_without_the_server_and_asks_nothing(visit, browser, tmp_path):
    page = visit().open("#exchange=x-two")
    page.wait_for_selector(".pane .token.draft")
    with page.expect_download() as download:
        page.click("#save-html")
    path = tmp_path / "saved.html"
    download.value.save_as(path)
    saved = Visit(browser, "file://", offline=True)
    alone = saved.page
    alone.goto(path.as_uri())
    alone.wait_for_selector("#answer .token")
    assert texts(alone, "#text .token") == texts(page, ".pane .token")
    assert scores(alone, "#text .token") == scores(page, ".pane .token")
    assert alone.evaluate("window.pwned") is None
    saved.close()
    with page.expect_download() as download:
        page.click("#save-json")
    download.value.save_as(tmp_path / "saved.json")
    (exchange,) = json.loads((tmp_path / "saved.json").read_text())["exchanges"]
    assert exchange["answer"] == HOSTILE


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


def test_markup_in_stored_texts_stays_text(visit):
    page = visit().open("#exchanges")
    page.wait_for_selector("#rows li")
    assert HOSTILE in texts(page, "#rows .why")
    page.click("#rows li:has-text('onerror') a")
    page.wait_for_selector(".pane .token.draft")
    shown = "".join(texts(page, ".pane section .token"))
    assert shown == HOSTILE.replace("\u202e", "")
    assert page.locator(".pane section .glyph.control").get_attribute("data-glyph") == "U+202E"
    assert page.inner_text("#view-title").startswith("</script><img src=x")
    assert page.locator("main img, main script, main svg[onload]").count() == 0
    assert page.evaluate("window.pwned") is None


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


def test_the_list_is_searched_ordered_opened_and_two_are_compared(visit, server):
    server.store.record(stored("x-needle", "a needle in hay", size=5))
    server.store.record(stored("x-needle-too", "a needle in straw", size=9))
    page = visit().open("#exchanges")
    page.fill("#search", "NEEDLE")
    page.wait_for_selector("#list-count:text-is('2 exchanges')")
    assert texts(page, "#rows .name") == ["a needle in straw", "a needle in hay"]
    assert texts(page, "#rows .chip") == ["0.91", "0.86"]
    page.select_option("#order", "highest")
    assert page.is_disabled("#compare")
    for box in page.locator("#rows input").all():
        box.check()
    page.click("#compare")
    page.wait_for_selector(".beside .token.draft")
    assert page.locator(".pane").count() == 2
    assert "differ from their first token" in page.inner_text("#view-note")
    assert page.inner_text(".heights tbody tr >> nth=0").split() == ["wide", "0.91", "0.86", "0.50"]
    page.go_back()
    page.select_option("#alerts", "any")
    page.wait_for_selector("#list-count:has-text('No exchange')")


def test_a_redacted_exchange_shows_scores_and_no_text(browser, engine, tmp_path):
    store = Store(f"sqlite:///{tmp_path / 'r.db'}", redact=True)
    store.record(stored("x-secret", "secret"))
    with running(engine, tmp_path, store=store) as server:
        began = Visit(browser, server.url)
        page = began.open("#exchange=x-secret")
        page.wait_for_selector(".pane .token.draft")
        assert scores(page, ".pane section .token") == [pytest.approx(2 / 3)]
        with page.expect_download() as download:
            page.click("#save-html")
        assert "secret</" not in download.value.path().read_text()
        assert set("".join(texts(page, ".pane .token"))) == {"▒"}
        began.close()


def test_a_key_is_asked_for_and_kept_in_the_tab_alone(browser, engine, tmp_path):
    store = Store(f"sqlite:///{tmp_path / 'k.db'}")
    key = new_key("writer", ["use"])
    store.add_key(key.row)
    with running(engine, tmp_path, store=store) as server:
        began = Visit(browser, server.url)
        began.expects_refusals = True
        page = began.open()
        assert page.locator("#composer").is_hidden()
        page.fill("#key", "pf_wrong")
        page.keyboard.press("Enter")
        page.wait_for_selector("#key-note:has-text('no valid API key')")
        page.fill("#key", key.secret)
        page.keyboard.press("Enter")
        page.wait_for_selector("#composer:not([hidden])")
        ask(page, tokens=4)
        page.click("#to-exchanges")
        page.wait_for_selector("#view-title:has-text('may not read')")
        assert key.secret not in page.evaluate("JSON.stringify(localStorage) + document.cookie + location.href")
        assert key.secret in page.evaluate("JSON.stringify(sessionStorage)")
        page.click("#forget")
        page.wait_for_selector("#lock:not([hidden])")
        assert key.secret not in page.evaluate("JSON.stringify(sessionStorage)")
        began.close()


@pytest.mark.slow
def test_the_command_serves_the_page(browser, pair, bank, tmp_path):
    for name, model in (("target", pair.target), ("draft", pair.draft)):
        model.save_pretrained(tmp_path / name)
        pair.tokenizer.save_pretrained(tmp_path / name)
    bank.save(tmp_path / "bank")
    run = [sys.executable, "-c", "import sys; from pilotfish.cli import main; sys.exit(main())", "serve"]
    models = ["--pair", "target", "--draft", "draft", "--banks", "bank", "--dtype", "float32"]
    with subprocess.Popen(
        [*run, *models, "--threshold", "0.5", "--port", "0"], cwd=tmp_path, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            said = next(line for line in process.stdout if "serving on" in line)
            began = Visit(browser, re.search(r"http://[\d.:]+", said)[0])
            page = began.open()
            ask(page, tokens=24)
            assert page.locator(".pane section .token").count() == 24
            page.click("#to-exchanges")
            page.wait_for_selector("#rows li:has-text('hello')")
            began.close()
        finally:
            process.terminate()


@pytest.mark.slow
def test_ten_thousand_tokens_are_laid_out_only_where_one_looks(visit, server):
    server.store.record(stored("x-long", "w", size=10_000))
    page = visit().open("#exchange=x-long")
    page.wait_for_selector(".pane section .token")
    assert page.locator(".pane section .token").count() == 10_000
    assert page.locator(".pane section .lines").count() >= 50
    assert page.eval_on_selector(".lines", "node => getComputedStyle(node).contentVisibility") == "auto"
    page.evaluate(
        "window.changed = 0; new MutationObserver((all) => { changed += all.length; })"
        ".observe(document.querySelector('.pane'), { attributes: true, subtree: true, attributeFilter: ['class'] })"
    )
    page.fill("#threshold", "0.51")  # from 0.50: a hundred tokens of ten thousand
    assert 0 < page.evaluate("new Promise((done) => setTimeout(() => done(changed)))") <= 110
    bars = page.eval_on_selector(".strip .score .bars", "node => node.getAttribute('d').split('M').length - 1")
    assert bars <= 600


@pytest.mark.slow
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_axe_finds_nothing_in_any_room(visit, server, theme):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe-playwright-python is not installed")
    server.store.record(stored("x-axe", "to look at", size=30))

    def check(page, room: str) -> None:
        found = axe.Axe().run(page, options={"resultTypes": ["violations"]}).response["violations"]
        assert [(each["id"], [node["html"] for node in each["nodes"]]) for each in found] == [], room

    page = visit(color_scheme=theme).open()
    check(page, "opening")
    ask(page, tokens=12)
    page.check("#drafts")
    page.keyboard.press("m")
    check(page, "chat")
    page.click("#to-exchanges")
    page.wait_for_selector("#rows li")
    check(page, "list")
    for room in ("exchange=x-axe", "compare=x-axe,x-one"):
        page.evaluate(f"location.hash = '{room}'")
        page.wait_for_selector(".pane .token.draft")
        page.click("#also summary")
        check(page, room)
