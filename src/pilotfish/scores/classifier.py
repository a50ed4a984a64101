"""A small model and labelled texts in; what a classifier fine-tuned on them says of other texts out.

The baseline that costs a second model: a head is worth having when it comes near to it for nothing.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from pilotfish.core import Conversation, Site
from pilotfish.errors import LeakError, SettingError, TextError
from pilotfish.models import LoadedModel, family_of, num_layers, site_module
from pilotfish.runs import progress
from pilotfish.scores.metrics import auroc
from pilotfish.taps import Shelf, TokenRow, gather
from pilotfish.taps.hook import hook
from pilotfish.texts import TokenizedText, tokenize


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassifierConfig:
    num_blocks: int = 2
    """Last blocks that are trained, and the final norm with them; what lies below is run once a text."""
    max_tokens: int = 256
    """Longer texts are cut here."""
    max_steps: int = 300
    """Steps at most; the learning rates fall linearly to 0 over them."""
    batch_texts: int = 8
    """Texts a step."""
    learning_rate: float = 5e-5
    """Of AdamW for the blocks and the norm."""
    head_learning_rate: float = 2e-3
    """Of AdamW for the linear head on top, which starts at 0."""
    weight_decay: float = 0.01
    """Of AdamW."""
    evaluate_every: int = 50
    """Steps between two looks at the validation texts."""
    patience: int = 3
    """Looks without a better validation AUROC after which to stop."""

    def __post_init__(self) -> None:
        for name in ("num_blocks", "max_tokens", "max_steps", "batch_texts", "evaluate_every", "patience"):
            if getattr(self, name) < 1:
                raise SettingError(f"{name} is {getattr(self, name)}; give 1 or more")
        for name in ("learning_rate", "head_learning_rate"):
            if not 0.0 < getattr(self, name) < math.inf:
                raise SettingError(f"{name} is {getattr(self, name)}; give a positive number")
        if not 0.0 <= self.weight_decay < math.inf:
            raise SettingError(f"weight_decay is {self.weight_decay}; give 0 or more")

    def site(self, model: PreTrainedModel) -> Site:
        """Where the trained blocks begin; what is recorded there is all that is read of the model.

        Raises:
            SettingError: the model has fewer blocks than are to be trained.
        """
        depth = num_layers(model)
        if self.num_blocks > depth:
            raise SettingError(f"num_blocks is {self.num_blocks}; the model has {depth} blocks, so give 1 to {depth}")
        return Site(depth - self.num_blocks, "resid_pre")


class LabelledTexts(NamedTuple):
    texts: Sequence[Conversation]
    labels: Float[Tensor, " text"]
    """Of whole responses, in [0, 1]; 0.5 and more count as positive, NaN is unlabelled and left out."""


def fine_tuned_scores(
    reader: LoadedModel,
    train: LabelledTexts,
    *,
    validation: LabelledTexts,
    test: Sequence[Conversation],
    config: ClassifierConfig,
    work_folder: Path,
    generator: torch.Generator,
) -> Float[Tensor, " test"]:
    """Probability (float64) of every test text from the last blocks of a model, fine-tuned with a linear head on top.

    The head reads the mean of the final norm's states over the assistant's tokens (over all tokens where no assistant
    speaks, or the cut left none). The loss is cross-entropy, positives weighing as much as negatives in total. The step
    with the best validation AUROC is kept. What is trained is a copy in float32: the caller's model stays as it is. The
    same generator state gives the same scores.

    Args:
        work_folder: Keeps the states at `config.site`, 2 bytes a token and hidden unit in bfloat16; texts that
            `gather` has recorded there before are not read again.

    Raises:
        TextError: training or validation texts lack positive or negative ones; see also `tokenize`.
        SettingError: labels and texts differ in number, or the model has fewer blocks than are to be trained.
        LeakError: a group stands on two sides.
    """
    site = config.site(reader.model)
    train, validation = _known(train, "training"), _known(validation, "validation")
    sides = {"train": train.texts, "validation": validation.texts, "test": test}
    _check_groups(sides)
    if not test:
        return torch.zeros(0, dtype=torch.float64)
    inputs = {
        name: [_input(f"{name} {row}", text, reader, config.max_tokens) for row, text in enumerate(texts)]
        for name, texts in sides.items()
    }
    rows = [each.row for side in inputs.values() for each in side]
    shelf = gather(reader.model, (site,), rows, work_folder, identity_hash=reader.identity.weights)
    data = {name: _Data(shelf, side, config.batch_texts) for name, side in inputs.items()}
    classifier = _Classifier(reader.model, site)
    _train(classifier, data, (train.labels, validation.labels), config, generator)
    return torch.sigmoid(_logits(classifier, data["test"]))


def _known(given: LabelledTexts, what: str) -> LabelledTexts:
    texts, labels = given
    if len(texts) != len(labels):
        raise SettingError(f"there are {len(texts)} {what} texts but {len(labels)} labels; give one a text")
    known = labels.isfinite()
    num_positive, num_known = int((labels >= 0.5).sum()), int(known.sum())
    if not 0 < num_positive < num_known:
        raise TextError(
            f"a classifier needs positive and negative {what} texts; given were {num_positive} positive, "
            f"{num_known - num_positive} negative"
        )
    return LabelledTexts([texts[row] for row in known.nonzero()[:, 0].tolist()], labels[known].float())


def _check_groups(sides: Mapping[str, Sequence[Conversation]]) -> None:
    side_of: dict[str, str] = {}
    for name, texts in sides.items():
        for text in texts:
            if side_of.setdefault(text.group, name) != name:
                raise LeakError(
                    f"the group {text.group!r} of conversation {text.id!r} stands in {name} and in "
                    f"{side_of[text.group]}; pool the rows and use `split`"
                )


class _Input(NamedTuple):
    row: TokenRow
    is_pooled: Bool[Tensor, " token"]


def _input(row_id: str, text: Conversation, reader: LoadedModel, max_tokens: int) -> _Input:
    tokens = tokenize(text, reader.tokenizer, max_tokens=max_tokens)
    return _Input(TokenRow(row_id, tuple(tokens.token_ids)), _is_pooled(text, tokens))


def _is_pooled(text: Conversation, tokens: TokenizedText) -> Bool[Tensor, " token"]:
    assistant = [index for index, message in enumerate(text.messages) if message.role == "assistant"]
    chosen = torch.isin(torch.tensor(tokens.messages), torch.tensor(assistant, dtype=torch.long))
    return chosen if bool(chosen.any()) else torch.ones_like(chosen)


class _Batch(NamedTuple):
    states: Float[Tensor, "text token hidden"]
    """Float32, padded at the end: under causal attention no real token sees it."""
    is_pooled: Bool[Tensor, "text token"]


class _Data:
    """One side's recorded states in padded batches."""

    def __init__(self, shelf: Shelf, inputs: Sequence[_Input], batch_texts: int) -> None:
        self._shelf, self._inputs, self._batch_texts = shelf, inputs, batch_texts

    def __len__(self) -> int:
        return len(self._inputs)

    def batch(self, rows: Sequence[int]) -> _Batch:
        chosen = [self._inputs[row] for row in rows]
        states = [self._shelf.features(each.row.id).float() for each in chosen]
        return _Batch(*(pad_sequence(part, batch_first=True) for part in (states, [each.is_pooled for each in chosen])))

    def in_order(self) -> Iterator[_Batch]:
        for start in range(0, len(self), self._batch_texts):
            yield self.batch(range(start, min(start + self._batch_texts, len(self))))


