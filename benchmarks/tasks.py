"""The metrics that ship and the public data that they are made and judged with; sets as published in, splits out.

The folder holds one folder a set, as docs/data.md lists them: sven/{train,val}, cyberseceval, toxic_spans, xstest,
halueval, liedetector, bipia.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from pilotfish.core import Conversation
from pilotfish.runs import generator
from pilotfish.scores import teach_ordinary
from pilotfish.texts import (
    apart_from,
    injection_class,
    read_bipia,
    read_cyberseceval,
    read_halueval,
    read_halueval_benign,
    read_liedetector,
    read_sven,
    read_toxic_spans,
    read_xstest,
    split,
)

FRACTIONS = {"train": 0.6, "validation": 0.15, "test": 0.25}
NUM_BENIGN = 600
UNSEEN_ATTACKS = 8
"""Classes of attacks, of 25, that training never sees."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    metric: str
    splits: dict[str, list[Conversation]]
    benign: list[Conversation]
    elsewhere: dict[str, list[Conversation]] = field(default_factory=dict)
    """Other labelled texts to judge on, by a name that says what is new about them."""
    max_tokens: int = 512


def tasks(data: Path, seed: int) -> dict[str, Callable[[], Task]]:
    """By metric; a set is read when its task is made."""
    return {
        "insecure_code": lambda: insecure_code(data, seed),
        "toxicity": lambda: toxicity(data, seed),
        "refusal": lambda: refusal(data, seed),
        "prompt_injection": lambda: prompt_injection(data, seed),
        "hallucination": lambda: hallucination(data, seed),
        "untruthful_answer": lambda: untruthful_answer(data, seed),
    }


def insecure_code(data: Path, seed: int) -> Task:
    """SVEN's validation half is the test; training texts that share a repository or a text with it are left out."""
    test = read_sven(data / "sven", "val")
    # All of CyberSecEval is insecure, and its requests look unlike SVEN's: more of it would teach the difference.
    insecure = drawn(read_cyberseceval(data / "cyberseceval" / "instruct.json"), 400, seed, "cyberseceval")
    pool = apart_from(test, [*read_sven(data / "sven", "train"), *insecure])
    splits = {**split(pool, {"train": 0.85, "validation": 0.15}, seed=seed), "test": test}
    taught = teach_ordinary(splits, benign(data, seed), metric="insecure_code", budget=0.01, seed=seed)
    return Task(metric="insecure_code", splits=taught.splits, benign=taught.benign)


def toxicity(data: Path, seed: int) -> Task:
    """The published test set is the test."""
    test = read_toxic_spans(data / "toxic_spans" / "test.csv")
    pool = drawn(apart_from(test, read_toxic_spans(data / "toxic_spans" / "train.csv")), 1600, seed, "toxicity")
    splits = {**split(pool, {"train": 0.85, "validation": 0.15}, seed=seed), "test": test}
    return Task(metric="toxicity", splits=splits, benign=benign(data, seed), max_tokens=256)


def refusal(data: Path, seed: int) -> Task:
    """Split by what the prompts are about."""
    rows = read_xstest(data / "xstest")
    return Task(metric="refusal", splits=split(rows, FRACTIONS, seed=seed), benign=benign(data, seed), max_tokens=256)


def prompt_injection(data: Path, seed: int) -> Task:
    """The test has texts, and classes of attacks, that training never sees."""
    rows = read_bipia(data / "bipia", seed=0, attacks_per_context=4)
    tables = drawn([row for row in rows if row.id.startswith("bipia-table")], 1000, seed, "tables", by_group=True)
    parts = split([row for row in rows if not row.id.startswith("bipia-table")] + tables, FRACTIONS, seed=seed)
    classes = sorted({name for row in rows if (name := injection_class(row)) is not None})
    order = torch.randperm(len(classes), generator=generator(seed, "attacks")).tolist()
    unseen = {classes[index] for index in order[:UNSEEN_ATTACKS]}
    seen = set(classes) - unseen
    splits = {name: _one_attack_a_text(part, unseen if name == "test" else seen) for name, part in parts.items()}
    used = [row for part in parts.values() for row in part]
    return Task(metric="prompt_injection", splits=splits, benign=benign_requests(data, seed, used))


def _one_attack_a_text(rows: Sequence[Conversation], classes: set[str]) -> list[Conversation]:
    """Each text as it is, and once with an attack of one of the classes."""
    chosen: dict[tuple[str, bool], Conversation] = {}
    for row in rows:
        name = injection_class(row)
        if name is None or name in classes:
            text = "-".join(row.id.split("-")[:3])
            chosen.setdefault((text, name is None), row)
    return list(chosen.values())


def hallucination(data: Path, seed: int) -> Task:
    """Replies of one model, as many without as with; none of the benign ones among them."""
    path = data / "halueval" / "general_data.jsonl"
    taken = {row.id for row in benign(data, seed)}
    found, free = [], []
    for row in read_halueval(path):
        if row.labels.get("hallucination") == 0.0:
            free.append(row)
        else:
            found.append(row)
    free = drawn([row for row in free if row.id not in taken], len(found), seed, "hallucination")
    return Task(
        metric="hallucination",
        splits=split([*found, *free], FRACTIONS, seed=seed),
        benign=benign(data, seed),
        max_tokens=256,
    )


def untruthful_answer(data: Path, seed: int) -> Task:
    """The published validation half is the test; a question's lie and truth stay together."""
    folder = data / "liedetector"
    test = drawn(read_liedetector(folder, "validation"), 600, 0, "test", by_group=True)
    rows = apart_from(test, read_liedetector(folder, "train"))
    pool = drawn(rows, 2000, seed, "untruthful_answer", by_group=True)
    splits = {**split(pool, {"train": 0.85, "validation": 0.15}, seed=seed), "test": test}
    return Task(metric="untruthful_answer", splits=splits, benign=benign(data, seed), max_tokens=256)


def benign_requests(data: Path, seed: int, but: Sequence[Conversation]) -> list[Conversation]:
    """What users ask, half of it with a text to work on; none of the texts of `but`."""
    asked = [replace(row, messages=row.messages[:1]) for row in benign(data, seed)]
    clean = [row for row in read_bipia(data / "bipia", seed=0) if injection_class(row) is None]
    texts = drawn(apart_from(but, clean), NUM_BENIGN // 2, seed, "benign texts")
    return [replace(row, labels={}, spans=()) for row in [*asked[: NUM_BENIGN // 2], *texts]]


def benign(data: Path, seed: int) -> list[Conversation]:
    """Ordinary replies of an assistant, to set thresholds on."""
    rows = read_halueval_benign(data / "halueval" / "general_data.jsonl")
    return [replace(row, labels={}) for row in drawn(rows, NUM_BENIGN, seed, "benign")]


def drawn(
    rows: Sequence[Conversation], count: int, seed: int, name: str, *, by_group: bool = False
) -> list[Conversation]:
    """About so many rows at random; whole groups where their rows belong together."""
    if not by_group:
        order = torch.randperm(len(rows), generator=generator(seed, name)).tolist()
        return [rows[index] for index in order[:count]]
    groups: dict[str, list[Conversation]] = {}
    for row in rows:
        groups.setdefault(row.group, []).append(row)
    names = list(groups)
    chosen: list[Conversation] = []
    for index in torch.randperm(len(names), generator=generator(seed, name)).tolist():
        if len(chosen) >= count:
            break
        chosen += groups[names[index]]
    return chosen
