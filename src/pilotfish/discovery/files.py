"""An exploration in; a folder with its vectors and their cards out, and from there a promoted vector.

`vectors.safetensors` holds `vectors` (at the source) and `effects` (at the target), one row a finding, at length 1.
`findings.json` holds what each does, in text, and the hash of that file.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from pilotfish.core import Site
from pilotfish.discovery.explore import Exploration, Finding
from pilotfish.discovery.observe import NextToken, Observed
from pilotfish.discovery.promote import gated, monitor, promoted
from pilotfish.errors import ArtefactError, SettingError
from pilotfish.heads import Card, HeadBank
from pilotfish.models import Identity, LoadedModel
from pilotfish.runs import atomic_path, write_json
from pilotfish.steering.files import load_directions, save_directions
from pilotfish.taps import Edit

Form = Literal["edit", "head", "gate"]

VECTORS_FILE = "vectors.safetensors"
FINDINGS_FILE = "findings.json"
HEAD_FOLDER, EDIT_FOLDER = "head", "edit"
"""Of a gate."""
NOT_FOR = (
    "Found without labels: it says how far a token stands along what one vector does. Measure its false alarms on "
    "ordinary texts before anything depends on it."
)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Discovered:
    """A folder of findings, read back."""

    identity: Identity
    source: Site
    target: Site
    radius: float
    findings: tuple[Mapping[str, Any], ...]
    """One card a vector (`described`), the most promising first."""
    vectors: Float[Tensor, "finding hidden"]
    effects: Float[Tensor, "finding hidden"]

    def index(self, id: str) -> int:
        """The row of a finding.

        Raises:
            SettingError: there is no such id.
        """
        ids = [finding["id"] for finding in self.findings]
        if id not in ids:
            raise SettingError(f"there is no finding {id!r}; the page names them, the first is {ids[0]!r}")
        return ids.index(id)


def described(found: Exploration, loaded: LoadedModel) -> dict[str, Any]:
    """All that was found as JSON, token ids as text: what the page shows and the folder keeps."""
    read = _Reader(loaded.tokenizer)
    radius = found.radius
    return {
        "identity": asdict(loaded.identity),
        "source": str(found.source),
        "target": str(found.target),
        "radius": {"value": radius.value, "dose": radius.dose, "warnings": list(radius.warnings)},
        "prompts": list(found.prompts),
        "plain": read.observed(found.plain),
        "findings": [read.finding(finding) for finding in found.findings],
    }


def save_findings(
    folder: Path, found: Exploration, loaded: LoadedModel, *, run: Mapping[str, Any] | None = None
) -> Path:
    """Writes `vectors.safetensors` and `findings.json`; each atomically, the cards last.

    Args:
        run: Command, settings and versions (`runs.run_card`).
    """
    data = save({"vectors": found.vectors.cpu().contiguous(), "effects": found.effects.cpu().contiguous()})
    with atomic_path(folder / VECTORS_FILE) as temporary:
        temporary.write_bytes(data)
    cards = described(found, loaded) | {"run": dict(run or {}), "vectors_sha256": hashlib.sha256(data).hexdigest()}
    write_json(folder / FINDINGS_FILE, cards)
    return folder


def load_findings(folder: Path) -> Discovered:
    """Reads a folder of findings; its `identity` says of which model.

    Raises:
        ArtefactError: a file is missing, cut or changed.
    """
    path = folder / FINDINGS_FILE
    data = _read(folder / VECTORS_FILE)
    try:
        cards: Any = json.loads(_read(path))
        if hashlib.sha256(data).hexdigest() != cards["vectors_sha256"]:
            raise ArtefactError(f"{folder / VECTORS_FILE} is not what {path.name} describes (another SHA-256)")
        tensors = load(data)
        return Discovered(
            identity=Identity(**cards["identity"]),
            source=Site.parse(cards["source"]),
            target=Site.parse(cards["target"]),
            radius=float(cards["radius"]["value"]),
            findings=tuple(cards["findings"]),
            vectors=tensors["vectors"],
            effects=tensors["effects"],
        )
    except (ValueError, LookupError, TypeError, SafetensorError, SettingError) as error:
        raise ArtefactError(
            f"{folder} is no folder of findings ({error}); copy it again, or run `discover` again"
        ) from error


def promote(
    found: Discovered, id: str, folder: Path, *, form: Form, name: str, run: Mapping[str, Any] | None = None
) -> Path:
    """Writes one finding as something to use, with its card.

    `edit`: a direction that adds the vector at the share of the radius at which it was looked at. `head`: a bank whose
    one head says how far a token stands along the vector's effect. `gate`: both a bank and the direction that takes the
    effect back, for where the head sees it (`load_gate`).

    Raises:
        SettingError: there is no such finding, or it changes nothing.
    """
    index = found.index(id)
    card = found.findings[index]
    notes = f"{id} of a discovery from {found.source} to {found.target}, radius {found.radius:.4g}. {NOT_FOR}"
    if form == "edit":
        dose = found.radius * float(card["share"])
        vector = found.vectors[index]
        direction = promoted(vector, found.source, name=name, identity=found.identity, radius=dose, notes=notes)
        return save_directions(folder, {direction.site: direction})
    head = monitor(
        found.effects[index], found.target, metric=name, center=float(card["center"]), length=float(card["length"])
    )
    bank = HeadBank([head], found.identity, card=Card(identity=found.identity, not_for=NOT_FOR, run=dict(run or {})))
    if form == "head":
        return bank.save(folder)
    bank.save(folder / HEAD_FOLDER)
    back = promoted(
        found.effects[index],
        found.target,
        name=f"without {name}",
        identity=found.identity,
        radius=-float(card["length"]),
        notes=notes,
    )
    save_directions(folder / EDIT_FOLDER, {back.site: back})
    return folder


def load_gate(folder: Path, *, identity: Identity, threshold: float = 0.5) -> Edit:
    """The gated edit that `promote` wrote.

    Args:
        threshold: Probability of the head from which on it acts; one half is midway between plain and steered.

    Raises:
        ArtefactError: a file is missing, cut or changed.
        BankMismatch, DirectionMismatch: it was made for another model.
    """
    bank = HeadBank.load(folder / HEAD_FOLDER)
    bank.check(identity)
    (direction,) = load_directions(folder / EDIT_FOLDER, identity=identity).values()
    return gated(direction, bank.heads[0], threshold=threshold)


class _Reader:
    """Token ids to text."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer

    def text(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=False))

    def moved(self, tokens: Sequence[NextToken]) -> list[dict[str, Any]]:
        return [{"text": self.text([one.token_id]), "before": one.before, "after": one.after} for one in tokens]

    def observed(self, one: Observed) -> dict[str, Any]:
        return {
            "answers": [self.text(answer) for answer in one.answers],
            "kl": one.kl,
            "surprise": one.surprise,
            "repeats": one.repeats,
            "rising": self.moved(one.rising),
            "falling": self.moved(one.falling),
            "monitors": dict(one.monitors),
        }

    def finding(self, finding: Finding) -> dict[str, Any]:
        given = finding._asdict()
        return given | self.observed(given.pop("observed"))


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ArtefactError(
            f"{path} cannot be read: {error.strerror}; findings are {VECTORS_FILE} with {FINDINGS_FILE}"
        ) from error
