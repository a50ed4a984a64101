"""A name in, a loaded model or target-draft pair out."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from pilotfish.errors import PairMismatch, SettingError, WeightsError
from pilotfish.models.families import family_named
from pilotfish.models.identity import Identity, identify
from pilotfish.models.weights import resolve
from pilotfish.runs import Device, resolve_device

logger = logging.getLogger(__name__)

DEMO_PAIRS: dict[str, tuple[str, str | None]] = {
    "demo:qwen-coder": ("demo:qwen-coder-1.5b", "demo:qwen-coder-0.5b"),
    "demo:smollm2": ("demo:smollm2", None),  # it has no smaller sibling
}
"""Name of a demo pair to the names of its target and draft."""

END_TOKENS = ("<|im_end|>", "<|endoftext|>")
"""Special tokens that end a turn wherever a vocabulary has them; a GGUF file keeps only one EOS id of several."""


class LoadedModel(NamedTuple):
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    identity: Identity
    reason: str
    """Why it runs on this device in this dtype."""


@dataclass(frozen=True, eq=False)
class Pair:
    """A target, its draft and the tokenizer that they share.

    Raises:
        PairMismatch: a token id means different things to the two.
    """

    target: PreTrainedModel
    draft: PreTrainedModel | None
    """None where the target has no smaller sibling: the heads then read the target."""
    tokenizer: PreTrainedTokenizerBase
    target_identity: Identity
    draft_identity: Identity | None

    def __post_init__(self) -> None:
        assert (self.draft is None) == (self.draft_identity is None), "a draft comes with its identity"
        top = max(self.tokenizer.get_vocab().values())
        if top >= self.vocab_size:
            raise PairMismatch(
                f"token id {top} of the tokenizer is outside the logits ({self.vocab_size} wide); "
                "use the tokenizer of the models"
            )

    @property
    def reader_identity(self) -> Identity:
        """Of the model whose states the heads read: the draft, or the target where there is none."""
        return self.draft_identity or self.target_identity

    @property
    def vocab_size(self) -> int:
        """Logits that both models have; models of one vocabulary may pad their logits to different widths."""
        return min(identity.vocab_size for identity in (self.target_identity, self.draft_identity) if identity)

    @property
    def eos_ids(self) -> frozenset[int]:
        """Token ids at which a generation ends."""
        configured = self.target.generation_config.eos_token_id if self.target.generation_config else None
        ids = configured if isinstance(configured, list) else [configured]
        special = self.tokenizer.added_tokens_encoder
        return frozenset(i for i in (*ids, self.tokenizer.eos_token_id, *map(special.get, END_TOKENS)) if i is not None)


def load_pair(name: str, *, draft: str | None = None, device: str = "auto", dtype: str = "auto") -> Pair:
    """Loads a demo pair by its name, or any target with a draft of your choice.

    Raises:
        PairMismatch: the two do not share a vocabulary.
        WeightsError, UnknownFamily: as for `load_model`.
    """
    target_name, own_draft = DEMO_PAIRS.get(name, (name, None))
    draft_name = draft or own_draft
    target = load_model(target_name, device=device, dtype=dtype)
    logger.info("%s: %s", target_name, target.reason)
    if draft_name is None:
        return Pair(target.model, None, target.tokenizer, target.identity, None)
    reader = load_model(draft_name, device=device, dtype=dtype)
    check_same_vocabulary(target, reader)
    return Pair(target.model, reader.model, target.tokenizer, target.identity, reader.identity)


def check_same_vocabulary(target: LoadedModel, draft: LoadedModel) -> None:
    """Refuses a draft that gives another meaning to any token id.

    Raises:
        PairMismatch: names the first differences and both sizes.
    """
    ours, theirs = target.tokenizer.get_vocab(), draft.tokenizer.get_vocab()
    if ours == theirs:
        return
    tokens = sorted({*ours, *theirs}, key=lambda token: (ours.get(token, len(ours)), token))
    differing = (
        f"{token!r} is {ours.get(token)} / {theirs.get(token)}"
        for token in tokens
        if ours.get(token) != theirs.get(token)
    )
    raise PairMismatch(
        f"target {target.identity.name} ({len(ours)} tokens) and draft {draft.identity.name} ({len(theirs)} tokens) "
        f"do not share a vocabulary: {'; '.join(islice(differing, 3))}. Take a draft of the target's family, or none"
    )


def load_model(name: str, *, device: str = "auto", dtype: str = "auto") -> LoadedModel:
    """Loads a model and its tokenizer from a local folder, a `demo:` name or a hub name.

    Raises:
        UnknownFamily: the architecture has no row in the family table; found before any weight is read.
        WeightsError: the files cannot be had, are damaged, or lack some of the weights.
        SettingError: the device or dtype is unknown, or the name is of a pair.
    """
    if name in DEMO_PAIRS and DEMO_PAIRS[name][0] != name:
        raise SettingError(f"{name} is a pair; for one model use {' or '.join(filter(None, DEMO_PAIRS[name]))}")
    where = resolve_device(device, dtype)
    folder = resolve(name)
    try:
        family_named(AutoConfig.from_pretrained(folder).model_type)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = _read_weights(folder, where)
    except (OSError, SafetensorError, ValueError) as error:
        raise WeightsError(
            f"{folder} holds no model that can be loaded: {error}. Fetch it again, or name another folder"
        ) from error
    return LoadedModel(model, tokenizer, identify(model, tokenizer, name), where.reason)


def _read_weights(folder: Path, where: Device) -> PreTrainedModel:
    with _bars_on_terminals_only():
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=where.dtype, output_loading_info=True, use_safetensors=True
        )
    model, info = loaded
    lacking = sorted({*info["missing_keys"], *(str(key) for key in info["mismatched_keys"])})
    if lacking:
        raise WeightsError(
            f"{folder} lacks weights or has them in another shape: {', '.join(lacking[:3])}. Fetch the model again"
        )
    moved: PreTrainedModel = model.to(where.device).eval()
    return moved


@contextlib.contextmanager
def _bars_on_terminals_only() -> Iterator[None]:
    bars: Any = transformers_logging  # unannotated
    was_enabled = bars.is_progress_bar_enabled()
    if not sys.stderr.isatty():
        bars.disable_progress_bar()
    try:
        yield
    finally:
        if was_enabled:
            bars.enable_progress_bar()
