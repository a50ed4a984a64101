"""A model and prompts in; vectors that change what it does, with what each changes in text, logits and monitors, out.

The whole way in one call: slice, radius, search, groups of vectors that do the same thing, and random vectors of the
same length beside them, without which no reach means anything.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from pilotfish.core import Message, Site
from pilotfish.discovery.dct import exponential, linear, projected, quadratic
from pilotfish.discovery.melbo import MelboConfig, melbo
from pilotfish.discovery.multiplicity import effect_clusters
from pilotfish.discovery.observe import ObserveConfig, Observed, observe
from pilotfish.discovery.radius import Radius, calibrated_radius
from pilotfish.discovery.ranking import logit_scores, unembedding_difference
from pilotfish.discovery.response import random_units, unit
from pilotfish.discovery.slice import Slice
from pilotfish.errors import SettingError, TextError
from pilotfish.heads import HeadBank
from pilotfish.models import LoadedModel, Pair, num_layers
from pilotfish.runs import generator
from pilotfish.texts import encode, render

Explorer = Literal["exponential", "melbo", "quadratic", "linear", "projected"]
Kind = Literal["changed", "broken", "same", "random"]

BROKEN_REPEATS = 0.4
"""Share of repeated stretches from which on an answer counts as broken."""
BROKEN_SURPRISE = 4.0
"""Nats a token from which on an answer counts as word salad."""

DOSES = (0.02, 4.0)
"""Shares of the stream's length between which a radius is looked for."""
NUM_DIRECTIONS = 8
"""Random directions that it is looked for with; 30 move it by a few percent and cost four times as much."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExploreConfig:
    """How it is searched, and how much is looked at."""

    method: Explorer = "exponential"
    num_vectors: int = 32
    """To be found; of `linear`, `projected` and `quadratic` half of them, each with its opposite."""
    source: Site | None = None
    """Where vectors are added; the input of the block at a third of the depth by default."""
    target: Site | None = None
    """Where their change is to be large; the output of the block before the middle by default."""
    radius: float | None = None
    """Length of the vectors; calibrated by default."""
    num_searched: int = 3
    """Prompts that are searched on: the first ones; time grows with them."""
    iterations: int | None = None
    """Rounds or steps of the search; the method's own number by default."""
    last: int | None = 3
    """Tokens at the end of each prompt that are read; None for all."""
    num_random: int = 4
    """Random vectors of the same length, shown beside what was found."""
    similarity: float = 0.8
    """Cosine of effects from which on two vectors do the same thing."""
    num_shown: int = 3
    """Prompts that are answered under every vector: the first ones."""
    shares: tuple[float, ...] = (1.0, 0.5, 0.25)
    """Shares of the radius to look at, falling: a vector under which answers break is looked at again with the next."""
    towards: tuple[str, ...] = ()
    """Texts whose first token is to become likelier: each finding then has a logit score."""
    away: tuple[str, ...] = ()
    """And whose is to become less likely."""
    observing: ObserveConfig = field(default_factory=ObserveConfig)
    seed: int = 0

    def __post_init__(self) -> None:
        if self.method not in get_args(Explorer):
            raise SettingError(f"method {self.method!r} is unknown; use one of {', '.join(get_args(Explorer))}")
        if min(self.num_vectors, self.num_random, self.num_shown, self.num_searched) < 1:
            raise SettingError(
                f"num_vectors {self.num_vectors}, num_random {self.num_random}, num_shown {self.num_shown} and "
                f"num_searched {self.num_searched} must be at least 1"
            )
        if not self.shares or any(not 0 < share <= 1 for share in self.shares):
            raise SettingError(f"shares {self.shares} must be one or more numbers in (0, 1]")
        if bool(self.towards) != bool(self.away):
            raise SettingError("a logit score is of some tokens over others; give both `towards` and `away`")


class Finding(NamedTuple):
    """One vector and what it does."""

    id: str
    kind: Kind
    """By its answers: `changed` and readable, `broken` (repeats itself or is word salad), `same` as the plain model's;
    or that it is a `random` vector, for comparison.
    """
    share: float
    """Share of the radius at which it was looked at: the largest one that leaves answers readable, else the smallest.
    """
    reach: float
    """Length of the change at the target, at the whole radius, over that of random vectors."""
    group: int
    """Vectors of one group do the same thing at the target; the largest group is 0."""
    is_first: bool
    """Whether it reaches furthest of its group."""
    center: float
    """Mean projection of the plain model's target states on the effect, in units of the stream."""
    length: float
    """Length of the change at the target."""
    num_flagged: int
    """Prompts that a monitor of the effect would flag as they are (`promote.monitor`, at one half)."""
    logit: float | None
    """Change of the asked logit difference where the answer begins; None where none was asked for."""
    observed: Observed


