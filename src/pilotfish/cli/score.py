"""`pilotfish score`: text that is there already in, its tokens' scores out."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

from pilotfish.cli.session import find_banks, legend
from pilotfish.cli.terminal import paint, uses_colour
from pilotfish.cli.verbs import Score
from pilotfish.core import Conversation, Message, TokenScore
from pilotfish.errors import TextError
from pilotfish.heads import joined
from pilotfish.models import DEMO_PAIRS, load_model
from pilotfish.scores import score_tokens
from pilotfish.texts import read_jsonl, tokenize


def run(config: Score) -> int:
    conversations = list(_conversations(config.file))
    target, own_draft = DEMO_PAIRS.get(config.pair, (config.pair, None))
    reader = load_model(config.draft or own_draft or target, device=config.device, dtype=config.dtype)
    bank = joined(find_banks(config.banks, (reader.identity,)))
    bank.check(reader.identity)
    colour = uses_colour()
    if config.format == "text":
        print(legend(bank.metrics[0], bank.thresholds.get(bank.metrics[0]), colour=colour))
    longest = reader.model.config.max_position_embeddings
    for conversation in conversations:
        text = tokenize(conversation, reader.tokenizer)
        if len(text.token_ids) > longest:
            raise TextError(
                f"{conversation.id} has {len(text.token_ids):,} tokens; {reader.identity.name} reads at most "
                f"{longest:,}. Cut the text"
            )
        answers = [i for i, message in enumerate(conversation.messages) if message.role == "assistant"]
        boundary = text.messages.index(answers[-1]) if answers and answers[-1] in text.messages else 0
        found = score_tokens(reader.model, bank, text.token_ids, boundary=boundary)
        rows = zip(found.tokens.tolist(), found.running.tolist(), strict=True)
        for index, (piece, message, row) in enumerate(zip(text.pieces, text.messages, rows, strict=True)):
            scores = {
                metric: TokenScore.scored(value, running=running)
                for metric, value, running in zip(bank.metrics, *row, strict=True)
            }
            if config.format == "jsonl":
                line = {
                    "id": conversation.id,
                    "position": index,
                    "token": text.token_ids[index],
                    "text": piece,
                    "message": message,
                    "scores": {metric: score.value for metric, score in scores.items()},
                    "running": {metric: score.running for metric, score in scores.items()},
                    "unscored": {metric: score.reason for metric, score in scores.items() if score.value is None},
                }
                print(json.dumps(line, ensure_ascii=False))
            elif message >= 0:
                print(
                    paint(piece, scores[bank.metrics[0]], bank.thresholds.get(bank.metrics[0]), colour=colour), end=""
                )
        if config.format == "text":
            print()
    return 0


def _conversations(file: Path | None) -> Iterator[Conversation]:
    if file is not None and file.suffix == ".jsonl":
        yield from read_jsonl(file)
        return
    try:
        raw = sys.stdin.buffer.read() if file is None else file.read_bytes()
    except OSError as error:
        raise TextError(f"{file} cannot be read: {error.strerror}; name a text file") from error
    name = "standard input" if file is None else str(file)
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise TextError(
            f"{name} is not UTF-8 at byte {error.start}; convert it first, for example with iconv"
        ) from error
    if not text.strip():
        raise TextError(f"{name} is empty; give at least one character of text")
    yield Conversation(name, name, (Message("assistant", text),))
