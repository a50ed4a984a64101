"""A model and contrasts in; a direction at every site, with a card, out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from pilotfish.core import Site
from pilotfish.errors import SettingError, TextError
from pilotfish.models import LoadedModel, num_layers
from pilotfish.runs import progress
from pilotfish.steering.beginning import Beginning, read_beginning
from pilotfish.steering.card import DirectionCard, PairsCard
from pilotfish.steering.direction import Direction
from pilotfish.steering.pairs import TokenPair, Tokens, tokenized
from pilotfish.taps import tapped
from pilotfish.texts import Contrast

Reading = Literal["mean_difference", "pca_center", "logistic"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ExtractConfig:
    """How directions are read off contrasts."""

    method: Reading = "mean_difference"
    """`mean_difference`: the mean over pairs of positive less negative (Rimsky et al., 2023, arXiv 2312.06681), the
    default. `pca_center`: the first principal component of both sides less their pair's middle (repeng), as long as the
    pairs' differences are along it (root mean square). `logistic`: the normal of a logistic regression between the two
    sides, as long as the mean difference is along it (needs the extra `evaluate`)."""
    tokens: Tokens = "last"
    """Which tokens of an answer are read."""
    chat: bool = True
    """Render with the tokenizer's chat template; else prompt and answer one after the other, as a base model reads."""
    batch_tokens: int = 768
    """Tokens of a forward pass. A few hundred keep a CPU busy, and more of them are more padding."""
    penalty: float = 1.0
    """Inverse of scikit-learn's C: how strongly `logistic` is held back. Features are scaled to variance 1 on average
    over hidden units, so that it means the same at every layer."""

    def __post_init__(self) -> None:
        for name, value, kind in (("method", self.method, Reading), ("tokens", self.tokens, Tokens)):
            if value not in get_args(kind):
                raise SettingError(f"{name} {value!r} is unknown; use one of {', '.join(get_args(kind))}")
        if self.batch_tokens < 1 or self.penalty <= 0:
            raise SettingError(
                f"batch_tokens {self.batch_tokens} and penalty {self.penalty} must be at least 1 and above 0"
            )


def extract(
    contrasts: Sequence[Contrast],
    loaded: LoadedModel,
    *,
    name: str,
    sites: Sequence[Site] | None = None,
    config: ExtractConfig | None = None,
) -> dict[Site, Direction]:
    """Reads a direction at every site; the outputs of all blocks by default.

    What all prompts begin with is run once, the rest of each prompt on top of it, and its two answers on top of that.
    Pairs with like prompts make a batch; no row is padded on its left, and what pads it on its right comes after every
    token that is read, so no mask is needed: under causal attention every state is that of the text alone. Memory is
    bounded by one batch; the methods other than `mean_difference` keep the two read states of each pair besides, not
    the activations.

    Raises:
        TextError: there are no contrasts, an answer cannot be read, or a text is longer than the model takes.
        SettingError: the model is in training mode, a site does not exist, or scikit-learn is wanted and missing.
    """
    config = config or ExtractConfig()
    if config.method == "logistic":
        _require_sklearn()
    chosen = tuple(sites) if sites else tuple(Site(i, "resid_post") for i in range(num_layers(loaded.model)))
    pairs = [tokenized(item, loaded.tokenizer, tokens=config.tokens, chat=config.chat) for item in contrasts]
    _check(loaded.model, contrasts, pairs)
    vectors = _fitted(_states(loaded.model, chosen, pairs, config.batch_tokens), len(pairs), config)
    data = PairsCard(
        num_pairs=len(contrasts),
        source="; ".join(dict.fromkeys(item.source for item in contrasts if item.source)),
        license="; ".join(dict.fromkeys(item.license for item in contrasts if item.license)),
        tokens=config.tokens,
    )
    card = DirectionCard(name=name, identity=loaded.identity, method=config.method, data=data)
    return {site: Direction(site=site, vector=vectors[site].float(), card=card) for site in chosen}


