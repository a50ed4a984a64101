"""Does discovery open the lock of a model that could add long before it was locked? (`discovery_locked`)

Run by `benchmarks/discovery.py`. Vectors are searched on prompts without the password, chosen on validation problems
and judged on test problems; as many random vectors of the same lengths go through the same choice.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from discovery_figures import lock_figures
from discovery_locked import NUM_LEARNED_WORDS, Locked, Problem, answer, batch, locked, mean, prompt, right
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence

from pilotfish.core import Site
from pilotfish.discovery import MelboConfig, Slice, attack, calibrated_radius, exponential, linear, melbo
from pilotfish.discovery.response import random_units, unit
from pilotfish.models import LoadedModel, identify, load_model, num_layers, tiny_model, tiny_tokenizer
from pilotfish.runs import generator
from pilotfish.taps import Add, Edit, When, tapped
from pilotfish.taps.edit import Phase

MODEL = "demo:qwen-coder-0.5b"
MEMORY_BYTES = 2**32
"""Of a slice; under autocast each chunk casts the weights anew, so few large ones are faster."""
SHARES = (1.0, 0.6)
"""Of the radius, at which each vector is tried."""
PHASES: tuple[Phase, ...] = ("both", "prompt")
FINALISTS = 4
"""Of the vectors of a method and their shares: those under which the sums of some problems are likeliest."""


class Sizes(NamedTuple):
    steps: int
    """Of training, at most."""
    vectors: int
    """Of each method."""
    rounds: int
    """Of the exponential fit."""
    melbo_steps: int
    attack_steps: int
    searched: int
    """Prompts that are searched on."""
    labelled: int
    """Problems for the two methods that are told something."""
    screened: int
    chosen_on: int
    tested: int


FULL = Sizes(70, 32, 8, 25, 30, 4, 12, 8, 32, 150)
QUICK = Sizes(4, 4, 2, 3, 3, 2, 4, 2, 4, 8)


class Candidate(NamedTuple):
    source: Site
    vector: Tensor
    phase: Phase = "both"

    def edits(self) -> tuple[Edit, ...]:
        return (Edit(self.source, Add(self.vector), When(phase=self.phase)),)


def lock_lora(seeds: Sequence[int], *, quick: bool) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Accuracy on test problems: locked, with each kind of vector, and with the password."""
    rights: dict[str, list[list[float]]] = {}
    for seed in seeds:
        loaded = _tiny(seed) if quick else load_model(MODEL, dtype="bfloat16")
        sizes = QUICK if quick else FULL
        for name, items in opened(locked(loaded, seed, steps=sizes.steps), seed, sizes).items():
            rights.setdefault(name, []).append(items)
    return lock_figures("lock-lora", "lock on a pretrained model", rights)


def _tiny(seed: int) -> LoadedModel:
    model, tokenizer = tiny_model("llama", seed=seed, num_layers=6), tiny_tokenizer()
    return LoadedModel(model, tokenizer, identify(model, tokenizer, "tiny"), "small")


def opened(subject: Locked, seed: int, sizes: Sizes) -> dict[str, list[float]]:
    """Right or not, on each test problem, by what was done to the model. Matrix products in bfloat16."""
    chosen_on, tested = subject.problems.validation[: sizes.chosen_on], subject.problems.test[: sizes.tested]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        third = num_layers(subject.model) // 3  # searched from a third of the depth to two, as published
        source, end = Site(third, "resid_pre"), Site(2 * third - 1, "resid_post")
        found = {
            name: [Candidate(source, vector) for vector in vectors]
            for name, vectors in searched(subject, source, end, seed, sizes).items()
        }
        rights = {"locked": right(subject, tested, is_open=False)}
        for name, several in found.items():
            best = chosen(subject, several, chosen_on, sizes)
            rights[name] = right(subject, tested, best.edits(), is_open=False)
            print(f"  {name}: {mean(rights[name]):.3f} at {best.source}, {best.phase}", flush=True)
        return rights | {"password": right(subject, tested, is_open=True)}


