"""Recorded activations and labels in, one trained head out."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from pilotfish.core import Site
from pilotfish.errors import SettingError, TextError
from pilotfish.heads.examples import Batch, Example, Rows, Source, features_of
from pilotfish.heads.form import Form
from pilotfish.heads.head import Head
from pilotfish.heads.loss import contrast_loss, response_loss, segment_variance, span_loss, token_loss
from pilotfish.heads.readout import Readout
from pilotfish.runs import progress

Quality = Callable[[Float[Tensor, " item"], Float[Tensor, " item"]], float]
"""Scores and labels of validation tokens, or responses, to how good they are; larger is better (`scores.auroc`)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FitConfig:
    form: Form = field(default_factory=Form)
    epochs: int = 9
    """Passes over the data at most; the learning rate falls linearly to 0 over them."""
    patience: int = 3
    """Passes without a better validation quality after which to stop."""
    learning_rate: float = 1e-4
    """Of AdamW, on standardised features."""
    weight_decays: tuple[float, ...] = (10.0, 100.0, 1000.0)
    """Candidates that are trained side by side; validation chooses. Few documents ask for the largest."""
    batch_tokens: int = 2048
    """Tokens a step, whole rows."""
    is_balanced: bool = True
    """Whether positive tokens, and positive responses, weigh as much as negative ones in total."""
    contrast: float = 1.0
    """Weight of the loss on pairs of twins."""
    temperature: float = 1.0
    """Of the softmax over a response's tokens; smaller looks at the highest alone."""
    top_k: int | None = None
    """Mean of so many highest running logits instead of the softmax."""
    segment_variance: float = 0.0
    """Weight of the variance of negative responses' running logits; 0.01 is published."""
    span_max: float = 0.0
    """Share of the token loss that goes to the highest token of each span, in [0, 1]."""

    def __post_init__(self) -> None:
        for name in ("epochs", "patience", "batch_tokens"):
            if getattr(self, name) < 1:
                raise SettingError(f"{name} is {getattr(self, name)}; give 1 or more")
        for name in ("learning_rate", "temperature"):
            if not 0.0 < getattr(self, name) < math.inf:
                raise SettingError(f"{name} {getattr(self, name)} is not a positive number; see the defaults")
        if not self.weight_decays or any(not 0.0 <= decay * self.learning_rate < 1.0 for decay in self.weight_decays):
            raise SettingError(
                f"weight decays {self.weight_decays} do not go with learning rate {self.learning_rate}; give one or "
                "more, each 0 or more and less than 1 / learning rate"
            )
        if self.top_k is not None and self.top_k < 1:
            raise SettingError(f"top_k {self.top_k} is too small; give 1 or more tokens, or none for the softmax")
        if self.contrast < 0 or self.segment_variance < 0 or not 0.0 <= self.span_max <= 1.0:
            raise SettingError("contrast and segment_variance are weights of 0 or more, span_max a share in [0, 1]")


class Epoch(NamedTuple):
    loss: float
    """Mean training loss of a candidate."""
    token: tuple[float, ...]
    """Quality on validation tokens, one a candidate; NaN without labels."""
    response: tuple[float, ...]


class Chosen(NamedTuple):
    """Where the best validation quality of a part of the head was reached."""

    quality: float
    epoch: int
    """0-based."""
    weight_decay: float


class FitResult(NamedTuple):
    weight: Float[Tensor, "channel feature"]
    """For features as they are: the standardisation is folded in."""
    bias: Float[Tensor, " channel"]
    outputs: Float[Tensor, " output"]
    form: Form
    chosen: Mapping[str, Chosen]
    """Of `token` and `response` where the form trains them apart, else of `both`."""
    history: tuple[Epoch, ...]

    @property
    def quality(self) -> float:
        """On validation, to compare forms by: the mean over tokens and responses, where both are labelled."""
        return sum(part.quality for part in self.chosen.values()) / len(self.chosen)

    def head(self, metric: str, sites: tuple[Site, ...]) -> Head:
        return Head(metric, sites, self.weight, self.bias, self.form, self.outputs)


