"""`pilotfish check`: one bank in two serving configurations in, what drifted and a verdict as exit code out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from pilotfish.cli.terminal import table
from pilotfish.cli.verbs import Check
from pilotfish.core import Conversation
from pilotfish.errors import BankMismatch, SettingError
from pilotfish.heads import HeadBank, load_bank
from pilotfish.models import Identity, LoadedModel, load_model
from pilotfish.runs import generator, write_json
from pilotfish.scores import Change, Drift, ScoredText, Tolerances, compare_configurations, read_scored, score_tokens
from pilotfish.scores.prepared import prepare, scored_by_head
from pilotfish.texts import read_jsonl

NAMES = {
    "auroc": "AUROC of responses",
    "recall": "recall at the threshold",
    "fpr": "false-positive rate",
    "flipped": "share of decisions flipped",
}


class _Configurations(NamedTuple):
    metric: str
    reference: Sequence[ScoredText]
    candidate: Sequence[ScoredText]
    names: tuple[str, str]
    warnings: tuple[str, ...] = ()


def run(config: Check) -> int:
    bank = None if config.bank is None else load_bank(config.bank)
    if config.reference is not None and config.candidate is not None and config.data is None:
        given = _from_files(config.reference, config.candidate, config.scorer)
    elif bank is not None and config.data is not None and config.reference is config.candidate is None:
        given = _from_bank(bank, read_jsonl(config.data), config)
    else:
        raise SettingError("give either a bank's folder and --data, or two files with --reference and --candidate")
    threshold, budget = _promise(bank, given.metric, config)
    drift = compare_configurations(
        given.reference,
        given.candidate,
        threshold=threshold,
        budget=budget,
        tolerances=Tolerances(config.max_auroc_loss, config.max_recall_loss),
        generator=generator(config.seed, "check"),
    )
    _print(drift, given)
    if config.json is not None:
        names = {"metric": given.metric, "reference": given.names[0], "candidate": given.names[1]}
        write_json(config.json, names | {"warnings": list(given.warnings)} | drift.to_dict())
    return drift.exit_code


def _promise(bank: HeadBank | None, metric: str, config: Check) -> tuple[float, float]:
    """Threshold and budget: as given, else as the card has them."""
    if bank is not None and metric not in bank.metrics:
        raise SettingError(f"metric {metric!r} has no head in this bank; there are {', '.join(bank.metrics)}")
    limit = None if bank is None else bank.card.thresholds.get(metric)
    threshold = config.threshold if config.threshold is not None or limit is None else limit.threshold
    budget = config.budget if config.budget is not None or limit is None else limit.budget
    if threshold is None or budget is None:
        raise SettingError(f"no card says at which threshold {metric!r} is flagged; give --threshold and --budget")
    return threshold, budget


def _from_files(reference: Path, candidate: Path, scorer: str) -> _Configurations:
    read = [read_scored(path) for path in (reference, candidate)]
    if read[0].metric != read[1].metric:
        raise SettingError(f"{reference} is about {read[0].metric!r}, {candidate} about {read[1].metric!r}")
    for path, content in zip((reference, candidate), read, strict=True):
        if scorer not in content.by_scorer:
            raise SettingError(f"{path} has no scorer {scorer!r}; it has {', '.join(content.by_scorer) or 'none'}")
    texts = [content.by_scorer[scorer] for content in read]
    return _Configurations(read[0].metric, texts[0], texts[1], (str(reference), str(candidate)))


def _from_bank(bank: HeadBank, rows: Sequence[Conversation], config: Check) -> _Configurations:
    metric = config.metric or bank.metrics[0]
    bank = bank.subset([metric])
    name = config.model or bank.identity.name
    other = config.candidate_model or name
    # One after the other, so that one model at a time is held.
    reader = load_model(name, device=config.device, dtype=config.against)
    bank.check(reader.identity)
    reference = _scored(reader, bank, rows, config.max_tokens)
    reader = load_model(other, device=config.device, dtype=config.dtype)
    warnings = _check_candidate(bank, reader.identity, may_differ=config.other_weights)
    candidate = _scored(reader, bank, rows, config.max_tokens)
    names = (f"{name}, {config.against}", f"{other}, {config.dtype}")
    return _Configurations(metric, reference, candidate, names, warnings)


def _check_candidate(bank: HeadBank, identity: Identity, *, may_differ: bool) -> tuple[str, ...]:
    """Says aloud that the weights differ, where they may; tokenizer and shape never may."""
    bank.check(replace(identity, weights=bank.identity.weights))
    if identity.weights == bank.identity.weights:
        return ()
    if not may_differ:
        raise BankMismatch(
            f"{identity.name} does not have the weights that this bank was made for; where that is what you want to "
            "check, add --other-weights True"
        )
    return (f"{identity.name} does NOT have the weights that this bank was made for: the bank refuses to serve it",)


def _scored(reader: LoadedModel, bank: HeadBank, rows: Sequence[Conversation], max_tokens: int) -> list[ScoredText]:
    return [
        scored_by_head(text, score_tokens(reader.model, bank, text.tokens.token_ids, boundary=text.boundary))
        for text in prepare(rows, reader, bank.metrics[0], max_tokens, keeps_unlabelled=True)
    ]


def _bounds(change: Change) -> str:
    return f"[{change.low:+.4f}, {change.high:+.4f}]"


def _print(drift: Drift, given: _Configurations) -> None:
    for warning in given.warnings:
        print(f"WARNING: {warning}\n")
    print(f"reference: {given.names[0]}\ncandidate: {given.names[1]}\n")
    rows = [
        [NAMES[name], f"{c.reference:.4f}", f"{c.candidate:.4f}", f"{c.change:+.4f}", _bounds(c), str(c.num_groups)]
        for name, c in drift.changes.items()
    ]
    columns = [given.metric, "reference", "candidate", "change", "95 % bounds (each side)", "documents"]
    print(table(columns, rows))
    print(
        f"\n{drift.num_rows} responses, {drift.num_positive} positive, {drift.num_benign} benign; at threshold "
        f"{drift.threshold:.3f} {drift.num_newly_flagged} are newly flagged, {drift.num_no_longer_flagged} no longer."
    )
    if drift.fpr_bounds is not None:
        low, high = drift.fpr_bounds
        print(f"False-positive rate of the candidate: {low:.2%} to {high:.2%}; the budget is {drift.budget:.2%}.")
    print(f"A response's score changed by {drift.largest_change:.4f} at most, {drift.mean_change:.4f} on average.")
    for note in drift.notes:
        print(f"Note: {note}.")
    print(f"\n{drift.verdict.upper()} (exit code {drift.exit_code})")
    for reason in drift.reasons:
        print(f"  {reason}")
