"""A headless Chromium and what its pages must never do; for tests of the server's page."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from typing import Any

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
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
        self.page.set_default_timeout(20_000)
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