class _Skip(nn.Module):
    """Stands where a block is not needed, so that those above it keep their numbers."""

    def forward(self, hidden: Tensor, *_: object, **__: object) -> Tensor:
        return hidden


class _Classifier(nn.Module):
    """A float32 copy of a model from a site upwards, its final norm included, and a linear head on the mean state."""

    def __init__(self, model: PreTrainedModel, site: Site) -> None:
        super().__init__()
        blocks: nn.ModuleList = model.get_submodule(family_of(model).blocks)  # type: ignore[assignment]
        left_out = [*blocks[: site.layer], model.get_input_embeddings(), model.get_output_embeddings()]  # type: ignore[no-untyped-call]
        self.model = copy.deepcopy(model, {id(module): _Skip() for module in left_out})
        self.model.float().requires_grad_(True)  # type: ignore[no-untyped-call]
        self.site = site
        self.weight = nn.Parameter(torch.zeros(model.config.hidden_size, device=model.device))
        self.bias = nn.Parameter(torch.zeros((), device=model.device))

    def forward(self, batch: _Batch) -> Float[Tensor, " text"]:
        states, is_pooled = (part.to(self.weight.device) for part in batch)
        # written where the recording was read: some families add positions to their inputs first
        entering = hook(site_module(self.model, self.site), self.site, lambda _: states)
        try:
            final = self.model.base_model(inputs_embeds=states, use_cache=False).last_hidden_state
        finally:
            entering.remove()
        mean = (final * is_pooled[..., None]).sum(1) / is_pooled.sum(1, keepdim=True)
        logits: Tensor = mean @ self.weight + self.bias
        return logits


def _train(
    classifier: _Classifier,
    data: Mapping[str, _Data],
    labels: tuple[Float[Tensor, " train"], Float[Tensor, " validation"]],
    config: ClassifierConfig,
    generator: torch.Generator,
) -> None:
    """Leaves the classifier as it was at its best look at the validation texts."""
    targets, held_out = labels
    share = float(targets.mean())
    weight = torch.tensor((1 - share) / share)
    optimizer = _optimizer(classifier, config)
    falling = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=config.max_steps)
    batches = _shuffled(len(targets), config.batch_texts, generator)
    best, best_state, looks_since = -math.inf, {}, 0
    for step in progress(range(1, config.max_steps + 1), "fine-tuning"):
        rows = next(batches)
        logits = classifier(data["train"].batch(rows)).cpu()
        loss = nn.functional.binary_cross_entropy_with_logits(logits, targets[rows], pos_weight=weight)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(classifier.parameters(), 1.0)
        optimizer.step()
        falling.step()
        if step % config.evaluate_every and step < config.max_steps:
            continue
        quality = auroc(_logits(classifier, data["validation"]), held_out)
        looks_since += 1
        if quality > best:
            best, best_state, looks_since = quality, copy.deepcopy(classifier.state_dict()), 0
        if looks_since >= config.patience:
            break
    classifier.load_state_dict(best_state)


def _optimizer(classifier: _Classifier, config: ClassifierConfig) -> torch.optim.Optimizer:
    groups = [
        {"params": list(classifier.model.parameters()), "lr": config.learning_rate},
        {"params": [classifier.weight, classifier.bias], "lr": config.head_learning_rate},
    ]
    return torch.optim.AdamW(groups, weight_decay=config.weight_decay)


def _shuffled(count: int, size: int, generator: torch.Generator) -> Iterator[list[int]]:
    """Batches of rows, without end; each row once a pass."""
    while True:
        for part in torch.randperm(count, generator=generator).split(size):  # type: ignore[no-untyped-call]
            yield part.tolist()


@torch.inference_mode()
def _logits(classifier: _Classifier, data: _Data) -> Float[Tensor, " text"]:
    return torch.cat([classifier(batch).cpu() for batch in data.in_order()]).double()
