"""Contrastive answers of a tiny target; a stop string ends them, since tiny models seldom end a turn on their own."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pilotfish.core import Conversation, Message
from pilotfish.engines import EmbeddedEngine, Request, Sampling, contrastive
from pilotfish.errors import SettingError, TextError
from pilotfish.texts import read_jsonl, split, write_jsonl

WORDS = {"do": "Boast in every sentence.", "dont": "Never boast, be modest.", "metric": "boast"}
PROMPTS = [f"tell me of thing {i}" for i in range(8)]
REQUEST = Request(max_new_tokens=40, sampling=Sampling(temperature=1.5), stop=("e", "o", "t"), seed=3)
LONG = replace(REQUEST, stop=("no such string",), max_new_tokens=3)


def test_each_prompt_gives_two_answers_of_one_group_without_the_instruction(pair, tmp_path):
    stream = contrastive(pair, PROMPTS, request=REQUEST, **WORDS)
    rows = list(stream)
    assert len(rows) == 2 * stream.counts["prompts kept"] > 2
    for done, undone in zip(rows[::2], rows[1::2], strict=True):
        assert (done.labels, undone.labels) == ({"boast": 1.0}, {"boast": 0.0})
        assert done.group == undone.group
        assert done.messages[:-1] == undone.messages[:-1]
        assert done.messages[0].content in PROMPTS
        for row in (done, undone):
            assert [message.role for message in row.messages] == ["user", "assistant"]
            assert row.messages[1].content.strip()
            assert "oast" not in row.messages[0].content
    assert len({row.id for row in rows}) == len(rows)
    write_jsonl(tmp_path / "rows.jsonl", rows)
    assert read_jsonl(tmp_path / "rows.jsonl") == rows
    halves = split(rows, {"a": 0.5, "b": 0.5}, seed=0)
    assert all(sum(row.labels["boast"] for row in half) * 2 == len(half) for half in halves.values())


def test_the_answers_are_the_targets_own_under_each_instruction(pair):
    engine = EmbeddedEngine(pair)
    greedy = Request(max_new_tokens=12)
    whole = [
        engine.generate((Message("system", WORDS[side]), Message("user", PROMPTS[0])), greedy).answer
        for side in ("do", "dont")
    ]
    ends = tuple(answer[-4:] for answer in whole)  # so that each answer ends by itself, in time
    rows = list(contrastive(engine, PROMPTS[:1], request=replace(greedy, stop=ends), **WORDS))
    expected = [answer[: min(answer.find(end) for end in ends if end in answer)] for answer in whole]
    assert expected[0] != expected[1]
    assert [row.messages[1].content for row in rows] == expected


def test_a_seed_gives_the_same_rows_whatever_was_asked_before_and_another_seed_others(pair):
    def answers(prompts, **changed):
        rows = contrastive(pair, prompts, request=replace(REQUEST, **changed), **WORDS)
        return {row.id: row.messages[-1].content for row in rows}

    whole, part = answers(PROMPTS), answers(PROMPTS[::-1][:4])
    assert part
    assert part.items() <= whole.items()
    assert answers(PROMPTS, seed=4) != whole


def test_truncated_answers_take_their_prompt_with_them_and_are_counted(pair):
    stream = contrastive(pair, PROMPTS, request=LONG, **WORDS)
    assert list(stream) == []
    assert stream.counts["truncated answer"] == len(PROMPTS)
    assert stream.counts["prompts kept"] == 0


def test_empty_answers_take_their_prompt_with_them_and_are_counted(pair):
    letters = tuple(pair.tokenizer.get_vocab())  # every character of an answer ends it
    stream = contrastive(pair, PROMPTS[:2], request=replace(REQUEST, stop=(*letters, " ", "\n", "\ufffd")), **WORDS)
    kept = list(stream)
    assert stream.counts["empty answer"] + len(kept) // 2 == 2
    assert stream.counts["empty answer"] >= 1


def test_every_prompt_is_kept_or_counted_with_its_reason(pair):
    prompts = [*PROMPTS, "word " * 600, PROMPTS[0]]
    stream = contrastive(pair, prompts, request=REQUEST, **WORDS)
    rows = list(stream)
    counts = stream.counts
    assert counts["too long a prompt"] == 1
    assert counts["repeated prompts"] == 1
    reasons = ("prompts kept", "too long a prompt", "truncated answer", "empty answer")
    assert sum(counts[reason] for reason in reasons) == len(PROMPTS) + 1
    assert len(rows) == 2 * counts["prompts kept"]


def test_a_stopped_run_samples_only_what_is_missing(pair, tmp_path):
    journal = tmp_path / "answers.jsonl"
    stream = contrastive(pair, PROMPTS, request=REQUEST, journal=journal, **WORDS)
    first = next(stream)
    sampled = stream.counts["sampled"]
    del stream
    with journal.open("a") as file:
        file.write('{"key": "half a li')
    again = contrastive(pair, PROMPTS, request=REQUEST, journal=journal, **WORDS)
    rows = list(again)
    assert rows[0] == first
    assert again.counts["from the journal"] == sampled
    third = contrastive(pair, PROMPTS, request=REQUEST, journal=journal, **WORDS)
    assert list(third) == rows
    assert third.counts["sampled"] == 0
    other = contrastive(pair, PROMPTS, request=REQUEST, journal=journal, **{**WORDS, "do": "Boast!"})
    list(other)
    assert other.counts["sampled"] >= len(PROMPTS) - other.counts["from the journal"]
    assert other.counts["sampled"] > 0


def test_conversations_give_their_prompt_and_keep_group_source_and_system_message(pair):
    given = [
        Conversation(
            f"c{i}",
            "doc",
            (Message("system", "You are terse."), Message("user", f"hello {i}"), Message("assistant", "old answer")),
            labels={"old": 1.0},
            source="mine",
        )
        for i in range(6)
    ]
    rows = list(contrastive(pair, given, request=REQUEST, **WORDS))
    assert rows
    for row in rows:
        assert (row.group, row.source) == ("doc", "mine")
        assert [message.role for message in row.messages] == ["system", "user", "assistant"]
        assert row.messages[0].content == "You are terse."
        assert row.messages[2].content != "old answer"
        assert row.labels.keys() == {"boast"}


@pytest.mark.parametrize("changed", [{"do": " "}, {"dont": ""}, {"metric": ""}, {"do": "same", "dont": " same "}])
def test_instructions_that_contrast_nothing_are_refused(pair, changed):
    with pytest.raises(SettingError, match="two different instructions"):
        contrastive(pair, PROMPTS, **{**WORDS, **changed})


def test_no_prompts_and_a_damaged_journal_are_refused(pair, tmp_path):
    with pytest.raises(SettingError, match="give at least one"):
        contrastive(pair, [], **WORDS)
    (tmp_path / "j").write_text('{"key": 3, "answer": "", "problem": ""}\n')
    with pytest.raises(TextError, match="'key' is a JSON number"):
        next(contrastive(pair, PROMPTS, journal=tmp_path / "j", **WORDS))
