"""`pilotfish labels` and `pilotfish contrast`: texts or prompts in, labelled conversations and their counts out."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path

from pilotfish.cli.terminal import table
from pilotfish.cli.verbs import Contrast, Labels
from pilotfish.core import Conversation
from pilotfish.engines import EmbeddedEngine, Request, Sampling, contrastive
from pilotfish.errors import SettingError, TextError
from pilotfish.models import load_pair
from pilotfish.runs import generator
from pilotfish.scores import Agreement, Estimate, agreement
from pilotfish.texts import Endpoint, Labelling, judge_passages, labelled, read_jsonl, write_jsonl

ROWS = {
    "yes": "the metric holds, with spans",
    "yes, elsewhere": "the metric holds; the passes mark other places, so no spans",
    "no": "the metric holds nowhere",
    "disputed": "one pass says yes, one no: unlabelled",
    "unreadable": "no reply of the asked form, or only quotes from elsewhere: unlabelled",
    "unanswered": "a request got no answer: unlabelled, run again to ask again",
    "labelled already": "had a label of the metric; left as they are",
    "without an answer": "no assistant message to read; left as they are",
}
"""Counts of a labelling and what they say, in the order of the table."""


def run(config: Labels) -> int:
    conversations = read_jsonl(config.data)
    if config.second_model is not None and config.passes == 1:
        raise SettingError("--second-model needs a second pass; leave out --passes 1")
    models = (config.model, config.second_model or config.model)[: config.passes]
    labelling = judge_passages(
        conversations,
        _words(config.definition),
        metric=config.metric,
        endpoints=[_endpoint(config, model) for model in models],
        journal=_answers_file(config.answers, config.out),
        concurrency=config.concurrency,
    )
    _print_counts(labelling)
    found = agreement(labelling.judged, generator=generator(config.seed, "agreement"))
    if found is not None:
        _print_agreement(found)
    by_id = {row.id: row for row in labelling.rest}
    by_id |= {row.conversation.id: labelled(row, config.metric) for row in labelling.judged}
    rows = [by_id[conversation.id] for conversation in conversations]
    if config.disputed == "drop":
        rows = [row for row in rows if _has_label(row, config.metric)]
    if not any(_has_label(row, config.metric) for row in rows):
        raise TextError("no row got a label, so nothing was written; see the counts above")
    write_jsonl(config.out, rows)
    print(f"\n{len(rows)} rows: {config.out.resolve()}")
    return 0


def run_contrast(config: Contrast) -> int:
    prompts = _prompts(config.prompts)
    do, dont = _words(config.do), _words(config.dont)
    request = Request(
        max_new_tokens=config.max_new_tokens,
        sampling=Sampling(temperature=config.temperature, top_p=config.top_p),
        seed=config.seed,
    )
    pair = load_pair(config.pair, draft=config.draft, device=config.device, dtype=config.dtype)
    stream = contrastive(
        EmbeddedEngine(pair),
        prompts,
        do=do,
        dont=dont,
        metric=config.metric,
        request=request,
        journal=_answers_file(config.answers, config.out),
    )
    rows = list(stream)
    print(table(["", "count"], [[name, str(count)] for name, count in stream.counts.items() if count]))
    if not rows:
        raise TextError("no prompt was kept, so nothing was written; see the counts, or raise --max-new-tokens")
    write_jsonl(config.out, rows)
    print(f"\n{len(rows)} rows: {config.out.resolve()}")
    return 0


def _endpoint(config: Labels, model: str) -> Endpoint:
    key = ""
    if config.key_env is not None:
        key = os.environ.get(config.key_env, "").strip()
        if not key:  # the name is not repeated: it may be the key, given by mistake
            raise SettingError("--key-env names an environment variable that is not set; give its NAME, not the key")
    return Endpoint(
        base_url=config.base_url,
        model=model,
        api_key=key,
        temperature=config.temperature,
        timeout_s=config.timeout_s,
        max_retries=config.max_retries,
    )


def _words(given: str) -> str:
    """The text itself, or that of the file after an @."""
    return _read(Path(given[1:])).strip() if given.startswith("@") else given


def _prompts(path: Path) -> Sequence[str | Conversation]:
    if path.suffix == ".jsonl":
        return read_jsonl(path)
    return [line.strip() for line in _read(path).splitlines() if line.strip()]


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise TextError(f"{path}: cannot be read ({error.strerror}); give the path of a readable file") from error
    except UnicodeDecodeError as error:
        raise TextError(f"{path}: byte {error.start} is not UTF-8; save the file as UTF-8") from error


def _answers_file(given: Path | None, out: Path) -> Path:
    return given or out.with_name(out.name + ".answers.jsonl")


def _has_label(row: Conversation, metric: str) -> bool:
    return metric in row.labels or any(span.metric == metric for span in row.spans)


def _print_counts(labelling: Labelling) -> None:
    counts = labelling.counts
    print(table(["", "rows"], [[words, str(counts[name])] for name, words in ROWS.items() if counts[name]]))
    print(
        f"\n{counts['requests']} requests in this run. Quotes: {counts['located']} found in the text, "
        f"{counts['repeated']} of them at several places (all marked), {counts['nowhere']} nowhere and dropped."
    )


def _print_agreement(found: Agreement) -> None:
    print(f"\nThe two passes, over {found.num_rows} rows that both could be read for:")
    print(f"Cohen's kappa of the labels {_figure(found.kappa)}; F1 of marked characters {_figure(found.character_f1)}")


def _figure(estimate: Estimate) -> str:
    if math.isnan(estimate.value):
        return "not defined"
    if math.isnan(estimate.low):
        return f"{estimate.value:.2f} (no interval from {estimate.n} groups)"
    return f"{estimate.value:.2f} [{estimate.low:.2f}, {estimate.high:.2f}]"
