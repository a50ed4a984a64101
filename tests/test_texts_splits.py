"""Splits by source document, and the check that nothing stands on both sides."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pilotfish.core import Conversation, Message
from pilotfish.errors import LeakError, SettingError, TextError
from pilotfish.texts import check_leak, num_documents, split

LONG = "a text that is long enough to be told from all others, whatever was said before it"
HALVES = {"train": 0.5, "test": 0.5}


def row(identifier: str, group: str, text: str | None = None, prompt: str = "go") -> Conversation:
    text = f"{LONG} {identifier}" if text is None else text
    return Conversation(identifier, group, (Message("user", prompt), Message("assistant", text)))


def places(splits: Mapping[str, list[Conversation]]) -> dict[str, str]:
    return {conversation.id: name for name, rows in splits.items() for conversation in rows}


# Rows drawn as (group, text) with few of each, so that groups share texts in chains.
ROWS = st.lists(st.tuples(st.integers(0, 7), st.integers(0, 9)), min_size=1, max_size=30)


def built(drawn: list[tuple[int, int]]) -> list[Conversation]:
    return [row(f"row{i}", f"group{group}", f"{LONG} {text}") for i, (group, text) in enumerate(drawn)]


def flooded(rows: list[Conversation]) -> int:
    """Clusters of rows that share a group or a text, by plain flooding."""
    left, count = list(rows), 0
    while left:
        cluster = [left.pop()]
        for member in cluster:
            near = [r for r in left if r.group == member.group or r.messages[1] == member.messages[1]]
            cluster += near
            left = [r for r in left if r not in near]
        count += 1
    return count


@given(drawn=ROWS, seed=st.integers(0, 99))
def test_a_split_loses_no_row_and_passes_its_own_leak_check(drawn: list[tuple[int, int]], seed: int) -> None:
    rows = built(drawn)
    try:
        splits = split(rows, HALVES, seed=seed)
    except TextError:
        assert flooded(rows) < 2
        return
    check_leak(splits)
    assert num_documents(rows) == flooded(rows)
    assert sorted(places(splits)) == sorted(conversation.id for conversation in rows)


@given(drawn=ROWS, seed=st.integers(0, 99), order=st.randoms(use_true_random=False))
def test_the_order_of_the_rows_does_not_change_who_goes_where(
    drawn: list[tuple[int, int]], seed: int, order: object
) -> None:
    rows = [*built(drawn), row("x", "x"), row("y", "y"), row("z", "z")]
    shuffled = list(rows)
    order.shuffle(shuffled)  # type: ignore[attr-defined]  # a random.Random
    assert places(split(rows, HALVES, seed=seed)) == places(split(shuffled, HALVES, seed=seed))


def test_rows_of_a_split_keep_their_order_and_the_sizes_follow_the_fractions() -> None:
    rows = [row(str(i), f"group{i // 3}") for i in range(300)]
    splits = split(rows, {"train": 0.8, "validation": 0.1, "test": 0.1}, seed=0)
    assert {name: len(part) for name, part in splits.items()} == {"train": 240, "validation": 30, "test": 30}
    assert all([int(r.id) for r in part] == sorted(int(r.id) for r in part) for part in splits.values())


def test_another_seed_gives_another_split_and_the_same_seed_the_same() -> None:
    rows = [row(str(i), str(i)) for i in range(40)]
    assert places(split(rows, HALVES, seed=1)) == places(split(rows, HALVES, seed=1))
    assert places(split(rows, HALVES, seed=1)) != places(split(rows, HALVES, seed=2))


def test_one_large_group_does_not_swallow_a_small_split() -> None:
    rows = [row(f"big{i}", "big") for i in range(60)] + [row(str(i), str(i)) for i in range(40)]
    for seed in range(20):
        splits = split(rows, {"train": 0.8, "test": 0.2}, seed=seed)
        assert places(splits)["big0"] == "train"
        assert len(splits["test"]) == 20


def test_a_fork_follows_its_original_through_a_chain_of_shared_texts() -> None:
    chain = [
        row("a", "one", LONG + "1"),
        row("b", "two", LONG + "1"),
        row("c", "two", LONG + "2"),
        row("d", "six", LONG + "2"),
    ]
    others = [row(str(i), str(i)) for i in range(12)]
    for seed in range(10):
        found = places(split(chain + others, HALVES, seed=seed))
        assert len({found[name] for name in "abcd"}) == 1


def test_the_same_short_answer_to_two_questions_is_not_one_document() -> None:
    apart = {"train": [row("a", "a", "No.", "Is it?")], "test": [row("b", "b", "No.", "Was it?")]}
    check_leak(apart)
    with pytest.raises(LeakError, match="the text of conversation 'b'"):
        check_leak({**apart, "test": [row("b", "b", "No. ", "Is  it?")]})


def test_the_same_question_with_two_long_answers_is_not_one_document() -> None:
    check_leak({"train": [row("a", "a", prompt=LONG)], "test": [row("b", "b", prompt=LONG)]})


def test_a_document_without_an_assistant_is_known_by_its_own_text() -> None:
    document = [Conversation(name, name, (Message("user", LONG),)) for name in "ab"]
    with pytest.raises(LeakError, match="the text of conversation 'b'"):
        check_leak({"train": document[:1], "test": document[1:]})


def test_a_leaking_group_is_named_with_both_rows_and_both_splits() -> None:
    words = r"the group 'g' of conversation 'b' in split 'test' .* split 'train' \(conversation 'a'\); pool the rows"
    with pytest.raises(LeakError, match=words):
        check_leak({"train": [row("a", "g")], "test": [row("b", "g")]})


def test_a_leaking_text_is_found_through_other_white_space_and_other_groups() -> None:
    spaced = LONG.replace(" ", "\n\t ")
    with pytest.raises(LeakError, match=r"the text of conversation 'b' in split 'test' .*conversation 'a'"):
        check_leak({"train": [row("a", "a", LONG)], "test": [row("b", "b", spaced)]})


def test_twins_within_one_split_are_no_leak() -> None:
    check_leak({"train": [row("a", "g", LONG), row("b", "g", LONG)], "test": [row("c", "c")]})


@pytest.mark.parametrize(
    "fractions", [{}, {"a": 0.5}, {"a": 1.5, "b": -0.5}, {"a": 1.0, "b": 0.0}, {"a": float("nan")}]
)
def test_fractions_that_are_not_shares_of_one_are_refused(fractions: dict[str, float]) -> None:
    with pytest.raises(SettingError, match="give positive numbers that sum to 1"):
        split([row("a", "a")], fractions, seed=0)


def test_too_few_documents_for_every_split_are_refused_with_their_count() -> None:
    rows = [row(str(i), "one") for i in range(9)]
    with pytest.raises(TextError, match="split test gets no rows: 9 rows come from 1 independent documents; give more"):
        split(rows, HALVES, seed=0)
    with pytest.raises(TextError, match="split train, test gets no rows: 0 rows"):
        split([], HALVES, seed=0)


def test_a_system_message_that_all_share_makes_no_document_of_them() -> None:
    system = Message("system", f"{LONG}: you are a helpful assistant")
    rows = [Conversation(f"r{i}", f"g{i}", (system, Message("user", f"{LONG} request {i}"))) for i in range(20)]
    assert num_documents(rows) == 20
    check_leak(split(rows, HALVES, seed=0))