class Exploration(NamedTuple):
    """All that was found, the most promising first."""

    source: Site
    target: Site
    radius: Radius
    prompts: tuple[str, ...]
    plain: Observed
    """The model as it is, on the first prompts."""
    findings: tuple[Finding, ...]
    vectors: Float[Tensor, "finding hidden"]
    """Unit vectors at the source, in the order of the findings."""
    effects: Float[Tensor, "finding hidden"]
    """Unit vectors at the target: the way in which each moves it."""


def explore(
    loaded: LoadedModel, prompts: Sequence[str], config: ExploreConfig, *, banks: Sequence[HeadBank] = ()
) -> Exploration:
    """Finds vectors on the first prompts, and looks at each on the first few of these.

    Args:
        banks: Monitors whose reading of the steered answers is wanted; of this model.

    Raises:
        TextError: there are no prompts.
        SettingError: the sites do not fit, or more vectors are asked for than there is room for.
        BankMismatch: a bank is of another model.
    """
    if not prompts:
        raise TextError("there are no prompts; give at least one, such as the model will be asked")
    for bank in banks:
        bank.check(loaded.identity)
    ids = [prompt_ids(loaded, prompt) for prompt in prompts[: config.num_searched]]
    source, target = sites_of(loaded, config)
    response = Slice(loaded.model, source, target, ids, last=config.last)
    radius = _radius(response, config)
    found = searched(response, config, radius.value)
    drawn = random_units(response, config.num_random, generator=generator(config.seed, "random vectors"))
    vectors = torch.cat([found, drawn])
    change = response.change(radius.value * vectors)
    shown = ids[: config.num_shown]
    eos_ids = Pair(loaded.model, None, loaded.tokenizer, loaded.identity, None).eos_ids

    def look(lengths: Tensor) -> list[Observed]:
        return observe(loaded.model, source, lengths, shown, eos_ids=eos_ids, banks=banks, config=config.observing)

    (plain,) = look(torch.zeros_like(vectors[:1]))
    observed, shares = _readable(look, radius.value * vectors, plain, config.shares)
    logits = _logits(loaded, ids, config, source, radius.value * torch.tensor(shares)[:, None] * vectors)
    findings = _findings(config, response, change, plain, list(zip(observed, shares, logits, strict=True)))
    order = sorted(range(len(findings)), key=lambda i: _promise(findings[i]))
    return Exploration(
        source=source,
        target=target,
        radius=radius,
        prompts=tuple(prompts[: config.num_searched]),
        plain=plain,
        findings=tuple(findings[i] for i in order),
        vectors=vectors[order],
        effects=unit(change)[order],
    )


def _readable(
    look: Callable[[Tensor], list[Observed]], vectors: Tensor, plain: Observed, shares: Sequence[float]
) -> tuple[list[Observed], list[float]]:
    """What each vector does at the largest share of its length that leaves answers readable."""
    observed, chosen = look(shares[0] * vectors), [shares[0]] * len(vectors)
    for share in shares[1:]:
        broken = [i for i, one in enumerate(observed) if kind_of(plain, one) == "broken"]
        if not broken:
            break
        for i, one in zip(broken, look(share * vectors[broken]), strict=True):
            observed[i], chosen[i] = one, share
    return observed, chosen


