"""Passes that several answers wait for in; the logits of each out, from one forward pass of the model.

The answers' new tokens stand one after another in a single row, so that no token is padding and every layer but the
attention sees one long text. The attention takes each answer by itself, over its own cache, with the very call that
it would get alone. So answers of any length share a pass, each keeps a cache that rolls back as it did, and nothing
of one answer can reach another.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from transformers import AttentionInterface, Cache, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward as _attend

from pilotfish.core import Site
from pilotfish.engines.reader import Pass, tapped_for
from pilotfish.taps import Edit, Gate, When, edited

logger = logging.getLogger(__name__)

Logits = Float[Tensor, "token vocab"]
_ATTENTION = "pilotfish_apart"
"""Name of `_attend_apart` among transformers' attentions."""


def read_together(passes: Sequence[Pass]) -> list[Logits | Exception]:
    """Makes passes of one model, each on a cache of its own, as one.

    Returns:
        For each the logits that it would give alone, or what it would raise.
    """
    if len(passes) > 1:
        lengths = [each.model.cache.get_seq_length() for each in passes]
        try:
            return _packed(passes)
        except Exception:  # one that fails alone as well ends its own answer, and no other
            logger.exception("a pass of %d answers failed; each is read alone", len(passes))
            for each, length in zip(passes, lengths, strict=True):
                each.model.cut_back(length)
    return [_tried(each.run) for each in passes]


def _tried(call: Callable[[], Logits]) -> Logits | Exception:
    try:
        return call()
    except Exception as error:  # for whoever asked for it, and no other
        logger.exception("a pass failed")
        return error


@torch.inference_mode()
def _packed(passes: Sequence[Pass]) -> list[Logits | Exception]:
    model, bank = passes[0].model.model, passes[0].model.bank
    layout = _Layout(passes)
    ranges = (range(end - each.num_logits, end) for each, end in zip(passes, layout.ends, strict=True))
    kept = [place for places in ranges for place in places]
    device = model.device
    options = {"logits_to_keep": torch.tensor(kept, device=device)} if kept else {}
    with (
        _attending_apart(model),
        edited(model, layout.edits(device)) if any(each.edits for each in passes) else nullcontext(),
        tapped_for(model, bank) as taps,
    ):
        output = (model if kept else model.base_model)(
            torch.tensor([[token for each in passes for token in each.ids]], device=device),
            position_ids=torch.tensor([layout.positions], device=device),
            past_key_values=_Caches(layout),
            use_cache=True,
            **options,
        )
        for each, start, end in zip(passes, layout.starts, layout.ends, strict=True):
            each.model.note(end - start, {site: states[:, start:end] for site, states in taps.items()})
    if not kept:
        return [torch.empty(0, model.config.vocab_size) for _ in passes]
    rows = output.logits[0].split([each.num_logits for each in passes])
    return [
        _tried(partial(each.model.checked, logits)) if each.num_logits else logits
        for each, logits in zip(passes, rows, strict=True)
    ]


class _Layout:
    """Where each answer's new tokens stand in the one row."""

    def __init__(self, passes: Sequence[Pass]) -> None:
        self.passes = passes
        self.sizes = [len(each.ids) for each in passes]
        self.ends = list(accumulate(self.sizes))
        self.starts = [end - size for end, size in zip(self.ends, self.sizes, strict=True)]
        self._masks: dict[tuple[int, int | None], Tensor | None] = {}

    @property
    def positions(self) -> list[int]:
        """Of each token in its own answer."""
        pairs = zip(self.passes, self.sizes, strict=True)
        return [each.model.length + i for each, size in pairs for i in range(size)]

    def mask(self, index: int, window: int | None, device: torch.device) -> Bool[Tensor, "1 1 new all"] | None:
        """What each new token of one answer looks at; None where that is all, or plainly what came before it."""
        if (index, window) not in self._masks:
            self._masks[index, window] = _mask(self.passes[index].model.length, self.sizes[index], window, device)
        return self._masks[index, window]

    def edits(self, device: torch.device) -> list[Edit]:
        """Every answer's edits, each on that answer's own tokens only."""
        found = []
        for each, start, size in zip(self.passes, self.starts, self.sizes, strict=True):
            for edit in each.edits:
                chosen = torch.zeros(1, self.ends[-1], dtype=torch.bool, device=device)
                chosen[0, start : start + size] = _chosen(edit.when, each, size, device)
                if chosen.any():
                    gate = _Within(chosen, edit.site, edit.when.gate)
                    found.append(replace(edit, when=When(rows=edit.when.rows, gate=gate)))
        return found


