"""Files of JSON lines in, conversations out, and back; every refusal names the file and the line."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import cast

from pilotfish.core import ROLES, Conversation, Message, Role, Span
from pilotfish.errors import TextError
from pilotfish.runs import write_text

ROW_KEYS = ("id", "group", "messages", "prompt", "response", "spans", "labels", "source", "license")
MESSAGE_KEYS = ("role", "content")
SPAN_KEYS = ("start", "end", "label", "metric", "head", "message")


def read_jsonl(path: Path) -> list[Conversation]:
    """Reads one conversation a line: `id`, and `messages` (role, content) or `prompt` and `response`.

    The other keys may be left out.
    A span has `start`, `end` (characters of one message, end exclusive), `metric` (or `head`), and may have `label`
    (default 1) and `message` (an index, default the last message). `group` names the source document, default the id.

    Raises:
        TextError: the file cannot be read, is not UTF-8 or JSON, is empty, or a row is not of that form.
    """
    conversations: list[Conversation] = []
    lines_of_ids: dict[str, int] = {}
    for number, row in json_lines(path):
        where = f"{path}:{number}"
        conversation = _conversation(row, where)
        if conversation.id in lines_of_ids:
            raise TextError(
                f"{where}: id {conversation.id!r} already stands in line {lines_of_ids[conversation.id]}; "
                "give every row its own id"
            )
        lines_of_ids[conversation.id] = number
        conversations.append(conversation)
    return conversations


def write_jsonl(path: Path, conversations: Sequence[Conversation]) -> None:
    """Writes conversations as `read_jsonl` reads them, atomically.

    Raises:
        TextError: there is nothing to write, two conversations share an id, or a text cannot be written as UTF-8.
    """
    if len({conversation.id for conversation in conversations}) != len(conversations) or not conversations:
        raise TextError(f"{path}: {len(conversations)} conversations to write; give at least one, each with its own id")
    lines = []
    for conversation in conversations:
        line = json.dumps(_row(conversation), ensure_ascii=False, allow_nan=False)
        check_encodable(line, f"conversation {conversation.id!r}")
        lines.append(line + "\n")
    write_text(path, "".join(lines))


def json_lines(path: Path) -> Iterator[tuple[int, dict[str, object]]]:
    """Yields line numbers and the JSON objects on them, blank lines left out.

    Raises:
        TextError: the file cannot be read, has no rows, or a line is not UTF-8 or not a JSON object.
    """
    number_of_rows = 0
    for number, raw in enumerate(read_bytes(path).removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if raw.strip():
            yield number, as_object(parse_json(raw, f"{path}:{number}"), f"{path}:{number}")
            number_of_rows += 1
    if not number_of_rows:
        raise TextError(f"{path}: the file has no rows; give one JSON object a line")


def read_bytes(path: Path) -> bytes:
    """Raises: TextError: the file cannot be opened."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise TextError(f"{path}: cannot be read ({error.strerror}); give the path of a readable file") from error


def parse_json(raw: bytes, where: str) -> object:
    """Decodes UTF-8 JSON.

    Raises:
        TextError: naming the first bad byte, or what JSON expected.
    """
    try:
        value: object = json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise TextError(
            f"{where}: byte {error.start} (0x{raw[error.start]:02x}) is not UTF-8; save the file as UTF-8"
        ) from error
    except (ValueError, RecursionError) as error:
        raise TextError(f"{where}: not JSON: {error}; write one JSON object a line") from error
    return value


def as_object(value: object, where: str) -> dict[str, object]:
    """Raises: TextError: the value is not a JSON object."""
    if not isinstance(value, dict):
        raise TextError(f"{where}: a JSON {_kind(value)} stands where an object {{...}} is needed")
    return value


def as_list(row: Mapping[str, object], key: str, where: str) -> list[dict[str, object]]:
    """The list of objects under a key.

    Raises:
        TextError: the key is missing, or is not a list of objects.
    """
    value = _required(row, key, where)
    if not isinstance(value, list):
        raise TextError(f"{where}: {key!r} is a JSON {_kind(value)}; give a list of objects")
    return [as_object(item, f"{where}: {key}[{index}]") for index, item in enumerate(value)]


def as_text(row: Mapping[str, object], key: str, where: str, *, default: str | None = None) -> str:
    """The text under a key.

    Raises:
        TextError: the key is missing and has no default, or is not text.
    """
    if default is not None and key not in row:
        return default
    value = _required(row, key, where)
    if not isinstance(value, str):
        raise TextError(f"{where}: {key!r} is a JSON {_kind(value)}; give text")
    check_encodable(value, f"{where}: {key!r}")
    return value


