"""`pilotfish tune`: labelled conversations and ordinary traffic in; a tuned draft, its bank and what changed out."""

from __future__ import annotations

from dataclasses import replace

from pilotfish.cli.fit import read_splits
from pilotfish.cli.terminal import table
from pilotfish.cli.verbs import Tune
from pilotfish.core import Conversation
from pilotfish.engines import Request, Sampling, engine_acceptance, target_answers
from pilotfish.heads import Measured
from pilotfish.models import LoadedModel, Pair, load_pair
from pilotfish.runs import generator
from pilotfish.scores import Estimate, RecipeConfig, RivalConfig, build_bank, compare, write_scored
from pilotfish.scores.acceptance import acceptance, acceptance_loss, read_acceptance
from pilotfish.scores.adapter import require_peft
from pilotfish.scores.distillation import Answer, TargetRecording
from pilotfish.scores.joint import JointConfig, Lessons, draft_of
from pilotfish.scores.recipe import Built
from pilotfish.scores.scored import SCORED_FILE
from pilotfish.scores.tuned import tuned_draft
from pilotfish.texts import read_jsonl

TOP_K = 512
"""Tokens of each distribution that acceptance is measured on: more than tuning needs, so that hardly any is missed."""
NUM_CHECKED = 8
"""Prompts that the engine itself answers."""
NAMES = {
    "auroc_token": "AUROC of tokens",
    "auroc_response": "AUROC of responses",
    "auroc_within": "AUROC within a text",
    "pairwise_accuracy": "right order in a pair",
}
Row = list[str]


def run(config: Tune) -> int:
    require_peft()
    splits, benign = read_splits(config.data, config.metric, config.benign, budget=config.budget, seed=config.seed)
    pair = load_pair(config.model, draft=config.draft, device=config.device, dtype=config.dtype)
    before = draft_of(pair)
    ordinary = {row.id for row in read_jsonl(config.benign)}
    learned = [row for row in splits["train"] if row.id in ordinary] or splits["train"]
    lessons = Lessons(config.metric, splits, _answers(pair, learned[: config.answers], config))
    joint = JointConfig(
        distill=config.distill, steps=config.steps, learning_rate=config.learning_rate, num_sites=config.sites
    )
    after = tuned_draft(pair, lessons, config.out / "draft", config=joint, work_folder=config.work, seed=config.seed)
    rows = _acceptance_rows(pair, after, benign, config)
    recipe = RecipeConfig(
        num_sites=config.sites, budget=config.budget, max_tokens=config.max_tokens, rivals=RivalConfig(names=())
    )
    judged = replace(recipe, rivals=RivalConfig(question=config.question))
    built = [
        build_bank(splits, benign, reader, metric=config.metric, config=each, work_folder=config.work, seed=config.seed)
        for reader, each in ((before, recipe), (after, judged))
    ]
    built[1].bank.save(config.out / "bank")
    write_scored(config.out / "bank" / SCORED_FILE, config.metric, built[1].scored)
    print(table([config.metric, "before", "after", "change"], [*_auroc_rows(built, config), *rows]))
    print("\nIntervals are 95 %. A loss of acceptance is relative, on the same answers; below 0 it is a gain.")
    print(
        f"The draft, for --draft: {config.out / 'draft'}. Banks of the untuned one refuse it; its own, for --banks: "
        f"{config.out / 'bank'}"
    )
    return 0


def _answers(pair: Pair, prompts: list[Conversation], config: Tune) -> list[Answer]:
    return target_answers(pair, prompts, request=_request(config), journal=config.work / "answers.jsonl")


def _request(config: Tune) -> Request:
    return Request(max_new_tokens=config.answer_tokens, sampling=Sampling(temperature=1.0), seed=config.seed)


def _auroc_rows(built: list[Built], config: Tune) -> list[Row]:
    cards = [each.bank.card for each in built]
    differences = compare(
        built[1].scored["head"], built[0].scored["head"], generator=generator(config.seed, "bootstrap")
    )
    return [
        [name, *(_cell(card.metrics[f"{config.metric}/{figure}"]) for card in cards), _cell(differences[figure], "+")]
        for figure, name in NAMES.items()
        if figure in differences
    ]


def _acceptance_rows(pair: Pair, after: LoadedModel, prompts: list[Conversation], config: Tune) -> list[Row]:
    """Of answers to prompts that the draft was not tuned on, and of the engine that speculates with each draft."""
    held_out = _answers(pair, prompts[: config.held_out], config)
    recorded = TargetRecording(pair, config.work / "target", top_k=min(TOP_K, pair.vocab_size))
    recorded.fill(held_out)
    tuned = replace(pair, draft=after.model, draft_identity=after.identity)
    read = [read_acceptance(draft_of(each).model, held_out, recorded) for each in (pair, tuned)]
    found = [acceptance(each, generator=generator(config.seed, "bootstrap")) for each in read]
    losses = acceptance_loss(read[0], read[1], generator=generator(config.seed, "bootstrap"))
    rows = [
        [f"acceptance, {name}", *(_cell(each[figure]) for each in found), f"loss {_cell(losses[figure], '+')}"]
        for figure, name in (("expected", "sampled at temperature 1"), ("greedy", "greedy"))
    ]
    checked = [
        engine_acceptance(
            each, prompts[:NUM_CHECKED], request=_request(config), generator=generator(config.seed, "bootstrap")
        )
        for each in (pair, tuned)
    ]
    return [*rows, ["acceptance, the engine at temperature 1", *map(_cell, checked), ""]]


def _cell(found: Estimate | Measured, sign: str = "") -> str:
    value, low, high = (format(part, f"{sign}.3f") for part in (found.value, found.low, found.high))
    return f"{value} [{low}, {high}]"
