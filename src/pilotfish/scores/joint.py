"""A pair, labelled texts and answers of the target in; a draft tuned for its heads and for speculation at once out.

Two losses pull on low-rank adapters: that of a head which reads the draft, and KL(target || draft) on the target's own
answers. The first makes states easier to read, the second keeps what the draft proposes acceptable. Sources: Obeso et
al. (arXiv 2509.03531) train adapters and head together, with KL to the untuned model; here it is to the target, as in
DistillSpec (arXiv 2310.08461), since that is what acceptance depends on.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from pilotfish.core import Conversation, Site
from pilotfish.errors import SettingError
from pilotfish.heads import Example, FitConfig, FitResult, Form, fit
from pilotfish.heads.examples import Batch, Rows, chosen_row
from pilotfish.heads.fit import LabelWeights, head_loss, label_weights
from pilotfish.heads.readout import Readout
from pilotfish.models import LoadedModel, Pair, evenly_spaced_sites, site_module
from pilotfish.runs import progress
from pilotfish.scores.adapter import Adapted, AdapterConfig, adapted, require_peft
from pilotfish.scores.distillation import (
    Answer,
    TargetRecording,
    answer_of,
    check_temperature,
    divergence,
    next_token_logits,
)
from pilotfish.scores.fitted import Reading
from pilotfish.scores.metrics import auroc, has_both_labels
from pilotfish.scores.prepared import Text, prepare, response_labels
from pilotfish.taps.hook import hook
from pilotfish.texts import check_leak

LARGEST_GRADIENT = 1.0
"""Norm over all adapters to which a step's gradient is cut."""


@dataclass(frozen=True, slots=True, kw_only=True)
class JointConfig:
    distill: float = 0.5
    """Share of the loss that goes to agreement with the target, in [0, 1]; the rest goes to the head."""
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    learning_rate: float = 4e-4
    """Of Adam for the adapters; falls linearly to 0 over the steps."""
    steps: int = 200
    """Steps of training."""
    batch_tokens: int = 256
    """Tokens of labelled texts a step, whole texts, twins together."""
    answer_tokens: int = 128
    """Tokens of answers a step, whole answers."""
    max_tokens: int = 256
    """Longer labelled texts are cut here."""
    num_sites: int = 5
    """Places that the head reads, as in the recipe that will judge."""
    top_k: int = 64
    """Likeliest tokens that are kept of each of the target's distributions."""
    temperature: float = 1.0
    """At which the two distributions are held against each other."""
    fit: FitConfig = field(default_factory=FitConfig)
    """Of the head on the untuned draft, with which tuning starts; its losses are gone on with."""

    def __post_init__(self) -> None:
        if not 0.0 <= self.distill <= 1.0:
            raise SettingError(
                f"distill {self.distill} is outside [0, 1]; 0 trains for the head alone, 1 for the target"
            )
        for name in ("steps", "batch_tokens", "answer_tokens", "max_tokens", "num_sites"):
            if getattr(self, name) < 1:
                raise SettingError(f"{name} is {getattr(self, name)}; give 1 or more")
        if not 0.0 < self.learning_rate < float("inf"):
            raise SettingError(f"learning rate {self.learning_rate} is not a positive number; 1e-4 is the default")
        check_temperature(self.temperature)


class Lessons(NamedTuple):
    """What a draft is tuned on."""

    metric: str
    splits: Mapping[str, Sequence[Conversation]]
    """`train`, and `validation`, on which the head that tuning starts with is chosen; others are not looked at."""
    answers: Sequence[Answer]
    """The target's own; none is needed where `distill` is 0."""


class JointLoss(NamedTuple):
    """Means over one step, before they are mixed; 0 for one that has no weight."""

    head: float
    divergence: float
    """Nats a token."""


class Tuned(NamedTuple):
    model: PreTrainedModel
    """Plain weights, the adapters merged in; those without an adapter are shared with the pair's draft."""
    readout: Readout
    """The head as it was trained beside; for a bank, run the recipe on the model."""
    history: tuple[JointLoss, ...]
    """Of each step, on its training texts."""


