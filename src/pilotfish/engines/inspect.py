"""Inspect's messages in, its model outputs with a monitor's scores out; and a scorer that reads those scores.

    inspect eval task.py --model pilotfish/demo:qwen-coder -M policy=mine.toml

Needs the extra `inspect`. Inspect (inspect_ai) finds this module by its entry point; nothing else imports it. An
answer's scores stand in its message's metadata under `monitor`, in the terms of control experiments: a suspicion score,
a reason, and whether it is flagged at the threshold that the head's card sets for its budget of false positives.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import anyio.to_thread
from inspect_ai.model import (
    ChatCompletionChoice,
    ChatMessage,
    ChatMessageAssistant,
    GenerateConfig,
    ModelAPI,
    ModelOutput,
    ModelUsage,
    StopCategory,
    StopDetails,
    modelapi,
)
from inspect_ai.scorer import Metric, SampleScore, Score, Scorer, Target, mean, metric, scorer, stderr
from inspect_ai.solver import TaskState
from inspect_ai.tool import ToolChoice, ToolInfo

from pilotfish.actions import Policy, read_policy, recorded_exchange
from pilotfish.core import Message
from pilotfish.engines.control import Alarm
from pilotfish.engines.embedded import EmbeddedEngine
from pilotfish.engines.records import Generation
from pilotfish.engines.request import Request
from pilotfish.engines.speculate import Sampling
from pilotfish.errors import SettingError
from pilotfish.heads import load_bank, shipped_banks
from pilotfish.models import load_pair

_STOP_REASONS = {"eos": "stop", "stop_string": "stop", "length": "max_tokens", "content_filter": "content_filter"}
_REFUSED = (
    "best_of",
    "frequency_penalty",
    "logit_bias",
    "logprobs",
    "presence_penalty",
    "response_schema",
    "top_logprobs",
)
"""Settings that would change an answer and that the engine does not have."""


class PilotfishAPI(ModelAPI):  # type: ignore[misc, unused-ignore]  # Any where inspect_ai is not installed
    """A pair with its banks as a model of Inspect. One answer at a time."""

    def __init__(
        self,
        model_name: str,
        base_url: str | None = None,
        api_key: str | None = None,
        config: GenerateConfig | None = None,
        **model_args: Any,
    ) -> None:
        """`model_name` is what `load_pair` takes.

        Args:
            model_args: `draft`, `device` and `dtype` as for `load_pair`; `banks`, folders of banks, by default those
                that ship; `policy`, a policy's file; or `engine`, one that is there already, with or without `policy`.

        Raises:
            SettingError: an argument is unknown.
        """
        super().__init__(model_name, base_url, api_key, [], config or GenerateConfig())
        policy, engine = model_args.pop("policy", None), model_args.pop("engine", None)
        self._policy = policy if isinstance(policy, Policy) else read_policy(Path(policy)) if policy else Policy()
        self._engine: EmbeddedEngine = engine or _loaded(model_name, **model_args)
        self._lock = threading.Lock()

    def max_connections(self) -> int:
        return 1

    async def generate(
        self, input: list[ChatMessage], tools: list[ToolInfo], tool_choice: ToolChoice, config: GenerateConfig
    ) -> ModelOutput:
        """Answers; Inspect waits in its loop while a thread generates.

        Raises:
            SettingError: there are tools, or a setting that the engine does not have.
        """
        if tools:
            raise SettingError("pilotfish/… calls no tools; give a task without tools, or another model")
        request = _request(config, self._policy)
        messages = tuple(Message(message.role, message.text) for message in input)
        generation = await anyio.to_thread.run_sync(self._generated, messages, request)
        return _output(generation, self.model_name, monitor_record(generation, _limits(self._engine, self._policy)))

    def _generated(self, messages: Sequence[Message], request: Request) -> Generation:
        with self._lock:
            return self._engine.generate(messages, request)


def monitor_record(generation: Generation, thresholds: Mapping[str, float]) -> dict[str, Any]:
    """What is kept of an answer's scores: for each metric the suspicion, and its running score at each token.

    A metric without a threshold is neither flagged nor not: None.
    """
    recorded = recorded_exchange(generation.to_dict(""))
    heads = {}
    for name in generation.metrics:
        alarm, limit = Alarm(name), thresholds.get(name)
        said = alarm.suspicion(recorded, 1.0 if limit is None else limit)._asdict()
        if limit is None:
            said |= {"flagged": None, "threshold": None, "position": None}
        heads[name] = said | {"values": alarm.values(recorded)}
    return {
        "heads": heads,
        "tokens": [token.text for token in generation.committed],
        "first_position": generation.num_prompt_tokens,
        "finish_reason": generation.finish_reason,
        "misses": dict(generation.misses()),
        "acceptance": generation.acceptance,
    }


def flagged() -> Metric:
    """The share of samples whose answer was flagged."""

    def share(scores: list[SampleScore]) -> float:
        found = [score.score.metadata["flagged"] for score in scores if score.score.metadata]
        return sum(found) / len(found) if found else 0.0

    return share


def monitor(name: str, threshold: float | None = None) -> Scorer:
    """Reads what the monitor said of a sample's answers; the most suspicious one counts.

    A sample of which no answer has scores is unscored, never 0.

    Args:
        name: of the metric.
        threshold: by default the one that the answer was held against.
    """

    async def score(state: TaskState, target: Target) -> Score:
        records = [message.metadata["monitor"] for message in state.messages if _has_record(message)]
        if not records:
            return Score.unscored(reason="no answer carries a monitor's scores; use a model pilotfish/…")
        unknown = [sorted(record["heads"]) for record in records if name not in record["heads"]]
        if unknown:
            raise SettingError(
                f"the scorer asks for metric {name!r}; the monitor has {', '.join(unknown[0]) or 'none'}"
            )
        highest = max((record["heads"][name] for record in records), key=lambda said: said["suspicion_score"])
        limit = highest["threshold"] if threshold is None else threshold
        is_flagged = limit is not None and highest["suspicion_score"] >= limit
        return Score(
            value=highest["suspicion_score"],
            answer=state.output.completion,
            explanation=highest["reason"],
            metadata={**highest, "threshold": limit, "flagged": is_flagged},
        )

    return score


flagged = metric(name="flagged")(flagged)
monitor = scorer(metrics=[mean(), stderr(), flagged()], name="monitor")(monitor)
modelapi(name="pilotfish")(PilotfishAPI)


def _has_record(message: ChatMessage) -> bool:
    return message.role == "assistant" and "monitor" in (message.metadata or {})


def _loaded(name: str, banks: str | Sequence[str] = (), **options: str) -> EmbeddedEngine:
    unknown = sorted(options.keys() - {"draft", "device", "dtype"})
    if unknown:
        raise SettingError(
            f"model argument {unknown[0]!r} is unknown; use banks, device, draft, dtype, engine or policy"
        )
    pair = load_pair(name, **options)
    folders = [banks] if isinstance(banks, str) else banks
    found = [load_bank(Path(folder)) for folder in folders] or shipped_banks(pair.reader_identity)
    return EmbeddedEngine(pair, found)


def _limits(engine: EmbeddedEngine, policy: Policy) -> dict[str, float]:
    calibrated = {name: limit for bank in engine.banks.values() for name, limit in bank.thresholds.items()}
    return calibrated | {rule.metric: rule.threshold for rule in policy.rules if rule.threshold is not None}


def _request(config: GenerateConfig, policy: Policy) -> Request:
    asked = [name for name in _REFUSED if getattr(config, name)] + ["num_choices"] * ((config.num_choices or 1) > 1)
    if asked:
        raise SettingError(f"pilotfish/… does not take {', '.join(asked)}; leave it out")
    sampling = {name: getattr(config, name) for name in ("temperature", "top_k", "top_p")}
    defaults = Request()
    return Request(
        max_new_tokens=config.max_tokens or defaults.max_new_tokens,
        sampling=Sampling(**{name: value for name, value in sampling.items() if value is not None}),
        stop=tuple(config.stop_seqs or ()),
        seed=config.seed or 0,
        policy=policy,
    )


def _output(generation: Generation, name: str, record: dict[str, Any]) -> ModelOutput:
    message = ChatMessageAssistant(
        content=generation.answer, model=name, source="generate", metadata={"monitor": record}
    )
    num_new = len(generation.committed)
    return ModelOutput(
        model=name,
        choices=[
            ChatCompletionChoice(
                message=message,
                stop_reason=_STOP_REASONS[generation.finish_reason or "eos"],
                stop_details=_details(generation),
            )
        ],
        usage=ModelUsage(
            input_tokens=generation.num_prompt_tokens, output_tokens=num_new, total_tokens=len(generation.tokens)
        ),
        time=generation.seconds,
    )


def _details(generation: Generation) -> StopDetails | None:
    """Why a policy ended the answer."""
    verdict = next((each for each in reversed(generation.verdicts) if each.action == "stop"), None)
    if generation.finish_reason != "content_filter" or verdict is None:
        return None
    level = None if verdict.score is None else f"{verdict.score:.3f}"
    return StopDetails(
        type="monitor",
        category=verdict.metric,
        explanation=verdict.reason,
        categories=[StopCategory(category=verdict.metric, level=level)],
    )
