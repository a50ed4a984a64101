"""The metrics that ship and the public data that they are made and judged with; sets as published in, splits out.

The folder holds one folder a set, as docs/data.md lists them: sven/{train,val}, cyberseceval, toxic_spans, xstest,
halueval, liedetector, bipia, repe.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from ordinary_code import ordinary_code

from pilotfish.core import Conversation, Message, Span
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
    read_repe_facts,
    read_sven,
    read_toxic_spans,
    read_xstest,
    split,
)

FRACTIONS = {"train": 0.6, "validation": 0.15, "test": 0.25}
NUM_BENIGN = 1000
NUM_TEXTS = 300
"""Of the benign requests: those with a text to work on."""
NUM_ORDINARY_CODE = 1400
BUDGET = 0.01
UNSEEN_ATTACKS = 8
"""Classes of attacks, of 25, that training never sees."""
DRAWS = 0
"""Seed of what is drawn from the sets: another seed of a task splits and fits the same texts, which are read once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    metric: str
    splits: dict[str, list[Conversation]]
    benign: list[Conversation]
    more_benign: list[Conversation] = field(default_factory=list)
    """For the threshold alone."""
    elsewhere: dict[str, list[Conversation]] = field(default_factory=dict)
    """Other labelled texts to judge on, by a name that says what is new about them; read only when asked for."""
    max_tokens: int = 512
    budget: float = BUDGET
    """Share of ordinary texts that may be flagged."""


def tasks(data: Path, seed: int) -> dict[str, Callable[[], Task]]:
    """By metric; a set is read when its task is made."""
    made = (insecure_code, toxicity, refusal, prompt_injection, hallucination, untruthful_answer)
    return {make.__name__: partial(_taught, make, data, seed) for make in made}


def _taught(make: Callable[[Path, int], Task], data: Path, seed: int) -> Task:
    """A task whose training has seen half of the benign texts; the other half sets the threshold, with more of them."""
    task = make(data, seed)
    found = teach_ordinary(task.splits, task.benign, metric=task.metric, budget=BUDGET, seed=seed)
    return replace(task, splits=found.splits, benign=[*found.benign, *task.more_benign])


def _of_replies(
    metric: str, data: Path, splits: dict[str, list[Conversation]], elsewhere: dict[str, list[Conversation]]
) -> Task:
    """A task whose ordinary texts are an assistant's replies."""
    return Task(
        metric=metric,
        splits=splits,
        benign=benign(data),
        more_benign=more_benign(data),
        elsewhere=elsewhere,
        max_tokens=256,
    )


def insecure_code(data: Path, seed: int) -> Task:
    """SVEN's validation half is the test; training texts that share a repository or a text with it are left out.

    Half of the ordinary texts are code, or the head would learn that code is what is insecure.

    Elsewhere: CyberSecEval's code of other repositories, all of it insecure.
    """
    test = read_sven(data / "sven", "val")
    # All of CyberSecEval is insecure, and its requests look unlike SVEN's: more of it would teach the difference.
    published = read_cyberseceval(data / "cyberseceval" / "instruct.json")
    insecure = drawn(published, 400, "cyberseceval")
    pool = apart_from(test, [*read_sven(data / "sven", "train"), *insecure])
    splits = {**split(pool, {"train": 0.85, "validation": 0.15}, seed=seed), "test": test}
    others = drawn(apart_from([*pool, *test], published), 200, "other cyberseceval")
    code = drawn(ordinary_code(), NUM_ORDINARY_CODE, "ordinary code")
    half = NUM_BENIGN // 2
    return Task(
        metric="insecure_code",
        splits=splits,
        benign=[*benign(data)[:half], *code[:half]],
        more_benign=[*drawn(more_benign(data), len(code) - half, "more replies"), *code[half:]],
        elsewhere={"cyberseceval": others},
    )


