"""The page's other rooms in a real browser: what was stored, keys, themes; and what holds in all of them."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest
from browser_kit import HOSTILE, Visit, ask, axe_finds_nothing, page_server, scores, stored, texts
from server_kit import running

from pilotfish.engines import EmbeddedEngine
from pilotfish.server import Store, new_key


@pytest.fixture(scope="module")
def engine(pair, bank):
    return EmbeddedEngine(pair, [bank])


@pytest.fixture(scope="module")
def server(engine, tmp_path_factory):
    with page_server(engine, tmp_path_factory.mktemp("page")) as found:
        yield found


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
        axe_finds_nothing(page, "lock")
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
    server.store.record(stored("x-axe", "to look at", size=30))
    page = visit(color_scheme=theme).open()
    axe_finds_nothing(page, "opening")
    ask(page, tokens=12)
    page.wait_for_selector(f"#budget:has-text('Of the last {len(server.store.exchanges(limit=200))} exchanges')")
    page.check("#drafts")
    page.keyboard.press("m")
    axe_finds_nothing(page, "chat")
    page.click("#to-exchanges")
    page.wait_for_selector("#rows li")
    axe_finds_nothing(page, "list")
    for room, stage in (("exchange=x-axe", ".alone"), ("compare=x-axe,x-one", ".beside")):
        page.evaluate(f"location.hash = '{room}'")
        page.wait_for_selector(f"{stage} .token.draft")
        page.eval_on_selector("#also", "node => { node.open = true; }")
        axe_finds_nothing(page, room)


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
    page.wait_for_selector("#theme :checked + span:text-is('Auto: dark')")
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
