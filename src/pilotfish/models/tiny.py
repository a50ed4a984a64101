"""A seed in, a model of a few thousand weights out: real architectures and a real tokenizer for tests and examples."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from pilotfish.errors import SettingError
from pilotfish.models.families import family_named
from pilotfish.models.identity import identify
from pilotfish.models.pair import Pair
from pilotfish.runs import generator

CONTEXT = 512
"""Longest sequence of a tiny model, in tokens."""

_WORDS = "user system assistant Ġthe Ġand Ġto Ġof Ġis return Ġreturn def import print Ġ= == ĠĠĠĠ ing er".split()  # noqa: SIM905
"""What merges into tokens, in byte-level spelling (Ġ is a space)."""

_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_DRAFT_NOISE = 0.05
"""Standard deviation of what sets the tiny draft apart from its target, relative to the weights'."""


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of 316 tokens: every text round-trips, some words merge, it has a chat template."""
    merges = [(word[:i], word[i]) for word in _WORDS for i in range(1, len(word))]
    pieces = dict.fromkeys([*sorted(pre_tokenizers.ByteLevel.alphabet()), *map("".join, merges)])
    backend = Tokenizer(
        models.BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=list(dict.fromkeys(merges)))
    )
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in _SPECIAL])
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]  # transformers leaves it unannotated
        tokenizer_object=backend,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=_CHAT_TEMPLATE,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def tiny_model(
    family: str, *, seed: int, num_layers: int = 3, hidden: int = 32, vocab_size: int | None = None
) -> PreTrainedModel:
    """A model of any row of the family table, in float32, with weights drawn from the seed.

    Args:
        hidden: Width of the residual stream; a multiple of 16.
        vocab_size: Width of the logits. By default that of `tiny_tokenizer`, whose EOS then ends a generation.

    Raises:
        UnknownFamily: there is no such row.
        SettingError: the width does not fit.
    """
    family_named(family)
    if hidden <= 0 or hidden % 16:
        raise SettingError(f"hidden size {hidden} is not a multiple of 16, which four rotary heads need")
    tokenizer = tiny_tokenizer()
    config = AutoConfig.for_model(
        family,
        hidden_size=hidden,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        max_position_embeddings=CONTEXT,
        vocab_size=vocab_size or len(tokenizer),
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id if vocab_size is None else None,
        pad_token_id=tokenizer.pad_token_id if vocab_size is None else None,
        **_extra_sizes(family, hidden),
    )
    with torch.random.fork_rng(devices=[]):  # its construction draws from the global generator, only to be overwritten
        build: Callable[..., PreTrainedModel] = AutoModelForCausalLM.from_config
        model = build(config, dtype=torch.float32)
    _draw_weights(model, generator(seed, f"tiny/{family}"))
    model.train(False)
    return model


def tiny_pair(*, seed: int) -> Pair:
    """A Llama pair whose draft is the target with noise on its weights, so that some drafted tokens are accepted."""
    tokenizer = tiny_tokenizer()
    target = tiny_model("llama", seed=seed)
    draft = copy.deepcopy(target)
    stream = generator(seed, "tiny/draft")
    with torch.no_grad():
        for parameter in draft.parameters():
            parameter.add_(_DRAFT_NOISE * parameter.std() * torch.randn(parameter.shape, generator=stream))
    names = (f"tiny-llama-{seed}", f"tiny-llama-{seed}-draft")
    return Pair(target, draft, tokenizer, identify(target, tokenizer, names[0]), identify(draft, tokenizer, names[1]))


def _draw_weights(model: PreTrainedModel, stream: torch.Generator) -> None:
    """Matrices at unit gain, logits peaked enough for a clear greedy choice, norms and biases near their start."""
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=stream)
            if parameter.ndim == 1:
                parameter.add_(0.1 * noise)
            else:
                parameter.copy_(noise / parameter.shape[-1] ** 0.5)
        output: Any = model.get_output_embeddings()  # type: ignore[no-untyped-call]  # transformers leaves it unannotated
        output.weight.mul_(3.0)


def _extra_sizes(family: str, hidden: int) -> dict[str, Any]:
    """What the config classes do not have in common."""
    if family == "gpt2":
        return {}
    if family == "gpt_neox":
        rope = {"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 0.5}
        return {"intermediate_size": 2 * hidden, "rope_parameters": rope}
    sizes = {"intermediate_size": 2 * hidden, "num_key_value_heads": 2, "head_dim": hidden // 4}
    return sizes | ({"sliding_window": 64} if family == "gemma3_text" else {})
