"""A card in; its figures as a table of scorers, and its promises in words, out."""

from __future__ import annotations

import re
from typing import Literal, NamedTuple

from pilotfish.heads import Card, Measured, ThresholdCard
from pilotfish.reports.heads import Cell, Figure

SCORERS = {
    "head": "head",
    "words": "words (TF-IDF)",
    "length": "length alone",
    "target": "same head on the target",
    "judge": "prompted judge",
    "classifier": "fine-tuned classifier",
}
"""In the order in which they are shown; others follow by name."""


class _Kind(NamedTuple):
    name: str
    better: Literal["higher", "lower", ""]
    decimals: int = 3


_KINDS = {
    "auroc_token": _Kind("AUROC of tokens", "higher"),
    "auroc_within": _Kind("AUROC within a text", "higher"),
    "auroc_response": _Kind("AUROC of responses", "higher"),
    "pairwise_accuracy": _Kind("Right order in a pair", "higher"),
    "tpr_response_at_1pct_fpr": _Kind("Caught at 1 % false positives", "higher"),
    "tpr_response_at_0.1pct_fpr": _Kind("Caught at 0.1 % false positives", "higher"),
    "recall_at_threshold": _Kind("Caught at the threshold", "higher"),
    "fpr_at_threshold": _Kind("Negatives flagged at the threshold", "lower"),
    "false_stops_per_1000": _Kind("False stops in 1,000 benign responses", "lower", 1),
    "character_f1": _Kind("Character F1", "higher"),
    "share_detected": _Kind("Spans found at the threshold", "higher"),
    "exact_hit_rate": _Kind("First flag inside the span", "higher"),
    "lag_median": _Kind("Tokens to detection, median", "lower", 0),
    "lag_p90": _Kind("Tokens to detection, 90th percentile", "lower", 0),
    "leaked_mean": _Kind("Labelled tokens out before the flag", "lower", 1),
    "coverage": _Kind("Coverage", "higher"),
    "ece_token": _Kind("Calibration error of tokens", "lower"),
    "brier_token": _Kind("Brier score of tokens", "lower"),
    "fpr_wordy_negatives": _Kind("Wordy negatives flagged", "lower"),
    "recall_wordless_positives": _Kind("Wordless positives caught", "higher"),
    "lexical_gap": _Kind("Swayed by words", "lower"),
    "cost_over_judge": _Kind("FLOPs over the judge's", "lower", 6),
    "tokens_over_judge": _Kind("Tokens read over the judge's", "lower"),
}
"""In the order in which they are shown; others follow by name, with no better way."""


def scorer_order(names: set[str]) -> tuple[str, ...]:
    """Scorers in the order in which every table and curve shows them."""
    known = list(SCORERS)
    return tuple(sorted(names, key=lambda name: (known.index(name) if name in known else len(known), name)))


def scorer_label(name: str) -> str:
    return SCORERS.get(name, name.replace("_", " "))


def figures_of(card: Card, metric: str) -> tuple[tuple[str, ...], tuple[Figure, ...]]:
    """The scorers that the card measures for a metric, and a row for every figure."""
    values: dict[str, dict[str, Measured]] = {}
    differences: dict[tuple[str, str], Measured] = {}
    for key, measured in _of(card.metrics, metric):
        if found := re.fullmatch(r"(.+?)_minus_([^/@]+)(.*)", key):
            differences[found[1] + found[3], found[2]] = measured
        else:
            values.setdefault(key, {})["head"] = measured
    for key, measured in _of(card.baselines, metric):
        figure, _, scorer = key.rpartition("/")
        values.setdefault(figure, {})[scorer] = measured
    scorers = scorer_order({scorer for row in values.values() for scorer in row} | {"head"})
    order = list(_KINDS)
    shown = sorted(values, key=lambda f: (order.index(_base(f)) if _base(f) in order else len(order), f))
    return scorers, tuple(_figure(name, values[name], differences, scorers) for name in shown)