def toxicity(data: Path, seed: int) -> Task:
    """The published test set is the test.

    Elsewhere: polite refusals of dangerous requests. They tell of false alarms alone; no other set is labelled so.
    """
    test = read_toxic_spans(data / "toxic_spans" / "test.csv")
    pool = drawn(apart_from(test, read_toxic_spans(data / "toxic_spans" / "train.csv")), 1600, "toxicity")
    splits = {**split(pool, {"train": 0.85, "validation": 0.15}, seed=seed), "test": test}
    refusals = [row for row in read_xstest(data / "xstest") if row.labels["refusal"] == 1.0]
    elsewhere = {"polite_refusals": relabelled(drawn(refusals, 200, "polite refusals"), "toxicity", lambda row: 0.0)}
    # Ordinary replies are so unlike a forum that 1 % of them are reached at a probability of .1.
    return replace(_of_replies("toxicity", data, splits, elsewhere), budget=0.002)


def refusal(data: Path, seed: int) -> Task:
    """Split by what the prompts are about.

    Elsewhere: short answers, of which hardly any refuses. They tell of false alarms alone; no other set is labelled so.
    """
    splits = split(read_xstest(data / "xstest"), FRACTIONS, seed=seed)
    elsewhere = {"short_answers": relabelled(short_answers(data), "refusal", lambda row: 0.0)}
    return _of_replies("refusal", data, splits, elsewhere)


def prompt_injection(data: Path, seed: int) -> Task:
    """The test has texts, and classes of attacks, that training never sees; training has a text with several.

    Elsewhere: the same texts with attacks of the classes that it does see.
    """
    rows = read_bipia(data / "bipia", seed=DRAWS, attacks_per_context=4)
    tables = drawn([row for row in rows if row.id.startswith("bipia-table")], 1000, "tables", by_group=True)
    parts = split([row for row in rows if not row.id.startswith("bipia-table")] + tables, FRACTIONS, seed=seed)
    classes = sorted({name for row in rows if (name := injection_class(row)) is not None})
    order = torch.randperm(len(classes), generator=generator(DRAWS, "attacks")).tolist()
    unseen = {classes[index] for index in order[:UNSEEN_ATTACKS]}
    seen = set(classes) - unseen
    splits = {
        name: _balanced([row for row in parts[name] if injection_class(row) not in unseen])
        for name in ("train", "validation")
    }
    splits["test"] = _one_attack_a_text(parts["test"], unseen)
    used = [row for part in parts.values() for row in part]
    ordinary, more = benign_requests(data, used)
    return Task(
        metric="prompt_injection",
        splits=splits,
        benign=ordinary,
        more_benign=more,
        elsewhere={"seen_attacks": _one_attack_a_text(parts["test"], seen)},
    )


def _one_attack_a_text(rows: Sequence[Conversation], classes: set[str]) -> list[Conversation]:
    """Each text as it is, and once with an attack of one of the classes."""
    chosen: dict[tuple[str, bool], Conversation] = {}
    for row in rows:
        name = injection_class(row)
        if name is None or name in classes:
            chosen.setdefault((_text_of(row), name is None), row)
    return list(chosen.values())


def _balanced(rows: Sequence[Conversation]) -> list[Conversation]:
    """With each text without an attack as often as with one, so that no kind of text is itself a sign of an attack."""
    clean = {row.id.removesuffix("-clean"): row for row in rows if injection_class(row) is None}
    attacked: set[str] = set()
    further = []
    for row in rows:
        if injection_class(row) is None:
            continue
        text = _text_of(row)
        if text in attacked:
            further.append(replace(clean[text], id=f"{row.id}-clean"))
        attacked.add(text)
    return [*rows, *further]


def _text_of(row: Conversation) -> str:
    """Id of the text, whichever attack it has."""
    return "-".join(row.id.split("-")[:3])


def hallucination(data: Path, seed: int) -> Task:
    """Replies of one model, as many without as with. Elsewhere: lies and truths of other models."""
    splits = split(replies(data), FRACTIONS, seed=seed)
    lies = relabelled(short_answers(data), "hallucination", lambda row: row.labels["untruthful_answer"])
    return _of_replies("hallucination", data, splits, {"lies": lies})


def replies(data: Path) -> list[Conversation]:
    """With hallucinations, and as many without; none of the benign ones among them."""
    taken = {row.id for row in benign(data)}
    found, free = [], []
    for row in read_halueval(data / "halueval" / "general_data.jsonl"):
        if row.labels.get("hallucination") == 0.0:
            free.append(row)
        else:
            found.append(row)
    return [*found, *drawn([row for row in free if row.id not in taken], len(found), "hallucination")]