def searched(response: Slice, config: ExploreConfig, radius: float) -> Float[Tensor, "vector hidden"]:
    """Unit vectors that the method finds; opposites included where it cannot tell them apart."""
    count, stream = config.num_vectors, generator(config.seed, config.method)
    half = max(1, (count + 1) // 2)
    match config.method:
        case "melbo":
            steps = config.iterations or 60
            settings = MelboConfig(num_vectors=count, radius=radius, steps=steps, learning_rate=5e-3)
            return unit(melbo(response, settings, generator=stream).vectors)
        case "exponential":
            rounds = config.iterations or 10
            # The start matters little (docs/discovery.md), so it costs two passes a vector, not one a dimension.
            start = linear(response, count, generator=stream, krylov_depth=1).inputs
            return exponential(response, count, generator=stream, radius=radius, iterations=rounds, start=start).inputs
        case "quadratic":
            rounds = config.iterations or 10
            one_way = quadratic(response, half, generator=stream, radius=radius, iterations=rounds).inputs
        case "linear":
            one_way = linear(response, half, generator=stream, radius=radius, krylov_depth=4).inputs
        case "projected":
            one_way = projected(response, half, generator=stream, radius=radius, num_projections=max(32, half)).inputs
    return torch.cat([one_way, -one_way])[:count]


def sites_of(loaded: LoadedModel, config: ExploreConfig) -> tuple[Site, Site]:
    """Source and target: those asked for, else from a third of the depth to its middle."""
    depth = num_layers(loaded.model)
    source = config.source or Site(depth // 3, "resid_pre")
    return source, config.target or Site(max(source.layer, depth // 2 - 1), "resid_post")


def prompt_ids(loaded: LoadedModel, prompt: str) -> list[int]:
    """A question as the model reads it, up to where its answer begins."""
    rendered = render([Message("user", prompt)], loaded.tokenizer, add_generation_prompt=True)
    return encode(rendered, loaded.tokenizer).token_ids


def _radius(response: Slice, config: ExploreConfig) -> Radius:
    length = float(response.source_norms().median())
    if config.radius is None:
        bracket = (DOSES[0] * length, DOSES[1] * length)
        stream = generator(config.seed, "radius")
        return calibrated_radius(response, generator=stream, num_directions=NUM_DIRECTIONS, bracket=bracket)
    if not config.radius > 0:
        raise SettingError(f"radius {config.radius} is not positive; leave it out to have one calibrated")
    return Radius(config.radius, None, config.radius / length, ())


def _logits(
    loaded: LoadedModel, ids: Sequence[Sequence[int]], config: ExploreConfig, source: Site, vectors: Tensor
) -> list[float | None]:
    if not config.towards:
        return [None] * len(vectors)
    wanted, unwanted = ([_first_token(loaded, text) for text in texts] for texts in (config.towards, config.away))
    to_final = Slice(loaded.model, source, Site(-1, "final"), ids, last=1)
    direction = unembedding_difference(loaded.model, wanted, unwanted)
    return list(logit_scores(to_final, vectors, direction).tolist())


def _first_token(loaded: LoadedModel, text: str) -> int:
    tokens: list[int] = loaded.tokenizer(text, add_special_tokens=False)["input_ids"]
    if not tokens:
        raise SettingError(f"the text {text!r} has no tokens; give the beginning of an answer")
    return tokens[0]


def _findings(
    config: ExploreConfig,
    response: Slice,
    change: Tensor,
    plain: Observed,
    seen: Sequence[tuple[Observed, float, float | None]],
) -> list[Finding]:
    lengths, along = change.norm(dim=-1), unit(change)
    quiet = response.states(torch.zeros(1, response.num_inputs, dtype=response.dtype, device=response.device))[0]
    projections = quiet @ along.T
    flagged = projections >= projections.mean(0) + lengths / 2
    prompts = torch.stack([flagged[response.prompt_index == i].any(0) for i in range(response.num_prompts)])
    groups = {i: at for at, group in enumerate(effect_clusters(change, similarity=config.similarity)) for i in group}
    chance = float(lengths[config.num_vectors :].mean())
    furthest: dict[int, int] = {}
    for i in range(len(change)):
        best = furthest.setdefault(groups[i], i)
        furthest[groups[i]] = i if lengths[i] > lengths[best] else best
    return [
        Finding(
            id=f"v{i}" if i < config.num_vectors else f"random{i - config.num_vectors}",
            kind=kind_of(plain, one) if i < config.num_vectors else "random",
            share=share,
            reach=float(lengths[i]) / chance,
            group=groups[i],
            is_first=furthest[groups[i]] == i,
            center=float(projections[:, i].mean()),
            length=float(lengths[i]),
            num_flagged=int(prompts[:, i].sum()),
            logit=logit,
            observed=one,
        )
        for i, (one, share, logit) in enumerate(seen)
    ]


def kind_of(plain: Observed, steered: Observed) -> Kind:
    """What its answers look like beside the plain model's."""
    if steered.answers == plain.answers:
        return "same"
    is_broken = steered.repeats >= max(BROKEN_REPEATS, 2 * plain.repeats) or steered.surprise >= BROKEN_SURPRISE
    return "broken" if is_broken else "changed"


def _promise(finding: Finding) -> tuple[int, bool, float]:
    """Readable changes first, one of each group before its likes, then by how far the words move."""
    order = ("changed", "broken", "same", "random")
    return order.index(finding.kind), not finding.is_first, -finding.observed.kl
