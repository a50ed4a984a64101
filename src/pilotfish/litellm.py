"""LiteLLM's requests and answers in; those that the policy of a running Pilotfish server lets through out.

Lives in LiteLLM's own process, which needs neither torch nor a model for it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any, NamedTuple

import httpx
from litellm.exceptions import GuardrailRaisedException
from litellm.integrations.custom_guardrail import CustomGuardrail
from litellm.llms.custom_httpx.http_handler import get_async_httpx_client
from litellm.types.guardrails import GuardrailEventHooks
from litellm.types.llms.custom_http import httpxSpecialProvider
from litellm.types.utils import ModelResponse, ModelResponseStream, TextCompletionResponse

from pilotfish.actions import Policy, Recorded, Verdict, dry_run, policy_from_dict
from pilotfish.actions.policy import GATING
from pilotfish.actions.recorded import RecordedToken
from pilotfish.core import TokenScore
from pilotfish.errors import PilotfishError

logger = logging.getLogger(__name__)

Turn = Mapping[str, str]
POLICY_S = 10.0
"""For so long a policy that was fetched is taken to be in force."""
READ = frozenset({"completion", "acompletion", "text_completion", "atext_completion"})
"""Kinds of LiteLLM's calls whose texts are read."""
_ROLES = {"developer": "system", "function": "tool"}
_BESIDE = ("tool_calls", "function_call", "reasoning_content", "audio", "images")
"""What an answer may hold beside its text."""


class _Server(NamedTuple):
    """What the Pilotfish server said of itself."""

    policy: Policy
    metrics: tuple[str, ...]
    thresholds: Mapping[str, float]
    """The calibrated ones."""
    until: float


class Unread(PilotfishError):
    """Something that no head reads."""


