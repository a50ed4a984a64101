"""The same texts as scored in two serving configurations in; whether bank and threshold still hold, out.

A change of dtype, a quantised or fine-tuned reader, or another engine moves scores a little. Two things can break: the
ranking (the scorer is worse, and no threshold mends it), or only where the threshold stands (set it again).
All intervals here are one-sided 95 % on either side, over source documents.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple

import torch

from pilotfish.errors import SettingError, TextError
from pilotfish.scores.calibration import Interval, clopper_pearson, num_benign_needed
from pilotfish.scores.metrics import Statistic, auroc_of_draws, bootstrap_by_group, mean_of
from pilotfish.scores.scored import ScoredText

Verdict = Literal["pass", "threshold stale", "scorer degraded", "inconclusive"]

_EXIT_CODES: dict[Verdict, int] = {"pass": 0, "threshold stale": 10, "scorer degraded": 11, "inconclusive": 12}
_LEVEL = 0.90
"""Two-sided, so that either end alone is a bound at 95 %."""
_MIN_GROUPS = 30
"""With fewer documents of a label, a bootstrap's intervals are too narrow to go by."""


class Tolerances(NamedTuple):
    """Losses against the reference that may be."""

    auroc_loss: float = 0.02
    recall_loss: float = 0.05
    """Of the share of positives found at the threshold."""


