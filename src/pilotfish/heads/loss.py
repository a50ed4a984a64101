"""Logits of labelled tokens and responses in; one loss a candidate out.

Candidates (other regularisation, same data) are trained side by side, so each loss keeps the candidate axis; a sum over
it keeps them independent.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn


def token_loss(
    logits: Float[Tensor, "token candidate"], labels: Float[Tensor, " token"], positive_weight: float
) -> Float[Tensor, " candidate"]:
    """Mean cross-entropy of labelled tokens, positive ones weighted."""
    weights = 1 + labels * (positive_weight - 1)
    wide = labels[:, None].expand_as(logits)
    losses = nn.functional.binary_cross_entropy_with_logits(logits, wide, reduction="none")
    return (losses * weights[:, None]).mean(0)


def span_loss(logits: Float[Tensor, "token candidate"], labels: Float[Tensor, " token"]) -> Float[Tensor, " candidate"]:
    """Mean cross-entropy of the highest token of each run of equal labels (Obeso et al., arXiv 2509.03531, there of
    annotated spans alone): a span is found once one of its tokens is.
    """
    starts = torch.cat([torch.ones(1, dtype=torch.bool), labels[1:] != labels[:-1]]).nonzero()[:, 0].tolist()
    runs = [slice(a, b) for a, b in zip(starts, [*starts[1:], len(labels)], strict=True)]
    highest = torch.stack([logits[run].amax(0) for run in runs])
    wide = labels[starts][:, None].expand_as(highest)
    return nn.functional.binary_cross_entropy_with_logits(highest, wide, reduction="none").mean(0)


def response_loss(
    running: Float[Tensor, "token candidate"], label: float, *, temperature: float, top_k: int | None
) -> Float[Tensor, " candidate"]:
    """Cross-entropy of one response's running logits, weighted by their softmax (arXiv 2601.04603): a positive response
    needs one clear place, a negative one is punished where it is most suspicious. With `top_k`, that of the mean of the
    k highest instead (SC-TopK, arXiv 2604.14865).
    """
    if top_k is not None:
        running = running.topk(min(top_k, len(running)), dim=0).values.mean(0, keepdim=True)
    weights = (running / temperature).softmax(0)
    wide = torch.full_like(running, label)
    return (weights * nn.functional.binary_cross_entropy_with_logits(running, wide, reduction="none")).sum(0)


def contrast_loss(
    positive: Float[Tensor, "token candidate"], negative: Float[Tensor, "other candidate"]
) -> Float[Tensor, " candidate"]:
    """Logistic loss of the difference of two responses to one prompt, each by its softmax-weighted mean logit."""
    means = [(running.softmax(0) * running).sum(0) for running in (positive, negative)]
    return nn.functional.softplus(means[1] - means[0])


def segment_variance(running: Float[Tensor, "token candidate"]) -> Float[Tensor, " candidate"]:
    """Variance of a harmless response's running logits: it keeps single spikes down (SegVar, arXiv 2604.14865)."""
    return running.var(0, correction=0)