class PilotfishGuardrail(CustomGuardrail):  # type: ignore[misc]  # litellm need not be there where types are checked
    """Has a Pilotfish server score prompts and answers, and does what that server's policy says.

    `flag` is recorded with LiteLLM's request; under every stricter action the request or answer is refused, since
    LiteLLM can do nothing subtler. Where the policy holds, no text leaves that was not scored, a stream's text is
    scored again as a whole every `every` characters, and whatever no head reads is refused: images, tool calls,
    reasoning, other kinds of calls. A server that does not answer refuses everything.
    """

    def __init__(
        self,
        *,
        api_base: str = "http://127.0.0.1:8000",
        api_key: str | None = None,
        every: int = 200,
        timeout: float = 30.0,
        **options: Any,
    ) -> None:
        """`litellm_params` of LiteLLM's configuration.

        Args:
            api_base: the Pilotfish server.
            api_key: of the Pilotfish server, with the scope `use`.
            every: characters of a stream between two checks.
            timeout: seconds that one check may take.
        """
        hooks = [GuardrailEventHooks.pre_call, GuardrailEventHooks.post_call]
        super().__init__(supported_event_hooks=hooks, timeout=timeout, **options)
        self._base = api_base.rstrip("/").removesuffix("/v1")
        self._headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
        self._every, self._timeout_s = every, timeout
        self._server: _Server | None = None

    async def async_pre_call_hook(
        self, user_api_key_dict: Any, cache: Any, data: dict[str, Any], call_type: str
    ) -> dict[str, Any]:
        """Judges a prompt before the model gets it."""
        try:
            if call_type not in READ:
                raise Unread(f"a call of the kind {call_type}")
            turns = _prompt(data)
        except Unread as unread:
            await self._without(data, unread, GuardrailEventHooks.pre_call)
            return data
        await self._judge(data, turns, {}, GuardrailEventHooks.pre_call)
        return data

    async def async_post_call_success_hook(self, data: dict[str, Any], user_api_key_dict: Any, response: Any) -> Any:
        """Judges every choice of a whole answer."""
        try:
            answers = _answers(response)
            turns = _prompt(data)
        except Unread as unread:
            await self._without(data, unread, GuardrailEventHooks.post_call)
            return response
        await self._judge(data, turns, answers, GuardrailEventHooks.post_call)
        return response

    async def async_post_call_streaming_iterator_hook(
        self, user_api_key_dict: Any, response: AsyncIterator[Any], request_data: dict[str, Any]
    ) -> AsyncIterator[Any]:
        """Judges a streamed answer while it comes; under a policy that holds, its pieces wait for that."""
        hook = GuardrailEventHooks.post_call
        holds = (await self._known()).policy.holds
        texts: dict[int, str] = {}
        waiting: list[Any] = []
        told: set[str] = set()
        num_new = 0
        try:
            async for chunk in response:
                try:
                    num_new += _add(texts, chunk)
                except Unread as unread:
                    if str(unread) not in told:
                        await self._without(request_data, unread, hook)
                        told.add(str(unread))
                if not holds:
                    yield chunk
                    continue
                waiting.append(chunk)
                if num_new >= self._every:
                    await self._judge(request_data, _prompt(request_data), texts, hook)
                    num_new = 0
                    while waiting:
                        yield waiting.pop(0)
            if num_new:
                await self._judge(request_data, _prompt(request_data), texts, hook)
            for chunk in waiting:
                yield chunk
        finally:
            close = getattr(response, "aclose", None)
            if close is not None:
                await close()

    # What is said of a text.

    async def _judge(
        self, data: dict[str, Any], turns: Sequence[Turn], answers: Mapping[int, str], hook: GuardrailEventHooks
    ) -> None:
        """Judges a prompt, or the answers to it; raises where one must not go on."""
        server = await self._known()
        asked = [[*turns, {"role": "assistant", "content": text}] for text in answers.values() if text]
        if hook is GuardrailEventHooks.pre_call:
            asked = [list(turns)]
        elif not asked:
            return
        reply = await self._ask("POST", "/score", {"texts": [{"messages": each} for each in asked]})
        last = len(turns) if hook is GuardrailEventHooks.post_call else None
        try:
            recorded = [_recorded(result, server, last) for result in reply["results"]]
            verdicts = [verdict for each in recorded for verdict in dry_run(server.policy, each)]
            is_complete = len(recorded) == len(asked) and all(each.tokens for each in recorded)
        except (AttributeError, KeyError, TypeError, PilotfishError) as error:
            raise self._failed(error) from error
        if not is_complete:
            raise self._failed("a text is without scores")
        self._record(data, verdicts, hook)
        gating = next((verdict for verdict in verdicts if verdict.action in GATING), None)
        if gating is not None:
            raise self._refusal(f"{gating.action} at token {gating.position}: {gating.reason}", is_verdict=True)

    async def _without(self, data: dict[str, Any], unread: Unread, hook: GuardrailEventHooks) -> None:
        """Goes on without a score for something, or refuses it where the policy holds."""
        if (await self._known()).policy.holds:
            raise self._refusal(f"{unread} is not monitored, and the policy lets nothing out without a score")
        logger.warning("%s is not monitored", unread)
        words = f"{unread} is not monitored"
        self.add_standard_logging_guardrail_information_to_request_data(
            guardrail_json_response=words, request_data=data, guardrail_status="not_run", event_type=hook
        )

    def _record(self, data: dict[str, Any], verdicts: Sequence[Verdict], hook: GuardrailEventHooks) -> None:
        gates = any(verdict.action in GATING for verdict in verdicts)
        status = "guardrail_intervened" if gates else "guardrail_flagged" if verdicts else "success"
        first = {(verdict.metric, verdict.action): verdict for verdict in reversed(verdicts)}
        said = [
            {name: getattr(verdict, name) for name in ("metric", "action", "position", "score", "threshold", "reason")}
            for verdict in first.values()
        ]
        self.add_standard_logging_guardrail_information_to_request_data(
            guardrail_json_response={"verdicts": said},
            request_data=data,
            guardrail_status=status,
            guardrail_provider="pilotfish",
            event_type=hook,
        )

    # The server.

    async def _known(self) -> _Server:
        if self._server is None or time.monotonic() >= self._server.until:
            said, heads = await self._ask("GET", "/policy"), await self._ask("GET", "/heads")
            try:
                self._server = _Server(
                    policy_from_dict(said["policy"], "the server's policy"),
                    tuple(dict.fromkeys(head["metric"] for head in heads["heads"])),
                    {h["metric"]: h["threshold"] for h in heads["heads"] if h["threshold"] is not None},
                    time.monotonic() + POLICY_S,
                )
            except (KeyError, TypeError, PilotfishError) as error:
                raise self._failed(error) from error
        return self._server

    async def _ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        client = get_async_httpx_client(httpxSpecialProvider.GuardrailCallback).client
        url = f"{self._base}/v1/monitor{path}"
        try:
            reply = await client.request(method, url, json=body, headers=self._headers, timeout=self._timeout_s)
            if reply.status_code != 200:
                raise self._failed(f"status {reply.status_code}: {reply.text[:300]}")
            found: dict[str, Any] = reply.json()
        except (httpx.HTTPError, ValueError) as error:
            raise self._failed(error) from error
        return found

    def _failed(self, why: object) -> GuardrailRaisedException:
        """Nothing goes out unjudged because the judge was not there."""
        logger.error("the Pilotfish server cannot be asked: %s: %s", type(why).__name__, why)
        return GuardrailRaisedException(self.guardrail_name, "the text could not be scored", status_code=503)

    def _refusal(self, words: str, *, is_verdict: bool = False) -> GuardrailRaisedException:
        return GuardrailRaisedException(self.guardrail_name, words, blocked_content=is_verdict)


