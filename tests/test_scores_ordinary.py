"""Ordinary texts that teach and ordinary texts that set a threshold, kept apart."""

from __future__ import annotations

import pytest

from pilotfish.core import Conversation, Message
from pilotfish.scores import num_benign_needed, teach_ordinary
from pilotfish.texts import check_leak

BUDGET = 0.1
NEEDED = num_benign_needed(BUDGET)


def rows(name: str, count: int, **labels: float) -> list[Conversation]:
    return [
        Conversation(
            f"{name}{i}", f"{name}{i}", (Message("user", "hi"), Message("assistant", f"{name} says {i}")), labels=labels
        )
        for i in range(count)
    ]


SPLITS = {"train": rows("a", 3, mine=1.0), "validation": rows("b", 2, mine=0.0), "test": rows("c", 2, mine=1.0)}


def test_half_of_the_ordinary_texts_teach_as_negatives_and_no_text_does_both():
    benign = rows("d", 2 * NEEDED + 10)
    splits, left = teach_ordinary(SPLITS, benign, metric="mine", budget=BUDGET, seed=0)
    taught = [row for name in ("train", "validation") for row in splits[name] if row.id.startswith("d")]
    assert len(left) >= NEEDED
    assert {row.id for row in taught} | {row.id for row in left} == {row.id for row in benign}
    assert {row.labels["mine"] for row in taught} == {0.0}
    assert all("mine" not in row.labels for row in left)
    assert splits["test"] == SPLITS["test"]
    assert all(any(row.id.startswith("d") for row in splits[name]) for name in ("train", "validation"))
    check_leak({**splits, "benign": left})


def test_a_label_that_a_text_has_already_is_kept():
    benign = rows("d", 2 * NEEDED + 10, mine=1.0)
    splits, _ = teach_ordinary(SPLITS, benign, metric="mine", budget=BUDGET, seed=0)
    assert {row.labels["mine"] for row in splits["train"] if row.id.startswith("d")} == {1.0}


@pytest.mark.parametrize("count", [0, 1, NEEDED, 2 * NEEDED - 1])
def test_too_few_to_do_both_leave_all_as_it_is(count):
    benign = rows("d", count)
    splits, left = teach_ordinary(SPLITS, benign, metric="mine", budget=BUDGET, seed=0)
    assert (splits, left) == (SPLITS, benign)
