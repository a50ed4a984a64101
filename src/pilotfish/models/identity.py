"""A model and its tokenizer in, what tells them from all others out."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pilotfish.models.families import num_layers

SAMPLES_PER_PARAMETER = 64
PROBE_TEXT = "def f(x):\n\treturn x == 10  # naïve 💡 <|im_end|>"


@dataclass(frozen=True, slots=True)
class Identity:
    """What a bank remembers of the model it was made for."""

    name: str
    """For people; two identities are the same model when everything but the name agrees."""
    weights: str
    """SHA-256 over a sample of every parameter, rounded to bfloat16, so that loading in float32 changes nothing."""
    tokenizer: str
    """SHA-256 over the vocabulary and the ids of a fixed probe text."""
    hidden_size: int
    num_layers: int
    vocab_size: int
    """Width of the logits, padding rows included."""


def identify(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str) -> Identity:
    """Fingerprints a model and its tokenizer; takes well under a second, since it samples the weights.

    Raises:
        UnknownFamily: the model has no row in the family table.
    """
    return Identity(
        name=name,
        weights=_hash_of_weights(model),
        tokenizer=_hash_of_tokenizer(tokenizer),
        hidden_size=model.config.hidden_size,
        num_layers=num_layers(model),
        vocab_size=model.config.vocab_size,
    )


def _hash_of_weights(model: PreTrainedModel) -> str:
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        digest.update(f"{name}{tuple(parameter.shape)}".encode())
        flat = parameter.detach().reshape(-1)
        step = max(1, flat.numel() // SAMPLES_PER_PARAMETER)
        sample = flat[::step][:SAMPLES_PER_PARAMETER].to("cpu", torch.bfloat16)
        digest.update(sample.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()


def _hash_of_tokenizer(tokenizer: PreTrainedTokenizerBase) -> str:
    probe = tokenizer(PROBE_TEXT)["input_ids"]
    return hashlib.sha256(json.dumps([sorted(tokenizer.get_vocab().items()), probe]).encode()).hexdigest()
