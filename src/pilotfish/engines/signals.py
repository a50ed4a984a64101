"""Two rows of logits and the token that followed in; how sharply draft and target disagreed about it out.

Both rows are there anyway where the draft proposed and the target verified. The distributions are the models' own, at
temperature 1 and before top-k and top-p, so that a signal does not depend on how a request samples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from pilotfish.actions.policy import SIGNAL
from pilotfish.core import TokenScore

NO_DRAFT = "the draft did not run here"
NO_TARGET = "the target did not run here"
PROMPT_TOKEN = "a prompt's tokens are not generated"


class Signals(NamedTuple):
    """The second signals of one token; None where a distribution is not known."""

    acceptance: float | None = None
    """Chance in [0, 1] that this token, had it been drafted, is kept: min(1, p / q), p the target's and q the draft's.
    """
    distance: float | None = None
    """Chance in [0, 1] that whatever the draft proposes here is rejected: half the sum of |p - q|."""
    divergence: float | None = None
    """Kullback-Leibler divergence of the target from the draft, sum of p log(p / q), in nats."""
    target_surprise: float | None = None
    """-log p of the token, in nats."""
    draft_surprise: float | None = None
    """-log q of the token, in nats."""
    reason: str = ""
    """Why some are None."""

    def scores(self) -> dict[str, TokenScore]:
        """As metrics for rules, all in [0, 1] and higher where the models disagree more: nats x become 1 - exp(-x), so
        a surprise is 1 - probability; the acceptance is turned round, as `signal.rejection`.
        """
        values = {
            "rejection": None if self.acceptance is None else 1.0 - self.acceptance,
            "distance": self.distance,
            "divergence": _unit(self.divergence),
            "target_surprise": _unit(self.target_surprise),
            "draft_surprise": _unit(self.draft_surprise),
        }
        return {
            SIGNAL + name: TokenScore.unscored(self.reason) if value is None else TokenScore.scored(value)
            for name, value in values.items()
        }


def compare(
    tokens: Sequence[int],
    target: Float[Tensor, "token vocab"] | None,
    draft: Float[Tensor, "token vocab"] | None,
    reason: str = "",
) -> list[Signals]:
    """The signals of tokens, each with the logits that its models had just before it.

    Args:
        target: None where the target did not run.
        draft: None where the draft did not.
        reason: why one is None.
    """
    assert (target is None or draft is None) == (reason != ""), "a missing side has a reason"
    log_p, log_q = (None if rows is None else rows.float().log_softmax(-1) for rows in (target, draft))
    own_p, own_q = (None if logs is None else _of_tokens(logs, tokens) for logs in (log_p, log_q))
    if log_p is None or log_q is None or own_p is None or own_q is None:
        return [
            Signals(
                target_surprise=None if own_p is None else -own_p[i],
                draft_surprise=None if own_q is None else -own_q[i],
                reason=reason,
            )
            for i in range(len(tokens))
        ]
    p = log_p.exp()
    divergence = (p * (log_p - log_q)).sum(-1).clamp_min(0.0).tolist()
    distance = (p - log_q.exp()).abs().sum(-1).mul(0.5).clamp_max(1.0).tolist()
    return [
        Signals(math.exp(min(0.0, one - other)), apart, nats, -one, -other)
        for one, other, apart, nats in zip(own_p, own_q, distance, divergence, strict=True)
    ]


def _of_tokens(logs: Float[Tensor, "token vocab"], tokens: Sequence[int]) -> list[float]:
    chosen = torch.tensor(tokens, device=logs.device).unsqueeze(-1)
    values: list[float] = logs.gather(-1, chosen).squeeze(-1).tolist()
    return values


def _unit(nats: float | None) -> float | None:
    return None if nats is None else -math.expm1(-max(nats, 0.0))


SIGNALS = tuple(Signals(reason="names").scores())
"""Names of the signals as metrics."""
