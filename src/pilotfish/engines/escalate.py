"""A token over its threshold in, the word of a slower judge out; asked within a budget, and a failure is no consent."""

from __future__ import annotations

import logging
from typing import Protocol, runtime_checkable

import torch

from pilotfish.actions import Action, Rule, Verdict
from pilotfish.errors import SettingError, Unanswered
from pilotfish.texts.endpoint import ChatMessage, Endpoint

logger = logging.getLogger(__name__)

ASKED = (
    "Read this exchange.\n\n--- exchange begins ---\n{prompt}{answer}\n--- exchange ends ---\n\n{question}\n"
    "Answer with one word: Yes or No."
)


@runtime_checkable
class Judge(Protocol):
    """Anything that can be called with the exchange so far."""

    def __call__(self, prompt: str, answer: str, verdict: Verdict) -> float:
        """The probability that what was suspected holds.

        Args:
            prompt: as rendered, the chat template's words included.
            answer: up to and with the token in question, which has not been emitted.
            verdict: what raised the suspicion.
        """
        ...


class EndpointJudge:
    """A model behind a URL, asked outright: yes is 1, no is 0, and anything else is no answer."""

    def __init__(self, endpoint: Endpoint, question: str) -> None:
        """`question`: a sentence that a yes answers when the answer must not leave. Give the endpoint a short timeout:
        the answer waits.
        """
        if not question.strip():
            raise SettingError("the judge's question is empty; give a sentence that can be answered with yes or no")
        self._endpoint, self._question = endpoint, question.strip()

    def __call__(self, prompt: str, answer: str, verdict: Verdict) -> float:
        asked = ASKED.format(prompt=prompt, answer=answer, question=self._question)
        reply = self._endpoint.ask([ChatMessage("user", asked)])
        word = reply.strip().split(maxsplit=1)[0].strip(".,:!*'\"").casefold() if reply.strip() else ""
        if word not in {"yes", "no"}:
            raise Unanswered(f"the judge neither said yes nor no but {reply[:60]!r}; ask a plainer question")
        return float(word == "yes")


class Escalation:
    """When the judge is asked about one answer, and what becomes of what it says."""

    def __init__(self, judge: Judge | None, *, generator: torch.Generator) -> None:
        self._judge = judge
        self._random = generator
        self._last: dict[int, int] = {}
        self._num_occasions: dict[int, int] = {}
        self.num_asked = 0
        self.num_unanswered = 0
        """Calls that failed; each stopped the answer."""

    def is_occasion(self, rule: Rule, verdict: Verdict, *, rises: bool) -> bool:
        """Whether the judge's word is due: the gate goes up, or has been up for long."""
        assert verdict.rule is not None, "a rule's verdict names it"
        last = self._last.get(verdict.rule)
        if not rises and last is not None and verdict.position - last < rule.every:
            return False
        self._last[verdict.rule] = verdict.position
        return True

    def settle(self, rule: Rule, verdict: Verdict, prompt: str, answer: str) -> tuple[Action, str]:
        """What to do, and why: stop, flag (not drawn) or escalate (asked, and it may go on)."""
        assert verdict.rule is not None, "a rule's verdict names it"
        if rule.share < 1.0 and float(torch.rand((), generator=self._random)) >= rule.share:
            return "flag", "not drawn for the judge"
        if self._num_occasions.get(verdict.rule, 0) >= rule.budget:
            return "stop", f"the judge's budget of {rule.budget} calls is used up"
        self._num_occasions[verdict.rule] = self._num_occasions.get(verdict.rule, 0) + 1
        self.num_asked += 1
        try:
            assert self._judge is not None, "the policy was checked"
            said = float(self._judge(prompt, answer, verdict))
            if not 0.0 <= said <= 1.0:  # also true for NaN
                raise ValueError(f"{said} is no probability")
        except Exception as error:
            logger.exception("the judge failed; the answer stops")
            self.num_unanswered += 1
            return "stop", f"the judge failed: {type(error).__name__}: {error}"
        if said >= rule.limit:
            return "stop", f"the judge gave {said:.3f}"
        return "escalate", f"the judge gave {said:.3f}, under {rule.limit:.3f}"
