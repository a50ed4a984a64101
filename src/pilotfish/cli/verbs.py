"""The settings of each verb; what a verb does stands in the module of its name and is imported when it runs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from pilotfish.errors import SettingError

DEMO_PAIR = "demo:qwen-coder"


@dataclass(frozen=True, slots=True, kw_only=True)
class Models:
    """Which models, and how they run."""

    pair: str = DEMO_PAIR
    """Target: a demo pair (demo:qwen-coder, demo:smollm2), a local folder or a hub name."""
    draft: str | None = None
    """Draft, where the pair does not name its own."""
    banks: tuple[Path, ...] = ()
    """Folders of banks, or names of such as ship; without any, all that ship for this draft or target."""
    device: str = "auto"
    """auto, cpu or cuda."""
    dtype: str = "auto"
    """auto, bfloat16, float16 or float32."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Demo(Models):
    """Runs coding requests through monitored speculation; ends with a page and the tax table."""

    out: Path = Path("out/demo.html")
    """The page to write."""
    max_new_tokens: int = 160
    """Longest answer."""
    tax_pairs: int = 3
    """Repetitions of the tax table; 0 leaves it out. `pilotfish bench tax` measures it properly."""

    def run(self) -> int:
        from pilotfish.cli.demo import run

        return run(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class Chat(Models):
    """Talks with the target in the terminal, every token coloured by its score."""

    prompt: str | None = None
    """One prompt, answered once; without it, lines are read until the input ends."""
    metric: str | None = None
    """Which score colours the text; the first one otherwise."""
    action: Literal["observe", "flag", "stop"] = "flag"
    """What to do at the bank's threshold."""
    threshold: float | None = None
    """Instead of the bank's calibrated threshold."""
    max_new_tokens: int = 256
    """Longest answer."""
    temperature: float = 0.0
    """0 is greedy."""
    top_p: float | None = None
    """Keep the likeliest tokens up to this mass."""
    draft_length: int | Literal["auto"] = "auto"
    """Drafted tokens a round; 0 turns speculation off."""
    seed: int = 0
    """Of the sampling."""
    page: Path | None = None
    """Also write the exchanges as a page."""

    def run(self) -> int:
        from pilotfish.cli.chat import run

        return run(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class Score(Models):
    """Scores text that is there already, in one pass of the reader: a file, or standard input."""

    file: Annotated[Path | None, tyro.conf.Positional] = None
    """UTF-8 text, or conversations when it ends in .jsonl; without it, standard input."""
    format: Literal["text", "jsonl"] = "text"
    """Coloured text, or one JSON object a token."""

    def run(self) -> int:
        from pilotfish.cli.score import run

        return run(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """Trains, calibrates and evaluates a head from labelled conversations, and writes a bank with its card."""

    data: Path
    """JSONL of conversations with spans or labels."""
    metric: str
    """Which of the labels to learn."""
    out: Path
    """Folder of the bank to write."""
    model: str = "demo:qwen-coder-0.5b"
    """The reader: the draft of the pair that will serve. Of a demo pair (demo:qwen-coder), its draft."""
    benign: Path | None = None
    """JSONL of ordinary traffic, for the threshold; without it, a part of the data is put aside for its negatives."""
    budget: float = 0.01
    """False-positive budget: the share of benign responses that may be flagged."""
    rivals: tuple[str, ...] = ("words", "length", "judge", "classifier")
    """What the head is held against; `target` besides: the same head on the target, which then reads all texts too."""
    target: str | None = None
    """The bigger model of the rival `target`, where the model is no demo pair."""
    question: str | None = None
    """What the baseline that asks the reader outright asks it: a sentence that a yes answers when the metric holds."""
    sites: int = 5
    """Evenly spaced layers that the head reads, the final norm among them."""
    max_tokens: int = 512
    """Longer texts are cut here."""
    seed: int = 0
    """Of splits, sampling and fit."""
    work: Path = Path("out/recordings")
    """Folder of the recorded activations; an interrupted run resumes there."""
    device: str = "auto"
    """auto, cpu or cuda."""
    dtype: str = "auto"
    """auto, bfloat16, float16 or float32; record in the dtype that will serve."""

    def __post_init__(self) -> None:
        if not 0.0 < self.budget < 1.0:
            raise SettingError(f"budget {self.budget} is outside (0, 1); 0.01 flags one benign response in a hundred")

    def run(self) -> int:
        from pilotfish.cli.fit import run

        return run(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tune:
    """Tunes the draft of a pair for a head and for speculation at once, and fits the head on it (extra `train`)."""

    data: Path
    """JSONL of conversations with spans or labels."""
    metric: str
    """Which of the labels to learn."""
    benign: Path
    """JSONL of ordinary traffic: negatives, the threshold, and prompts that the target answers for the draft."""
    out: Path
    """Folder to write: the draft as a model in `draft`, its bank in `bank`."""
    model: str = DEMO_PAIR
    """The pair, by its target: a demo pair, a local folder or a hub name."""
    draft: str | None = None
    """Draft, where the pair does not name its own."""
    distill: float = 0.5
    """Share of the loss that goes to agreement with the target, in [0, 1]; the rest goes to the head."""
    steps: int = 200
    """Steps of training."""
    learning_rate: float = 4e-4
    """Of the adapters."""
    answers: int = 100
    """Prompts that the target answers for the draft to learn from."""
    held_out: int = 40
    """Other prompts, on whose answers acceptance is measured."""
    answer_tokens: int = 64
    """Longest such answer."""
    budget: float = 0.01
    """False-positive budget: the share of benign responses that may be flagged."""
    question: str | None = None
    """What the baseline that asks the draft outright asks it: a sentence that a yes answers when the metric holds."""
    sites: int = 5
    """Evenly spaced layers that the head reads, the final norm among them."""
    max_tokens: int = 512
    """Longer texts are cut here when the head is fitted; tuning itself reads the first 256 tokens."""
    seed: int = 0
    """Of splits, sampling, tuning and fit."""
    work: Path = Path("out/recordings")
    """Folder of recorded activations, answers and distributions; an interrupted run resumes there."""
    device: str = "auto"
    """auto, cpu or cuda."""
    dtype: str = "auto"
    """auto, bfloat16, float16 or float32."""

    def __post_init__(self) -> None:
        if not 0.0 < self.budget < 1.0:
            raise SettingError(f"budget {self.budget} is outside (0, 1); 0.01 flags one benign response in a hundred")
        if not 0.0 <= self.distill <= 1.0:
            raise SettingError(f"distill {self.distill} is outside [0, 1]; 0.5 weighs head and target alike")
        if min(self.steps, self.answers, self.answer_tokens) < 1 or self.held_out < 2:
            raise SettingError("give 1 or more steps, answers and answer tokens, and 2 or more prompts held out")

    def run(self) -> int:
        from pilotfish.cli.tune import run

        return run(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class Labels:
    """Has a judge behind an OpenAI-compatible URL mark where a metric of yours holds in your texts."""

    data: Path
    """JSONL of conversations; the last answer of each is read, unless the row has a label of the metric."""
    metric: str
    """Name of the metric."""
    definition: str
    """When the metric holds, in a sentence; @FILE reads it from a text file."""
    base_url: str
    """Of the judge, for example http://localhost:8000/v1."""
    model: str
    """The judge's name on that server."""
    out: Path
    """JSONL to write, for `pilotfish fit`."""
    key_env: str | None = None
    """NAME of the environment variable with the API key; never the key itself."""
    passes: Literal[1, 2] = 2
    """With two, the second is worded otherwise and only what both say becomes a label."""
    second_model: str | None = None
    """Another judge on the same server for the second pass."""
    disputed: Literal["keep", "drop"] = "keep"
    """Rows that got no label: written without one, or left out."""
    answers: Path | None = None
    """Where replies are kept, so that a second run asks only what is missing; by default OUT.answers.jsonl."""
    concurrency: int = 4
    """Requests at the same time."""
    timeout_s: float = 120.0
    """Longest wait for one reply."""
    max_retries: int = 5
    """Further tries after 429, 5xx or a timeout, with growing pauses."""
    temperature: float | None = 0.0
    """Of the judge; None leaves it to the server."""
    seed: int = 0
    """Of the bootstrap."""

    def run(self) -> int:
        from pilotfish.cli.labels import run

        return run(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class Contrast:
    """Makes labelled texts without a judge: the target answers each prompt told to do a thing, and told not to."""

    prompts: Path
    """One prompt a line, or conversations when it ends in .jsonl (their last answers are left out)."""
    metric: str
    """Name of the metric."""
    do: str
    """System message for doing the thing; @FILE reads it from a text file."""
    dont: str
    """System message for not doing it."""
    out: Path
    """JSONL to write, for `pilotfish fit`."""
    pair: str = DEMO_PAIR
    """Target: a demo pair (demo:qwen-coder, demo:smollm2), a local folder or a hub name."""
    draft: str | None = None
    """Draft, where the pair does not name its own."""
    device: str = "auto"
    """auto, cpu or cuda."""
    dtype: str = "auto"
    """auto, bfloat16, float16 or float32."""
    answers: Path | None = None
    """Where answers are kept, so that a second run samples only what is missing; by default OUT.answers.jsonl."""
    max_new_tokens: int = 256
    """Longest answer; a prompt with an answer that reaches it is dropped."""
    temperature: float = 0.7
    """0 is greedy."""
    top_p: float | None = None
    """Keep the likeliest tokens up to this mass."""
    seed: int = 0
    """Of the sampling."""

    def run(self) -> int:
        from pilotfish.cli.labels import run_contrast

        return run_contrast(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """Shows how good the heads of banks are: figures beside baselines, curves, examples of hits and misses."""

    folders: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Folders of banks; curves and examples come from the scored.json that `fit` leaves in them."""
    out: Path = Path("out/report.html")
    """The page to write; like scored.json, it quotes the held-out texts."""
    markdown: Path | None = None
    """Also write Markdown here."""

    def run(self) -> int:
        from pilotfish.cli.report import run

        return run(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class Threshold:
    """Sets a bank's thresholds anew, on benign texts of your own: its promise is for texts like those."""

    bank: Annotated[Path, tyro.conf.Positional]
    """Folder of the bank, or the name of one that ships."""
    benign: Path
    """JSONL of conversations that must not be flagged; prompts alone, where prompts are what will be judged."""
    out: Path
    """Folder for the bank with its new thresholds; the heads are the same."""
    budget: float = 0.01
    """Share of benign responses that may be flagged."""
    model: str | None = None
    """The reader; by default the one that the bank names."""
    work: Path = Path("out/recordings")
    """Keeps what the reader made of the texts; the next bank of that reader does not read them again."""
    max_tokens: int | None = None
    """Longer texts are cut here; by default where the reader's context ends."""
    device: str = "auto"
    """auto, cpu or cuda."""
    dtype: str = "auto"
    """auto, bfloat16, float16 or float32; take the one that will serve."""
    seed: int = 0
    """Of the bootstrap."""

    def run(self) -> int:
        from pilotfish.cli.threshold import run

        return run(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """Holds a bank in one serving configuration against another: exits 0 pass, 10 threshold stale, 11 scorer degraded,
    12 inconclusive.
    """

    bank: Annotated[Path | None, tyro.conf.Positional] = None
    """Folder of the bank, or the name of one that ships; says threshold and budget where two files are compared."""
    data: Path | None = None
    """JSONL of labelled conversations to score in both configurations."""
    dtype: str = "bfloat16"
    """Of the candidate: auto, bfloat16, float16 or float32."""
    against: str = "float32"
    """Dtype of the reference."""
    model: str | None = None
    """The reader; by default the one that the bank names."""
    candidate_model: str | None = None
    """Another reader for the candidate: a fine-tuned or quantised folder."""
    other_weights: bool = False
    """Whether the candidate's weights may differ from those that the bank was made for; tokenizer and shape may not."""
    reference: Path | None = None
    """Instead of scoring here: scored.json made in the reference configuration."""
    candidate: Path | None = None
    """And the one made in the candidate's."""
    scorer: str = "head"
    """Which scorer of those two files."""
    metric: str | None = None
    """Of a bank with several; the first one otherwise."""
    threshold: float | None = None
    """Instead of the card's."""
    budget: float | None = None
    """False-positive budget instead of the card's."""
    max_auroc_loss: float = 0.02
    """More than this is a degraded scorer."""
    max_recall_loss: float = 0.05
    """More than this, at the threshold, is a stale threshold."""
    max_tokens: int = 512
    """Longer texts are cut here."""
    json: Path | None = None
    """Also write the figures and the verdict as JSON."""
    seed: int = 0
    """Of the bootstrap."""
    device: str = "auto"
    """auto, cpu or cuda."""

    def run(self) -> int:
        from pilotfish.cli.check import run

        return run(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchTax(Models):
    """Measures what monitoring costs against its alternatives, paired in one run (also: `bench tax`)."""

    num_pairs: int = 20
    """Repetitions of every arm; the interval needs about 20."""
    max_new_tokens: int = 48
    """Length of the answers."""
    heads: int = 64
    """Linear heads in the bank (random weights: cost does not depend on them); 0 takes the shipped bank."""
    sites: int = 5
    """Sites that each head reads."""
    seed: int = 0
    """Of the random heads and the bootstrap."""

    def run(self) -> int:
        from pilotfish.cli.bench import run

        return run(self)
