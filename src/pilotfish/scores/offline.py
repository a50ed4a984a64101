"""Text that is there already in, the scores of one pass out."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from pilotfish.errors import SettingError
from pilotfish.heads import BankScores, HeadBank
from pilotfish.taps import tapped


@torch.inference_mode()
def score_tokens(model: PreTrainedModel, bank: HeadBank, token_ids: Sequence[int], *, boundary: int = 0) -> BankScores:
    """Probability of every metric at every token: the head's reading of the states up to that token.

    Args:
        boundary: Position where the answer begins; `running` does not look back over it.

    Raises:
        SettingError: there are no tokens.
    """
    if not token_ids:
        raise SettingError("there are no tokens to score; give at least one")
    batch = torch.tensor([list(token_ids)], device=model.device)
    with tapped(model, bank.sites) as taps:
        model(batch, use_cache=False, logits_to_keep=1)
        found = bank.score_text(bank.features(taps), boundary=boundary)
        return BankScores(found.tokens.cpu(), found.running.cpu())
