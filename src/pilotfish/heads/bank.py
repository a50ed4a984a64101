"""All heads of a model in, one fused matmul out; and the files that a bank is kept in."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from pilotfish.core import Site
from pilotfish.errors import ArtefactError, BankMismatch, SettingError
from pilotfish.heads.card import Card, HeadCard
from pilotfish.heads.form import Form
from pilotfish.heads.head import Head
from pilotfish.models import Identity
from pilotfish.runs import atomic_path

WEIGHTS_FILE = "heads.safetensors"
CARD_FILE = "card.json"
TENSORS = ("weight", "bias", "outputs")
"""Of each head, as they are named in the file."""


class BankScores(NamedTuple):
    """Calibrated probabilities of every metric at every token."""

    tokens: Float[Tensor, "token metric"]
    """That the property holds at the token itself."""
    running: Float[Tensor, "token metric"]
    """That it holds of the response, as far as it has been read; this is what a threshold is held against."""


class _Group(NamedTuple):
    """Heads of one form, to be evaluated together."""

    form: Form
    metrics: Int[Tensor, " head"]
    channels: Int[Tensor, " channel"]
    outputs: Float[Tensor, "head output"]


class HeadBank:
    """All heads of one model: a token costs one matrix-vector product, and a look at the channels of the last few."""

    def __init__(
        self,
        heads: Sequence[Head],
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
        self.weight = torch.cat([self._widened(head) for head in heads]).T.contiguous()
        """Features x channels, float32."""
        self.bias = torch.cat([head.bias.float() for head in heads])
        self._groups = _grouped(self.heads)
        self.window = max(head.form.window for head in heads)
        """Tokens that a score looks back on at most, the current one included."""

    def _check_shape(self, head: Head) -> None:
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

    def _widened(self, head: Head) -> Float[Tensor, "channel feature"]:
        """The head's weights over the bank's sites, zero where it does not read."""
        wide = torch.zeros(len(head.weight), len(self.sites), self.identity.hidden_size)
        for site, part in zip(head.sites, head.weight.float().chunk(len(head.sites), dim=1), strict=True):
            wide[:, self.sites.index(site)] = part
        return wide.flatten(1)

    def features(self, taps: Mapping[Site, Tensor], row: int = 0) -> Float[Tensor, "token feature"]:
        """Float32 features of one row of the batch of the last forward pass."""
        return torch.cat([taps[site][row] for site in self.sites], dim=-1).float()

    @property
    def num_channels(self) -> int:
        """Of all heads together."""
        return len(self.bias)

    def channels(self, features: Float[Tensor, "token feature"]) -> Float[Tensor, "token channel"]:
        """What the heads make of each token by itself, from one matmul in float32."""
        if self.weight.device != features.device:  # follow the model, once
            self.weight, self.bias = self.weight.to(features.device), self.bias.to(features.device)
            self._groups = [_Group(form, *(item.to(features.device) for item in rest)) for form, *rest in self._groups]
        return torch.addmm(self.bias, features.float(), self.weight)

    def score(self, channels: Float[Tensor, "past_and_new channel"], num_new: int, *, boundary: int = 0) -> BankScores:
        """Probabilities of the last `num_new` tokens.

        Args:
            channels: Theirs, after those of the tokens before; of these `window - 1` are looked at, or all there are.
            boundary: Row of `channels` where the answer begins: it is judged without a look back at the prompt.
        """
        num_past = len(channels) - num_new
        if num_past < boundary < len(channels):
            prompt = self.score(channels[:boundary], boundary - num_past)
            answer = self.score(channels[boundary:], len(channels) - boundary)
            return BankScores(*(torch.cat(parts) for parts in zip(prompt, answer, strict=True)))
        if boundary <= num_past:
            channels = channels[boundary:]
        channels = channels[-(num_new + self.window - 1) :]
        tokens = channels.new_empty(num_new, len(self.heads))
        running = channels.new_empty(num_new, len(self.heads))
        for form, metrics, chosen, outputs in self._groups:
            group = channels.index_select(1, chosen).reshape(len(channels), len(metrics), form.num_channels)
            tokens[:, metrics] = form.tokens(group[-num_new:], outputs)
            running[:, metrics] = form.running(group, outputs)[-num_new:]
        return BankScores(tokens.sigmoid_(), running.sigmoid_())

    def score_windows(
        self, windows: Float[Tensor, "row window channel"], is_known: Bool[Tensor, "row window"]
    ) -> BankScores:
        """Probabilities of tokens of many sequences at once, each given with those before it.

        Args:
            windows: Channels of the last `self.window` tokens of a sequence, the one to be scored last.
            is_known: Where a place lies inside the sequence, and for an answer not in its prompt.
        """
        tokens = windows.new_empty(len(windows), len(self.heads))
        running = torch.empty_like(tokens)
        for form, metrics, chosen, outputs in self._groups:
            picked = windows if len(self._groups) == 1 else windows.index_select(2, chosen)
            group = picked.reshape(*is_known.shape, len(metrics), form.num_channels)
            tokens[:, metrics] = form.tokens(group[:, -1], outputs)
            running[:, metrics] = form.at_end(group, is_known, outputs)
        return BankScores(tokens.sigmoid_(), running.sigmoid_())

    def score_text(self, features: Float[Tensor, "token feature"], *, boundary: int = 0) -> BankScores:
        """Probabilities of all tokens of a text, given the features of all; its answer begins at `boundary`."""
        return self.score(self.channels(features), len(features), boundary=boundary)

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
        tensors = {
            f"{head.metric}.{name}": getattr(head, name).float().cpu().contiguous()
            for head in self.heads
            for name in TENSORS
        }
        data = save(tensors)
        with atomic_path(folder / WEIGHTS_FILE) as temporary:
            temporary.write_bytes(data)
        heads = {head.metric: HeadCard(sites=tuple(map(str, head.sites)), **asdict(head.form)) for head in self.heads}
        card = replace(self.card, identity=self.identity, heads=heads, weights_sha256=hashlib.sha256(data).hexdigest())
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
        heads = [_head(tensors, metric, described, path) for metric, described in card.heads.items()]
        return cls(heads, card.identity, card=card)


def joined(banks: Sequence[HeadBank]) -> HeadBank:
    """One bank with the heads of several, so that they cost one matmul.

    Raises:
        BankMismatch: they were made for different models.
        SettingError: there are no banks, or two have a head for one metric.
    """
    if not banks:
        raise SettingError("there are no banks to join; give at least one")
    first, *others = banks
    if not others:
        return first
    for bank in others:
        bank.check(first.identity)
    heads = [head for bank in banks for head in bank.heads]
    thresholds = {metric: limit for bank in banks for metric, limit in bank.thresholds.items()}
    return HeadBank(heads, first.identity, thresholds=thresholds, card=Card.joined([bank.card for bank in banks]))


def _grouped(heads: Sequence[Head]) -> list[_Group]:
    ends = list(itertools.accumulate(head.form.num_channels for head in heads))
    groups = []
    for form in dict.fromkeys(head.form for head in heads):
        metrics = [index for index, head in enumerate(heads) if head.form == form]
        channels = [channel for i in metrics for channel in range(ends[i] - form.num_channels, ends[i])]
        outputs = torch.stack([heads[i].outputs.float() for i in metrics])
        groups.append(_Group(form, torch.tensor(metrics), torch.tensor(channels), outputs))
    return groups


def _head(tensors: Mapping[str, Tensor], metric: str, described: HeadCard, path: Path) -> Head:
    names = [f"{metric}.{name}" for name in TENSORS]
    if not tensors.keys() >= set(names):
        raise ArtefactError(f"{path} lacks the weights of head {metric!r} that its card names; fit the bank again")
    weight, bias, outputs = (tensors[name] for name in names)
    if weight.ndim != 2 or bias.shape != weight.shape[:1] or outputs.ndim != 1:
        raise ArtefactError(
            f"{path}: head {metric!r} has weights of shape {tuple(weight.shape)} and biases of shape "
            f"{tuple(bias.shape)}; a row of weights and one bias a channel are needed: fit the bank again"
        )
    try:
        sites = tuple(map(Site.parse, described.sites))
        form = Form(kind=described.kind, width=described.width, window=described.window)
    except (SettingError, AttributeError, TypeError) as error:  # values of another kind, too
        raise ArtefactError(f"{path.with_name(CARD_FILE)}, head {metric!r}: {error}; copy the bank again") from error
    return Head(metric, sites, weight, bias, form, outputs)
