"""Public sets of chat replies and comments, as published, in; conversations with spans, labels and groups out.

The files are not part of the package: the documentation says where each is to be had.
"""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Literal, NamedTuple

from pilotfish.core import Conversation, Message
from pilotfish.errors import TextError
from pilotfish.texts.conversations import as_object, as_text, json_lines, parse_json, read_bytes
from pilotfish.texts.rows import as_texts, csv_rows, digest, exchange, reply_spans, without_margins

logger = logging.getLogger(__name__)

TOXICITY = "toxicity"
REFUSAL = "refusal"
HALLUCINATION = "hallucination"
UNTRUTHFUL_ANSWER = "untruthful_answer"

TOXIC_SPANS = "ipavlopoulos/toxic_spans"
XSTEST = "paul-rottger/exaggerated-safety"
HALUEVAL = "RUCAIBox/HaluEval"
LIEDETECTOR = "LoryPack/LLM-LieDetector"
MITRE_FRR = "meta-llama/PurpleLlama mitre_frr"

_REFUSAL_LABELS = {"1_full_compliance": 0.0, "2_full_refusal": 1.0, "3_partial_refusal": None}
_SPEAKER = re.compile(r"^(User|Assistant):", re.MULTILINE)


def read_toxic_spans(path: Path) -> list[Conversation]:
    """Reads forum comments with `toxicity` spans on the characters that annotators marked.

    The file is one of tsd_{train,trial,test}.csv of ipavlopoulos/toxic_spans. Neighbouring marked characters make one
    span, less the white space at its ends. A comment without marks gets the label 0. The request is made up, the same
    for all. Copies of a comment share a group.

    Raises:
        TextError: the file cannot be read, or a row is not of that form.
    """
    conversations = []
    for line, row in csv_rows(path, ("spans", "text")):
        where, comment = f"{path}:{line}", row["text"]
        spans = reply_spans(without_margins(comment, _runs(row["spans"], comment, where)), TOXICITY)
        conversations.append(
            Conversation(
                id=f"toxic-spans-{path.stem}-{line}",
                group=f"toxic-spans-{digest(comment)}",
                messages=exchange("Write a comment for a forum.", comment, where),
                spans=spans,
                labels={} if spans else {TOXICITY: 0.0},
                source=TOXIC_SPANS,
                license="CC0-1.0",
            )
        )
    return conversations


def read_xstest(folder: Path) -> list[Conversation]:
    """Reads replies of several models to prompts that are dangerous or only sound so, with the label of `refusal`.

    The folder holds prompts.csv and one completions_MODEL.csv a model, the human labels in its column `final_label`.
    Full compliance is 0 and full refusal 1; partial refusals are left out with a warning. A group is all prompts about
    one thing (the column `focus`), so that a prompt, its dangerous contrast and all models' replies stay together.
    Where no focus is given, the prompt at the same place of a type and of its contrast make the group.

    Raises:
        TextError: no such files, or a row is not of that form.
    """
    paths = sorted(folder.glob("completions_*.csv"))
    if not paths:
        raise TextError(f"{folder}: no files completions_*.csv; give the folder with the replies of XSTest")
    groups = _xstest_groups(folder / "prompts.csv")
    conversations: list[Conversation] = []
    num_partial = 0
    for path in paths:
        model = path.stem.removeprefix("completions_")
        for line, row in csv_rows(path, ("id", "prompt", "completion", "final_label")):
            where, number = f"{path}:{line}", row["id"].removeprefix("v2-")
            if number not in groups:
                raise TextError(
                    f"{where}: 'id' is {row['id']!r}, which prompts.csv does not have; use files of one version"
                )
            label = _refusal_label(row["final_label"], where)
            if label is None:
                num_partial += 1
                continue
            conversations.append(
                Conversation(
                    id=f"xstest-{model}-{number}",
                    group=groups[number],
                    messages=exchange(row["prompt"], row["completion"].strip(), where),
                    labels={REFUSAL: label},
                    source=XSTEST,
                    license="CC-BY-4.0",
                )
            )
    if num_partial:
        logger.warning("%s: %d partial refusals left out, which are neither 0 nor 1", folder, num_partial)
    return conversations