def _prompt(data: Mapping[str, Any]) -> list[Turn]:
    """The messages of a request as text; tool calls among them are read as text too."""
    messages = data.get("messages")
    if messages is None:
        prompt = data.get("prompt")
        if not isinstance(prompt, str):
            raise Unread("a prompt that is no text")
        return [{"role": "user", "content": prompt}]
    return [_turn(message) for message in messages]


def _turn(message: Any) -> Turn:
    if not isinstance(message, Mapping):
        message = message.model_dump()
    content = message.get("content") or ""
    if not isinstance(content, str):
        if any(not isinstance(part, Mapping) or part.get("type") != "text" for part in content):
            raise Unread("a message that holds more than text")
        content = "".join(part["text"] for part in content)
    called = [call["function"] for call in message.get("tool_calls") or ()]
    said = [content, *(f"{function['name']}({function['arguments']})" for function in called)]
    role = message.get("role", "user")
    return {"role": _ROLES.get(role, role), "content": "\n".join(part for part in said if part)}


def _answers(response: Any) -> dict[int, str]:
    """The text of each choice."""
    if isinstance(response, TextCompletionResponse):
        return {choice.index: choice.text or "" for choice in response.choices}
    if not isinstance(response, ModelResponse):
        raise Unread(f"an answer of the kind {type(response).__name__}")
    return {choice.index: _text(choice.message) for choice in response.choices}


def _add(texts: dict[int, str], chunk: Any) -> int:
    """Adds what a chunk says; returns how many characters that is."""
    if not isinstance(chunk, ModelResponseStream | ModelResponse):
        raise Unread(f"a piece of the kind {type(chunk).__name__}")
    num_new = 0
    for choice in chunk.choices:
        text = _text(choice.delta)
        texts[choice.index] = texts.get(choice.index, "") + text
        num_new += len(text)
    return num_new


def _text(said: Any) -> str:
    for name in _BESIDE:
        if getattr(said, name, None):
            raise Unread(f"an answer with {name}")
    content = getattr(said, "content", None) or ""
    if not isinstance(content, str):
        raise Unread("an answer that is no text")
    return content


def _recorded(result: Mapping[str, Any], server: _Server, last: int | None) -> Recorded:
    """The scores of a prompt's tokens, or of the answer's alone: those of message `last`."""
    tokens = tuple(
        RecordedToken(row["position"], row["text"], _scores(row, server.metrics), is_prompt=last is None)
        for row in result["tokens"]
        if last is None or row["message"] == last
    )
    return Recorded("", tokens, (), server.thresholds)


def _scores(row: Mapping[str, Any], metrics: Sequence[str]) -> dict[str, TokenScore]:
    return {
        metric: TokenScore.scored(row["scores"][metric], running=row["running"][metric])
        if metric in row["running"]
        else TokenScore.unscored(row["unscored"].get(metric) or "the server gave no score")
        for metric in metrics
    }
