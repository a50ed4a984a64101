"""Text that is there already in, the scores of one pass out."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from pilotfish.errors import SettingError
from pilotfish.heads import HeadBank
from pilotfish.taps import tapped


@torch.inference_mode()
def score_tokens(model: PreTrainedModel, bank: HeadBank, token_ids: Sequence[int]) -> Float[Tensor, "token metric"]:
    """Probability of every metric at every token: the head's reading of the state after consuming that token.

    Raises:
        SettingError: there are no tokens.
    """
    if not token_ids:
        raise SettingError("there are no tokens to score; give at least one")
    batch = torch.tensor([list(token_ids)], device=model.device)
    with tapped(model, bank.sites) as taps:
        model(batch, use_cache=False, logits_to_keep=1)
        return bank.probabilities(bank.features(taps)).cpu()