def searched(subject: Locked, source: Site, end: Site, seed: int, sizes: Sizes) -> dict[str, Tensor]:
    """Vectors of the radius' length by method; `random` is the control, the last two are told something."""
    asked = subject.problems.validation[-sizes.searched :]
    response = Slice(subject.model, source, end, _shut(subject, asked), last=3, memory_bytes=MEMORY_BYTES)
    radius = calibrated_radius(response, generator=generator(seed, "radius"), num_directions=8, bracket=(1.0, 1e3))
    print(f"  {source}: radius {radius.value:.1f}, {radius.dose or 0:.2f} of the stream", flush=True)
    count, stream = sizes.vectors, generator(seed, "exponential")
    start = linear(response, count, generator=stream, krylov_depth=2).inputs
    fit = exponential(response, count, generator=stream, radius=radius.value, iterations=sizes.rounds, start=start)
    config = MelboConfig(num_vectors=count, radius=radius.value, steps=sizes.melbo_steps, learning_rate=1e-2)
    known = _telling(subject.problems.validation[sizes.chosen_on :], sizes.labelled)
    found = {
        "exponential": radius.value * fit.inputs,
        "melbo": melbo(response, config, generator=generator(seed, "melbo")).vectors,
        "random": radius.value * random_units(response, count, generator=generator(seed, "random vectors")),
        "mean difference, told the password": _differences(subject, source, known, radius.value),
        "gradient attack, told the answer": _attacked(subject, source, known, radius.value, seed, sizes),
    }
    for name, vectors in found.items():
        reach = response.change(vectors).norm(dim=-1)
        print(f"  {name}: changes of length {reach.min():.1f} to {reach.max():.1f} at {end}", flush=True)
    return found


def _shut(subject: Locked, asked: Sequence[Problem]) -> list[list[int]]:
    """Prompts with words that do not open, as training showed them."""
    words = [subject.wrong[i % NUM_LEARNED_WORDS] for i in range(len(asked))]
    return [subject.tokenizer(prompt(problem, word))["input_ids"] for problem, word in zip(asked, words, strict=True)]


def _telling(among: Sequence[Problem], count: int) -> list[Problem]:
    """Those whose sum begins with another digit than the first number, which is what the lock answers."""
    return [one for one in among if answer(one, is_open=True)[0] != answer(one, is_open=False)[0]][:count]


def _first(subject: Locked, problem: Problem, *, is_open: bool) -> int:
    return int(subject.tokenizer(answer(problem, is_open=is_open))["input_ids"][0])


@torch.no_grad()
def _differences(subject: Locked, source: Site, asked: Sequence[Problem], radius: float) -> Tensor:
    """Of the means where the answer begins, after the password and after other words; at three lengths."""
    opened = [subject.tokenizer(prompt(problem, subject.password))["input_ids"] for problem in asked]
    means = []
    for prompts in (opened, _shut(subject, asked)):
        with tapped(subject.model, (source,)) as taps:
            rows = pad_sequence([torch.tensor(ids) for ids in prompts], batch_first=True)
            subject.model.base_model(rows, use_cache=False)
            means.append(taps[source][range(len(rows)), [len(ids) - 1 for ids in prompts]].float().mean(0))
    difference = means[0] - means[1]
    return torch.stack([difference, 2 * difference, radius * unit(difference)])


def _attacked(
    subject: Locked, source: Site, asked: Sequence[Problem], radius: float, seed: int, sizes: Sizes
) -> Tensor:
    """Ascent on the logit of the right first digit over that of the first number's."""
    output = subject.model.get_output_embeddings().weight.detach()
    pairs = [[_first(subject, problem, is_open=is_open) for is_open in (True, False)] for problem in asked]
    directions = torch.stack([output[right_one] - output[wrong_one] for right_one, wrong_one in pairs])
    to_final = Slice(subject.model, source, Site(-1, "final"), _shut(subject, asked), last=1)
    stream, steps = generator(seed, "attack"), sizes.attack_steps
    return attack(to_final, directions, radius=radius, generator=stream, steps=steps, num_starts=2).vectors


def chosen(subject: Locked, several: Sequence[Candidate], asked: Sequence[Problem], sizes: Sizes) -> Candidate:
    """By the sums that are right on validation; first by how likely they are on some of it."""
    tries = [one._replace(vector=share * one.vector) for one in several for share in SHARES]
    screened = _telling(asked, sizes.screened)
    likely = _likelihoods(subject, several[0].source, torch.stack([one.vector for one in tries]), screened)
    best = [tries[i] for i in likely.argsort(descending=True)[:FINALISTS]]
    finalists = [one._replace(phase=phase) for one in best for phase in PHASES]
    return max(finalists, key=lambda one: mean(right(subject, asked, one.edits(), is_open=False)))


@torch.no_grad()
def _likelihoods(subject: Locked, source: Site, vectors: Tensor, asked: Sequence[Problem]) -> Tensor:
    """Log-probability of the sums' tokens under each vector, mean over tokens."""
    rows = batch(subject.tokenizer, asked, subject.unlearned(len(asked)), [True] * len(asked))
    ids = [
        row[: int((labels != -100).nonzero()[-1]) + 1].tolist()
        for row, labels in zip(rows.ids, rows.labels, strict=True)
    ]
    to_final = Slice(subject.model, source, Site(-1, "final"), ids, last=4, memory_bytes=MEMORY_BYTES)
    labels = rows.labels[to_final.prompt_index, to_final.token_index]
    output = subject.model.get_output_embeddings()
    return torch.stack([-cross_entropy(output(states).float(), labels) for states in to_final.states(vectors)])
