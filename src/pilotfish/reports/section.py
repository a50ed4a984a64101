"""The folder of a bank in; what a report shows of each of its metrics out."""

from __future__ import annotations

from pathlib import Path

from pilotfish.errors import ArtefactError
from pilotfish.heads import Card, bank_folder
from pilotfish.heads.bank import CARD_FILE
from pilotfish.reports.curves import curves_of
from pilotfish.reports.examples import examples_of
from pilotfish.reports.figures import figures_of, promise_of, scorer_label, verdict_of
from pilotfish.reports.heads import Section
from pilotfish.scores import Scored, read_scored
from pilotfish.scores.scored import SCORED_FILE

MISSING = (
    f"There is no {SCORED_FILE} of this metric beside the card, so there are no curves and no examples. `pilotfish "
    "fit` writes it; it holds the texts, and is not copied with a bank that is shared."
)


def read_sections(folder: Path) -> list[Section]:
    """A section for each metric of a bank; curves and examples come from the `scored.json` beside its card.

    Raises:
        ArtefactError: the card or `scored.json` is damaged, the card is missing, or the two are of different metrics.
    """
    folder = bank_folder(folder)
    card = Card.load(folder / CARD_FILE)
    path = folder / SCORED_FILE
    scored = read_scored(path) if path.exists() else None
    if scored is not None and scored.metric not in card.heads:
        raise ArtefactError(
            f"{path} is of metric {scored.metric!r}; the card beside it has {', '.join(card.heads) or 'none'}. Copy "
            "both from one run of `pilotfish fit`"
        )
    return [_section(card, metric, scored) for metric in card.heads]


def _section(card: Card, metric: str, scored: Scored | None) -> Section:
    scorers, figures = figures_of(card, metric)
    found = card.thresholds.get(metric)
    threshold = None if found is None else found.threshold
    is_here = scored is not None and scored.metric == metric
    by_scorer = scored.by_scorer if scored is not None and is_here else {}
    head = card.heads[metric]
    return Section(
        metric=metric,
        model=card.identity.name,
        reader=f"A {head.kind} head that reads {card.identity.name} at {', '.join(head.sites)}.",
        promise=promise_of(card, metric),
        verdict=verdict_of(card, metric),
        is_better=card.better_than_words.get(metric),
        caveats=card.not_for,
        data=tuple(
            (row.role, row.source or "unnamed", row.license or "unnamed", f"{row.num_rows:,}", f"{row.num_tokens:,}")
            for row in card.data
            if row.metric in {"", metric}
        ),
        scorers=scorers,
        scorer_labels=tuple(map(scorer_label, scorers)),
        figures=figures,
        plots=curves_of(by_scorer, threshold) if is_here else (),
        examples=examples_of(by_scorer.get("head", ()), threshold) if is_here else (),
        missing="" if is_here else MISSING,
    )
