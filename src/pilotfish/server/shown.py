"""Stored exchanges in; exchanges as the report's page shows them out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pilotfish.actions import Policy
from pilotfish.reports import render_page
from pilotfish.server.backend import EngineInfo
from pilotfish.server.report import threshold_of

WITHHELD = "▒"
"""Stands for a text that the store does not keep."""


def report_of(stored: Sequence[Mapping[str, Any]], info: EngineInfo, policy: Policy) -> str:
    """One self-contained HTML document of exchanges from the store."""
    return render_page([_shown(exchange, info, policy) for exchange in stored], title=f"Exchanges of {info.model}")


def _shown(exchange: Mapping[str, Any], info: EngineInfo, policy: Policy) -> dict[str, Any]:
    tokens = [{**token, "text": _text(token["text"])} for token in exchange["tokens"]]
    found = {metric for token in tokens for metric in (*token["scores"], *token["unscored"])}
    found |= {verdict["metric"] for verdict in exchange["verdicts"]}
    metrics = [*info.metrics, *sorted(found - set(info.metrics))]
    limits = {metric: threshold_of(info, policy, metric) for metric in metrics}
    answer = [token for token in tokens if token["origin"] != "prompt"]
    num_scored = sum(all(metric in token["running"] for metric in info.metrics) for token in tokens)
    seconds = exchange["stats"].get("seconds")
    return {
        **{key: exchange[key] for key in ("id", "created_s", "verdicts", "finish_reason")},
        "title": exchange["asked"] or exchange["id"],
        "target": exchange["model"],
        "draft": info.draft if exchange["model"] == info.model else None,
        "metrics": metrics,
        "thresholds": {metric: limit for metric, limit in limits.items() if limit is not None},
        "tokens": tokens,
        "rounds": [
            {**item, "drafted": [{**token, "text": _text(token["text"])} for token in item["drafted"]]}
            for item in exchange["rounds"]
        ],
        "stats": {
            "acceptance": exchange["stats"].get("acceptance"),
            "tokens_per_s": len(answer) / seconds if seconds else None,
            "num_committed": len(tokens),
            "num_scored": num_scored,
        },
    }


def _text(text: str | None) -> str:
    return WITHHELD if text is None else text
