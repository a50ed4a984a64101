"""Texts as scored by a head and its baselines in; ROC, reliability and detection curves, ready to draw, out."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from pilotfish.reports.figures import scorer_label, scorer_order
from pilotfish.reports.heads import Axis, Plot, Point, Series
from pilotfish.scores import ReliabilityPoint, ScoredText, detect, reliability_curve, roc_points
from pilotfish.scores.metrics import has_both_labels

LOWEST_FPR = 1e-3
NUM_POINTS = 241
LOW_SCORE, NUM_LOW_BINS, NUM_HIGH_BINS = 0.1, 5, 10
SHARES = tuple((share, f"{share:g}") for share in (0.0, 0.25, 0.5, 0.75, 1.0))
LONGEST_LAGS = (16, 32, 64, 128, 256)
"""Where the axis of tokens may end."""

Scorers = Mapping[str, Sequence[ScoredText]]
Pair = tuple[Float[Tensor, " item"], Float[Tensor, " item"]]


def curves_of(by_scorer: Scorers, threshold: float | None) -> tuple[Plot, ...]:
    """Every curve, an empty one with the reason where the texts do not define it."""
    return (
        _roc("responses", {name: _responses(texts) for name, texts in by_scorer.items()}),
        _roc("tokens", {name: _tokens(texts) for name, texts in by_scorer.items()}),
        _reliability({name: _tokens(texts) for name, texts in by_scorer.items()}),
        _detection(by_scorer, threshold),
    )


def _roc(what: str, pairs: Mapping[str, Pair]) -> Plot:
    counts = {name: (int((labels >= 0.5).sum()), int((labels < 0.5).sum())) for name, (_, labels) in pairs.items()}
    usable = [name for name in scorer_order(set(pairs)) if all(counts[name])]
    num_positive, num_negative = counts[usable[0]] if usable else (0, 0)
    lowest = min(0.1, max(LOWEST_FPR, 1 / num_negative)) if usable else LOWEST_FPR
    series = tuple(
        _series(name, [(p.fpr, p.tpr) for p in roc_points(*pairs[name], lowest=lowest, num_points=NUM_POINTS)])
        for name in usable
    )
    note = (
        f"From {num_positive:,} positive and {num_negative:,} negative {what}; the axis of false positives is in log "
        f"space and starts at {lowest:.2g}."
    )
    return Plot(
        title=f"ROC, {what}",
        note=note if usable else f"Nothing to draw: there are no {what} with both labels.",
        x=Axis(label=f"share of negative {what} flagged", low=lowest, high=1.0, ticks=_log_ticks(lowest), is_log=True),
        y=Axis(label=f"share of positive {what} caught", low=0.0, high=1.0, ticks=SHARES),
        series=series,
        is_step=True,
        reference=tuple((x, x) for x in _geometric(lowest, 1.0, 60)),
        reference_label="chance",
    )


def _reliability(pairs: Mapping[str, Pair]) -> Plot:
    usable = {
        name: pairs[name]
        for name in scorer_order(set(pairs))
        if has_both_labels(pairs[name][1]) and bool(((pairs[name][0] >= 0) & (pairs[name][0] <= 1)).all())
    }
    series = []
    for name, pair in usable.items():
        bins = _bins(*pair)
        points = [(found.mean_probability, found.share_positive) for found in bins]
        series.append(_series(name, points, [f"{found.num_items:,} tokens" for found in bins]))
    note = (
        f"Tokens below {LOW_SCORE:g} in {NUM_LOW_BINS} bins of about equal counts, those above in {NUM_HIGH_BINS}; "
        "calibrated probabilities lie on the diagonal."
    )
    return Plot(
        title="Reliability of token scores",
        note=note if series else "Nothing to draw: no scorer gives tokens of both labels a probability.",
        x=Axis(label="mean score in the bin", low=0.0, high=1.0, ticks=SHARES),
        y=Axis(label="share of labelled tokens", low=0.0, high=1.0, ticks=SHARES),
        series=tuple(series),
        is_step=False,
        reference=((0.0, 0.0), (1.0, 1.0)),
        reference_label="calibrated",
    )


def _bins(scores: Float[Tensor, " item"], labels: Float[Tensor, " item"]) -> list[ReliabilityPoint]:
    """Where positives are rare nearly all scores are low; bins of their own keep the rest of the curve in sight."""
    is_low = scores < LOW_SCORE
    low = reliability_curve(scores[is_low], labels[is_low], NUM_LOW_BINS)
    return low + reliability_curve(scores[~is_low], labels[~is_low], NUM_HIGH_BINS)


def _detection(by_scorer: Scorers, threshold: float | None) -> Plot:
    lags = {} if threshold is None else _lags(by_scorer, threshold)
    found = sorted(lag for row in lags.values() for lag in row if lag is not None)
    late = found[int(0.95 * (len(found) - 1))] if found else 0
    longest = next((end for end in LONGEST_LAGS if end >= late), LONGEST_LAGS[-1])
    series = []
    for name, row in lags.items():
        shares = [sum(lag is not None and lag <= at for lag in row) / len(row) for at in range(longest + 1)]
        series.append(_series(name, [(float(at), share) for at, share in enumerate(shares)]))
    if threshold is None:
        note = "Nothing to draw: there is no threshold."
    elif not lags:
        note = "Nothing to draw: no text has a labelled span with token scores."
    else:
        num_texts = len(next(iter(lags.values())))
        note = (
            f"Of {num_texts:,} texts with a span, the share that is flagged within so many tokens of its first token."
        )
        if len(lags) > 1:
            note += " The other scorers flag no more negative texts than the head does."
    return Plot(
        title="Tokens to detection",
        note=note,
        x=Axis(label="tokens after onset", low=0.0, high=float(longest), ticks=_count_ticks(longest)),
        y=Axis(label="share of texts detected", low=0.0, high=1.0, ticks=SHARES),
        series=tuple(series),
        is_step=True,
    )


def _lags(by_scorer: Scorers, threshold: float) -> dict[str, list[int | None]]:
    """Tokens from onset to flag, None when missed, of each text with a span that a scorer reads token by token."""
    head = _readable(by_scorer.get("head", ()))
    allowed = sum(peak >= threshold for peak in _negative_peaks(head))
    lags = {}
    for name in scorer_order(set(by_scorer)):
        texts = _readable(by_scorer[name])
        limit = threshold if name == "head" else _threshold_flagging(_negative_peaks(texts), allowed)
        spans = [text for text in texts if bool((text.token_labels >= 0.5).any())]
        if spans and limit is not None:
            lags[name] = [detect(text, limit).lag for text in spans]
    return lags


def _readable(texts: Sequence[ScoredText]) -> list[ScoredText]:
    """Texts that can be judged at each labelled token."""
    return [
        text
        for text in texts
        if text.judged is not None and not bool(text.judged[text.token_labels.isfinite()].isnan().any())
    ]


def _negative_peaks(texts: Sequence[ScoredText]) -> list[float]:
    """The highest that each text without a positive token is judged at a labelled one."""
    peaks = []
    for text in texts:
        is_known = text.token_labels.isfinite()
        if text.judged is not None and bool(is_known.any()) and not bool((text.token_labels >= 0.5).any()):
            peaks.append(float(text.judged[is_known].max()))
    return peaks


def _threshold_flagging(peaks: Sequence[float], allowed: int) -> float | None:
    """The lowest threshold that at most so many peaks reach; None where there is no peak to tell."""
    if allowed >= len(peaks):
        return None
    return math.nextafter(sorted(peaks, reverse=True)[allowed], math.inf)


def _responses(texts: Sequence[ScoredText]) -> Pair:
    known = [(t.score, t.label) for t in texts if not math.isnan(t.label) and not math.isnan(t.score)]
    return _column([score for score, _ in known]), _column([label for _, label in known])


def _tokens(texts: Sequence[ScoredText]) -> Pair:
    scores, labels = [_column([])], [_column([])]
    for text in texts:
        if text.token_scores is not None:
            is_known = text.token_labels.isfinite() & ~text.token_scores.isnan()
            scores.append(text.token_scores[is_known].double())
            labels.append(text.token_labels[is_known].double())
    return torch.cat(scores), torch.cat(labels)


def _column(values: Sequence[float]) -> Float[Tensor, " item"]:
    return torch.tensor(values, dtype=torch.float64)


def _series(name: str, points: Sequence[Point], notes: Sequence[str] = ()) -> Series:
    rounded = tuple((float(f"{x:.6g}"), round(y, 5)) for x, y in points)
    return Series(scorer=name, label=scorer_label(name), points=rounded, notes=tuple(notes))


def _geometric(low: float, high: float, count: int) -> list[float]:
    return [low * (high / low) ** (step / (count - 1)) for step in range(count)]


def _log_ticks(lowest: float) -> tuple[tuple[float, str], ...]:
    """Powers of ten, and their doubles and halves where there are few of them."""
    steps = (1,) if lowest <= 0.01 else (1, 2, 5)
    values = [step * 10.0**power for power in range(-4, 1) for step in steps]
    return tuple((value, f"{value:g}") for value in values if lowest <= value * (1 + 1e-9) <= 1.01)


def _count_ticks(longest: int) -> tuple[tuple[float, str], ...]:
    return tuple((float(at), f"{at}") for at in range(0, longest + 1, longest // 4))
