"""The token page: safe whatever a model writes, self-contained, legible, refusing what it cannot show truthfully."""

from __future__ import annotations

import base64
import copy
import hashlib
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pilotfish.errors import SettingError
from pilotfish.reports import render_page, write_page

HOSTILE = "</script><script>alert(1)</script><!-- <img src=x> & {{data}} {{title}} \u2028 \u202e"
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


class Page(HTMLParser):
    """What a browser's parser sees: element names, attributes, and the text inside scripts and styles."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.sources: list[str] = []
        self._in_source = False
        self.feed(source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._in_source = tag in ("script", "style")
        if self._in_source:
            self.sources.append("")

    def handle_endtag(self, tag: str) -> None:
        self._in_source = False

    def handle_data(self, data: str) -> None:
        if self._in_source:
            self.sources[-1] += data

    @property
    def data(self) -> str:
        return next(source for source in self.sources if source.startswith('{"title"'))


def exchange(text: str = "hello") -> dict[str, Any]:
    """Two prompt tokens; an accepted draft, a rejected one, the target's token instead, and one that nobody read."""
    return {
        "title": text,
        "prompt": text,
        "metrics": ["insecure_code", "toxicity"],
        "thresholds": {"insecure_code": 0.71},
        "tokens": [
            {"position": 0, "text": "<|im_start|>", "origin": "prompt", "scores": {"insecure_code": 0.03}},
            {"position": 1, "text": text, "origin": "prompt", "scores": {"insecure_code": 0}},
            {
                "position": 2,
                "text": "sys",
                "origin": "draft",
                "round": 1,
                "scores": {"insecure_code": 0.9},
                "reader": "draft",
            },
            {"position": 3, "text": "tem\n", "origin": "target", "round": 1, "scores": {"insecure_code": 1}},
            {"position": 4, "text": "", "origin": "target", "round": 2, "unscored": {"insecure_code": "never read"}},
        ],
        "rounds": [
            {
                "round": 1,
                "start": 2,
                "drafted": [
                    {"text": "sys", "accepted": True, "scores": {"insecure_code": 0.9}},
                    {"text": text, "accepted": False},
                ],
            }
        ],
        "verdicts": [
            {
                "position": 2,
                "metric": "insecure_code",
                "action": "flag",
                "score": 0.9,
                "threshold": 0.71,
                "reason": text,
            },
            {
                "position": 9,
                "metric": "toxicity",
                "action": "stop",
                "score": None,
                "threshold": None,
                "reason": "unscored",
            },
        ],
        "stats": {"tokens_per_s": 7.1, "acceptance": 0.5, "num_committed": 3, "num_scored": 2, "k": [2]},
        "finish_reason": "stop",
    }


TAX = {"columns": ["set-up", "ratio"], "rows": [["target alone", 1.0], ["with heads", "1.47"]], "note": "two cores"}


@given(st.one_of(st.just(HOSTILE), st.text(st.characters(), max_size=40)))
def test_whatever_a_model_writes_stays_data(text: str) -> None:
    given_exchange = exchange(text)
    page = Page(render_page([given_exchange], title=text, tax={**TAX, "note": text}))
    harmless = Page(render_page([exchange()], tax=TAX))
    assert page.tags == harmless.tags
    assert not set(page.data) & set("<>&")
    assert json.loads(page.data) == {"title": text, "exchanges": [given_exchange], "tax": {**TAX, "note": text}}