def tune(pair: Pair, lessons: Lessons, *, config: JointConfig, work_folder: Path, generator: torch.Generator) -> Tuned:
    """Trains adapters on the draft, and a head that reads it, together; the pair is left as it is.

    The head starts as the recipe would fit it on the untuned draft. How good the result is must be asked of the recipe
    (`build_bank`) and of `acceptance` on answers that stand apart: the losses here are of training texts. The same
    generator state gives the same weights on one machine with one number of threads.

    Args:
        work_folder: Keeps recorded activations of the draft and distributions of the target, which other mixing weights
            then find there.

    Raises:
        SettingError: the pair has no draft, there are no answers to distil from, or peft is not installed.
        TextError, LeakError, ArtefactError: as for `build_bank`; an answer that the target cannot read.
    """
    draft = draft_of(pair)
    require_peft()
    if config.distill > 0 and not lessons.answers:
        raise SettingError("there are no answers of the target to distil from; give some, or set distill to 0")
    sides = {name: lessons.splits[name] for name in ("train", "validation")}
    check_leak(sides)
    texts = {name: prepare(rows, draft, lessons.metric, config.max_tokens) for name, rows in sides.items()}
    head = _first_head(texts, draft, config, work_folder, generator)
    units = _twins_together(texts["train"])
    steps = _schedule(units, [[answer] for answer in lessons.answers], config, generator)
    recorded = TargetRecording(pair, work_folder / "target", top_k=config.top_k, temperature=config.temperature)
    if config.distill > 0:
        recorded.fill(_distinct(steps))
    trainer = Trainer(adapted(draft.model, config.adapter, generator=generator), head, recorded, config)
    history = [trainer.step(batch, 1 - i / config.steps) for i, batch in enumerate(progress(steps, "tuning"))]
    return Tuned(trainer.adapted.merged(), head.readout, tuple(history))


def draft_of(pair: Pair) -> LoadedModel:
    """Raises `SettingError` where the pair has none."""
    if pair.draft is None or pair.draft_identity is None:
        raise SettingError(f"{pair.target_identity.name} has no draft to tune; name one of its family")
    return LoadedModel(pair.draft, pair.tokenizer, pair.draft_identity, "the pair's draft")


class Lesson(NamedTuple):
    """A labelled text."""

    text: Answer
    example: Example


class Step(NamedTuple):
    """The texts of one step."""

    lessons: tuple[Lesson, ...]
    answers: tuple[Answer, ...]


class FirstHead(NamedTuple):
    """A head on the untuned draft, ready to be trained on."""

    readout: Readout
    sites: tuple[Site, ...]
    weights: LabelWeights
    decay: Float[Tensor, "channel 1"]
    """Of weights, a step and unit of learning rate, as validation chose it for each channel."""


class Trainer:
    """The loop's state: adapters, readout, and an optimiser over both."""

    def __init__(self, adapted: Adapted, head: FirstHead, recorded: TargetRecording, config: JointConfig) -> None:
        self.adapted, self.head, self._recorded, self._config = adapted, head, recorded, config
        self._parameters = adapted.parameters()
        groups = [
            {"params": self._parameters, "rate": config.learning_rate},
            {"params": list(head.readout.parameters()), "rate": config.fit.learning_rate},
        ]
        self._optimizer = torch.optim.Adam(groups)

    def step(self, batch: Step, pace: float) -> JointLoss:
        """One step at a share of the learning rates; its losses are those before it."""
        self._optimizer.zero_grad()
        loss = self.backward(batch)
        nn.utils.clip_grad_norm_(self._parameters, LARGEST_GRADIENT)
        for group in self._optimizer.param_groups:
            group["lr"] = pace * group["rate"]
        if self._config.distill < 1:
            with torch.no_grad():  # by hand, as in the fit: Adam's own would be one for all channels
                self.head.readout.weight.mul_(1 - pace * self._config.fit.learning_rate * self.head.decay)
        self._optimizer.step()
        return loss

    def backward(self, batch: Step) -> JointLoss:
        """Adds the gradients of the mixed loss; answers go one by one, so that the labelled texts bound the memory."""
        share = self._config.distill
        texts = [lesson.text for lesson in batch.lessons]
        num_positions = sum(len(text.positions) for text in (*texts, *batch.answers))
        total = 0.0
        if share > 0:
            for answer in batch.answers:
                loss = share * self._read(answer).divergence.sum() / num_positions
                loss.backward()  # type: ignore[no-untyped-call]
                total += float(loss.detach()) / share
        read = [self._read(text) for text in texts]
        distance = torch.stack([each.divergence.sum() for each in read]).sum() / num_positions
        head = self._head_loss(batch.lessons, read) if share < 1 else distance.new_zeros(())
        mixed = (1 - share) * head.to(distance.device) + share * distance
        if mixed.requires_grad:  # texts without a label of the kind that the head is trained on ask for nothing
            mixed.backward()  # type: ignore[no-untyped-call]
        return JointLoss(float(head.detach()), total + float(distance.detach()))

    def _head_loss(self, lessons: Sequence[Lesson], read: Sequence[_Read]) -> Float[Tensor, ""]:
        window = self.head.readout.form.window
        rows = [chosen_row(each.features, lesson.example, window) for each, lesson in zip(read, lessons, strict=True)]
        rows = [row for row in rows if len(row.labels)]
        batch = Batch(torch.cat([row.features for row in rows]), rows)
        return head_loss(self.head.readout, batch, self._config.fit, self.head.weights).sum()

    def _read(self, text: Answer) -> _Read:
        """One pass of the adapted draft, with its gradients."""
        model, found = self.adapted.model, dict[Site, Tensor]()
        with ExitStack() as hooks:
            for site in self.head.sites:
                hooks.callback(hook(site_module(model, site), site, partial(found.__setitem__, site)).remove)
            if self._config.distill > 0:
                logits = next_token_logits(model, text, self._recorded.vocab_size)
                distance = divergence(self._recorded.of(text), logits, temperature=self._config.temperature)
            else:
                model.base_model(torch.tensor([text.token_ids], device=model.device), use_cache=False)
                distance = torch.zeros(1, device=model.device)
        features = torch.cat([found[site][0] for site in self.head.sites], dim=-1).float().cpu()
        return _Read(features, distance)


