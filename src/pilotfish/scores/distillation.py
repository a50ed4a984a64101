"""Answers in; the target's likeliest next tokens, read once and kept on disk, and how far a draft is from them, out."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor
from transformers import PreTrainedModel

from pilotfish.errors import SettingError, TextError
from pilotfish.models import Pair
from pilotfish.runs import atomic_path, progress
from pilotfish.scores.prepared import Text

logger = logging.getLogger(__name__)

SMALLEST_REST = 1e-6
"""Mass that a draft is credited with outside the recorded tokens at least; float32 tells no less from 0."""


class Answer(NamedTuple):
    """A text as tokens, and which of them an engine would have generated."""

    id: str
    group: str
    """The source document, which a bootstrap draws whole."""
    token_ids: tuple[int, ...]
    is_answer: Bool[Tensor, " token"]

    @property
    def positions(self) -> Int[Tensor, " _"]:
        """Tokens after which a token of the answer is chosen."""
        return self.is_answer[1:].nonzero()[:, 0]


def answer_of(text: Text) -> Answer:
    """A labelled text as if the target had written its response."""
    return Answer(text.tokens.id, text.tokens.group, tuple(text.tokens.token_ids), text.is_response)


class Likeliest(NamedTuple):
    """A next-token distribution at each position of an answer: its largest probabilities, and one for all others."""

    ids: Int[Tensor, "position top"]
    """The likeliest first."""
    probs: Float[Tensor, "position top"]
    rest: Float[Tensor, " position"]


class TargetRecording:
    """What the target would say at every position of an answer, on disk: it is three times as slow as its draft.

    An answer has a file of its own, named by target, settings and tokens. So an interrupted run goes on where it was,
    answers may come in any order, and no other target or setting finds it. A probability takes 2 bytes (half
    precision), its token id 4.
    """

    def __init__(self, pair: Pair, folder: Path, *, top_k: int = 64, temperature: float = 1.0) -> None:
        """`temperature` divides the logits, those of a draft that is held against the recording included.

        Raises:
            SettingError: `top_k` is not from 1 to the size of the vocabulary, or the temperature not positive.
        """
        if not 1 <= top_k <= pair.vocab_size:
            raise SettingError(f"top_k {top_k} is not allowed; give 1 to {pair.vocab_size}, the size of the vocabulary")
        check_temperature(temperature)
        self.temperature = temperature
        self.vocab_size = pair.vocab_size
        self.folder = folder
        self._target, self._top_k = pair.target, top_k
        self._made_by = [pair.target_identity.weights, str(pair.target.dtype), pair.vocab_size, top_k, temperature]

    def fill(self, answers: Iterable[Answer]) -> None:
        """Reads, and keeps, what is not there yet.

        Raises:
            TextError: an answer is empty, has no token before it, or is too long for the target.
            StorageError: the disk is full.
        """
        for answer in progress(list(answers), "reading the target"):
            if self._kept(answer) is None:
                self._read(answer)

    def of(self, answer: Answer) -> Likeliest:
        """The distributions at the answer's positions, float32; read from the target if they are not there yet.

        Raises: as `fill`.
        """
        kept = self._kept(answer)
        return self._read(answer) if kept is None else kept

    def _path(self, answer: Answer) -> Path:
        content = json.dumps([self._made_by, answer.token_ids, answer.positions.tolist()])
        return self.folder / f"{hashlib.sha256(content.encode()).hexdigest()[:32]}.safetensors"

    def _kept(self, answer: Answer) -> Likeliest | None:
        path = self._path(answer)
        if not path.exists():
            return None
        try:
            tensors = load(path.read_bytes())
            ids, probs, rest = (tensors[name] for name in Likeliest._fields)
        except (SafetensorError, KeyError):
            logger.warning("%s is damaged; reading the target again", path)
            return None
        total = probs.float().sum(-1) + rest.float()
        if probs.shape != (len(answer.positions), self._top_k) or bool(((total - 1).abs() > 0.01).any()):
            logger.warning("%s holds no distributions of this answer; reading the target again", path)
            return None
        return Likeliest(ids.long(), probs.float() / total[:, None], rest.float() / total)

    def _read(self, answer: Answer) -> Likeliest:
        longest = self._target.config.max_position_embeddings
        if not len(answer.positions) or len(answer.token_ids) > longest:
            raise TextError(
                f"answer {answer.id!r} has {len(answer.token_ids)} tokens, {len(answer.positions)} of them chosen "
                f"after another; give one or more such, and at most {longest} in all"
            )
        with torch.inference_mode():
            logits = next_token_logits(self._target, answer, self.vocab_size)
            probs, ids = (logits / self.temperature).softmax(-1).topk(self._top_k)
        half = {"probs": probs.half(), "rest": (1 - probs.sum(-1)).clamp_min(0).half(), "ids": ids.int()}
        data = save({name: tensor.cpu().contiguous() for name, tensor in half.items()})
        with atomic_path(self._path(answer)) as temporary:
            temporary.write_bytes(data)
        kept = self._kept(answer)
        assert kept is not None, "what was just written can be read"
        return kept


def next_token_logits(model: PreTrainedModel, answer: Answer, vocab_size: int) -> Float[Tensor, "position vocab"]:
    """Float32 logits after each of the answer's positions, in one pass; gradients flow where they are enabled."""
    ids = torch.tensor([answer.token_ids], device=model.device)
    logits: Tensor = model(ids, use_cache=False, logits_to_keep=answer.positions.to(model.device)).logits
    return logits[0, :, :vocab_size].float()


def divergence(
    target: Likeliest, logits: Float[Tensor, "position vocab"], *, temperature: float = 1.0
) -> Float[Tensor, " position"]:
    """KL(target || draft) over the recorded tokens and one token that stands for all others, in nats.

    Lumping tokens together never makes it larger: it lies below the exact one by rest times the divergence within the
    rest.
    """
    probs, rest = target.probs.to(logits.device), target.rest.to(logits.device)
    log_draft = draft_log_probs(target, logits, temperature)
    log_rest = (1 - log_draft.exp().sum(-1)).clamp_min(SMALLEST_REST).log()
    negative_entropy = torch.xlogy(probs, probs).sum(-1) + torch.xlogy(rest, rest)
    return negative_entropy - (probs * log_draft).sum(-1) - rest * log_rest


def draft_log_probs(
    target: Likeliest, logits: Float[Tensor, "position vocab"], temperature: float
) -> Float[Tensor, "position top"]:
    """Log-probabilities that a draft gives to the target's likeliest tokens."""
    scaled = logits if temperature == 1.0 else logits / temperature
    chosen = scaled.gather(-1, target.ids.to(logits.device))
    return chosen - scaled.logsumexp(-1, keepdim=True)


def check_temperature(temperature: float) -> None:
    """Raises `SettingError` unless it is positive and finite."""
    if not 0.0 < temperature < float("inf"):
        raise SettingError(f"temperature {temperature} is not allowed; give a positive number, 1 for the model's own")
