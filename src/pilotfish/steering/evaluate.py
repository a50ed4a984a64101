"""Ways to steer and held-out texts in; what each does beside doing nothing, out: a table with intervals.

Every table has the rows that a vector must be held against: no steering, a prompt, a few examples in the prompt, a
random direction and one from shuffled labels, the vectors at the same damage. A prompt often wins ("Steering GPT-2-XL",
"AxBench", arXiv 2501.17148), and a table without it does not show whether a vector is of use.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from pilotfish.core import Message
from pilotfish.errors import SettingError, TextError
from pilotfish.models import LoadedModel
from pilotfish.runs import progress
from pilotfish.scores.metrics import Estimate, bootstrap_by_group, mean_of
from pilotfish.steering.direction import Direction
from pilotfish.steering.meters import Divergence, answer_logits, by_length, divergences
from pilotfish.steering.rollouts import Decoding, Sampled, rollouts
from pilotfish.taps import Edit
from pilotfish.texts import Contrast, encode, render

NO_STEERING = "no steering"
MIN_TO_TELL = 8
"""Independent items that a verdict takes: a bootstrap of fewer calls noise a difference several times too often."""


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Arm:
    """One way to steer: edits, an instruction, examples, or nothing."""

    name: str
    edits: tuple[Edit, ...] = ()
    instruction: str = ""
    """System message."""
    examples: tuple[Message, ...] = ()
    """Earlier turns that show what is wanted."""
    prefix: str = ""
    """Put before a prompt, and before a plain text, which has no messages."""

    def messages(self, prompt: str) -> tuple[Message, ...]:
        system = (Message("system", self.instruction),) if self.instruction else ()
        return (*system, *self.examples, Message("user", f"{self.prefix}{prompt}"))

    @property
    def before(self) -> str:
        """What a plain text is read after: the prefix, then what instruction and examples say."""
        said = [self.instruction, *(message.content for message in self.examples)]
        return self.prefix + "".join(f"{each}\n\n" for each in said if each)


class Row(NamedTuple):
    """One arm under one measure."""

    arm: str
    measure: str
    value: Estimate
    change: Estimate | None
    """Against no steering, item by item; None in that row itself."""


def few_shot(contrasts: Sequence[Contrast], *, name: str = "few-shot prompt") -> Arm:
    """Contrasts with their positive answers, as turns before the prompt; as a prefix where they have no prompts."""
    shown = [item for item in contrasts if item.prompt]
    if not shown:
        return Arm(name=name, prefix="\n\n".join(item.positive.strip() for item in contrasts) + "\n\n")
    turns = ((Message("user", item.prompt), Message("assistant", item.positive.strip())) for item in shown)
    return Arm(name=name, examples=tuple(message for turn in turns for message in turn))


def random_like(direction: Direction, *, generator: torch.Generator) -> Direction:
    """A direction drawn evenly from all, of the same length, at the same site."""
    drawn = torch.randn(direction.vector.shape, generator=generator, dtype=torch.float64)
    vector = (drawn * (direction.norm / drawn.norm())).float()
    return replace(
        direction, vector=vector, card=replace(direction.card, notes="random, of the length of another")
    ).named(f"random, as long as {direction.card.name}")


def shuffled(contrasts: Sequence[Contrast], *, generator: torch.Generator) -> list[Contrast]:
    """The same contrasts with the two answers swapped in half of them: what extraction finds without the labels.

    Exactly half, one contrast left out where their number is odd: else a rest of what all share is left, which
    calibration to equal damage makes as strong as the real direction.
    """
    half = len(contrasts) // 2
    order = torch.randperm(len(contrasts), generator=generator)[: 2 * half].tolist()
    swapped, kept = set(order[:half]), set(order)
    return [
        replace(item, positive=item.negative, negative=item.positive) if index in swapped else item
        for index, item in enumerate(contrasts)
        if index in kept
    ]


# What can be measured of an arm, item by item


def prompt_ids(loaded: LoadedModel, arm: Arm, prompt: str) -> list[int]:
    """A prompt as the model reads it under an arm, up to where its answer begins."""
    rendered = render(arm.messages(prompt), loaded.tokenizer, add_generation_prompt=True)
    return encode(rendered, loaded.tokenizer).token_ids


def margins(loaded: LoadedModel, arm: Arm, contrasts: Sequence[Contrast]) -> Float[Tensor, " item"]:
    """Log probability a token of the positive answer less that of the negative, in nats; float64.

    Only the tokens that tell the two apart count, as a mean over each side's: for `(A)` and `(B)` that is the log odds
    of the letters, and its sigmoid their probability; for longer answers it is no probability of anything. Answers
    without a prompt are read as plain texts, after what the arm says.

    Raises:
        TextError: the two answers of a contrast are the same tokens, or one is the beginning of the other; or they are
            longer than the model reads, with what the arm puts before them.
    """
    parts = [part for item, contrast in enumerate(contrasts) for part in _parts(loaded, arm, item, contrast)]
    found = torch.zeros(len(contrasts), dtype=torch.float64)
    longest, room = max(map(_size, parts), default=0), loaded.model.config.max_position_embeddings
    if longest > room:
        raise TextError(
            f"a contrast takes {longest} tokens under {arm.name!r}, where the model reads at most {room}; shorten "
            "prompts and answers, or show fewer examples"
        )
    for index, log_probs in _log_probs(loaded, arm, [part.sampled for part in parts]):
        part = parts[index]
        weights = torch.tensor(part.weights, dtype=torch.float64)
        found[part.item] += log_probs[part.places, part.token_ids].double().cpu() @ weights
    return found


def differ_in_one_token(loaded: LoadedModel, contrasts: Sequence[Contrast]) -> bool:
    """Whether the answers of every contrast differ in one token each, so that margins are log odds.

    Raises:
        TextError: as `margins`, of any arm.
    """
    spans = [_differing(*_sides(loaded, item), where=f"contrast {item.id!r}") for item in contrasts]
    return all(ends == (first + 1, first + 1) for first, ends in spans)


def letter_probability(loaded: LoadedModel, arm: Arm, contrasts: Sequence[Contrast]) -> Float[Tensor, " item"]:
    """Probability of the positive letter among the two; see `margins`."""
    return margins(loaded, arm, contrasts).sigmoid()


def text_losses(loaded: LoadedModel, arm: Arm, texts: Sequence[str]) -> Float[Tensor, " text"]:
    """Mean nats a token of each text as it stands; `exp` of it is the perplexity.

    What an arm puts before plain texts, `Arm.before`, is read before each text and not counted. Many models have no BOS
    and read a text worse that nothing stands before: hold arms against each other with a `prefix` in all of them.

    Raises:
        TextError: a text has fewer than two tokens.
    """
    prefix = _plain_ids(loaded, arm.before)
    rows = [list(loaded.tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]
    if any(len(ids) < 2 for ids in rows):
        raise TextError("a text of fewer than two tokens has no perplexity; give a longer one")
    # The first token counts in no arm: without a prefix nothing predicts it.
    sampled = [Sampled((*prefix, ids[0]), tuple(ids[1:])) for ids in rows]
    losses = torch.zeros(len(texts), dtype=torch.float64)
    for index, log_probs in _log_probs(loaded, arm, sampled):
        ids = rows[index][1:]
        losses[index] = -log_probs[range(len(ids)), ids].double().mean()
    return losses


class Answered(NamedTuple):
    """What an arm wrote, and how far from the unsteered model that was."""

    texts: tuple[str, ...]
    found: tuple[Divergence, ...]

    @property
    def kl_mean(self) -> float:
        return float(torch.cat([one.kl for one in self.found]).mean())

    @property
    def kl_p95(self) -> float:
        return float(torch.cat([one.kl for one in self.found]).quantile(0.95))

    @property
    def acceptance(self) -> float:
        return float(torch.cat([one.acceptance for one in self.found]).mean())

    @property
    def damage(self) -> dict[str, float]:
        """The three figures above, by name."""
        return {"kl_mean": self.kl_mean, "kl_p95": self.kl_p95, "acceptance": self.acceptance}


def answer(
    loaded: LoadedModel, arm: Arm, prompts: Sequence[str], *, decoding: Decoding, generator: torch.Generator
) -> Answered:
    """Lets an arm answer prompts, and measures its damage along the answers.

    The unsteered model is given the bare prompt, so an instruction has a KL too and can stand in one table with a dose.
    """
    steered = [prompt_ids(loaded, arm, prompt) for prompt in prompts]
    plain = [prompt_ids(loaded, Arm(name=NO_STEERING), prompt) for prompt in prompts]
    sampled = rollouts(loaded.model, steered, arm.edits, decoding=decoding, generator=generator)
    texts = tuple(str(loaded.tokenizer.decode(list(one.answer_ids), skip_special_tokens=True)) for one in sampled)
    return Answered(texts, tuple(divergences(loaded.model, sampled, arm.edits, plain_prompts=plain)))


# The table


Measure = Callable[[Arm], Float[Tensor, " item"]]


def compare(
    arms: Sequence[Arm],
    measures: Mapping[str, Measure],
    *,
    groups: Mapping[str, Sequence[str]] | None = None,
    generator: torch.Generator,
) -> list[Row]:
    """Every arm under every measure, with 95 % intervals by item, and its change against no steering on the same items.

    Args:
        arms: The first is no steering.
        groups: By measure, what belongs together among its items and is resampled together; each item by default.

    Raises:
        SettingError: there are no arms, or a measure has fewer than two items.
    """
    if not arms or arms[0].edits or arms[0].instruction or arms[0].examples or arms[0].prefix:
        raise SettingError("the first arm must do nothing; put Arm(name='no steering') before the others")
    rows = []
    for name, measure in measures.items():
        plain: Tensor | None = None
        for arm in arms:
            values = measure(arm)
            names = (groups or {}).get(name) or [str(index) for index in range(len(values))]
            change = None
            if plain is not None:
                change = bootstrap_by_group(mean_of((values - plain).tolist()), names, generator=generator)
            else:
                plain = values
            value = bootstrap_by_group(mean_of(values.tolist()), names, generator=generator)
            rows.append(Row(arm.name, name, value, change))
    return rows


class Verdict(NamedTuple):
    """Whether a vector is of use beside a prompt."""

    prompt: str
    """The one that the vector was held against."""
    prompt_wins: bool
    difference: Estimate
    """The prompt's effect less the vector's, item by item."""
    sentence: str


def against_prompt(
    vector: Float[Tensor, " item"],
    prompts: Mapping[str, Float[Tensor, " item"]],
    groups: Sequence[str],
    *,
    best: str,
    generator: torch.Generator,
) -> Verdict:
    """Holds a vector against a prompt, on the same items; with fewer than eight groups without a verdict.

    Args:
        best: Of the prompts, chosen on other items: the best of these would be a little lucky.

    Raises:
        SettingError: there is no such prompt, or fewer than two groups.
    """
    if best not in prompts:
        raise SettingError(f"there is no prompt {best!r} to hold the vector against; there are {', '.join(prompts)}")
    num_groups = len(set(groups))
    difference = bootstrap_by_group(mean_of((prompts[best] - vector).tolist()), groups, generator=generator)
    figure = f"{difference.value:+.3f} [{difference.low:+.3f}, {difference.high:+.3f}]"
    if num_groups < MIN_TO_TELL:
        sentence = f"{num_groups} independent items are too few to tell; the {best} less the vector is {figure}."
    elif difference.low > 0:
        sentence = f"The {best} does better than the vector, by {figure}: use the {best}."
    elif difference.high < 0:
        sentence = f"The vector does better than the {best}, which less the vector is {figure}."
    else:
        sentence = f"Neither is shown to be better; the {best} less the vector is {figure}."
    return Verdict(best, difference.value > 0, difference, sentence)


class _Part(NamedTuple):
    """A text, and which log probabilities along its answer a margin sums with which weights."""

    item: int
    sampled: Sampled
    places: Sequence[int]
    token_ids: Sequence[int]
    weights: Sequence[float]


def _size(part: _Part) -> int:
    return len(part.sampled.prompt_ids) + len(part.sampled.answer_ids)


def _sides(loaded: LoadedModel, contrast: Contrast) -> tuple[list[int], list[int]]:
    """Token ids of both answers."""
    one, other = (
        list(loaded.tokenizer(text.strip(), add_special_tokens=False)["input_ids"])
        for text in (contrast.positive, contrast.negative)
    )
    return one, other


def _parts(loaded: LoadedModel, arm: Arm, item: int, contrast: Contrast) -> Iterator[_Part]:
    asked = contrast.prompt
    prompt = tuple(prompt_ids(loaded, arm, asked) if asked else _plain_ids(loaded, arm.before or "\n"))
    sides = _sides(loaded, contrast)
    first, ends = _differing(*sides, where=f"contrast {contrast.id!r}")
    if ends == (first + 1, first + 1):  # both can be read off the same logits
        answer_ids = tuple(sides[0][: first + 1])
        yield _Part(item, Sampled(prompt, answer_ids), [first] * 2, [ids[first] for ids in sides], [1.0, -1.0])
        return
    for sign, ids, end in zip((1.0, -1.0), sides, ends, strict=True):
        places = range(first, end)
        yield _Part(item, Sampled(prompt, tuple(ids[:end])), places, ids[first:end], [sign / len(places)] * len(places))


def _log_probs(
    loaded: LoadedModel, arm: Arm, texts: Sequence[Sampled]
) -> Iterator[tuple[int, Float[Tensor, "token vocab"]]]:
    """Log probabilities along each answer, with its index; the shortest text comes first."""
    order = by_length(texts)
    logits = answer_logits(loaded.model, [texts[index] for index in order], arm.edits)
    for index, row in progress(zip(order, logits, strict=True), arm.name, total=len(order)):
        yield index, row.float().log_softmax(-1)


def _differing(one: Sequence[int], other: Sequence[int], *, where: str) -> tuple[int, tuple[int, int]]:
    """Where two rows begin to differ, and where each does so for the last time."""
    shortest = min(len(one), len(other))
    first = next((i for i in range(shortest) if one[i] != other[i]), shortest)
    same = 0
    while same < shortest - first and one[-1 - same] == other[-1 - same]:
        same += 1
    ends = (len(one) - same, len(other) - same)
    if min(ends) <= first:  # one is the other with something put in: let both go on to their ends
        ends = (len(one), len(other))
    if min(ends) <= first:
        raise TextError(f"{where}: one answer is the beginning of the other, or the same; give two that differ")
    return first, ends


def _plain_ids(loaded: LoadedModel, text: str) -> list[int]:
    """A text's tokens, after a BOS where the tokenizer puts one."""
    return list(loaded.tokenizer(text)["input_ids"])