def untruthful_answer(data: Path, seed: int) -> Task:
    """The published validation half is the test; a question's lie and truth stay together.

    Elsewhere: true and false statements, and replies with and without hallucinations.
    """
    test = short_answers(data)
    rows = apart_from(test, read_liedetector(data / "liedetector", "train"))
    pool = drawn(rows, 2000, "untruthful_answer", by_group=True)
    splits = {**split(pool, {"train": 0.85, "validation": 0.15}, seed=seed), "test": test}
    elsewhere = {
        "statements": statements(data),
        "hallucinations": relabelled(
            replies(data), "untruthful_answer", lambda row: float(row.labels.get("hallucination") != 0.0)
        ),
    }
    return _of_replies("untruthful_answer", data, splits, elsewhere)


def short_answers(data: Path) -> list[Conversation]:
    """To questions of many kinds, half of them lies."""
    return drawn(read_liedetector(data / "liedetector", "validation"), 600, "test", by_group=True)


def statements(data: Path) -> list[Conversation]:
    """True and false ones, as answers to one request."""
    return [
        Conversation(
            f"{pair.id}-{label:g}",
            f"{pair.id}-{label:g}",
            (Message("user", "Tell me a fact."), Message("assistant", statement)),
            labels={"untruthful_answer": label},
            source=pair.source,
            license=pair.license,
        )
        for pair in read_repe_facts(data / "repe" / "facts_true_false.csv")
        for label, statement in ((0.0, pair.positive), (1.0, pair.negative))
    ]


def relabelled(rows: Sequence[Conversation], metric: str, label: Callable[[Conversation], float]) -> list[Conversation]:
    """The same texts with one label each, of another metric."""
    return [replace(row, spans=(), labels={metric: label(row)}) for row in rows]


def benign_requests(data: Path, but: Sequence[Conversation]) -> tuple[list[Conversation], list[Conversation]]:
    """What users ask, three in ten with a text to work on, none of the texts of `but`; and more in the same mixture."""
    clean = [row for row in read_bipia(data / "bipia", seed=DRAWS) if injection_class(row) is None]
    texts = [_without_attack(row) for row in drawn(apart_from(but, clean), len(clean), "benign texts")]
    asked, more_asked = (
        [_without_attack(replace(row, messages=row.messages[:1])) for row in rows]
        for rows in (benign(data), more_benign(data))
    )
    num_bare = NUM_BENIGN - NUM_TEXTS
    more_texts = apart_from(texts[:NUM_TEXTS], texts[NUM_TEXTS:])
    num_more = len(more_texts) * num_bare // NUM_TEXTS
    return [*asked[:num_bare], *texts[:NUM_TEXTS]], [*more_asked[:num_more], *more_texts]


def _without_attack(row: Conversation) -> Conversation:
    """Where no assistant speaks, only spans can say 0."""
    whole = Span(0, 0, len(row.messages[0].content), "prompt_injection", 0.0)
    return replace(row, labels={}, spans=(whole,))


def benign(data: Path) -> list[Conversation]:
    """Ordinary replies of an assistant, to set thresholds on."""
    rows = read_halueval_benign(data / "halueval" / "general_data.jsonl")
    return [replace(row, labels={}) for row in drawn(rows, NUM_BENIGN, "benign")]


def more_benign(data: Path) -> list[Conversation]:
    """The other ordinary replies, of which no head has learnt."""
    taken = {row.id for row in (*benign(data), *replies(data))}
    rows = read_halueval_benign(data / "halueval" / "general_data.jsonl")
    return [replace(row, labels={}) for row in rows if row.id not in taken]


def drawn(rows: Sequence[Conversation], count: int, name: str, *, by_group: bool = False) -> list[Conversation]:
    """About so many rows at random; whole groups where their rows belong together."""
    if not by_group:
        order = torch.randperm(len(rows), generator=generator(DRAWS, name)).tolist()
        return [rows[index] for index in order[:count]]
    groups: dict[str, list[Conversation]] = {}
    for row in rows:
        groups.setdefault(row.group, []).append(row)
    names = list(groups)
    chosen: list[Conversation] = []
    for index in torch.randperm(len(names), generator=generator(DRAWS, name)).tolist():
        if len(chosen) >= count:
            break
        chosen += groups[names[index]]
    return chosen
