"""All heads of a model in, one fused matmul out; and the files that a bank is kept in."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from pilotfish.core import Site
from pilotfish.errors import ArtefactError, BankMismatch, SettingError
from pilotfish.heads.card import Card
from pilotfish.heads.linear import LinearHead
from pilotfish.models import Identity
from pilotfish.runs import atomic_path

WEIGHTS_FILE = "heads.safetensors"
CARD_FILE = "card.json"


class HeadBank:
    """All heads of one model. They keep no state: a token costs one matrix-vector product, however long the text."""

    def __init__(
        self,
        heads: Sequence[LinearHead],
        identity: Identity,
        *,
        thresholds: Mapping[str, float] | None = None,
        card: Card | None = None,
    ) -> None:
        """`thresholds`: probability from which on a metric counts as found, instead of the card's; they are not saved.

        Raises:
            BankMismatch: a head was made for another hidden size, or reads a layer that the model has not.
            SettingError: there are no heads, or two of one metric.
        """
        self.heads = tuple(heads)
        self.metrics = tuple(head.metric for head in heads)
        self.identity = identity
        self.card = card or Card(identity=identity)
        self.thresholds = (
            {metric: limit.threshold for metric, limit in self.card.thresholds.items()}
            if thresholds is None
            else dict(thresholds)
        )
        if not heads or len(set(self.metrics)) != len(heads):
            raise SettingError(f"a bank needs at least one head and one a metric; given were {list(self.metrics)}")
        self.sites: tuple[Site, ...] = tuple(dict.fromkeys(site for head in heads for site in head.sites))
        for head in heads:
            self._check_shape(head)
        self._weight = torch.stack([self._widened(head) for head in heads], dim=1)
        self._bias = torch.tensor([head.bias for head in heads], dtype=torch.float32)

    def _check_shape(self, head: LinearHead) -> None:
        if head.hidden_size != self.identity.hidden_size:
            raise BankMismatch(
                f"head {head.metric!r} reads {head.hidden_size} hidden units a site, {self.identity.name} has "
                f"{self.identity.hidden_size}; fit it on this model"
            )
        deepest = max(site.layer for site in head.sites)
        if deepest >= self.identity.num_layers:
            raise BankMismatch(
                f"head {head.metric!r} reads layer {deepest}, {self.identity.name} has {self.identity.num_layers} "
                "layers; fit it on this model"
            )

    def _widened(self, head: LinearHead) -> Float[Tensor, " feature"]:
        """The head's weights over the bank's sites, zero where it does not read."""
        wide = torch.zeros(len(self.sites), self.identity.hidden_size)
        for site, part in zip(head.sites, head.weight.float().chunk(len(head.sites)), strict=True):
            wide[self.sites.index(site)] = part
        return wide.flatten()

    def features(self, taps: Mapping[Site, Tensor], row: int = 0) -> Float[Tensor, "token feature"]:
        """Float32 features of one row of the batch of the last forward pass."""
        return torch.cat([taps[site][row] for site in self.sites], dim=-1).float()

    def logits(self, features: Float[Tensor, "token feature"]) -> Float[Tensor, "token metric"]:
        """Calibrated log-odds of every metric, from one matmul in float32."""
        if self._weight.device != features.device:  # follow the model, once
            self._weight, self._bias = self._weight.to(features.device), self._bias.to(features.device)
        return torch.addmm(self._bias, features.float(), self._weight)

    def probabilities(self, features: Float[Tensor, "token feature"]) -> Float[Tensor, "token metric"]:
        return self.logits(features).sigmoid()

    def subset(self, metrics: Sequence[str]) -> HeadBank:
        """A bank with some of the heads.

        Raises:
            SettingError: a metric has no head.
        """
        unknown = [metric for metric in metrics if metric not in self.metrics]
        if unknown:
            raise SettingError(f"metric {unknown[0]!r} has no head; there are {', '.join(self.metrics)}")
        heads = [self.heads[self.metrics.index(metric)] for metric in metrics]
        kept = {metric: value for metric, value in self.thresholds.items() if metric in metrics}
        return HeadBank(heads, self.identity, thresholds=kept, card=self.card.subset(metrics))

    def check(self, identity: Identity) -> None:
        """Refuses any other model than the one that the bank was made for; the name alone may differ.

        Raises:
            BankMismatch: names what differs.
        """
        names = [field.name for field in fields(Identity) if field.name != "name"]
        differing = [name for name in names if getattr(self.identity, name) != getattr(identity, name)]
        if differing:
            raise BankMismatch(
                f"the bank for {', '.join(self.metrics)} was made for {self.identity.name}, not for {identity.name}: "
                f"other {', '.join(name.replace('_', ' ') for name in differing)}. Fit a bank on this model, or load "
                "the model that it was made for"
            )

    def save(self, folder: Path) -> Path:
        """Writes `heads.safetensors` and `card.json`; the card holds the tensors' hash, and is written last."""
        tensors = {f"{head.metric}.weight": head.weight.float().cpu().contiguous() for head in self.heads}
        tensors |= {f"{head.metric}.bias": torch.tensor([head.bias], dtype=torch.float64) for head in self.heads}
        data = save(tensors)
        with atomic_path(folder / WEIGHTS_FILE) as temporary:
            temporary.write_bytes(data)
        sites = {head.metric: tuple(map(str, head.sites)) for head in self.heads}
        card = replace(self.card, identity=self.identity, sites=sites, weights_sha256=hashlib.sha256(data).hexdigest())
        card.save(folder / CARD_FILE)
        return folder

    @classmethod
    def load(cls, folder: Path) -> HeadBank:
        """Reads a bank; run `check` before using it on a model (the engine does).

        Raises:
            ArtefactError: a file is missing, cut, changed, or holds weights that are not finite.
            BankMismatch: the weights do not have the shape that the card's model asks for.
        """
        card = Card.load(folder / CARD_FILE)
        path = folder / WEIGHTS_FILE
        try:
            data = path.read_bytes()
        except OSError as error:
            raise ArtefactError(
                f"{path} cannot be read: {error.strerror}; a bank is heads.safetensors with card.json"
            ) from error
        if hashlib.sha256(data).hexdigest() != card.weights_sha256:
            raise ArtefactError(
                f"{path} is not what its card describes (another SHA-256): cut, changed or mixed up; copy both files "
                "again"
            )
        try:
            tensors = load(data)
        except SafetensorError as error:
            raise ArtefactError(f"{path} is not a safetensors file: {error}; copy the bank again") from error
        heads = [_head(tensors, metric, sites, path) for metric, sites in card.sites.items()]
        return cls(heads, card.identity, card=card)


def _head(tensors: Mapping[str, Tensor], metric: str, names: Sequence[str], path: Path) -> LinearHead:
    weight, bias = tensors.get(f"{metric}.weight"), tensors.get(f"{metric}.bias")
    if weight is None or bias is None:
        raise ArtefactError(f"{path} lacks the weights of head {metric!r} that its card names; fit the bank again")
    if weight.ndim != 1 or bias.numel() != 1:
        raise ArtefactError(
            f"{path}: head {metric!r} has weights of shape {tuple(weight.shape)} and a bias of shape "
            f"{tuple(bias.shape)}; a linear head has one row of weights and one bias: fit the bank again"
        )
    try:
        sites = tuple(map(Site.parse, names))
    except SettingError as error:
        raise ArtefactError(f"{path.with_name(CARD_FILE)}, head {metric!r}: {error}; copy the bank again") from error
    return LinearHead(metric, sites, weight, float(bias))
