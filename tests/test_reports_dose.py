"""The page of dose curves: every layer, the prompt as a line, and no text that can break it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from pilotfish.reports.dose import render_dose_page, write_dose_page

HOSTILE = "</script><script>alert(1)</script> & {{data}}"
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


def curve(*doses: tuple[float, float, float]) -> list[dict[str, Any]]:
    """Of relative dose, KL and effect."""
    return [
        {"dose": 10 * x, "relative": x, "kl_mean": kl, "kl_p95": 3 * kl, "acceptance": 1 - kl / 4, "behaviour": effect}
        for x, kl, effect in doses
    ]


def estimate(value: float) -> dict[str, float]:
    return {"value": value, "low": value - 0.5, "high": value + 0.5}


def figures(**given: Any) -> dict[str, Any]:
    early = curve((0.0, 0.0, -1.0), (0.2, 0.1, 0.5), (0.4, 0.4, 1.5), (0.8, 2.0, 0.0))
    late = curve((0.0, 0.0, -1.0), (0.2, 0.2, -0.5), (0.4, 0.4, 0.25))
    return {
        "name": "cheerful",
        "model": "tiny",
        "site": "3.resid_post",
        "kind": "add_keeping_norm",
        "dose": 4.0,
        "budget": "mean KL at most 0.4",
        "budget_not_spent_for": "",
        "measure": "margin, nats",
        "curve": early,
        "sites": [
            {"site": "3.resid_post", "kl_mean": 0.4, "effect": 1.5, "curve": early[:3]},
            {"site": "11.resid_post", "kl_mean": 0.4, "effect": 0.25, "curve": late},
        ],
        "prompts": {"prompt": 1.0, "few-shot prompt": 2.25},
        "rows": [
            {"arm": "no steering", "measure": "margin, nats", "value": estimate(-1.0)},
            {"arm": "vector", "measure": "margin, nats", "value": estimate(1.0), "change": estimate(2.0)},
            {"arm": "vector", "measure": "probability", "value": estimate(0.7), "change": estimate(0.4)},
        ],
        "damage": {
            "vector": {"kl_mean": 0.4, "kl_p95": 1.25, "acceptance": 0.875},
            "few-shot prompt": {"kl_mean": 0.9},
        },
        "verdict": "The few-shot prompt does better than the vector.",
    } | given


def data_of(page: str) -> dict[str, Any]:
    (block,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)
    return dict(json.loads(block))


def test_effect_stands_against_damage_one_curve_a_layer_and_the_best_prompt_is_a_line() -> None:
    trade, effect, damage = data_of(render_dose_page(figures()))["plots"]
    assert [one["label"] for one in trade["series"]] == ["3.resid_post", "11.resid_post"]
    assert trade["series"][0]["points"] == [[0.0, -1.0], [0.1, 0.5], [0.4, 1.5]]
    assert [point[1] for point in trade["reference"]] == [2.25, 2.25]
    assert trade["reference_label"] == "few-shot prompt, at a KL of 0.90"
    assert trade["y"]["low"] <= -1.0 and trade["y"]["high"] >= 2.25
    assert [point[0] for point in effect["series"][0]["points"]] == [0.0, 0.2, 0.4, 0.8]
    assert [one["label"] for one in damage["series"]] == ["KL, 95th percentile", "KL, mean", "1 - acceptance"]
    assert damage["reference"] == []


def test_a_prompt_without_answers_has_no_cost_to_tell() -> None:
    trade, *_ = data_of(render_dose_page(figures(damage={})))["plots"]
    assert trade["reference_label"] == "few-shot prompt"


def test_text_stays_text_and_nothing_is_asked_of_the_network() -> None:
    page = render_dose_page(figures(name=HOSTILE, verdict=HOSTILE, model=HOSTILE))
    assert data_of(page)["verdict"] == HOSTILE
    assert page.count("<script") == 3 and "alert(1)</script>" not in page
    assert not re.search(r"https?://(?!www\.w3\.org)", page)


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")
def test_the_page_draws_its_curves_and_tables(tmp_path: Path) -> None:
    assert CHROMIUM is not None
    path = write_dose_page(tmp_path / "page.html", figures(budget_not_spent_for="even 0.1 overspends it"))
    profile = f"--user-data-dir={tmp_path / 'profile'}"
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", profile, "--dump-dom"]
    done = subprocess.run([CHROMIUM, *flags, path.as_uri()], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.count('<figure class="plot">') == 3
    assert len(re.findall(r'class="curve" data-scorer="line-1" d="M', done.stdout)) >= 3
    assert "add keeping norm with dose 4.000; budget: mean KL at most 0.4" in done.stdout
    assert "The budget is not spent: even 0.1 overspends it." in done.stdout
    assert "+2.000<small>[+1.500, +2.500]</small>" in done.stdout and "+0.700" not in done.stdout
