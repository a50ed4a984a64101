"""Recorded rows and their labels in, batches of whole rows out."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from pilotfish.errors import ArtefactError, SettingError


class Example(NamedTuple):
    """What is known of one recorded row."""

    labels: Float[Tensor, " _"]
    """A label in [0, 1] a token, NaN where unlabelled."""
    label: float = math.nan
    """Of the whole response; NaN when it has none."""
    in_response: Bool[Tensor, " _"] | None = None
    """The tokens that belong to the response; all when None."""
    twin: str = ""
    """Responses of one twin name and opposite labels are held against each other: two answers to one prompt."""
    boundary: int = 0
    """Where the answer begins: what runs over a response does not look back over it."""


@runtime_checkable
class Source(Protocol):
    """Activations row by row; a `Recording` is one."""

    @property
    def row_ids(self) -> tuple[str, ...]: ...

    def features(self, row_id: str) -> Float[Tensor, "token feature"]: ...


class Row(NamedTuple):
    """The tokens of a row that training reads, and the few before them that a window looks back on."""

    features: Float[Tensor, "token feature"]
    labels: Float[Tensor, " token"]
    in_response: Bool[Tensor, " token"]
    boundary: int
    label: float
    twin: str


class Batch(NamedTuple):
    features: Float[Tensor, "token feature"]
    """Float32 of all rows; holds until the next batch is taken."""
    rows: list[Row]

    def split(self, values: Float[Tensor, "token ..."]) -> Sequence[Float[Tensor, "_ ..."]]:
        parts: Sequence[Tensor] = torch.split(values, [len(row.labels) for row in self.rows])
        return parts


class Rows:
    """The rows of a source in shuffled batches, twins together."""

    def __init__(self, source: Source, examples: Mapping[str, Example], *, batch_tokens: int, window: int) -> None:
        self._source, self._examples = source, examples
        self._batch_tokens, self._window = batch_tokens, window
        units = defaultdict(list)
        for row_id in source.row_ids:
            units[examples[row_id].twin or f"row {row_id}"].append(row_id)
        self._units = list(units.values())
        self._wide = torch.empty(0, source.features(source.row_ids[0]).shape[1])

    def batches(self, generator: torch.Generator | None = None) -> Iterator[Batch]:
        """All rows once, in random order if a generator is given."""
        count = len(self._units)
        order = range(count) if generator is None else torch.randperm(count, generator=generator).tolist()
        rows: list[Row] = []
        for index in order:
            rows += [row for row_id in self._units[index] if len((row := self._row(row_id)).labels)]
            if sum(len(row.labels) for row in rows) >= self._batch_tokens:
                yield self._batch(rows)
                rows = []
        if rows:
            yield self._batch(rows)

    def _row(self, row_id: str) -> Row:
        example = self._examples[row_id]
        return chosen_row(features_of(self._source, row_id, example), example, self._window)

    def _batch(self, rows: list[Row]) -> Batch:
        size = sum(len(row.labels) for row in rows)
        if size > len(self._wide):  # one buffer for all batches: fresh memory would cost more than the arithmetic
            self._wide = torch.empty(size, self._wide.shape[1])
        torch.cat([row.features.to(self._wide.dtype) for row in rows], out=self._wide[:size])
        return Batch(self._wide[:size], rows)

    def standardiser(self) -> tuple[Float[Tensor, " feature"], Float[Tensor, " feature"]]:
        """Mean and inverse standard deviation over what is read; 0 for a constant feature, so nothing reads it."""
        count, total, squares, shift = 0, torch.zeros(()), torch.zeros(()), torch.zeros(())
        for features, _ in self.batches():
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


def chosen_row(features: Float[Tensor, "token feature"], example: Example, window: int) -> Row:
    """The part of a row that training reads."""
    in_response = example.in_response
    if in_response is None:
        in_response = torch.ones_like(example.labels, dtype=torch.bool)
    if math.isnan(example.label):  # tokens alone: nothing but the labelled ones is looked at
        chosen = example.labels.isfinite()
        return Row(features[chosen], example.labels[chosen], in_response[chosen], 0, example.label, example.twin)
    places = (in_response | example.labels.isfinite()).nonzero()[:, 0]
    if not len(places):
        return Row(features[:0], example.labels[:0], in_response[:0], 0, example.label, example.twin)
    first = int(places[0])
    start = first if first <= example.boundary else max(example.boundary, first - window + 1)
    kept = slice(start, int(places[-1]) + 1)
    boundary = max(0, example.boundary - start)
    return Row(features[kept], example.labels[kept], in_response[kept], boundary, example.label, example.twin)


def features_of(source: Source, row_id: str, example: Example) -> Float[Tensor, "token feature"]:
    features = source.features(row_id)
    if len(features) != len(example.labels):
        raise SettingError(
            f"row {row_id!r} has {len(features)} recorded tokens but {len(example.labels)} labels; give the labels of "
            "the text that was recorded"
        )
    return features