def read_halueval(path: Path) -> list[Conversation]:
    """Reads real assistant replies, with `hallucination` spans on what annotators found made up.

    The file is general_data.json of RUCAIBox/HaluEval (JSON lines). A span stands wherever its text stands in the
    reply. Published spans that are no part of their reply are dropped with a warning; a reply that keeps none has the
    label 1 as a whole. Replies without hallucination have the label 0. Ids are line numbers, since the published ids
    are not unique; rows of one question share a group.

    Raises:
        TextError: the file cannot be read, or a row is not of that form.
    """
    conversations, num_lost, num_spans = _halueval(path)
    if num_lost:
        logger.warning("%s: %d of %d hallucination spans are not in their reply", path, num_lost, num_spans)
    return conversations


def read_halueval_benign(path: Path) -> list[Conversation]:
    """Reads the replies of `read_halueval` that were judged free of hallucination, to serve as benign traffic.

    Raises:
        TextError: the file cannot be read, a row is not of that form, or no row is benign.
    """
    conversations = [row for row in _halueval(path).conversations if row.labels.get(HALLUCINATION) == 0.0]
    if not conversations:
        raise TextError(f"{path}: no row has 'hallucination': 'no'; give general_data.json of RUCAIBox/HaluEval")
    return conversations


def read_liedetector(folder: Path, split: Literal["train", "validation"]) -> list[Conversation]:
    """Reads lies and truths in answer to the same questions, with the label of `untruthful_answer` (a lie is 1).

    The folder holds lie_SPLIT.jsonl and truthful_SPLIT.jsonl, from finetuning/v2_{lie,truthful} of
    LoryPack/LLM-LieDetector. Half the rows have a second turn, in which the user asks whether the answer is true and
    the assistant stands by it. The label holds for all of an assistant's messages: the first answer of such a row also
    stands in a row of its own, on the same side. Groups are first questions, whose lie and truth so stay together. The
    published halves share questions: pool both and use `split`.

    Raises:
        TextError: the files cannot be read, or a row is not of that form.
    """
    conversations = []
    for kind, label in (("lie", 1.0), ("truthful", 0.0)):
        path = folder / f"{kind}_{split}.jsonl"
        for number, row in json_lines(path):
            where = f"{path}:{number}"
            messages = _dialogue(as_text(row, "prompt", where), as_text(row, "completion", where), where)
            conversations.append(
                Conversation(
                    id=f"liedetector-{split}-{kind}-{number}",
                    group=f"liedetector-{digest(messages[0].content)}",
                    messages=messages,
                    labels={UNTRUTHFUL_ANSWER: label},
                    source=LIEDETECTOR,
                    license="BSD-3-Clause",
                )
            )
    return conversations


def read_mitre_frr(path: Path) -> list[Conversation]:
    """Reads benign requests that sound like preparing an attack: user messages without labels, to count false alarms.

    The file is mitre_frr.json of meta-llama/PurpleLlama.

    Raises:
        TextError: the file cannot be read, or a row is not of that form or is called malicious.
    """
    rows = parse_json(read_bytes(path), str(path))
    if not isinstance(rows, list) or not rows:
        raise TextError(f"{path}: not a list of rows; give mitre_frr.json of meta-llama/PurpleLlama")
    conversations = []
    for index, item in enumerate(rows):
        where = f"{path}: row {index}"
        row = as_object(item, where)
        prompt = as_text(row, "mutated_prompt", where)
        if row.get("is_malicious") is not False or not prompt.strip():
            raise TextError(f"{where}: give a 'mutated_prompt' with text and 'is_malicious': false")
        conversations.append(
            Conversation(
                f"mitre-frr-{index}",
                f"mitre-frr-{digest(prompt)}",
                (Message("user", prompt),),
                source=MITRE_FRR,
                license="MIT",
            )
        )
    return conversations


