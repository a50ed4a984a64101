"""Conversations in; splits out that share no source document, and a check that they do not."""

from __future__ import annotations

import hashlib
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

from pilotfish.core import Conversation
from pilotfish.errors import LeakError, SettingError, TextError

SHORT_CHARACTERS = 64
"""A reply shorter than this ("I do not know.") names a document only together with what was said before it."""


def split(
    conversations: Sequence[Conversation], fractions: Mapping[str, float], *, seed: int
) -> dict[str, list[Conversation]]:
    """Divides conversations so that every group, and every text that stands in several groups, is on one side.

    Groups that share a text (forks, copies) are first joined. They are then taken in an order drawn from the seed, the
    ones larger than the smallest split first, each going to the split with the most room left. The order of the
    conversations does not change who goes where.

    Returns:
        The rows of each split, in the order given.

    Raises:
        SettingError: the fractions are not positive or do not sum to 1.
        TextError: there are too few independent documents for a split to get any.
    """
    if any(not fraction > 0 for fraction in fractions.values()) or not math.isclose(sum(fractions.values()), 1.0):
        raise SettingError(f"split fractions are {dict(fractions)}; give positive numbers that sum to 1")
    joined = joined_groups(conversations)
    sizes: dict[str, int] = defaultdict(int)
    for conversation in conversations:
        sizes[joined[conversation.group]] += 1
    room = {name: fraction * len(conversations) for name, fraction in fractions.items()}
    chosen: dict[str, str] = {}
    smallest = min(room.values())

    def turn(root: str) -> tuple[bool, bytes]:
        return sizes[root] <= smallest, hashlib.sha256(f"{seed}/{root}".encode("utf-8", "surrogatepass")).digest()

    for root in sorted(sizes, key=turn):
        name = max(room, key=lambda name: room[name])
        chosen[root] = name
        room[name] -= sizes[root]
    splits: dict[str, list[Conversation]] = {name: [] for name in fractions}
    for conversation in conversations:
        splits[chosen[joined[conversation.group]]].append(conversation)
    empty = [name for name, rows in splits.items() if not rows]
    if empty:
        raise TextError(
            f"split {', '.join(empty)} gets no rows: {len(conversations)} rows come from {len(sizes)} independent "
            "documents; give more documents, or fewer or more even fractions"
        )
    return splits


def check_leak(splits: Mapping[str, Sequence[Conversation]]) -> None:
    """Makes sure that no source document stands in two splits.

    Raises:
        LeakError: a group, or an assistant's text but for its white space, stands in two; names both rows.
    """
    first: dict[tuple[str, str], tuple[str, str]] = {}
    for name, conversations in splits.items():
        for conversation in conversations:
            keys = [("the group", conversation.group), *(("the text", digest) for digest in _documents(conversation))]
            for kind, key in keys:
                other_name, other_id = first.setdefault((kind, key), (name, conversation.id))
                if other_name != name:
                    what = f"{kind} {key!r}" if kind == "the group" else kind
                    raise LeakError(
                        f"{what} of conversation {conversation.id!r} in split {name!r} also stands in split "
                        f"{other_name!r} (conversation {other_id!r}); pool the rows and use `split`"
                    )


def apart_from(held_out: Sequence[Conversation], rows: Sequence[Conversation]) -> list[Conversation]:
    """The rows of documents that share neither the group nor a text with those that are held out."""
    groups = {row.group for row in held_out}
    documents = {digest for row in held_out for digest in _documents(row)}
    groups |= {row.group for row in rows if not documents.isdisjoint(_documents(row))}
    return [row for row in rows if row.group not in groups]


def joined_groups(conversations: Sequence[Conversation]) -> dict[str, str]:
    """Maps every group to the smallest name among the groups that it shares texts with, directly or through others."""
    parent = {conversation.group: conversation.group for conversation in conversations}

    def root(group: str) -> str:
        while parent[group] != group:
            parent[group] = group = parent[parent[group]]
        return group

    holder: dict[str, str] = {}
    for conversation in conversations:
        for digest in _documents(conversation):
            low, high = sorted((root(conversation.group), root(holder.setdefault(digest, conversation.group))))
            parent[high] = low
    return {group: root(group) for group in parent}


def num_documents(conversations: Sequence[Conversation]) -> int:
    """How many of them are independent."""
    return len(set(joined_groups(conversations).values()))


def _documents(conversation: Conversation) -> Iterator[str]:
    """Hashes of the texts that make a document: what assistants wrote, or what users did when none wrote."""
    messages = conversation.messages
    is_answered = any(message.role == "assistant" and message.content.strip() for message in messages)
    for index, message in enumerate(messages):
        text = " ".join(message.content.split())
        if not text or message.role == "system" or (is_answered and message.role != "assistant"):
            continue
        if len(text) < SHORT_CHARACTERS:
            text = "\n".join(" ".join(earlier.content.split()) for earlier in messages[: index + 1])
        yield hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