def test_the_policy_lets_through_the_pages_own_scripts_and_style_and_nothing_else() -> None:
    page = Page(render_page([exchange()]))
    policy = next(attrs["content"] for _, attrs in page.tags if attrs.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    own = [source for source in page.sources if source != page.data]
    digests = [base64.b64encode(hashlib.sha256(source.encode()).digest()).decode() for source in own]
    assert len(own) == 3
    assert set(re.findall(r"'sha256-([^']+)'", policy)) == set(digests)
    assert policy.startswith("default-src 'none'")
    assert "unsafe" not in policy


def test_the_page_refers_to_nothing_outside_itself() -> None:
    source = (
        render_page([exchange()], tax=TAX)
        .replace("http://www.w3.org/2000/svg", "")
        .replace("http://www.w3.org/1999/xhtml", "")
    )
    assert not re.search(
        r"""https?:|//[a-z]+\.|url\(|@import|\ssrc=|\shref=|fetch\(|XMLHttpRequest|WebSocket""", source
    )


def test_a_written_page_is_the_rendered_one_and_replaces_an_older_one(tmp_path: Path) -> None:
    path = tmp_path / "reports" / "page.html"
    write_page(path, [exchange("old")])
    assert write_page(path, [exchange(HOSTILE + "\ud800")], title="lone \ud800", tax=TAX) == path
    assert path.read_text(encoding="utf-8") == render_page([exchange(HOSTILE + "\ud800")], title="lone \ud800", tax=TAX)
    assert [file.name for file in path.parent.iterdir()] == ["page.html"]


def edited(*keys: str | int, value: Any) -> dict[str, Any]:
    changed: Any = copy.deepcopy(exchange())
    at = changed
    for key in keys[:-1]:
        at = at[key]
    at[keys[-1]] = value
    return changed


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (edited("title", value=None), "exchange 1: title is missing; give text"),
        (edited("metrics", value=[]), "at least one metric"),
        (edited("metrics", value=["insecure_code", "insecure_code"]), "each once"),
        (
            edited("thresholds", "insecure_code", value=1.5),
            r"thresholds: 'insecure_code' is 1.5, not a number in \[0, 1\]",
        ),
        (edited("tokens", value=[]), "tokens is empty"),
        (edited("tokens", value="text"), 'tokens is "text"; give a JSON list'),
        (edited("tokens", 1, value=7), r"tokens\[1\] is 7; give a JSON object"),
        (edited("tokens", 1, "text", value=7), r"tokens\[1\]: text is 7; give text"),
        (edited("tokens", 1, "position", value=0), "position 0 comes after position 0; positions must rise"),
        (edited("tokens", 1, "position", value=-1), "position is -1; give a whole number"),
        (edited("tokens", 1, "origin", value="user"), 'origin "user" is unknown; use one of prompt, draft, target'),
        (
            edited("tokens", 1, "scores", "insecure_code", value=float("nan")),
            "is NaN, not a number in .* reason under `unscored`",
        ),
        (edited("tokens", 1, "scores", "insecure_code", value=None), "is missing, not a number"),
        (edited("tokens", 1, "scores", "insecure_code", value=True), "is true, not a number"),
        (edited("tokens", 1, "scores", "scheming", value=0.5), "'scheming' is not among the exchange's metrics"),
        (edited("tokens", 1, "unscored", value={"insecure_code": "late"}), "both scored and unscored; keep one"),
        (edited("tokens", 1, "unscored", value={"toxicity": 3}), "give text"),
        (edited("rounds", 0, "start", value="2"), "start is .*; give a whole number"),
        (edited("rounds", 0, "drafted", 0, "accepted", value=1), "accepted is 1; give true or false"),
        (edited("rounds", 0, "drafted", 0, "scores", value={"insecure_code": -0.1}), "is -0.1, not a number"),
        (edited("verdicts", 0, "reason", value=None), r"verdicts\[0\]: reason is missing"),
        (edited("verdicts", 0, "score", value=2), "is 2, not a number"),
        (edited("stats", "acceptance", value="much"), 'acceptance is "much"; give a number'),
        (edited("finish_reason", value=3), "finish_reason is 3; give text"),
        (edited("policy", value={"dose": float("inf")}), "not JSON"),
        (edited("policy", value={"path": Path("x")}), "not JSON"),
    ],
)
def test_an_exchange_that_could_not_be_shown_truthfully_is_refused(bad: dict[str, Any], words: str) -> None:
    with pytest.raises(SettingError, match=words):
        render_page([bad])


@pytest.mark.parametrize(
    ("tax", "words"),
    [
        ({**TAX, "rows": [["target alone"]]}, r"rows\[0\] has 1 cells; give one for each of the 2 columns"),
        ({**TAX, "rows": [["target alone", None]]}, "a cell is text or a number"),
        ({"rows": []}, "tax table: columns is missing; give a JSON list"),
    ],
)
def test_a_table_with_missing_cells_is_refused(tax: dict[str, Any], words: str) -> None:
    with pytest.raises(SettingError, match=words):
        render_page([exchange()], tax=tax)


def test_a_page_without_exchanges_is_refused() -> None:
    with pytest.raises(SettingError, match="give at least one"):
        render_page([])


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_text_is_legible_on_paper_and_on_the_highest_score(theme: str) -> None:
    css = resources.files("pilotfish.reports").joinpath("page.css").read_text(encoding="utf-8")
    light, dark = (
        dict(re.findall(r"--(\w+): (#\w{6});", block)) for block in re.findall(r":root[^{]*\{(.*?)\}", css, re.S)
    )
    colours = light | (dark if theme == "dark" else {})
    for text, ground in (("ink", "paper"), ("ink", "hot"), ("ink", "raised"), ("soft", "paper"), ("blue", "paper")):
        assert contrast(colours[text], colours[ground]) >= 4.5, (text, ground)  # WCAG 2.2, level AA
    assert contrast(colours["bar"], colours["paper"]) >= 2.5


def contrast(one: str, other: str) -> float:
    def luminance(colour: str) -> float:
        channels = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
        linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_contrast_of_black_on_white_is_twenty_one() -> None:
    assert contrast("#000000", "#ffffff") == pytest.approx(21)


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")
def test_a_browser_shows_every_token_and_never_an_unscored_one_as_scored(tmp_path: Path) -> None:
    path = write_page(tmp_path / "page.html", [exchange(HOSTILE)], tax=TAX)
    assert CHROMIUM is not None
    flags = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--no-first-run",
        f"--user-data-dir={tmp_path / 'profile'}",
        "--dump-dom",
    ]
    done = subprocess.run([CHROMIUM, *flags, path.as_uri()], capture_output=True, text=True, timeout=120, check=True)
    shown = [attrs.get("class") or "" for _, attrs in Page(done.stdout).tags if "data-stop" in attrs]
    assert ["lookahead" in classes for classes in shown] == [False, False, False, True, False, False]
    assert ["unscored" in classes for classes in shown] == [False, False, False, True, False, True]
    assert ["over" in classes for classes in shown] == [False, False, True, False, True, False]
    assert "At 0.71, 2 tokens of the answer and 0 of the prompt would be flagged; 1 token not scored." in done.stdout
    assert 'data-theme="light"' in done.stdout
    assert "target alone" in done.stdout.split('id="tax-table"')[1]
