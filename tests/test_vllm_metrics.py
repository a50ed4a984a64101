"""The dashboard for vLLM and the counters that it asks for."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
from prometheus_client import REGISTRY, generate_latest
from prometheus_client.parser import text_string_to_metric_families

import pilotfish.vllm
from pilotfish.actions import Policy, Verdict
from pilotfish.models import tiny_tokenizer
from pilotfish.server import EngineInfo
from pilotfish.vllm.metrics import metrics
from pilotfish.vllm.record import About, Record
from pilotfish.vllm.wire import Miss, News

SUFFIXES = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count")}


def count_an_answer() -> None:
    """Flagged and stopped, with one token that has no score."""
    info = EngineInfo(model="target", draft="draft", max_tokens=9, heads=())
    about = About(metrics=("m",), reader="draft", tokenizer=tiny_tokenizer(), policy=Policy(), info=info)
    record = Record(about, "ab", [1, 2])
    scores = np.array([[0.1, 0.2], [np.nan, np.nan], [0.8, 0.9]], dtype=np.float32)
    verdicts = [Verdict(2, "m", action, 0.9, 0.5, "m") for action in ("flag", "stop")]
    record.add(News(0, scores, [Miss(1, 2, "hole: here")], verdicts), [3])
    metrics().count(record)


def test_the_dashboard_asks_for_all_metrics_that_the_plugin_has_and_for_no_others():
    count_an_answer()
    board = json.loads(Path(pilotfish.vllm.__file__).with_name("grafana.json").read_text())
    families = [
        family
        for family in text_string_to_metric_families(generate_latest(REGISTRY).decode())
        if family.name.startswith("pilotfish:") and not family.name.endswith("_created")
    ]
    labels = {
        family.name + suffix: {label for sample in family.samples for label in sample.labels}
        for family in families
        for suffix in SUFFIXES[family.type]
    }
    queries = [target["expr"] for panel in board["panels"] for target in panel.get("targets", [])]
    shown = {name for query in queries for name in re.findall(r"pilotfish:\w+", query)}
    assert shown <= set(labels)
    assert {re.sub("_(total|bucket)$", "", name) for name in shown} == {family.name for family in families}
    for query in queries:
        wanted = {label for group in re.findall(r"by \(([\w, ]+)\)", query) for label in group.split(", ")}
        for name in re.findall(r"pilotfish:\w+", query):
            assert wanted <= labels[name], query
