"""Published sets for steering, as they are, in; contrasts (a prompt with two answers) and plain texts out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pilotfish.errors import TextError
from pilotfish.texts.conversations import as_text, json_lines, read_bytes
from pilotfish.texts.rows import csv_rows, digest

ANTHROPIC_EVALS = "anthropics/evals"
REPE_FACTS = "andyzoujm/representation-engineering"

_CONTRAST_KEYS = ("id", "group", "prompt", "positive", "negative", "source", "license")
_ESSAYS = {
    "wedding": "chatgpt_wedding_essay_20230423.txt",
    "shipping": "chatgpt_shipping_essay_20230423.txt",
    "macedonia": "wikipedia_macedonia.txt",
    "banana_bread": "vegan_banana_bread.txt",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Contrast:
    """One prompt and two answers to it: the first shows the property, the second does not."""

    id: str
    group: str
    """The source document; rows of one group never stand on two sides of a split."""
    prompt: str
    """May be empty: the answers are then whole texts."""
    positive: str
    negative: str
    source: str = ""
    license: str = ""

    def __post_init__(self) -> None:
        for side, answer in (("positive", self.positive), ("negative", self.negative)):
            if not answer.strip():
                raise TextError(f"contrast {self.id!r}: the {side} answer is empty; give text or remove the row")
        if self.positive == self.negative:
            raise TextError(f"contrast {self.id!r}: both answers are the same; a direction is what tells them apart")


def read_contrasts(path: Path) -> list[Contrast]:
    """Reads one contrast a line: `positive` and `negative`, and if wanted `prompt`, `id`, `group`, `source`, `license`.

    The id is the line number by default, and the group that of the prompt, or of the id where there is none.

    Raises:
        TextError: the file cannot be read, is empty, an id stands twice, or a row is not of that form.
    """
    contrasts: dict[str, Contrast] = {}
    for number, row in json_lines(path):
        where = f"{path}:{number}"
        unknown = [key for key in row if key not in _CONTRAST_KEYS]
        if unknown:
            raise TextError(f"{where}: unknown key {', '.join(map(repr, unknown))}; use {', '.join(_CONTRAST_KEYS)}")
        given = {key: as_text(row, key, where, default="") for key in ("id", "group", "prompt", "source", "license")}
        identifier = given["id"] or str(number)
        if identifier in contrasts:
            raise TextError(f"{where}: id {identifier!r} stands in an earlier line too; give every row its own id")
        contrasts[identifier] = _contrast(
            where,
            {"positive": as_text(row, "positive", where), "negative": as_text(row, "negative", where), **given}
            | {"id": identifier, "group": given["group"] or digest(given["prompt"] or identifier)},
        )
    return list(contrasts.values())


def read_anthropic_evals(path: Path) -> list[Contrast]:
    """Reads one file of the model-written or human-written evaluations: a question, and the answer that matches.

    The file is any of `advanced-ai-risk/human_generated_evals/*.jsonl` or `persona/*.jsonl` of anthropics/evals (Perez
    et al., 2022, arXiv 2212.09251). Answers keep their published form, such as ` (A)` or ` Yes`. Rows that ask the same
    question share a group. The published choices are not balanced: see `docs/data.md`.

    Raises:
        TextError: the file cannot be read, or a row is not of that form.
    """
    contrasts = []
    for number, row in json_lines(path):
        where = f"{path}:{number}"
        question = as_text(row, "question", where)
        contrasts.append(
            _contrast(
                where,
                {
                    "id": f"{path.stem}-{number}",
                    "group": digest(question),
                    "prompt": question,
                    "positive": as_text(row, "answer_matching_behavior", where),
                    "negative": as_text(row, "answer_not_matching_behavior", where),
                    "source": f"{ANTHROPIC_EVALS}: {path.stem}",
                    "license": "CC-BY-4.0",
                },
            )
        )
    return contrasts


def read_repe_facts(path: Path) -> list[Contrast]:
    """Reads true and false statements; the n-th true one is paired with the n-th false one, what is left over dropped.

    The file is `data/facts/facts_true_false.csv` of andyzoujm/representation-engineering (Zou et al., 2023, arXiv
    2310.01405). The set has no pairs of its own: a mean difference is that of the two classes, whatever the pairing.

    Raises:
        TextError: the file cannot be read, a label is not 0 or 1, or one of the classes is missing.
    """
    statements: dict[str, list[str]] = {"1": [], "0": []}
    for line, row in csv_rows(path, ("statement", "label")):
        if row["label"] not in statements:
            raise TextError(f"{path}:{line}: label {row['label']!r} is not 0 (false) or 1 (true)")
        statements[row["label"]].append(row["statement"].strip())
    pairs = list(zip(statements["1"], statements["0"], strict=False))
    if not pairs:
        raise TextError(f"{path}: there are no true or no false statements; both are needed")
    return [
        _contrast(
            f"{path}, pair {index}",
            {
                "id": f"repe-facts-{index}",
                "group": f"repe-facts-{index}",
                "prompt": "",
                "positive": true,
                "negative": false,
                "source": REPE_FACTS,
                "license": "MIT",
            },
        )
        for index, (true, false) in enumerate(pairs)
    ]


def read_actadd_essays(folder: Path) -> dict[str, str]:
    """Reads the four texts of montemac/activation_additions (MIT): `wedding`, `shipping`, `macedonia`, `banana_bread`.

    They serve perplexity curves of the wedding experiment (Turner et al., 2023, arXiv 2308.10248): the first is what a
    wedding vector should make likelier, the others what it should leave alone.

    Raises:
        TextError: a file cannot be read or is not UTF-8.
    """
    texts = {}
    for name, file in _ESSAYS.items():
        try:
            texts[name] = read_bytes(folder / file).decode("utf-8")
        except UnicodeDecodeError as error:
            raise TextError(f"{folder / file}: byte {error.start} is not UTF-8; copy the file again") from error
    return texts


def _contrast(where: str, fields: Mapping[str, str]) -> Contrast:
    try:
        return Contrast(**fields)
    except TextError as error:
        raise TextError(f"{where}: {error}") from error