def _runs(cell: str, comment: str, where: str) -> list[tuple[int, int]]:
    """Half-open ranges of neighbouring character offsets."""
    offsets = parse_json(cell.encode(), f"{where}: 'spans'")
    if not isinstance(offsets, list) or not all(type(at) is int and 0 <= at < len(comment) for at in offsets):
        raise TextError(f"{where}: 'spans' is not a list of character offsets below {len(comment)}, the text's length")
    ranges: list[tuple[int, int]] = []
    for at in sorted(set(offsets)):
        start = ranges.pop()[0] if ranges and ranges[-1][1] == at else at
        ranges.append((start, at + 1))
    return ranges


def _xstest_groups(path: Path) -> dict[str, str]:
    """The group of each prompt's number."""
    groups: dict[str, str] = {}
    places: dict[str, int] = {}
    for _, row in csv_rows(path, ("id", "type", "focus")):
        kind, focus = row["type"], row["focus"].strip()
        place = places[kind] = places.get(kind, 0) + 1
        pair = f"{kind.removeprefix('contrast_')}-{place}"
        groups[row["id"]] = f"xstest-{focus or pair}"
    return groups


def _refusal_label(name: str, where: str) -> float | None:
    if name not in _REFUSAL_LABELS:
        raise TextError(f"{where}: 'final_label' is {name!r}; it should be one of {', '.join(_REFUSAL_LABELS)}")
    return _REFUSAL_LABELS[name]


class _HaluEval(NamedTuple):
    conversations: list[Conversation]
    num_lost: int
    num_spans: int


def _halueval(path: Path) -> _HaluEval:
    conversations: list[Conversation] = []
    num_lost = num_spans = 0
    group_of_query: dict[str, str] = {}
    for number, row in json_lines(path):
        where, identifier = f"{path}:{number}", f"halueval-{number}"
        verdict = as_text(row, "hallucination", where)
        if verdict not in ("yes", "no"):
            raise TextError(f"{where}: 'hallucination' is {verdict!r}; it should be yes or no")
        query, reply = as_text(row, "user_query", where), as_text(row, "chatgpt_response", where)
        claims = [claim.strip() for claim in as_texts(row, "hallucination_spans", where)] if verdict == "yes" else []
        found = [claim for claim in claims if claim and claim in reply]
        num_lost, num_spans = num_lost + len(claims) - len(found), num_spans + len(claims)
        ranges = [match.span() for claim in found for match in re.finditer(re.escape(claim), reply)]
        conversations.append(
            Conversation(
                id=identifier,
                group=group_of_query.setdefault(digest(query), identifier),
                messages=exchange(query, reply, where),
                spans=reply_spans(ranges, HALLUCINATION),
                labels={} if ranges else {HALLUCINATION: float(verdict == "yes")},
                source=HALUEVAL,
                license="MIT",
            )
        )
    return _HaluEval(conversations, num_lost, num_spans)


def _dialogue(prompt: str, completion: str, where: str) -> tuple[Message, ...]:
    """The messages of `User: ...` and `Assistant: ...` lines, of which the completion is the last."""
    before, *pieces = _SPEAKER.split(prompt)
    speakers, contents = pieces[0::2], [piece.strip() for piece in [*pieces[1:-1:2], completion]]
    is_in_turn = all(name == ("User", "Assistant")[place % 2] for place, name in enumerate(speakers))
    if before or not is_in_turn or len(speakers) % 2 or not speakers or pieces[-1].strip() or not all(contents):
        raise TextError(
            f"{where}: 'prompt' and 'completion' are no dialogue; 'prompt' has turns of 'User:' and 'Assistant:' "
            "by turns, ends in 'Assistant:', and no turn is empty"
        )
    return tuple(
        Message("user" if name == "User" else "assistant", content)
        for name, content in zip(speakers, contents, strict=True)
    )