class _Read(NamedTuple):
    features: Float[Tensor, "token feature"]
    divergence: Float[Tensor, " position"]


def _first_head(
    texts: Mapping[str, Sequence[Text]],
    draft: LoadedModel,
    config: JointConfig,
    work_folder: Path,
    generator: torch.Generator,
) -> FirstHead:
    sites = evenly_spaced_sites(draft.model, config.num_sites)
    fitting = replace(config.fit, form=_form(texts.values(), config.fit.form))
    reading = Reading(draft, sites, work_folder)
    train, validation = (reading.of(texts[name]) for name in ("train", "validation"))
    examples = {text.tokens.id: text.example for part in texts.values() for text in part}
    result = fit(train, validation, examples, config=fitting, quality=auroc, generator=generator)
    rows = Rows(train, examples, batch_tokens=fitting.batch_tokens, window=fitting.form.window)
    readout = _readout(result, *rows.standardiser(), generator)
    return FirstHead(readout, sites, label_weights(train, validation, examples, fitting), _decay(result))


def _form(sides: Iterable[Sequence[Text]], form: Form) -> Form:
    """As the recipe has it: a linear head has one channel where only one kind of label is there."""
    has_all = all(
        has_both_labels(labels)
        for side in sides
        for labels in (torch.cat([text.labels for text in side]), response_labels(side))
    )
    return form if has_all or form.kind != "linear" else replace(form, width=1)


def _readout(
    result: FitResult, mean: Float[Tensor, " feature"], inverse_std: Float[Tensor, " feature"], random: torch.Generator
) -> Readout:
    """The fitted head as it was while it was trained: for standardised features."""
    readout = Readout(result.form, mean, inverse_std, 1, generator=random)
    with torch.no_grad():
        readout.weight.copy_(torch.where(inverse_std > 0, result.weight / inverse_std, 0.0))
        readout.bias.copy_(result.bias + result.weight @ mean)
        readout.outputs.copy_(result.outputs)
    return readout


def _decay(result: FitResult) -> Float[Tensor, "channel 1"]:
    parts = [result.chosen.get(name, result.chosen.get("both")) for name in ("token", "response")]
    first, other = (part.weight_decay for part in parts if part is not None)
    return torch.tensor([first] + [other] * (result.form.num_channels - 1))[:, None]


def _twins_together(texts: Sequence[Text]) -> list[list[Lesson]]:
    units: dict[str, list[Lesson]] = {}
    for text in texts:
        example = text.example
        units.setdefault(example.twin, []).append(Lesson(answer_of(text), example))
    return list(units.values())


def _schedule(
    lessons: Sequence[Sequence[Lesson]],
    answers: Sequence[Sequence[Answer]],
    config: JointConfig,
    random: torch.Generator,
) -> list[Step]:
    """What each step reads; known beforehand, so that the target need not read more."""
    labelled = _batches(lessons, config.batch_tokens, random)
    own = _batches(answers, config.answer_tokens, random) if config.distill > 0 else None
    return [Step(tuple(next(labelled)), () if own is None else tuple(next(own))) for _ in range(config.steps)]


Item = TypeVar("Item", Lesson, Answer)


def _batches(units: Sequence[Sequence[Item]], size: int, random: torch.Generator) -> Iterator[list[Item]]:
    """Whole units of so many tokens or a little more, without end; each unit once a pass."""
    batch: list[Item] = []
    while True:
        for index in torch.randperm(len(units), generator=random).tolist():
            batch += units[index]
            if sum(map(_num_tokens, batch)) >= size:
                yield batch
                batch = []


def _num_tokens(item: Lesson | Answer) -> int:
    return len((item.text if isinstance(item, Lesson) else item).token_ids)


def _distinct(steps: Sequence[Step]) -> list[Answer]:
    texts = [text for step in steps for text in (*(lesson.text for lesson in step.lessons), *step.answers)]
    return list({text.token_ids: text for text in texts}.values())
