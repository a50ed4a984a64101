"""A running server and the directions that it serves in; whether each acts there as it says, check by check, out.

What happens inside the server is not seen from here: an answer's text, and what the server says it did.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import Any, NamedTuple

import httpx

from pilotfish.errors import EndpointError
from pilotfish.steering import Check

TIMEOUT_S = 300.0
NUM_MATES = 3
"""Steered requests sent together with one that is not."""

Steer = Mapping[str, Any]


class Reply(NamedTuple):
    text: str
    num_tokens: int
    steering: tuple[Mapping[str, Any], ...]
    """What the server says that the answer was steered with."""


class SteeringServer:
    """A Pilotfish server as a client sees it."""

    def __init__(self, url: str, *, key: str = "", num_tokens: int = 16) -> None:
        """`key`: of the API, where the server wants one. Every answer has up to `num_tokens` tokens, all greedy."""
        headers = {"authorization": f"Bearer {key}"} if key else {}
        self._url, self._num_tokens = url.rstrip("/").removesuffix("/v1"), num_tokens
        self._client = httpx.Client(base_url=self._url, headers=headers, timeout=TIMEOUT_S, trust_env=False)

    @cached_property
    def served(self) -> dict[str, Any]:
        """The model, and the directions that clients may steer along.

        Raises:
            EndpointError: the server cannot be reached, or refuses.
        """
        return self._call("GET", "/v1/steer/directions")

    def ask(self, prompt: str, *steer: Steer) -> Reply:
        """Raises as `served` does."""
        asked = {
            "model": self.served["model"],
            "messages": [{"role": "user", "content": prompt}],
            "max_tokens": self._num_tokens,
            "temperature": 0,
            "steer": list(steer),
            "monitor": {"tokens": False},
        }
        answer = self._call("POST", "/v1/chat/completions", asked)
        (choice,) = answer["choices"]
        text = choice["message"]["content"] or ""
        said = (choice.get("monitor") or {}).get("steering") or ()
        return Reply(text, answer["usage"]["completion_tokens"], tuple(said))

    def together(self, prompt: str, asked: Sequence[Sequence[Steer]]) -> list[Reply]:
        """Sends one request for each steering, all at the same time."""
        with ThreadPoolExecutor(len(asked)) as pool:
            return list(pool.map(lambda steer: self.ask(prompt, *steer), asked))

    def close(self) -> None:
        self._client.close()

    def _call(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        try:
            response = self._client.request(method, path, json=body)
            found = response.json()
        except httpx.HTTPError as error:
            raise EndpointError(f"{self._url} does not answer ({error}); start `pilotfish serve` there") from error
        except ValueError as error:
            raise EndpointError(f"{self._url}{path} is not JSON; give the URL of a Pilotfish server") from error
        if response.status_code != 200 or not isinstance(found, dict):
            said = found.get("error", found) if isinstance(found, dict) else found
            raise EndpointError(f"{self._url}{path} refuses with {response.status_code}: {said}")
        return found


def verify_served(
    server: SteeringServer, direction: Mapping[str, Any], prompt: str, *, dose: float, scope: str
) -> list[Check]:
    """Checks that a direction changes the answer, does nothing at dose 0, is on for each of its tokens and as asked,
    and leaves alone a request that is answered at the same time.

    Args:
        direction: As the server lists it.

    Raises:
        EndpointError: the server cannot be reached, or refuses.
    """
    steer = {"name": direction["name"], "dose": dose, "scope": scope}
    plain, steered, zero = server.ask(prompt), server.ask(prompt, steer), server.ask(prompt, {**steer, "dose": 0.0})
    # In half precision company alone may round an answer otherwise: what counts is steered company.
    mates = server.together(prompt, [()] * (1 + NUM_MATES))
    beside, *others = server.together(prompt, [(), *[(steer,)] * NUM_MATES])
    return [
        Check("the vector changes the answer", steered.text != plain.text, _first_change(plain.text, steered.text)),
        Check("dose 0 changes nothing", zero.text == plain.text, _first_change(plain.text, zero.text)),
        _fires(steered, direction, steer),
        Check(
            "requests at the same time are untouched",
            beside.text in {plain.text, mates[0].text} and not beside.steering and all(one.steering for one in others),
            f"beside {len(others)} steered ones: {_first_change(plain.text, beside.text)}",
        ),
    ]


def _fires(steered: Reply, direction: Mapping[str, Any], steer: Steer) -> Check:
    """By the server's own count of tokens that its target gave while the edit was on."""
    name = "it is on for every token, as asked"
    if len(steered.steering) != 1:
        return Check(name, False, f"the answer names {len(steered.steering)} directions")
    (said,) = steered.steering
    wanted = {**steer, "sha256": direction["sha256"], "kind": direction["card"]["kind"]}
    others = [f"{key} {said[key]!r} instead of {value!r}" for key, value in wanted.items() if said[key] != value]
    counted = f"{said['num_tokens']} of {steered.num_tokens} tokens"
    passed = not others and said["num_tokens"] == steered.num_tokens > 0
    return Check(name, passed, "; ".join([counted, *others]))


def _first_change(one: str, other: str) -> str:
    if one == other:
        return f"the same {len(one)} characters"
    same = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    return f"another text from character {same} on"