def activation_addition(
    positive: str, negative: str, loaded: LoadedModel, *, name: str, site: Site
) -> tuple[Direction, ...]:
    """One direction a position of a prompt: what `positive` has there less what `negative` has (ActAdd).

    The shorter prompt is filled up with spaces. Add the n-th direction at position n of a prompt alone:
    `direction.to_edit(dose, when=When(phase="prompt", positions=(n, n + 1)))`. A BOS token makes the first one 0.

    Source: Turner et al., 2023 (arXiv 2308.10248), algorithm 1; there the site is a block's input, `resid_pre`.

    Raises:
        TextError: a prompt is empty, or no number of spaces makes the two equally long.
    """
    ids = [list(loaded.tokenizer(text)["input_ids"]) for text in (positive, negative)]
    space = loaded.tokenizer(" ", add_special_tokens=False)["input_ids"]
    if not positive or not negative or len(space) != 1:
        raise TextError(
            "activation addition needs two prompts, both with text, and a tokenizer with a token for a space"
        )
    longest = max(map(len, ids))
    states = []
    with torch.no_grad(), tapped(loaded.model, [site]) as taps:
        for row in ids:
            padded = torch.tensor([row + space * (longest - len(row))], device=loaded.model.device)
            loaded.model.base_model(padded, use_cache=False)
            states.append(taps[site][0].float().cpu())
    data = PairsCard(num_pairs=1, source=f"{positive!r} less {negative!r}", tokens="each position")
    card = DirectionCard(name=name, identity=loaded.identity, method="actadd", data=data)
    return tuple(Direction(site=site, vector=vector.clone(), card=card) for vector in states[0] - states[1])


def _check(model: PreTrainedModel, contrasts: Sequence[Contrast], pairs: Sequence[TokenPair]) -> None:
    if model.training:
        raise SettingError("the model is in training mode, where dropout changes its activations; call model.eval()")
    if not contrasts:
        raise TextError("there are no contrasts to read; give at least one, better 50")
    context = model.config.max_position_embeddings
    for contrast, pair in zip(contrasts, pairs, strict=True):
        size = max(len(side.token_ids) for side in pair)
        if size > context:
            raise TextError(
                f"contrast {contrast.id!r} has {size} tokens; this model takes up to {context}: shorten or drop it"
            )


def _batches(pairs: Sequence[TokenPair], begun: int, batch_tokens: int) -> list[list[TokenPair]]:
    """Pairs whose beginnings are about equally long, the shortest first: what both sides of all share is run once a
    pair, and of it what was `begun` not at all.
    """
    batches: list[list[TokenPair]] = []
    shared = longest = 0
    for pair in sorted(pairs, key=lambda pair: pair.num_shared):
        size = max(len(side.token_ids) for side in pair)
        longest = max(longest, size)
        if not batches or (len(batches[-1]) + 1) * (2 * longest - shared - begun) > batch_tokens:
            batches.append([])
            shared, longest = pair.num_shared, size
        batches[-1].append(pair)
    return batches


def _states(
    model: PreTrainedModel, sites: Sequence[Site], pairs: Sequence[TokenPair], batch_tokens: int
) -> Iterator[dict[Site, Float[Tensor, "pair side hidden"]]]:
    beginning = read_beginning(model, [pair.positive.token_ids[: pair.num_shared] for pair in pairs])
    for batch in progress(_batches(pairs, beginning.num_tokens, batch_tokens), "reading pairs"):
        yield _read(model, sites, batch, beginning)


