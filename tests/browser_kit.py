"""A headless Chromium and what its pages must never do; for tests of the server's page."""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from server_kit import Running, running

from pilotfish.actions import Policy, Rule
from pilotfish.engines import EmbeddedEngine, Token
from pilotfish.engines.records import Scores
from pilotfish.server.exchanges import Exchange

HOSTILE = "</script><img src=x onerror='window.pwned=1'><svg onload=window.pwned=1>\u202e{{data}}"

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
FLAG = Policy(rules=(Rule(metric="wide", scope="answer"),))
WATCH = """
window.violated = [];
document.addEventListener("securitypolicyviolation", ({ violatedDirective }) => violated.push(violatedDirective));
"""


@contextlib.contextmanager
def chromium() -> Iterator[Any]:
    """A browser; skips where the machine has none."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("no chromium on this machine")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        try:
            yield browser
        finally:
            browser.close()


class Visit:
    """A visitor with a storage of their own. At the end the page has broken no policy, failed nowhere, and asked nobody
    but its server.
    """

    def __init__(self, browser: Any, url: str, **options: Any) -> None:
        self.url, self.wrong = url, []
        self.expects_refusals = False
        """A refused request is a line on the console too."""
        self.context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **options})
        self.context.add_init_script(WATCH)
        self.page = self.context.new_page()
        self.page.set_default_timeout(60_000)
        self.page.on("pageerror", lambda error: self.wrong.append(f"error: {error}"))
        self.page.on("console", self._on_console)
        self.page.on("request", self._on_request)

    def _on_console(self, message: Any) -> None:
        if message.type in {"error", "warning"} and not (self.expects_refusals and "Failed to load" in message.text):
            self.wrong.append(f"console: {message.text}")

    def _on_request(self, request: Any) -> None:
        if not request.url.startswith((f"{self.url}/", "blob:")):
            self.wrong.append(f"asked {request.url}")

    def open(self, room: str = "") -> Any:
        """The page in one of its rooms, once it is there."""
        self.page.goto(f"{self.url}/{room}")
        self.page.wait_for_selector("main > :not([hidden], .aside-only, #stage)")
        return self.page

    def close(self) -> None:
        violated = self.page.evaluate("window.violated")
        self.context.close()
        assert self.wrong == []
        assert violated == []


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


@contextlib.contextmanager
def page_server(engine: EmbeddedEngine, folder: Path) -> Iterator[Running]:
    """A server that flags, with two exchanges in its store, of which one is hostile."""
    with running(engine, folder, policy=FLAG, requests_per_minute=100_000) as found:
        found.store.record(stored("x-one", "plain"))
        found.store.record(stored("x-two", HOSTILE, prompt=f"<|im_start|>user\n{HOSTILE}<|im_end|>"))
        yield found


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


def axe_finds_nothing(page, room: str) -> None:
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe-playwright-python is not installed")
    found = axe.Axe().run(page, options={"resultTypes": ["violations"]}).response["violations"]
    assert [(each["id"], [node["html"] for node in each["nodes"]]) for each in found] == [], room
