"""A model and a steering in; whether it does on this machine what it says, check by check, out.

Serving libraries have failed at each of these without a word: a vector that never reached the model, one that reached
only the first token of an answer, one that reached the neighbours in the batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from pilotfish.core import Site
from pilotfish.errors import SettingError
from pilotfish.steering.dose import Steering
from pilotfish.taps import Edit, Taps, edited, tapped


class Check(NamedTuple):
    name: str
    passed: bool
    detail: str
    """What was seen, in numbers."""


@torch.inference_mode()
def verify(
    model: PreTrainedModel, steering: Steering, dose: float, prompt: Sequence[int], *, num_tokens: int = 16
) -> list[Check]:
    """Checks that the vector changes the logits, leaves batch mates alone, does nothing at dose 0, and fires once for
    each token that it is meant for in cached generation.

    Args:
        prompt: Token ids, two or more.
        num_tokens: Tokens to generate, greedily and past any end token.

    Raises:
        SettingError: the dose is 0, or the prompt or the generation is too short.
    """
    if dose == 0 or len(prompt) < 2 or num_tokens < 1:
        raise SettingError(
            f"dose {dose}, a prompt of {len(prompt)} tokens and {num_tokens} tokens to generate show nothing; give a "
            "dose other than 0, 2 tokens or more, and 1 or more"
        )
    edits = steering.edits(dose, model)
    return [
        _changes_logits(model, edits, prompt),
        _leaves_batch_mates(model, edits, prompt),
        _dose_zero(model, steering, prompt),
        _fires(model, edits, prompt, num_tokens),
        _leaves_nothing_behind(model, edits, prompt),
    ]


def _changes_logits(model: PreTrainedModel, edits: Sequence[Edit], prompt: Sequence[int]) -> Check:
    plain, steered = _logits(model, (), [prompt]), _logits(model, edits, [prompt])
    change = float((steered - plain).float().abs().max())
    return Check("the vector changes the logits", change > 0, f"largest change {change:.4g}")


def _leaves_batch_mates(model: PreTrainedModel, edits: Sequence[Edit], prompt: Sequence[int]) -> Check:
    batch = [list(prompt), list(reversed(prompt))]
    first = [replace(edit, when=replace(edit.when, rows=(0,))) for edit in edits]
    plain, steered = _logits(model, (), batch), _logits(model, first, batch)
    mate, own = (int((steered[row] != plain[row]).sum()) for row in (1, 0))
    return Check(
        "batch mates are untouched",
        mate == 0 and own > 0,
        f"{mate} logits of the row beside it changed, {own} of its own",
    )


def _dose_zero(model: PreTrainedModel, steering: Steering, prompt: Sequence[int]) -> Check:
    plain, steered = _logits(model, (), [prompt]), _logits(model, steering.edits(0.0, model), [prompt])
    changed = int((plain != steered).sum())
    return Check("dose 0 is bit-identical", changed == 0, f"{changed} of {plain.numel()} logits changed")


def _fires(model: PreTrainedModel, edits: Sequence[Edit], prompt: Sequence[int], num_tokens: int) -> Check:
    """Counts the tokens whose activations the edits changed, pass by pass, against those they are meant for.

    Several edits of one site count as one; where a gate decides, the same text read in one pass says which tokens.
    """
    ids, seen = list(prompt), []
    cache = DynamicCache()
    unread = list(prompt)
    for _ in range(num_tokens + 1):  # the last generated token is read too
        batch = torch.tensor([unread], device=model.device)
        with _watched(model, edits, len(prompt)) as watched:
            logits = model(batch, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[0, -1]
            seen.append(watched.changed())
        unread = [int(logits.float().argmax())]
        ids += unread
    fired = torch.cat(seen, dim=1)
    whole = torch.tensor([ids[:-1]], device=model.device)
    with _watched(model, edits, len(prompt)) as watched:
        model(whole, use_cache=False, logits_to_keep=1)
        in_one_pass = watched.changed()
    gated = any(edit.when.gate is not None for edit in edits)
    meant = in_one_pass if gated else _meant(edits, len(prompt), len(ids) - 1).expand_as(fired)
    wrong = int((fired != meant).sum())
    what = "its gate opens for in one pass" if gated else "it is meant for"
    return Check(
        f"it fires once a token over {num_tokens} generated tokens",
        wrong == 0 and bool(fired.any()),
        f"{int(fired.sum())} activations changed, {int(meant.sum())} {what}, {wrong} differ",
    )


def _leaves_nothing_behind(model: PreTrainedModel, edits: Sequence[Edit], prompt: Sequence[int]) -> Check:
    plain = _logits(model, (), [prompt])
    for _ in range(100):
        with edited(model, edits):
            pass
    changed = int((_logits(model, (), [prompt]) != plain).sum())
    return Check("100 uses leave the model bit-identical", changed == 0, f"{changed} logits changed")


class _Watch(NamedTuple):
    before: Taps
    after: Taps

    def changed(self) -> Bool[Tensor, "site token"]:
        """Tokens of the first row at which the last pass left other activations than the edits found."""
        return torch.stack([(self.before[site] != self.after[site]).any(-1)[0].cpu() for site in self.before])


@contextmanager
def _watched(model: PreTrainedModel, edits: Sequence[Edit], prompt_length: int) -> Iterator[_Watch]:
    sites = tuple(dict.fromkeys(edit.site for edit in edits))
    writing = edited(model, edits, prompt_length=prompt_length)
    with tapped(model, sites) as before, writing, tapped(model, sites) as after:
        yield _Watch(before, after)


def _meant(edits: Sequence[Edit], prompt_length: int, num_tokens: int) -> Bool[Tensor, "site token"]:
    """Tokens of one unpadded row that phase, positions and rows of the edits choose, by site."""
    sites: dict[Site, Tensor] = {}
    places = torch.arange(num_tokens)
    for edit in edits:
        when = edit.when
        chosen = {"prompt": places < prompt_length, "generation": places >= prompt_length, "both": places >= 0}[
            when.phase
        ]
        if when.positions is not None:
            chosen = chosen & (places >= when.positions[0]) & (places < when.positions[1])
        if when.rows is not None:
            chosen = chosen & (0 in when.rows)
        sites[edit.site] = sites.get(edit.site, torch.zeros_like(chosen)) | chosen
    return torch.stack(list(sites.values()))


def _logits(
    model: PreTrainedModel, edits: Sequence[Edit], batch: Sequence[Sequence[int]]
) -> Float[Tensor, "batch token vocab"]:
    """In one pass, its last token counted as generated so that an edit of either phase has something to act on."""
    ids = torch.tensor([list(row) for row in batch], device=model.device)
    with edited(model, edits, prompt_length=ids.shape[1] - 1):
        logits: Tensor = model(ids, use_cache=False).logits
    return logits