def as_index(row: Mapping[str, object], key: str, where: str, *, default: int | None = None) -> int:
    """The whole number under a key.

    Raises:
        TextError: the key is missing and has no default, or is not a whole number.
    """
    if default is not None and key not in row:
        return default
    value = _required(row, key, where)
    if not isinstance(value, int) or isinstance(value, bool):
        raise TextError(f"{where}: {key!r} is {value!r}; give a whole number")
    return value


def check_encodable(text: str, where: str) -> None:
    """Refuses half surrogate pairs, which JSON can spell but no tokenizer can read.

    Raises:
        TextError: naming the character's index.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise TextError(
            f"{where}: character {error.start} is half a surrogate pair, not text; "
            "write the whole character or remove it"
        ) from error


def _conversation(row: dict[str, object], where: str) -> Conversation:
    _check_keys(row, ROW_KEYS, where)
    identifier = as_text(row, "id", where)
    if not identifier:
        raise TextError(f"{where}: 'id' is empty; give every row its own id")
    labels = as_object(row.get("labels", {}), f"{where}: 'labels'")
    spans = as_list(row, "spans", where) if "spans" in row else []
    try:
        messages = _messages(row, where)
        return Conversation(
            id=identifier,
            group=as_text(row, "group", where, default=identifier),
            messages=messages,
            spans=tuple(_span(span, f"{where}: spans[{index}]", len(messages)) for index, span in enumerate(spans)),
            labels={metric: _label(labels, metric, f"{where}: 'labels'") for metric in labels},
            source=as_text(row, "source", where, default=""),
            license=as_text(row, "license", where, default=""),
        )
    except TextError as error:
        raise error if str(error).startswith(where) else TextError(f"{where}: {error}") from error


def _messages(row: dict[str, object], where: str) -> tuple[Message, ...]:
    if "messages" in row:
        if "prompt" in row or "response" in row:
            raise TextError(f"{where}: 'messages' stands beside 'prompt' or 'response'; give one form of the text")
        items = as_list(row, "messages", where)
        return tuple(_message(item, f"{where}: messages[{index}]") for index, item in enumerate(items))
    if "prompt" not in row and "response" not in row:
        raise TextError(f"{where}: there is no text; give 'messages', or 'prompt' and 'response'")
    prompt = (Message("user", as_text(row, "prompt", where)),) if "prompt" in row else ()
    response = (Message("assistant", as_text(row, "response", where)),) if "response" in row else ()
    return prompt + response


def _message(item: dict[str, object], where: str) -> Message:
    _check_keys(item, MESSAGE_KEYS, where)
    role = as_text(item, "role", where)
    if role not in ROLES:
        raise TextError(f"{where}: role {role!r} is unknown; use one of {', '.join(ROLES)}")
    return Message(cast(Role, role), as_text(item, "content", where))


def _span(item: dict[str, object], where: str, num_messages: int) -> Span:
    _check_keys(item, SPAN_KEYS, where)
    if ("metric" in item) == ("head" in item):
        raise TextError(f"{where}: give the metric's name once, as 'metric' (or 'head')")
    return Span(
        message=as_index(item, "message", where, default=num_messages - 1),
        start=as_index(item, "start", where),
        end=as_index(item, "end", where),
        metric=as_text(item, "metric" if "metric" in item else "head", where),
        value=_label(item, "label", where) if "label" in item else 1.0,
    )


def _label(row: Mapping[str, object], key: str, where: str) -> float:
    value = row[key]
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value <= 1:
        raise TextError(
            f"{where}: {key!r} is {value!r}; give a number from 0 to 1, or leave it out where nothing is known"
        )
    return float(value)


def _row(conversation: Conversation) -> dict[str, object]:
    return {
        "id": conversation.id,
        "group": conversation.group,
        "messages": [{"role": message.role, "content": message.content} for message in conversation.messages],
        "spans": [
            {"start": span.start, "end": span.end, "label": span.value, "metric": span.metric, "message": span.message}
            for span in conversation.spans
        ],
        "labels": dict(conversation.labels),
        "source": conversation.source,
        "license": conversation.license,
    }


def _check_keys(row: Mapping[str, object], allowed: Sequence[str], where: str) -> None:
    unknown = [key for key in row if key not in allowed]
    if unknown:
        raise TextError(f"{where}: unknown key {', '.join(map(repr, unknown))}; use {', '.join(allowed)}")


def _required(row: Mapping[str, object], key: str, where: str) -> object:
    if key not in row:
        raise TextError(f"{where}: {key!r} is missing")
    return row[key]


def _kind(value: object) -> str:
    kinds = {
        dict: "object",
        list: "list",
        str: "text",
        bool: "true/false",
        int: "number",
        float: "number",
        type(None): "null",
    }
    return kinds[type(value)]