def _mask(num_cached: int, num_new: int, window: int | None, device: torch.device) -> Tensor | None:
    num_all = num_cached + num_new
    if (num_new == 1 or not num_cached) and (window is None or num_all <= window):
        return None
    place = torch.arange(num_cached, num_all, device=device).unsqueeze(-1)
    seen = torch.arange(num_all, device=device)
    mask = seen <= place
    return (mask if window is None else mask & (seen > place - window))[None, None]


def _chosen(when: When, each: Pass, size: int, device: torch.device) -> Bool[Tensor, " new"]:
    """The new tokens of an answer that an edit applies to, its gate aside."""
    place = torch.arange(each.model.length, each.model.length + size, device=device)
    chosen = torch.ones_like(place, dtype=torch.bool)
    if when.phase != "both":
        chosen &= (place < each.model.boundary) == (when.phase == "prompt")
    if when.positions is not None:
        chosen &= (place >= when.positions[0]) & (place < when.positions[1])
    return chosen


@dataclass(frozen=True, slots=True, eq=False)
class _Within:
    """A gate that opens on some tokens of a pass only, and there as another one does."""

    chosen: Bool[Tensor, "1 token"]
    site: Site
    gate: Gate | None

    @property
    def sites(self) -> tuple[Site, ...]:
        return self.gate.sites if self.gate is not None else (self.site,)

    def opens(self, features: Float[Tensor, "batch token feature"]) -> Bool[Tensor, "batch token"]:
        return self.chosen if self.gate is None else self.chosen & self.gate.opens(features)


# The caches and the attention.


class _States(NamedTuple):
    """Keys or values of each answer; what a model hands from its cache to its attention."""

    layout: _Layout
    rows: list[Float[Tensor, "1 head token size"]]


class _Caches(Cache):
    """The answers' caches as the one that a model writes to."""

    def __init__(self, layout: _Layout) -> None:
        super().__init__(layers=[])
        self._layout = layout

    def update(self, keys: Tensor, values: Tensor, layer: int, *_: Any, **__: Any) -> tuple[_States, _States]:  # type: ignore[override]  # read by `_attend_apart` alone
        layout = self._layout
        parts = (torch.split(states, layout.sizes, dim=2) for states in (keys, values))
        new = zip(layout.passes, *parts, strict=True)
        pairs = [each.model.cache.update(key, value, layer) for each, key, value in new]
        return _States(layout, [key for key, _ in pairs]), _States(layout, [value for _, value in pairs])


def _attend_apart(
    module: nn.Module,
    query: Float[Tensor, "1 head token size"],
    key: _States,
    value: _States,
    _: Tensor | None,
    *,
    sliding_window: int | None = None,
    **options: Any,
) -> tuple[Float[Tensor, "1 token head size"], None]:
    """Each answer's tokens attend to its own keys, by the attention that a single answer gets."""
    layout = key.layout
    rows = zip(torch.split(query, layout.sizes, dim=2), key.rows, value.rows, strict=True)
    found = [
        _attend(module, one, keys, values, layout.mask(index, sliding_window, query.device), **options)[0]
        for index, (one, keys, values) in enumerate(rows)
    ]
    return torch.cat(found, dim=1), None


AttentionInterface.register(_ATTENTION, _attend_apart)


@contextmanager
def _attending_apart(model: PreTrainedModel) -> Iterator[None]:
    """With the answers' attention in place of the model's own, which is put back."""
    config: Any = model.config
    usual, config._attn_implementation = config._attn_implementation, _ATTENTION
    try:
        yield
    finally:
        config._attn_implementation = usual
