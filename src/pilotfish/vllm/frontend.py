"""Outputs of the engine core in; answers with a record of their scores beside them out.

A record hangs on vLLM's own state of a request and on the outputs that are made of it, and goes when they go: there is
no table that an abort could leave something in.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

from pilotfish.errors import EngineFailed
from pilotfish.vllm.compat import wrapped
from pilotfish.vllm.plan import Plan
from pilotfish.vllm.record import About, Record
from pilotfish.vllm.settings import VARIABLE
from pilotfish.vllm.wire import KEY, News


def install() -> None:
    """Wraps what makes answers of tokens; `serving` tells clients of them."""
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.engine.detokenizer import BaseIncrementalDetokenizer
    from vllm.v1.engine.llm_engine import LLMEngine
    from vllm.v1.engine.output_processor import OutputProcessor, RequestState

    wrapped(AsyncLLM, "__init__", _knowing)
    wrapped(LLMEngine, "__init__", _knowing)
    wrapped(OutputProcessor, "process_outputs", _listening)
    wrapped(RequestState, "_new_completion_output", _carrying)
    wrapped(BaseIncrementalDetokenizer, "update", _reading_to_the_end)


@dataclass(slots=True)
class _Ending:
    """How a step's tokens may end an answer."""

    is_cut: bool
    """Whether they were cut before the token that a rule stops."""
    stop_string: str | None = None
    """The client's own that they have completed."""


def record_of(completion: Any) -> Record | None:
    """The record of one of a `RequestOutput`'s completions; None where none was kept."""
    return getattr(completion, KEY, None)


def _knowing(begin: Any) -> Any:
    @functools.wraps(begin)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N807  # it takes that one's place
        begin(self, *args, **kwargs)
        processor = self.output_processor
        setattr(processor, KEY, About.of(Plan.of(self.vllm_config), self.vllm_config, processor.tokenizer))

    return __init__


def _listening(process: Any) -> Any:
    @functools.wraps(process)
    def process_outputs(self: Any, engine_core_outputs: Any, *args: Any, **kwargs: Any) -> Any:
        heard = []
        for output in engine_core_outputs:
            said = (output.kv_transfer_params or {}).pop(KEY, None)
            output.kv_transfer_params = output.kv_transfer_params or None
            state = self.request_states.get(output.request_id)
            if state is None:
                continue
            if said is None:
                _check_silence(output)
                continue
            news = News.unpacked(said)
            ending = _Ending(news.stops)
            setattr(state.detokenizer, KEY, ending)
            heard.append((_record(self, state), news, output, ending))
        done = process(self, engine_core_outputs, *args, **kwargs)
        for record, news, output, ending in heard:
            if ending.stop_string:  # the offending token comes after the answer's end, like vLLM's surplus tokens
                news.withheld = []
            record.add(news, output.new_token_ids)
        return done

    return process_outputs


def _reading_to_the_end(update: Any) -> Any:
    """vLLM hides the text of the token that ends an answer; the one of a stop on score has not even come here."""

    @functools.wraps(update)
    def read(self: Any, new_token_ids: list[int], stop_terminated: bool) -> str | None:
        ending: _Ending | None = getattr(self, KEY, None)
        if ending is None:
            return update(self, new_token_ids, stop_terminated)  # type: ignore[no-any-return]  # vLLM's
        ending.stop_string = update(self, new_token_ids, stop_terminated and not ending.is_cut)
        return ending.stop_string

    return read


def _check_silence(output: Any) -> None:
    """Raises `EngineFailed` when tokens have come that nobody has judged: nothing leaves unmonitored."""
    if output.new_token_ids:
        raise EngineFailed(
            f"vLLM's engine core does not run the monitor; set {VARIABLE}, and VLLM_PLUGINS where it is set, for all "
            "of its processes alike"
        )


def _record(processor: Any, state: Any) -> Record:
    record: Record | None = getattr(state, KEY, None)
    if record is None:
        about = getattr(processor, KEY)
        stop = getattr(state.detokenizer, "stop", ())
        record = Record(about, state.prompt, state.prompt_token_ids or (), stop)
        setattr(state, KEY, record)
    return record


def _carrying(make: Any) -> Any:
    @functools.wraps(make)
    def _new_completion_output(self: Any, *args: Any, **kwargs: Any) -> Any:
        completion = make(self, *args, **kwargs)
        setattr(completion, KEY, getattr(self, KEY, None))
        return completion

    return _new_completion_output