class Change(NamedTuple):
    """A figure in both configurations and candidate minus reference, with the bounds of that difference."""

    reference: float
    candidate: float
    change: float
    low: float
    """One-sided 95 % bounds."""
    high: float
    num_groups: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Drift:
    verdict: Verdict
    reasons: tuple[str, ...]
    """What the verdict rests on."""
    notes: tuple[str, ...]
    """What was not judged, and why."""
    changes: Mapping[str, Change]
    """`auroc`, `recall`, `fpr` and, where there is no positive row, `flipped` (share of decisions)."""
    fpr_bounds: Interval | None
    """One-sided 95 % Clopper-Pearson bounds of the candidate's false-positive rate; None without a benign row."""
    threshold: float
    budget: float
    num_rows: int
    num_positive: int
    num_benign: int
    num_unscored: int
    """Rows to which the candidate gave no number."""
    num_newly_flagged: int
    num_no_longer_flagged: int
    largest_change: float
    """Of a response's score, either way."""
    mean_change: float
    """Mean size of the change."""

    @property
    def exit_code(self) -> int:
        """0 pass, 10 threshold stale, 11 scorer degraded, 12 inconclusive."""
        return _EXIT_CODES[self.verdict]

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as it stands in JSON."""
        plain = asdict(self) | {"exit_code": self.exit_code}
        plain["changes"] = {name: change._asdict() for name, change in self.changes.items()}
        plain["fpr_bounds"] = None if self.fpr_bounds is None else self.fpr_bounds._asdict()
        return plain


class _Row(NamedTuple):
    group: str
    label: float
    reference: float
    candidate: float


class _Evidence(NamedTuple):
    degraded: list[str]
    stale: list[str]
    open: list[str]
    """Losses that are neither shown nor excluded."""
    excluded: list[str]


def compare_configurations(
    reference: Sequence[ScoredText],
    candidate: Sequence[ScoredText],
    *,
    threshold: float,
    budget: float,
    tolerances: Tolerances | None = None,
    generator: torch.Generator,
    num_resamples: int = 1000,
) -> Drift:
    """Whether a bank and its threshold, made in the reference configuration, hold in the candidate's.

    * scorer degraded: AUROC fell by more than the tolerance (paired bootstrap by document), or a response has no score;
    * threshold stale: the false-positive rate at the threshold is above the budget (exact lower bound), or recall fell
      by more than the tolerance;
    * pass: all such losses are excluded, and benign responses newly flagged are at most `budget` of them;
    * inconclusive: neither; most often too few documents.

    Rows are matched by id and need one label each, or none. Without any label all rows count as benign. Without a
    positive row, ranking and recall cannot be judged, and the share of flipped decisions must stay within the budget.

    Raises:
        SettingError: there are no rows, the budget is outside (0, 1), or the reference or the threshold is no number.
        TextError: the two do not hold the same texts with the same labels and groups.
    """
    num_benign_needed(budget)  # refuses what is no budget
    all_rows = _paired(reference, candidate)
    if not math.isfinite(threshold) or not all(math.isfinite(row.reference) for row in all_rows):
        raise SettingError("the threshold or a score of the reference is not a number; score the reference again")
    rows = [row for row in all_rows if math.isfinite(row.candidate)]
    positive, benign = _by_label(rows, all_rows)
    changes = _changes(positive, benign, threshold, _Bootstrap(generator, num_resamples))
    flagged = {row.group for row in benign if row.candidate >= threshold}
    documents = {row.group for row in benign}
    bounds = clopper_pearson(len(flagged), len(documents), _LEVEL) if documents else None
    evidence = _Evidence([], [], [], [])
    if len(rows) < len(all_rows):
        evidence.degraded.append(f"{len(all_rows) - len(rows)} of {len(all_rows)} responses have no score")
    _judge_losses(changes, tolerances or Tolerances(), (positive, benign), evidence)
    _judge_false_alarms(changes, bounds, budget, evidence)
    verdict, reasons = _verdict(evidence)
    moved = [abs(row.candidate - row.reference) for row in rows]
    return Drift(
        verdict=verdict,
        reasons=reasons,
        notes=_notes(all_rows, positive),
        changes=changes,
        fpr_bounds=bounds,
        threshold=threshold,
        budget=budget,
        num_rows=len(all_rows),
        num_positive=len(positive),
        num_benign=len(benign),
        num_unscored=len(all_rows) - len(rows),
        num_newly_flagged=sum(row.reference < threshold <= row.candidate for row in rows),
        num_no_longer_flagged=sum(row.candidate < threshold <= row.reference for row in rows),
        largest_change=max(moved, default=0.0),
        mean_change=sum(moved) / max(len(moved), 1),
    )


def _paired(reference: Sequence[ScoredText], candidate: Sequence[ScoredText]) -> list[_Row]:
    if not reference:
        raise SettingError("there are no scored texts to compare; give at least one")
    other = {text.id: text for text in candidate}
    differing = sorted({text.id for text in reference} ^ set(other))
    if differing or len(other) != len(candidate) or len(reference) != len(candidate):
        raise TextError(
            f"the two configurations scored {len(reference)} and {len(candidate)} texts"
            + (f", {differing[0]!r} in one of them only" if differing else ", some id twice")
            + "; score the same file with both"
        )
    rows = []
    for text in reference:
        match = other[text.id]
        same_label = text.label == match.label or (math.isnan(text.label) and math.isnan(match.label))
        if not same_label or text.group != match.group:
            raise TextError(f"text {text.id!r} has another label or group in the two; score the same file with both")
        rows.append(_Row(text.group, text.label, text.score, match.score))
    return rows


def _by_label(rows: Sequence[_Row], all_rows: Sequence[_Row]) -> tuple[list[_Row], list[_Row]]:
    """Positive and benign rows; without any label all are benign."""
    if all(math.isnan(row.label) for row in all_rows):
        return [], list(rows)
    return [row for row in rows if row.label >= 0.5], [row for row in rows if row.label < 0.5]


class _Bootstrap(NamedTuple):
    generator: torch.Generator
    num_resamples: int

    def bounds(self, statistic: Statistic, groups: Sequence[str]) -> Interval:
        """Of a difference of two shares; where nothing can be drawn, all that such a difference can be."""
        try:
            _, low, high, _ = bootstrap_by_group(statistic, groups, level=_LEVEL, **self._asdict())
        except SettingError:
            return Interval(-1.0, 1.0)
        return Interval(low, high)


def _changes(
    positive: Sequence[_Row], benign: Sequence[_Row], threshold: float, bootstrap: _Bootstrap
) -> dict[str, Change]:
    def flagged(rows: Sequence[_Row]) -> tuple[list[bool], list[bool]]:
        return [row.reference >= threshold for row in rows], [row.candidate >= threshold for row in rows]

    changes = {}
    if positive and benign:
        changes["auroc"] = _change_of_auroc([*positive, *benign], bootstrap)
    if positive:
        changes["recall"] = _change_of_share(*flagged(positive), positive, bootstrap)
    if benign:
        changes["fpr"] = _change_of_share(*flagged(benign), benign, bootstrap)
    if benign and not positive:
        flipped = [before != after for before, after in zip(*flagged(benign), strict=True)]
        changes["flipped"] = _change_of_share([False] * len(benign), flipped, benign, bootstrap)
    return changes


def _change_of_auroc(rows: Sequence[_Row], bootstrap: _Bootstrap) -> Change:
    labels, *scores = (
        torch.tensor([getattr(row, name) for row in rows], dtype=torch.float64)
        for name in ("label", "reference", "candidate")
    )
    before, after = (auroc_of_draws(each, labels) for each in scores)
    groups = [row.group for row in rows]
    low, high = bootstrap.bounds(lambda drawn: after(drawn) - before(drawn), groups)
    everything = torch.arange(len(rows))
    a, b = before(everything), after(everything)
    return Change(a, b, b - a, low, high, len(set(groups)))


def _change_of_share(
    before: Sequence[bool], after: Sequence[bool], rows: Sequence[_Row], bootstrap: _Bootstrap
) -> Change:
    """Bounds by bootstrap, and no tighter than the exact ones of a net count of documents.

    Where few decisions flip, or none, resampling shows only those; the exact bound knows what so many documents miss.
    """
    groups = [row.group for row in rows]
    n = len(set(groups))
    a, b = sum(before) / len(rows), sum(after) / len(rows)
    drawn = bootstrap.bounds(mean_of([float(y) - x for x, y in zip(before, after, strict=True)]), groups)
    net = abs(b - a) * n  # in documents
    least = clopper_pearson(math.floor(net + 1e-9), n, _LEVEL).low
    most = clopper_pearson(math.ceil(net - 1e-9), n, _LEVEL).high
    low, high = (-most, most) if a == b else (least, most) if b > a else (-most, -least)
    return Change(a, b, b - a, min(low, drawn.low), max(high, drawn.high), n)


def _judge_losses(
    changes: Mapping[str, Change], tolerances: Tolerances, by_label: tuple[list[_Row], list[_Row]], evidence: _Evidence
) -> None:
    few = min(len({row.group for row in rows}) for rows in by_label)
    needed = num_benign_needed(tolerances.recall_loss)
    judged = (
        ("auroc", "AUROC", tolerances.auroc_loss, evidence.degraded, _MIN_GROUPS),
        ("recall", "recall at the threshold", tolerances.recall_loss, evidence.stale, needed),
    )
    for name, words, tolerance, shown, groups in judged:
        if name not in changes:
            continue
        change = changes[name]
        lost, most, least = -change.change, max(-change.low, 0.0), -change.high
        if name == "auroc" and few < groups:
            evidence.open.append(f"{few} documents of one label are too few for an interval of AUROC; give {groups}")
        elif least > tolerance:
            shown.append(f"{words} fell by {lost:.3f}, by {least:.3f} at the least; {tolerance:g} may be lost")
        elif most > tolerance:
            evidence.open.append(
                f"{words} may have fallen by {most:.3f}, where {tolerance:g} may be lost; "
                f"{change.num_groups} documents were given, {groups} are the fewest that can do"
            )
        else:
            evidence.excluded.append(f"{words} fell by {most:.3f} at the most")


def _judge_false_alarms(
    changes: Mapping[str, Change], bounds: Interval | None, budget: float, evidence: _Evidence
) -> None:
    if bounds is None:
        evidence.open.append("no row is benign, so false positives cannot be judged; add benign responses")
        return
    fpr = changes["fpr"]
    if bounds.low > budget:
        before = f"; the reference's is {fpr.reference:.2%}, over it too" if fpr.reference > budget else ""
        evidence.stale.append(
            f"the false-positive rate is {fpr.candidate:.2%}, {bounds.low:.2%} at the least, over the budget of "
            f"{budget:.2%}{before}"
        )
        return
    name, words = ("flipped", "decisions flipped") if "flipped" in changes else ("fpr", "false-positive rate has risen")
    most = changes[name].high
    if most > budget:
        evidence.open.append(
            f"{words}: {most:.2%} at the most, where {budget:.2%} may be; {fpr.num_groups} documents were given, "
            f"{num_benign_needed(budget)} are the fewest that can do"
        )
    else:
        evidence.excluded.append(f"{words}: {most:.2%} at the most")


def _verdict(evidence: _Evidence) -> tuple[Verdict, tuple[str, ...]]:
    if evidence.degraded:
        return "scorer degraded", tuple(evidence.degraded + evidence.stale)
    if evidence.stale:
        return "threshold stale", tuple(evidence.stale + evidence.open)
    if evidence.open:
        return "inconclusive", tuple(evidence.open)
    return "pass", tuple(evidence.excluded)


def _notes(rows: Sequence[_Row], positive: Sequence[_Row]) -> tuple[str, ...]:
    unlabelled = sum(math.isnan(row.label) for row in rows)
    notes = []
    if unlabelled == len(rows):
        notes.append("no row is labelled: all count as benign, and only false positives and flips are judged")
    elif unlabelled:
        notes.append(f"{unlabelled} of {len(rows)} rows have no label; only their flips are counted")
    if not positive:
        notes.append("no row is positive: ranking and recall are NOT judged; a head that finds nothing might pass")
    return tuple(notes)