@torch.no_grad()
def _read(
    model: PreTrainedModel, sites: Sequence[Site], batch: Sequence[TokenPair], beginning: Beginning
) -> dict[Site, Float[Tensor, "pair side hidden"]]:
    """The mean of the read tokens of each side, in float32 or wider."""
    begun, shared = beginning.num_tokens, batch[0].num_shared
    cache = beginning.for_rows(len(batch))
    if shared > begun:
        prompts = torch.tensor([pair.positive.token_ids[begun:shared] for pair in batch], device=model.device)
        model.base_model(prompts, past_key_values=cache, use_cache=True)
    cache.batch_repeat_interleave(2)
    rests = [(side.token_ids[shared:], side.start - shared) for pair in batch for side in pair]
    width = max(len(rest) for rest, _ in rests)
    precise = torch.promote_types(model.dtype, torch.float32)
    ids = torch.zeros(len(rests), width, dtype=torch.long)
    weights = torch.zeros(len(rests), width, dtype=precise)
    for row, (rest, start) in enumerate(rests):
        ids[row, : len(rest)] = torch.tensor(rest)
        weights[row, start : len(rest)] = 1 / (len(rest) - start)
    weights = weights.to(model.device)
    with tapped(model, sites) as taps:
        model.base_model(ids.to(model.device), past_key_values=cache, use_cache=True)
        read = {site: torch.einsum("st,sth->sh", weights, value.to(precise)) for site, value in taps.items()}
    return {site: value.reshape(len(batch), 2, -1).cpu() for site, value in read.items()}


def _fitted(
    states: Iterator[dict[Site, Float[Tensor, "pair side hidden"]]], num_pairs: int, config: ExtractConfig
) -> dict[Site, Float[Tensor, " hidden"]]:
    if config.method == "mean_difference":
        return _mean_difference(states, num_pairs)
    kept: dict[Site, list[Tensor]] = {}
    for batch in states:
        for site, values in batch.items():
            kept.setdefault(site, []).append(values)
    together = {site: torch.cat(parts) for site, parts in kept.items()}
    if config.method == "pca_center":
        return {site: _pca_center(values) for site, values in together.items()}
    return {site: _logistic(values, config.penalty) for site, values in together.items()}


def _mean_difference(
    states: Iterator[dict[Site, Float[Tensor, "pair side hidden"]]], num_pairs: int
) -> dict[Site, Float[Tensor, " hidden"]]:
    sums: dict[Site, Tensor] = {}
    for batch in states:
        for site, values in batch.items():
            total = (values[:, 0].double() - values[:, 1].double()).sum(0)
            sums[site] = sums[site] + total if site in sums else total
    return {site: total / num_pairs for site, total in sums.items()}


def _pca_center(states: Float[Tensor, "pair side hidden"]) -> Float[Tensor, " hidden"]:
    """Both sides less their middle are plus and minus half the difference, so the mean is 0 and the component that of
    the differences as they are, their mean not taken out.
    """
    differences = states[:, 0].double() - states[:, 1].double()
    component: Tensor = torch.linalg.eigh(differences.T @ differences).eigenvectors[:, -1]
    along = differences @ component
    balance = along.sign().sum() or along.sum()  # most pairs; where they are even, their mean
    return along.square().mean().sqrt() * balance.sign() * component


def _logistic(states: Float[Tensor, "pair side hidden"], penalty: float) -> Float[Tensor, " hidden"]:
    from sklearn.linear_model import LogisticRegression

    positive, negative = states.double().unbind(1)
    features = torch.cat([positive, negative])
    features = features - features.mean(0)
    scale = features.square().mean().sqrt()
    if not scale:
        return torch.zeros_like(positive[0])
    labels = [1] * len(positive) + [0] * len(negative)
    fitted = LogisticRegression(C=1 / penalty, max_iter=10_000).fit((features / scale).numpy(), labels)
    normal = torch.nn.functional.normalize(torch.from_numpy(fitted.coef_[0]), dim=0)
    return ((positive - negative).mean(0) @ normal).abs() * normal


def _require_sklearn() -> None:
    try:
        import sklearn  # noqa: F401
    except ModuleNotFoundError as error:
        raise SettingError(
            "method 'logistic' needs scikit-learn, which is not installed; run `pip install 'pilotfish[evaluate]'`, or "
            "take 'mean_difference'"
        ) from error
