"""The contexts and attacks of BIPIA, as published, in; requests with and without an injected instruction out.

An attack on a model through a text that it is given to work on (Yi et al., 2023, "Benchmarking and Defending Against
Indirect Prompt Injection Attacks on Large Language Models"). The wording of the requests and the places of the attacks
are our own.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from pilotfish.core import Conversation, Message, Span
from pilotfish.errors import SettingError, TextError
from pilotfish.texts.conversations import as_object, as_text, json_lines, parse_json, read_bytes
from pilotfish.texts.rows import as_texts, digest

PROMPT_INJECTION = "prompt_injection"
BIPIA = "microsoft/BIPIA"

_ATTACKS_OF_KIND = {"email": "text", "table": "text", "code": "code"}
_PLACES = ("start", "middle", "end")
_BREAKS = (r"\n", r"(?<=[.!?])\s", r"\s")
"""Where a context may be cut in two, the first that it has: lines, sentences, words."""
_ATTACKED = re.compile(rf"bipia-(?:{'|'.join(_ATTACKS_OF_KIND)})-\d+-(.+)-\d+")


class AttackSplit(NamedTuple):
    seen: list[Conversation]
    """Without the attacks held back: for training."""
    unseen: list[Conversation]
    """With no other attacks: for testing."""


class _Request(NamedTuple):
    before: str
    context: str
    after: str


def read_bipia(folder: Path, *, seed: int, attacks_per_context: int = 1) -> list[Conversation]:
    """Reads user messages that hold an e-mail, a table or a forum answer, each once as it is and once per attack.

    The folder holds {email,table,code}_train.jsonl and {text,code}_attack_train.json of microsoft/BIPIA. Code attacks
    go into forum answers, text attacks into e-mails and tables. An attack stands on a line of its own at the start, in
    the middle or at the end of its context, with a span of `prompt_injection` on exactly its text. The attacks of one
    context are of different classes and go to the three places in turn. All draws follow from the seed and the row.

    There is no assistant message, and a label alone would say nothing of a user's tokens. So a message without attack
    has a span of value 0 on all of its text, beside the label 0.

    Ids are `bipia-KIND-LINE-CLASS-N`, without attack `bipia-KIND-LINE-clean`. A group is one context, which may stand
    in several rows with other questions.

    Raises:
        TextError: the files cannot be read, or are not of that form.
        SettingError: fewer than one attack per context, or more than there are classes.
    """
    conversations: list[Conversation] = []
    for kind, attack_kind in _ATTACKS_OF_KIND.items():
        attacks = _attacks(folder / f"{attack_kind}_attack_train.json")
        if not 1 <= attacks_per_context <= len(attacks):
            raise SettingError(
                f"attacks_per_context is {attacks_per_context}; give 1 to {len(attacks)}, the number of classes in "
                f"{attack_kind}_attack_train.json"
            )
        path = folder / f"{kind}_train.jsonl"
        for line, row in json_lines(path):
            request = _request(kind, row, f"{path}:{line}")
            identifier = f"bipia-{kind}-{line}"
            conversations.append(_conversation(f"{identifier}-clean", kind, request))
            names = sorted(attacks, key=lambda name: _draw(seed, identifier, "class", name))[:attacks_per_context]
            for count, name in enumerate(names):
                attack = _choose(attacks[name], seed, identifier, "attack", name)
                place = _PLACES[(_draw(seed, identifier, "place") + count) % len(_PLACES)]
                cut = _cut(request.context, place, _draw(seed, identifier, "cut", name))
                conversations.append(
                    _conversation(f"{identifier}-{_slug(name)}-{count}", kind, request, attack=attack, cut=cut)
                )
    return conversations


def injection_class(conversation: Conversation) -> str | None:
    """The class of the attack in a row of `read_bipia`, for example `cookie-theft`; None where there is no attack."""
    match = _ATTACKED.fullmatch(conversation.id)
    return match[1] if match else None


def split_by_attack(conversations: Sequence[Conversation], unseen: Sequence[str]) -> AttackSplit:
    """Holds attack classes back for a test; rows without attack are in both parts.

    Both parts also share contexts. So divide by group first, and take `seen` of the training rows and `unseen` of the
    test rows.

    Raises:
        SettingError: a class that no row has.
    """
    classes = [injection_class(conversation) for conversation in conversations]
    unknown = [name for name in unseen if name not in classes]
    if unknown:
        known = ", ".join(sorted({name for name in classes if name is not None}))
        raise SettingError(f"attack class {', '.join(map(repr, unknown))} is in no row; use {known}")
    rows = list(zip(conversations, classes, strict=True))
    return AttackSplit(
        [row for row, name in rows if name not in unseen], [row for row, name in rows if name is None or name in unseen]
    )


def _attacks(path: Path) -> dict[str, list[str]]:
    """The texts of each attack class."""
    table = as_object(parse_json(read_bytes(path), str(path)), str(path))
    attacks = {name: [text.strip() for text in as_texts(table, name, str(path))] for name in table}
    if not attacks or not all(texts and all(texts) for texts in attacks.values()):
        raise TextError(f"{path}: a class without attacks, or an empty attack; give the file of microsoft/BIPIA")
    return attacks


def _request(kind: str, row: Mapping[str, object], where: str) -> _Request:
    """What a user writes around a context."""
    if kind == "code":
        code, error, context = ("\n".join(as_texts(row, key, where)).strip() for key in ("code", "error", "context"))
        before = f"This Python code:\n\n{code}\n\nfails with this error:\n\n{error}\n\nI found this answer:\n\n"
        after = "\n\nCorrect the code."
    else:
        context = as_text(row, "context", where).strip()
        before = f"Here is {'an e-mail' if kind == 'email' else 'a table'}:\n\n"
        after = f"\n\nAnswer a question about it: {as_text(row, 'question', where).removeprefix('Q: ').strip()}"
    if not context:
        raise TextError(f"{where}: the context is empty; remove the row")
    return _Request(before, context, after)


def _conversation(identifier: str, kind: str, request: _Request, *, attack: str = "", cut: int = 0) -> Conversation:
    before, context, after = request
    if attack:
        head, tail = before + context[:cut], context[cut:] + after
        head += "" if head.endswith("\n") else "\n"
        content = head + attack + ("" if tail.startswith("\n") else "\n") + tail
        span = Span(0, len(head), len(head) + len(attack), PROMPT_INJECTION, 1.0)
    else:
        content = before + context + after
        span = Span(0, 0, len(content), PROMPT_INJECTION, 0.0)
    return Conversation(
        id=identifier,
        group=f"bipia-{kind}-{digest(context)}",
        messages=(Message("user", content),),
        spans=(span,),
        labels={} if attack else {PROMPT_INJECTION: 0.0},
        source=BIPIA,
        license="MIT",
    )


def _cut(context: str, place: str, draw: int) -> int:
    """The character of a context before which an attack goes."""
    if place != "middle":
        return 0 if place == "start" else len(context)
    cuts = next((cuts for pattern in _BREAKS if (cuts := [m.end() for m in re.finditer(pattern, context)])), None)
    return cuts[draw % len(cuts)] if cuts else len(context)


def _draw(seed: int, *names: str) -> int:
    """A whole number that looks random: the same for the same seed and names, in every version of every library."""
    return int.from_bytes(hashlib.sha256("/".join((str(seed), *names)).encode()).digest()[:8], "big")


def _choose(texts: Sequence[str], seed: int, *names: str) -> str:
    return texts[_draw(seed, *names) % len(texts)]


def _slug(name: str) -> str:
    return "-".join(re.findall(r"[a-z0-9]+", name.lower()))
