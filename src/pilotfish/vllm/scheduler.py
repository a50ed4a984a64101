"""A step's scores in; tokens that may leave, and news for the client beside them, out.

Judging happens where vLLM decides that a request has ended, before its tokens leave the engine core: what a rule stops
never comes to the front end. A request's track hangs on vLLM's own object for it and goes when that goes.
"""

from __future__ import annotations

import functools
from typing import Any

from pilotfish.vllm.plan import Plan
from pilotfish.vllm.track import Track
from pilotfish.vllm.wire import KEY, StepScores, no_scores

NO_SCORES = "the worker sent no scores"


def monitored(get: Any) -> Any:
    """Whatever scheduler vLLM would take, judged; so that asynchronous scheduling stays what it was."""

    @functools.wraps(get)
    def get_scheduler_cls(self: Any) -> type:
        return judged(get(self))

    return get_scheduler_cls


@functools.cache
def judged(base: type) -> type:
    """A scheduler class of vLLM's that judges."""
    return type(f"Judging{base.__name__}", (Judging, base), {})


class Judging:
    """What is laid over one of vLLM's schedulers."""

    requests: dict[str, Any]
    """vLLM's own, by request id."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        scheduler: Any = self
        plan = Plan.of(scheduler.vllm_config)
        self._charge = plan.charge(plan.bank())
        self._step: dict[str, tuple[Track, int]] = {}
        """Of the requests with new tokens in this step their track, and how many of these were drafted."""
        self._scores: dict[str, Any] = {}
        self._failure = ""

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> Any:
        vllm: Any = super()
        scores = getattr(model_runner_output, KEY, None)
        if not isinstance(scores, StepScores):
            scores = no_scores(len(self._charge.metrics), NO_SCORES)
        self._failure = scores.failure
        parts = scores.of_requests(len(model_runner_output.req_ids))
        self._scores = dict(zip(model_runner_output.req_ids, parts, strict=True))
        self._step = {}
        sampled = model_runner_output.sampled_token_ids
        for request_id in scheduler_output.num_scheduled_tokens:
            index = model_runner_output.req_id_to_index.get(request_id)
            if index is not None and not (sampled and sampled[index]):
                self._take_prompt(self.requests.get(request_id))
        outputs = vllm.update_from_output(scheduler_output, model_runner_output)
        for group in outputs.values():
            for output in group.outputs:
                self._tell(output)
        self._step, self._scores = {}, {}
        return outputs

    def _take_prompt(self, request: Any) -> None:
        """A chunk of a prompt: nothing leaves yet."""
        if request is not None and not request.is_finished():
            track = _track_of(request, self._charge)
            track.take(self._scores[request.request_id], request.all_token_ids[track.num_settled :], self._failure)

    def _update_request_with_output(self, request: Any, new_token_ids: list[int], **kwargs: Any) -> Any:
        track, start = _track_of(request, self._charge), request.num_tokens
        self._step[request.request_id] = track, len(new_token_ids) - 1
        known = [*request.all_token_ids[track.num_settled :], *new_token_ids[max(0, track.num_settled - start) :]]
        track.take(self._scores[request.request_id], known, self._failure)
        track.settle(start + len(new_token_ids) - self._charge.lags, self._failure)
        offending: list[int] = []
        if track.stop is not None:  # cut before vLLM takes note of the tokens
            kept = max(0, track.stop.position - start)
            offending = new_token_ids[kept:][:1] if track.stop.position >= start else []
            del new_token_ids[kept:]
        vllm: Any = super()
        new_token_ids, is_stopped = vllm._update_request_with_output(request, new_token_ids, **kwargs)
        if track.stop is not None and not is_stopped:
            track.withheld(offending)
            _end(request, f"monitor:{track.stop.metric}")
            is_stopped = True
        if is_stopped:
            track.finish(request.num_tokens)
        return new_token_ids, is_stopped

    def _tell(self, output: Any) -> None:
        track, num_drafted = self._step.get(output.request_id, (None, 0))
        if track is not None:
            news = track.told(num_drafted)
            output.kv_transfer_params = {**(output.kv_transfer_params or {}), KEY: news.packed()}


def _track_of(request: Any, charge: Any) -> Track:
    if not hasattr(request, KEY):
        setattr(request, KEY, Track(charge, request.num_prompt_tokens))
    track: Track = getattr(request, KEY)
    return track


def _end(request: Any, reason: str) -> None:
    from vllm.v1.request import RequestStatus

    request.status = RequestStatus.FINISHED_STOPPED
    request.stop_reason = reason
    request.resumable = False  # a session does not go on after it
