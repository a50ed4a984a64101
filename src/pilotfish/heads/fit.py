"""Recorded activations and token labels in, one trained linear readout out."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from pilotfish.core import Site
from pilotfish.errors import ArtefactError, SettingError, TextError
from pilotfish.heads.linear import LinearHead, LinearReadout
from pilotfish.runs import progress

Labels = Mapping[str, Float[Tensor, " _"]]
"""Row to a label in [0, 1] a token, NaN where a token is unlabelled; such tokens are never read."""

Quality = Callable[[Float[Tensor, " token"], Float[Tensor, " token"]], float]
"""Logits and labels of validation tokens to how good they are; larger is better. `scores.auroc` is one."""


@runtime_checkable
class Source(Protocol):
    """Activations row by row; a `Recording` is one."""

    row_ids: tuple[str, ...]

    def features(self, row_id: str) -> Float[Tensor, "token feature"]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class FitConfig:
    epochs: int = 20
    """Passes over the data at most; the learning rate falls linearly to 0 over them."""
    patience: int = 4
    """Passes without a better validation quality after which to stop."""
    learning_rate: float = 1e-4
    """Of AdamW, on standardised features."""
    weight_decays: tuple[float, ...] = (10.0, 100.0, 1000.0, 5000.0)
    """Candidates that are trained side by side; validation chooses. Few documents ask for the largest."""
    batch_tokens: int = 2048
    """Tokens a step."""
    buffer_tokens: int = 16384
    """Tokens of random rows that are held in memory at once and shuffled."""
    tokens_per_row: int | None = None
    """Labelled tokens drawn anew from each row in each pass; None takes all."""
    is_balanced: bool = True
    """Whether positive tokens weigh as much as negative ones in total."""

    def __post_init__(self) -> None:
        counts = {"epochs": self.epochs, "patience": self.patience, "batch_tokens": self.batch_tokens}
        counts |= {"buffer_tokens": self.buffer_tokens, "tokens_per_row": self.tokens_per_row or 1}
        for name, value in counts.items():
            if value < 1:
                raise SettingError(f"{name} is {value}; give 1 or more")
        if not 0.0 < self.learning_rate < math.inf:
            raise SettingError(f"learning rate {self.learning_rate} is not a positive number; 1e-4 suits most models")
        if not self.weight_decays or any(not 0.0 <= decay * self.learning_rate < 1.0 for decay in self.weight_decays):
            raise SettingError(
                f"weight decays {self.weight_decays} do not go with learning rate {self.learning_rate}; give one or "
                "more, each 0 or more and less than 1 / learning rate"
            )


class Epoch(NamedTuple):
    loss: float
    """Mean training loss of a candidate."""
    qualities: tuple[float, ...]
    """On validation tokens, one a candidate."""


class FitResult(NamedTuple):
    weight: Float[Tensor, " feature"]
    """For features as they are: the standardisation is folded in."""
    bias: float
    quality: float
    """Best on validation."""
    epoch: int
    """0-based pass after which it was reached."""
    weight_decay: float
    """Of the candidate chosen."""
    history: tuple[Epoch, ...]

    def head(self, metric: str, sites: tuple[Site, ...]) -> LinearHead:
        return LinearHead(metric, sites, self.weight, self.bias)


class _Batch(NamedTuple):
    features: Float[Tensor, "token feature"]
    """Float32; holds until the next batch is taken."""
    labels: Float[Tensor, " token"]


def fit(
    train: Source,
    validation: Source,
    labels: Labels,
    *,
    config: FitConfig,
    quality: Quality,
    generator: torch.Generator,
) -> FitResult:
    """Trains logistic regression on labelled tokens with AdamW, and keeps what was best on the validation rows.

    Memory is bounded by `buffer_tokens`, whatever the number of rows. The same generator state gives the same result.

    Raises:
        TextError: the training or validation tokens lack positive or negative labels.
        SettingError: labels are missing for a row, or do not have its length.
        ArtefactError: activations that are not finite.
    """
    share = _share_of_positives(train, labels, "training")
    _share_of_positives(validation, labels, "validation")
    tokens = _Tokens(train, labels, config, generator)
    readout = LinearReadout(*_standardiser(tokens.batches()), len(config.weight_decays))
    optimizer = torch.optim.Adam(readout.parameters())
    positive_weight = (1.0 - share) / share if config.is_balanced else 1.0
    history: list[Epoch] = []
    best: FitResult | None = None
    for epoch in progress(range(config.epochs), "fitting"):
        learning_rate = config.learning_rate * (1 - epoch / config.epochs)
        loss = _train(readout, optimizer, tokens.batches(), config.weight_decays, learning_rate, positive_weight)
        history.append(Epoch(loss, _qualities(readout, validation, labels, quality)))
        top = max(history[-1].qualities)
        if best is None or top > best.quality:
            chosen = history[-1].qualities.index(top)
            best = FitResult(*readout.folded(chosen), top, epoch, config.weight_decays[chosen], ())
        if epoch - best.epoch >= config.patience:
            break
    assert best is not None
    return best._replace(history=tuple(history))


def _train(
    readout: LinearReadout,
    optimizer: torch.optim.Optimizer,
    batches: Iterator[_Batch],
    weight_decays: tuple[float, ...],
    learning_rate: float,
    positive_weight: float,
) -> float:
    """One pass. The decay of AdamW is taken by hand, since every candidate has its own."""
    optimizer.param_groups[0]["lr"] = learning_rate
    keep = 1 - learning_rate * torch.tensor(weight_decays)[:, None]
    total, num_tokens = 0.0, 0
    for features, targets in batches:
        logits = readout(features)
        weights = 1 + targets * (positive_weight - 1)
        wide = targets[:, None].expand_as(logits)
        losses = nn.functional.binary_cross_entropy_with_logits(logits, wide, reduction="none")
        loss = (losses * weights[:, None]).mean(0).sum()  # a sum over candidates keeps them independent
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        with torch.no_grad():
            readout.weight.mul_(keep)
        optimizer.step()
        total += float(loss.detach()) / len(weight_decays) * len(targets)
        num_tokens += len(targets)
    return total / num_tokens


class _Tokens:
    """The labelled tokens of a source in shuffled batches.

    They go through buffers that are allocated once: fresh memory for every batch would cost more than the arithmetic.
    """

    def __init__(self, source: Source, labels: Labels, config: FitConfig, generator: torch.Generator) -> None:
        self._source, self._labels, self._config, self._generator = source, labels, config, generator
        like = source.features(source.row_ids[0])
        self._held = like.new_empty(config.buffer_tokens, like.shape[1])
        self._held_labels = torch.empty(config.buffer_tokens)
        self._chosen = like.new_empty(config.batch_tokens, like.shape[1])
        self._wide = torch.empty(config.batch_tokens, like.shape[1])

    def batches(self) -> Iterator[_Batch]:
        """Every row once in random order; the tokens of a buffer full of rows are shuffled together."""
        num_held = 0
        for index in torch.randperm(len(self._source.row_ids), generator=self._generator).tolist():
            row_id = self._source.row_ids[index]
            tokens = self._tokens_of(row_id)
            features = _features(self._source, row_id, self._labels) if len(tokens) else self._held
            for part in tokens.split(len(self._held)):  # type: ignore[no-untyped-call]  # a longer row goes in parts
                if num_held + len(part) > len(self._held):
                    yield from self._shuffled(num_held)
                    num_held = 0
                end = num_held + len(part)
                torch.index_select(features, 0, part, out=self._held[num_held:end])
                self._held_labels[num_held:end] = self._labels[row_id][part]
                num_held = end
        yield from self._shuffled(num_held)

    def _tokens_of(self, row_id: str) -> Int[Tensor, " chosen"]:
        tokens, limit = _labelled(self._labels[row_id]), self._config.tokens_per_row
        if limit is None or len(tokens) <= limit:
            return tokens
        return tokens[torch.randperm(len(tokens), generator=self._generator)[:limit]]

    def _shuffled(self, num_held: int) -> Iterator[_Batch]:
        order = torch.randperm(num_held, generator=self._generator)
        for part in order.split(self._config.batch_tokens):  # type: ignore[no-untyped-call]
            torch.index_select(self._held, 0, part, out=self._chosen[: len(part)])
            yield _Batch(self._wide[: len(part)].copy_(self._chosen[: len(part)]), self._held_labels[part])


def _standardiser(batches: Iterator[_Batch]) -> tuple[Float[Tensor, " feature"], Float[Tensor, " feature"]]:
    """Mean and inverse standard deviation of the training tokens; 0 for a constant feature, so nothing reads it."""
    count, total, squares, shift = 0, torch.zeros(()), torch.zeros(()), torch.zeros(())
    for features, _ in batches:
        if not count:
            shift = features.mean(0)  # so that the squares of a large mean do not drown the variance
        count += len(features)
        total = total + features.sub_(shift).sum(0).double()
        squares = squares + features.square_().sum(0).double()
    offset = total / count
    mean, std = shift + offset, (squares / count - offset.square()).clamp_min(0).sqrt()
    if not bool(torch.isfinite(std).all()):
        raise ArtefactError("the recorded activations are not finite; record them again, in bfloat16 or float32")
    varies = std > 1e-6 * mean.abs() + 1e-12
    return mean.float(), torch.where(varies, 1 / std, 0.0).float()


@torch.inference_mode()
def _qualities(readout: LinearReadout, source: Source, labels: Labels, quality: Quality) -> tuple[float, ...]:
    logits, targets = [], []
    for row_id in source.row_ids:
        tokens = _labelled(labels[row_id])
        if len(tokens):
            logits.append(readout(_features(source, row_id, labels)[tokens].float()))
            targets.append(labels[row_id][tokens])
    columns, target = torch.cat(logits), torch.cat(targets).float()
    return tuple(quality(column, target) for column in columns.unbind(1))


def _labelled(labels: Float[Tensor, " token"]) -> Int[Tensor, " labelled"]:
    return labels.isfinite().nonzero()[:, 0]


def _features(source: Source, row_id: str, labels: Labels) -> Float[Tensor, "token feature"]:
    features = source.features(row_id)
    if len(features) != len(labels[row_id]):
        raise SettingError(
            f"row {row_id!r} has {len(features)} recorded tokens but {len(labels[row_id])} labels; give the labels of "
            "the text that was recorded"
        )
    return features


def _share_of_positives(source: Source, labels: Labels, what: str) -> float:
    missing = [row_id for row_id in source.row_ids if row_id not in labels]
    if missing:
        raise SettingError(
            f"{len(missing)} {what} rows have no labels, the first is {missing[0]!r}; give NaN for unlabelled"
        )
    known = torch.cat([labels[row_id][_labelled(labels[row_id])] for row_id in source.row_ids])
    share = float(known.double().mean()) if len(known) else 0.0
    if not 0.0 < share < 1.0:
        raise TextError(
            f"the {what} rows have {len(known)} labelled tokens and a share of positives of {share:g}; a head needs "
            "positive and negative tokens on both sides: give more documents"
        )
    return share
