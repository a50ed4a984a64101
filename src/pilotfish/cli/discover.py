"""`pilotfish discover`: prompts in; a folder of vectors and a page on what each does out."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from pathlib import Path

from pilotfish.cli.discover_verbs import Discover, DiscoverPromote
from pilotfish.cli.terminal import table
from pilotfish.core import Site
from pilotfish.discovery import (
    Exploration,
    ExploreConfig,
    ObserveConfig,
    described,
    explore,
    load_findings,
    promote,
    save_findings,
)
from pilotfish.discovery.files import Form
from pilotfish.errors import SettingError, TextError
from pilotfish.heads import load_bank, shipped_banks
from pilotfish.models import load_model
from pilotfish.reports.findings import write_findings_page
from pilotfish.runs import run_card
from pilotfish.texts.conversations import read_bytes

PAGE_FILE = "findings.html"
NUM_PRINTED = 8


def run(config: Discover) -> int:
    if config.promote > config.num_vectors or config.promote < 0:
        raise SettingError(f"promote {config.promote} is outside 0 to {config.num_vectors}, the vectors to be found")
    prompts = [line.strip() for line in read_bytes(config.prompts).decode("utf-8", "replace").splitlines()]
    prompts = [prompt for prompt in prompts if prompt]
    if not prompts:
        raise TextError(f"{config.prompts} has no prompts; give one a line")
    loaded = load_model(config.model, device=config.device, dtype=config.dtype)
    named = [load_bank(folder) for folder in config.banks]
    banks = named or shipped_banks(loaded.identity)
    found = explore(loaded, prompts, _settings(config), banks=banks)
    card = run_card("pilotfish discover", {key: str(value) for key, value in asdict(config).items()}, config.seed)
    save_findings(config.out, found, loaded, run=card)
    page = write_findings_page(
        config.out / PAGE_FILE,
        described(found, loaded),
        method=config.method,
        folder=str(config.out),
        logit=_logit_name(config),
    )
    _print_findings(found)
    print(f"\nThe page: {page.resolve()}")
    print(f"To use one: pilotfish discover promote {config.out} {found.findings[0].id} --form edit")
    for finding in found.findings[: config.promote]:
        _promote(config.out, finding.id, config.form)
    return 0


def run_promote(config: DiscoverPromote) -> int:
    _promote(config.folder, config.id, config.form, name=config.name, out=config.out)
    return 0


def _promote(folder: Path, id: str, form: Form, *, name: str = "", out: Path | None = None) -> None:
    settings = {"folder": str(folder), "id": id, "form": form, "name": name}
    run = run_card("pilotfish discover promote", settings, 0)
    written = promote(load_findings(folder), id, out or folder / f"{id}-{form}", form=form, name=name or id, run=run)
    print(f"{id} as {form}: {written}")


def _settings(config: Discover) -> ExploreConfig:
    return ExploreConfig(
        method=config.method,
        num_vectors=config.num_vectors,
        source=None if config.source is None else Site.parse(config.source),
        target=None if config.target is None else Site.parse(config.target),
        radius=config.radius,
        num_searched=config.num_searched,
        iterations=config.iterations,
        num_shown=config.num_shown,
        towards=config.towards,
        away=config.away,
        observing=ObserveConfig(max_new_tokens=config.max_new_tokens),
        seed=config.seed,
    )


def _logit_name(config: Discover) -> str:
    return f"{', '.join(config.towards)} over {', '.join(config.away)}" if config.towards else ""


def _print_findings(found: Exploration) -> None:
    kinds = Counter(finding.kind for finding in found.findings)
    num_ways = len({finding.group for finding in found.findings if finding.kind == "changed"})
    print(
        f"{found.source} to {found.target}, radius {found.radius.value:.4g}: {kinds['changed']} vectors change answers "
        f"readably, in {num_ways} ways; {kinds['broken']} break them, {kinds['same']} leave them as they are; "
        f"{kinds['random']} random vectors beside them"
    )
    rows = [
        [one.id, one.kind, f"{one.reach:.2f}", f"{one.observed.kl:.2f}", f"{one.observed.surprise:.2f}", str(one.group)]
        for one in found.findings[:NUM_PRINTED]
    ]
    print(table(["", "answers", "reach over random", "KL, nats", "surprise, nats", "group"], rows))
