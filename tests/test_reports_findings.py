"""The findings browser: all of a discovery in one file, no text can break it, and words are compared as words."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from pilotfish.errors import SettingError
from pilotfish.reports.document import asset
from pilotfish.reports.findings import render_findings_page, write_findings_page

HOSTILE = "</script><script>alert(1)</script> & {{data}} \u202e"
NODE = shutil.which("node")
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


def finding(id: str, **given: Any) -> dict[str, Any]:
    return {
        "id": id,
        "kind": "changed",
        "share": 0.5,
        "reach": 2.0,
        "group": 0,
        "is_first": True,
        "center": 0.0,
        "length": 1.0,
        "num_flagged": 0,
        "logit": None,
        "answers": ["A pond is small."],
        "kl": 1.25,
        "surprise": 1.0,
        "repeats": 0.0,
        "rising": [{"text": " Un", "before": 0.01, "after": 0.5}],
        "falling": [],
        "monitors": {"refusal": 0.25},
    } | given


def found(*findings: dict[str, Any]) -> dict[str, Any]:
    return {
        "identity": {"name": "tiny"},
        "source": "1.resid_pre",
        "target": "2.resid_post",
        "radius": {"value": 6.0, "dose": 0.25, "warnings": []},
        "prompts": ["What is a pond?"],
        "plain": {"answers": ["A pond is a lake."], "monitors": {"refusal": 0.125}},
        "findings": list(findings),
    }


def test_the_page_holds_every_finding_and_asks_nothing_of_the_network() -> None:
    page = render_findings_page(found(finding("v0"), finding("v1", kind="same")), method="melbo", folder="out/x")
    (block,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)
    data = json.loads(block)
    assert [one["id"] for one in data["findings"]] == ["v0", "v1"] and data["folder"] == "out/x"
    assert not re.search(r'(src|href)="', page) and "default-src 'none'" in page


def test_no_text_of_a_model_leaves_the_pages_data() -> None:
    page = render_findings_page(found(finding("v0", answers=[HOSTILE])), method="melbo", folder=HOSTILE)
    assert page.count("<script") == 3 and "alert(1)</script>" not in page and "\u202e" not in page


def test_a_discovery_without_findings_has_no_page() -> None:
    with pytest.raises(SettingError, match="at least one vector"):
        render_findings_page(found(), method="melbo", folder="out")


@pytest.mark.skipif(NODE is None, reason="no node on this machine")
@pytest.mark.parametrize(
    ("before", "after", "runs"),
    [
        ("a pond is", "a pond is", [["same", "a pond is"]]),
        ("a pond is", "a lake is", [["same", "a"], ["gone", " pond"], ["come", " lake"], ["same", " is"]]),
        ("", "un lac", [["come", "un lac"]]),
        ("big, big", "big", [["same", "big"], ["gone", ", big"]]),
    ],
)
def test_words_are_compared_as_words(before: str, after: str, runs: list[list[str]]) -> None:
    assert NODE is not None
    asked = f"console.log(JSON.stringify(diffWords({json.dumps(before)}, {json.dumps(after)})))"
    script = asset("diff.js") + asked
    command = [NODE, "--input-type=module", "-e", script]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert json.loads(done.stdout) == runs
    assert "".join(text for kind, text in runs if kind != "gone") == after


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")
def test_the_page_lists_one_of_each_group_of_readable_findings(tmp_path: Path) -> None:
    assert CHROMIUM is not None
    given = found(
        finding("v0"), finding("v1", is_first=False), finding("v2", kind="broken"), finding("random0", kind="random")
    )
    path = write_findings_page(tmp_path / "page.html", given, method="melbo", folder="out/x")
    profile = f"--user-data-dir={tmp_path / 'profile'}"
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", profile, "--dump-dom"]
    done = subprocess.run([CHROMIUM, *flags, path.as_uri()], capture_output=True, text=True, timeout=120, check=True)
    assert re.findall(r'id="finding-(\w+)"', done.stdout) == ["v0"]
    assert "1 finding of 4 listed." in done.stdout and "1 break its answers" in done.stdout
    assert re.search(r"<del>[^<]*a lake</del>", done.stdout) and re.search(r"<ins>[^<]*small</ins>", done.stdout)
    assert "discover promote out/x v0" in done.stdout
