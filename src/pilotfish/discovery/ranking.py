"""Found vectors in; a number for each, of what a person or a monitor would notice, out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from pilotfish.core import Site
from pilotfish.discovery.slice import Slice, lies_below
from pilotfish.errors import SettingError
from pilotfish.heads import Head
from pilotfish.taps import Edit, edited

Measure = Callable[[Sequence[Edit]], float]
"""What a model does under edits, as one number: the more, the more of the behaviour."""


def unembedding_difference(
    model: PreTrainedModel, wanted: Sequence[int], unwanted: Sequence[int]
) -> Float[Tensor, " hidden"]:
    """The way along which the final state raises the mean logit of some tokens over that of others.

    Raises:
        SettingError: a side is empty.
    """
    if not wanted or not unwanted:
        raise SettingError("a logit difference needs at least one token on either side")
    output: Any = model.get_output_embeddings()  # type: ignore[no-untyped-call]  # transformers leaves it unannotated
    weight: Tensor = output.weight.detach()
    return weight[list(wanted)].mean(0) - weight[list(unwanted)].mean(0)


def logit_scores(
    to_final: Slice, vectors: Float[Tensor, "vector hidden"], direction: Float[Tensor, " hidden"]
) -> Float[Tensor, " vector"]:
    """How much each vector, at the length it has, raises a logit or a difference of logits at the read tokens.

    Args:
        to_final: A slice whose target is `final`; with `last=1` it reads where the answer begins.

    Raises:
        SettingError: its target is another.
    """
    if to_final.target.stream != "final":
        raise SettingError(f"the slice ends at {to_final.target}; logits are read at `final`, so give such a slice")
    return to_final.change(vectors) @ direction


def head_scores(
    model: PreTrainedModel,
    source: Site,
    prompts: Sequence[Sequence[int]],
    *,
    head: Head,
    vectors: Float[Tensor, "vector hidden"],
    last: int | None = 3,
) -> Float[Tensor, " vector"]:
    """How much each vector, added at `source`, raises a monitor's mean token logit at the read tokens.

    Raises:
        SettingError: the head's logit is not linear in the activations.
    """
    if head.form.kind == "mlp":
        raise SettingError(f"head {head.metric!r} is an mlp; vectors are ranked by heads whose token logit is linear")
    scores = torch.zeros(len(vectors), dtype=vectors.dtype, device=vectors.device)
    for site, weight in zip(head.sites, head.weight[0].to(vectors).chunk(len(head.sites)), strict=True):
        if site == source:
            scores += vectors @ weight
        elif lies_below(source, site):
            scores += Slice(model, source, site, prompts, last=last).change(vectors) @ weight
    return scores


def logit_measure(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], direction: Float[Tensor, " hidden"]
) -> Measure:
    """The mean over prompts of the final state's projection on `direction` at the last token: a logit difference,
    biases of the output layer aside, under whatever edits.
    """
    rows = [torch.tensor([list(prompt)], device=model.device) for prompt in prompts]

    def measure(edits: Sequence[Edit]) -> float:
        with torch.no_grad(), ExitStack() as stack:
            if edits:
                stack.enter_context(edited(model, edits))
            last = [model.base_model(row, use_cache=False).last_hidden_state[0, -1] for row in rows]
            return float((torch.stack(last) @ direction).mean())

    return measure
