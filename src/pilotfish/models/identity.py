"""A model and its tokenizer, loaded or on disk, in; what tells them from all others out."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from pilotfish.errors import WeightsError
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
        weights=_hash_of_weights(sorted(model.named_parameters())),
        tokenizer=_hash_of_tokenizer(tokenizer),
        hidden_size=model.config.hidden_size,
        num_layers=num_layers(model),
        vocab_size=model.config.vocab_size,
    )


def identify_folder(folder: Path, name: str) -> Identity:
    """The identity of a model that transformers has saved, without loading it: only sampled pages are read.

    Raises:
        WeightsError: the folder holds no such model.
    """
    try:
        config = AutoConfig.from_pretrained(folder).get_text_config()
        tokenizer = AutoTokenizer.from_pretrained(folder)
        weights = _hash_of_weights(_stored_parameters(folder, is_tied=config.tie_word_embeddings))
    except (OSError, SafetensorError, ValueError) as error:
        raise WeightsError(f"{folder} holds no model in safetensors that can be read: {error}") from error
    return Identity(
        name=name,
        weights=weights,
        tokenizer=_hash_of_tokenizer(tokenizer),
        hidden_size=config.hidden_size,
        num_layers=config.num_hidden_layers,
        vocab_size=config.vocab_size,
    )


def _stored_parameters(folder: Path, *, is_tied: bool) -> Iterator[tuple[str, Tensor]]:
    """As a loaded model names them: one that is tied has no output layer of its own."""
    paths = sorted(folder.glob("*.safetensors"))
    if not paths:
        raise OSError("no *.safetensors file is there")
    with ExitStack() as stack:
        files = [stack.enter_context(safe_open(path, framework="pt")) for path in paths]
        where = {key: file for file in files for key in file.keys()}  # noqa: SIM118
        if is_tied:
            where.pop("lm_head.weight", None)
        for key in sorted(where):  # one at a time
            yield key, where[key].get_tensor(key)


def _hash_of_weights(parameters: Iterable[tuple[str, Tensor]]) -> str:
    """Of parameters in the order of their names."""
    digest = hashlib.sha256()
    for name, parameter in parameters:
        digest.update(f"{name}{tuple(parameter.shape)}".encode())
        flat = parameter.detach().reshape(-1)
        step = max(1, flat.numel() // SAMPLES_PER_PARAMETER)
        sample = flat[::step][:SAMPLES_PER_PARAMETER].to("cpu", torch.bfloat16)
        digest.update(sample.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()


def _hash_of_tokenizer(tokenizer: PreTrainedTokenizerBase) -> str:
    probe = tokenizer(PROBE_TEXT)["input_ids"]
    return hashlib.sha256(json.dumps([sorted(tokenizer.get_vocab().items()), probe]).encode()).hexdigest()
