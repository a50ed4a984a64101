"""A bank, a judge and texts in; what the one costs over what the other does, out."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Int
from torch import Tensor

from pilotfish.heads import HeadBank
from pilotfish.models import LoadedModel
from pilotfish.scores.metrics import Estimate, Statistic, bootstrap_by_group


def head_flops_per_token(bank: HeadBank) -> int:
    """Multiplications and additions of the bank's one matmul; the windows that follow are a few dozen more."""
    return 2 * bank.num_channels * len(bank.sites) * bank.identity.hidden_size


def model_flops_per_token(reader: LoadedModel) -> int:
    """Twice the weights that a token passes: all but the embedding, which is looked up, and the output layer.

    Attention's sums over the text before are left out, so a long text costs more than this.
    """
    embedding = reader.model.get_input_embeddings().weight
    weights = reader.model.base_model.parameters()
    return 2 * sum(weight.numel() for weight in weights if weight is not embedding)


def cost_over_judge(
    bank: HeadBank,
    reader: LoadedModel,
    *,
    num_read: Int[Tensor, " text"],
    num_judged: Int[Tensor, " text"],
    groups: Sequence[str],
    generator: torch.Generator,
) -> dict[str, Estimate]:
    """What a head costs as a share of what asking its reader costs, on the same texts, with intervals by group.

    * `cost_over_judge`: in FLOPs, where the reader reads the text anyway, as a draft does.
    * `tokens_over_judge`: in tokens read, where it reads for the head alone; the judge also reads its question.

    Args:
        num_read: Tokens of each text as the head reads it.
        num_judged: Tokens of each text with the judge's question and template.
    """
    share = head_flops_per_token(bank) / model_flops_per_token(reader)
    read, judged = num_read.double(), num_judged.double()

    def over(factor: float) -> Statistic:
        return lambda rows: factor * float(read[rows].sum() / judged[rows].sum())

    return {
        name: bootstrap_by_group(over(factor), groups, generator=generator)
        for name, factor in {"cost_over_judge": share, "tokens_over_judge": 1.0}.items()
    }