def fit(
    train: Source,
    validation: Source,
    examples: Mapping[str, Example],
    *,
    config: FitConfig,
    quality: Quality,
    generator: torch.Generator,
) -> FitResult:
    """Trains a head with AdamW on token and response labels, and keeps what was best on the validation rows.

    A linear head with two channels trains the first on tokens and the second on responses, and chooses each by its own
    validation quality; other forms train all on both and choose by the mean. Memory is bounded by a batch, whatever
    the number of rows. The same generator state gives the same result.

    Raises:
        TextError: the training or validation rows lack positive or negative labels of a kind that the form needs.
        SettingError: labels are missing for a row, or do not have its length.
        ArtefactError: activations that are not finite.
    """
    form = config.form
    weights = label_weights(train, validation, examples, config)
    rows = Rows(train, examples, batch_tokens=config.batch_tokens, window=form.window)
    readout = Readout(form, *rows.standardiser(), len(config.weight_decays), generator=generator)
    optimizer = torch.optim.Adam(readout.parameters())
    apart = form.kind == "linear" and not form.shares
    history: list[Epoch] = []
    best: dict[str, tuple[Chosen, list[Tensor]]] = {}
    for epoch in progress(range(config.epochs), "fitting"):
        learning_rate = config.learning_rate * (1 - epoch / config.epochs)
        loss = _train(readout, optimizer, rows.batches(generator), config, learning_rate, weights)
        history.append(Epoch(loss, *_qualities(readout, validation, examples, quality)))
        for part, values in _parts(history[-1], apart=apart).items():
            top = max(values)
            if part not in best or top >= best[part][0].quality:  # of equals the later: its margins are wider
                at = values.index(top)
                best[part] = Chosen(top, epoch, config.weight_decays[at]), readout.folded(at)
        if all(epoch - found.epoch >= config.patience for found, _ in best.values()):
            break
    weight, bias, outputs = best["response" if apart else "both"][1]
    if apart:  # channel 0 of the candidate that is best on tokens, channel 1 of the one that is best on responses
        token_weight, token_bias, _ = best["token"][1]
        weight, bias = torch.cat([token_weight[:1], weight[1:]]), torch.cat([token_bias[:1], bias[1:]])
    chosen = {part: found for part, (found, _) in best.items()}
    return FitResult(weight, bias, outputs, form, chosen, tuple(history))


class LabelWeights(NamedTuple):
    """Of a positive token and a positive response against a negative one; None where there are no labels of a kind."""

    token: float | None
    response: float | None


def label_weights(
    train: Source, validation: Source, examples: Mapping[str, Example], config: FitConfig
) -> LabelWeights:
    """How much more a positive counts; refuses rows that the form cannot be trained on."""
    sides = [_shares(source, examples, what) for what, source in (("training", train), ("validation", validation))]
    usable = [all(0.0 < share < 1.0 for share in kind) for kind in zip(*sides, strict=True)]
    needs_both = config.form.kind == "linear" and not config.form.shares
    if not any(usable) or (needs_both and not all(usable)):
        (train_tokens, train_responses), (tokens, responses) = sides
        raise TextError(
            f"the share of positives is {train_tokens:g} of the training tokens and {train_responses:g} of their "
            f"responses, {tokens:g} and {responses:g} on validation; a head needs positive and negative ones on both "
            "sides. Give more documents, or a form of one channel (width 1) where only one kind is labelled"
        )
    token, response = (
        ((1 - share) / share if config.is_balanced else 1.0) if known else None
        for share, known in zip(sides[0], usable, strict=True)
    )
    return LabelWeights(token, response)


def _shares(source: Source, examples: Mapping[str, Example], what: str) -> tuple[float, float]:
    """Of positives among labelled tokens and among labelled responses; 0 where there are none."""
    missing = [row_id for row_id in source.row_ids if row_id not in examples]
    if missing:
        raise SettingError(
            f"{len(missing)} {what} rows have no labels, the first is {missing[0]!r}; give NaN for unlabelled"
        )
    rows = [examples[row_id] for row_id in source.row_ids]
    kinds = torch.cat([row.labels for row in rows]), torch.tensor([row.label for row in rows])
    tokens, responses = (float(labels.double().nanmean().nan_to_num()) for labels in kinds)
    return tokens, responses


def _parts(epoch: Epoch, *, apart: bool) -> dict[str, list[float]]:
    if apart:
        return {"token": list(epoch.token), "response": list(epoch.response)}
    known = [values for values in (epoch.token, epoch.response) if not math.isnan(values[0])]
    return {"both": [sum(values) / len(known) for values in zip(*known, strict=True)]}


def _train(
    readout: Readout,
    optimizer: torch.optim.Optimizer,
    batches: Iterator[Batch],
    config: FitConfig,
    learning_rate: float,
    weights: LabelWeights,
) -> float:
    """One pass. The decay of AdamW is taken by hand, since every candidate has its own."""
    optimizer.param_groups[0]["lr"] = learning_rate
    keep = 1 - learning_rate * torch.tensor(config.weight_decays)[:, None, None]
    total, num_rows = 0.0, 0
    for batch in batches:
        loss = head_loss(readout, batch, config, weights).sum()  # a sum over candidates keeps them independent
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        with torch.no_grad():
            readout.weight.mul_(keep)
        optimizer.step()
        total += float(loss.detach()) / len(config.weight_decays) * len(batch.rows)
        num_rows += len(batch.rows)
    return total / num_rows


