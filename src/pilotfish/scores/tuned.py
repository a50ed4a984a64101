"""A pair and lessons in; a tuned draft in a folder of its own, as any model is kept, out."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers import PreTrainedModel

from pilotfish.errors import ArtefactError, SettingError, StorageError
from pilotfish.models import LoadedModel, Pair, identify, load_model
from pilotfish.runs import DISK_FULL, generator, run_card, write_json
from pilotfish.scores.joint import JointConfig, Lessons, draft_of, tune

CARD_FILE = "tuning.json"
NOT_FOR = (
    "A bank made for the untuned draft does not fit this one: fit its heads anew. Acceptance was kept up on answers to "
    "prompts like those it was tuned on; measure it on your own."
)


def tuned_draft(
    pair: Pair, lessons: Lessons, folder: Path, *, config: JointConfig, work_folder: Path, seed: int
) -> LoadedModel:
    """Tunes the pair's draft and keeps it in a folder, plain weights with tokenizer and card; `load_model` reads it.

    The same call finds it there. The folder appears whole or not at all.

    Raises:
        ArtefactError: the folder holds something else.
        SettingError: tuning changed nothing that an identity would show; otherwise as `tune`.
        StorageError: the disk is full.
    """
    draft = draft_of(pair)
    made_from = fingerprint(pair, lessons, config, seed)
    if folder.exists():
        _check_made_from(folder, made_from)
    else:
        tuned = tune(pair, lessons, config=config, work_folder=work_folder, generator=generator(seed, "tune"))
        if identify(tuned.model, pair.tokenizer, "").weights == draft.identity.weights:
            raise SettingError(
                "tuning has left the draft's weights as they were, to within their dtype; take more steps or a larger "
                "learning rate"
            )
        save_draft(tuned.model, pair, folder, _card(pair, lessons, config, seed) | {"made_from": made_from})
    dtype = str(draft.model.dtype).removeprefix("torch.")
    return load_model(str(folder), device=str(draft.model.device), dtype=dtype)


def fingerprint(pair: Pair, lessons: Lessons, config: JointConfig, seed: int) -> str:
    """Of all that decides what a draft becomes; another machine may still round otherwise."""
    draft = draft_of(pair)
    content: list[Any] = [
        [pair.target_identity.weights, draft.identity.weights, str(draft.model.dtype)],
        [lessons.metric, asdict(config), seed],
        [[asdict(row) for row in lessons.splits[name]] for name in ("train", "validation")],
        [[list(answer.token_ids), answer.is_answer.tolist()] for answer in lessons.answers] if config.distill else [],
    ]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def save_draft(model: PreTrainedModel, pair: Pair, folder: Path, card: dict[str, Any]) -> None:
    """Writes a model with the pair's tokenizer and a card; the folder appears whole or not at all.

    Raises:
        ArtefactError: the folder is there already.
        StorageError: the disk is full.
    """
    with _whole_folder(folder) as temporary:
        model.save_pretrained(temporary)
        pair.tokenizer.save_pretrained(temporary)
        write_json(temporary / CARD_FILE, card)


def _check_made_from(folder: Path, made_from: str) -> None:
    path = folder / CARD_FILE
    try:
        found = json.loads(path.read_text(encoding="utf-8"))["made_from"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtefactError(f"{folder} is there, but holds no tuned draft; give another folder") from error
    if found != made_from:
        raise ArtefactError(
            f"{folder} holds a draft that was tuned from other models, texts or settings (its {CARD_FILE} says from "
            "which); give another folder, or delete that one"
        )


def _card(pair: Pair, lessons: Lessons, config: JointConfig, seed: int) -> dict[str, Any]:
    counts: dict[tuple[str, str, str], int] = defaultdict(int)
    for name in ("train", "validation"):
        for row in lessons.splits[name]:
            counts[name, row.source, row.license] += 1
    return {
        "draft": asdict(draft_of(pair).identity),
        "target": asdict(pair.target_identity),
        "metric": lessons.metric,
        "data": [
            {"role": role, "source": source, "license": license, "num_rows": count}
            for (role, source, license), count in counts.items()
        ],
        "answers": {
            "count": len(lessons.answers),
            "tokens": sum(len(answer.positions) for answer in lessons.answers),
        },
        "not_for": NOT_FOR,
        "run": run_card("tune", asdict(config), seed),
    }


@contextlib.contextmanager
def _whole_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder beside `folder`, renamed to it when the block ends well, removed when it does not."""
    if folder.exists():
        raise ArtefactError(f"{folder} is there already; give another folder, or delete that one")
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}.", suffix=".part"))
    try:
        yield temporary
        temporary.chmod(0o755)
        os.replace(temporary, folder)
    except (OSError, SafetensorError) as error:
        is_full = getattr(error, "errno", None) in DISK_FULL or any(os.strerror(c) in str(error) for c in DISK_FULL)
        if is_full:
            raise StorageError(f"no space left on the disk of {folder}; free some and run the same command") from error
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