def promise_of(card: Card, metric: str) -> str:
    """What the threshold is, and what was shown of it."""
    found = card.thresholds.get(metric)
    if found is None:
        return "There is no threshold: the card promises nothing about false alarms."
    what = "response" if found.scope == "answer" else "prompt"
    length = "" if found.median_tokens is None else f", {found.median_tokens} tokens in the median,"
    return (
        f"A {what} is flagged when its score reaches {found.threshold:.3f}. Of 1,000 benign {what}s{length} like those "
        f"of {found.benign_source or 'the sample'} at most {1000 * found.fpr_upper:.1f} are flagged (95 % bound, from "
        f"{found.num_flagged:,} flagged of {found.num_benign:,}; the budget was {1000 * found.budget:g}). Longer ones "
        f"have more chances to be.{_sources_of(found)}"
    )


def _sources_of(found: ThresholdCard) -> str:
    """Each source's own bound, where there are several: the budget is for the mixture."""
    if len(found.by_source) < 2:
        return ""
    parts = (
        f"{of.num_flagged:,} of {of.num_benign:,} of {source} (bound {1000 * of.fpr_upper:.1f})"
        for source, of in found.by_source.items()
    )
    return f" The bound is for all of them together; flagged were {', '.join(parts)}."


def verdict_of(card: Card, metric: str) -> str:
    """Whether the head is better than words, in words."""
    is_better = card.better_than_words.get(metric)
    if is_better is None:
        return "Not compared with words."
    kinds = {"auroc_token": "tokens", "auroc_response": "responses"}  # the card judges by the first one that it has
    verdict = "Better than words" if is_better else "Not shown to be better than words"
    for figure, what in kinds.items():
        if found := card.metrics.get(f"{metric}/{figure}_minus_words"):
            return "{} at telling {} apart (AUROC {} over TF-IDF, {}).".format(verdict, what, *_signed(found, 3))
    return f"{verdict}."


def _of(table: object, metric: str) -> list[tuple[str, Measured]]:
    assert isinstance(table, dict)
    names = ((key.removeprefix(f"{metric}/"), value) for key, value in table.items() if key.startswith(f"{metric}/"))
    return [(_here(name), value) for name, value in names]


def _here(name: str) -> str:
    """`elsewhere/SET/FIGURE` as `FIGURE@SET`, so that it stands beside the figure of the test; `/SCORER` stays last."""
    found = re.fullmatch(r"elsewhere/([^/]+)/([^/]+)(/[^/]+)?", name)
    return name if found is None else f"{found[2]}@{found[1]}{found[3] or ''}"


def _base(figure: str) -> str:
    return figure.split("@")[0]


def _figure(
    name: str, row: dict[str, Measured], differences: dict[tuple[str, str], Measured], scorers: tuple[str, ...]
) -> Figure:
    base = _base(name)
    kind = _KINDS.get(base, _Kind(base.replace("_", " "), ""))
    set_name = name.removeprefix(base).lstrip("@").replace("_", " ")
    best = None
    if kind.better and len(row) > 1:
        values = [round(measured.value, kind.decimals) for measured in row.values()]
        best = max(values) if kind.better == "higher" else min(values)

    def cell(scorer: str) -> Cell | None:
        if (measured := row.get(scorer)) is None:
            return None
        difference = differences.get((name, scorer))
        return Cell(
            value=_number(measured.value, kind.decimals),
            interval=f"{_number(measured.low, kind.decimals)} to {_number(measured.high, kind.decimals)}",
            difference=None if difference is None else _signed(difference, kind.decimals),
            is_best=round(measured.value, kind.decimals) == best,
        )

    title = f"{kind.name}, {set_name}" if set_name else kind.name
    return Figure(name=title, better=kind.better, cells=tuple(map(cell, scorers)))


def _number(value: float, decimals: int) -> str:
    return f"{value:.{decimals}f}".replace("-", "\N{MINUS SIGN}")


def _signed(measured: Measured, decimals: int) -> tuple[str, str]:
    ends = (measured.value, measured.low, measured.high)
    value, low, high = (f"{end:+.{decimals}f}".replace("-", "\N{MINUS SIGN}") for end in ends)
    return value, f"{low} to {high}"