def head_loss(readout: Readout, batch: Batch, config: FitConfig, weights: LabelWeights) -> Float[Tensor, " candidate"]:
    """Of each candidate: the mean over labelled tokens, that over labelled responses, and that over pairs of twins."""
    channels = readout(batch.features)
    loss: Tensor = channels.new_zeros(channels.shape[1])
    if weights.token is not None:
        labels = torch.cat([row.labels for row in batch.rows])
        known = labels.isfinite()
        if bool(known.any()):
            logits, labels = readout.form.tokens(channels, readout.outputs)[known], labels[known]
            loss = loss + (1 - config.span_max) * token_loss(logits, labels, weights.token)
            if config.span_max:
                loss = loss + config.span_max * span_loss(logits, labels)
    if weights.response is not None:
        loss = loss + _response_losses(readout, channels, batch, config, weights.response)
    return loss


def _response_losses(
    readout: Readout,
    channels: Float[Tensor, "token candidate channel"],
    batch: Batch,
    config: FitConfig,
    positive_weight: float,
) -> Float[Tensor, " candidate"]:
    """Means over the responses of a batch, and over its pairs of twins."""
    losses, contrasts = [], []
    by_twin: dict[str, tuple[list[Tensor], list[Tensor]]] = {}
    for row, part in zip(batch.rows, batch.split(channels), strict=True):
        if math.isnan(row.label):
            continue
        running = readout.form.running(part[row.boundary :], readout.outputs)[row.in_response[row.boundary :]]
        own = response_loss(running, row.label, temperature=config.temperature, top_k=config.top_k)
        if row.label < 0.5 and config.segment_variance:
            own = own + config.segment_variance * segment_variance(running)
        losses.append(own * (1 + row.label * (positive_weight - 1)))
        if row.twin:
            by_twin.setdefault(row.twin, ([], []))[row.label < 0.5].append(running)
    for positives, negatives in by_twin.values():
        contrasts += [contrast_loss(*pair) for pair in itertools.product(positives, negatives)]
    total = channels.new_zeros(channels.shape[1])
    if losses:
        total = total + torch.stack(losses).mean(0)
    if contrasts and config.contrast:
        total = total + config.contrast * torch.stack(contrasts).mean(0)
    return total


@torch.inference_mode()
def _qualities(
    readout: Readout, source: Source, examples: Mapping[str, Example], quality: Quality
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Of every candidate on tokens and on responses, which score what their highest token scores.

    Where there are twins, half of the latter is the share of pairs that are told apart.
    """
    tokens, token_labels, responses = [], [], []
    for row_id in source.row_ids:
        example = examples[row_id]
        channels = readout(features_of(source, row_id, example).float())
        known = example.labels.isfinite()
        tokens.append(readout.form.tokens(channels, readout.outputs)[known])
        token_labels.append(example.labels[known])
        if not math.isnan(example.label):
            running = readout.form.running(channels[example.boundary :], readout.outputs)
            chosen = slice(None) if example.in_response is None else example.in_response[example.boundary :]
            responses.append(running[chosen].amax(0))
    labelled = [examples[row_id] for row_id in source.row_ids if not math.isnan(examples[row_id].label)]
    return (
        _each(quality, torch.cat(tokens), torch.cat(token_labels)),
        _with_pairs(quality, torch.stack(responses), labelled) if responses else (math.nan,) * tokens[0].shape[1],
    )


def _each(
    quality: Quality, scores: Float[Tensor, "item candidate"], labels: Float[Tensor, " item"]
) -> tuple[float, ...]:
    return tuple(quality(column, labels.float()) for column in scores.unbind(1))


def _with_pairs(
    quality: Quality, scores: Float[Tensor, "response candidate"], examples: Sequence[Example]
) -> tuple[float, ...]:
    alone = _each(quality, scores, torch.tensor([example.label for example in examples]))
    twins: dict[str, tuple[list[int], list[int]]] = {}
    for index, example in enumerate(examples):
        if example.twin:
            twins.setdefault(example.twin, ([], []))[example.label < 0.5].append(index)
    pairs = [pair for sides in twins.values() for pair in itertools.product(*sides)]
    if not pairs:
        return alone
    positive, negative = (scores[[pair[side] for pair in pairs]] for side in (0, 1))
    told_apart = ((positive > negative).double() + 0.5 * (positive == negative).double()).mean(0).tolist()
    return tuple((a + b) / 2 for a, b in zip(alone, told_apart, strict=True))
