"""Recorded scores in, the verdicts that a policy would have given out: to try a policy before it serves."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pilotfish.actions.policy import Policy, Verdict
from pilotfish.actions.watch import Part, Reasoning, Watch
from pilotfish.core import TokenScore
from pilotfish.errors import ArtefactError

Scores = Mapping[str, TokenScore]


class RecordedToken(NamedTuple):
    position: int
    text: str
    scores: Scores
    is_prompt: bool = False
    round: int = 0
    """Round of speculation that committed it; 0 for the prompt."""


class RecordedRound(NamedTuple):
    """What was drafted in one round of speculation and read by the draft, as far as it was."""

    number: int
    start: int
    """Position that the first drafted token would take."""
    drafted: tuple[Scores, ...]


class Recorded(NamedTuple):
    """One exchange as it was recorded."""

    title: str
    tokens: tuple[RecordedToken, ...]
    rounds: tuple[RecordedRound, ...] = ()
    thresholds: Mapping[str, float] = {}
    """The bank's, for rules that name none."""
    starts_reasoning: bool = False
    """Whether the chat template had opened the reasoning before the answer began."""

    def parts(self, policy: Policy) -> Iterator[frozenset[Part]]:
        """The scopes that each token lies in."""
        reasoning = Reasoning("inside" if self.starts_reasoning else "start")
        for token in self.tokens:
            reasoning, parts = reasoning.parts(token.text, policy, is_prompt=token.is_prompt)
            yield parts

    @property
    def metrics(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(metric for token in self.tokens for metric in token.scores))


def dry_run(policy: Policy, recorded: Recorded) -> tuple[Verdict, ...]:
    """What a policy would have decided about a recorded exchange, to its first stop.

    What an action would have changed is not in the recording: after a redaction, a steered or a sampled-again token
    the verdicts are those of the text as it was.

    Raises:
        SettingError: the policy names a metric that was not recorded, or a threshold is nowhere given.
    """
    metrics = recorded.metrics
    policy.check(
        metrics,
        {metric for metric in metrics if metric not in recorded.thresholds},
        edits={rule.edit for rule in policy.rules if rule.edit},
        has_judge=True,
    )
    watch = Watch(policy)
    verdicts: list[Verdict] = []
    for token, parts in zip(recorded.tokens, recorded.parts(policy), strict=True):
        verdicts += watch.judge(token.position, token.scores, recorded.thresholds, parts=parts)
        if any(verdict.action == "stop" for verdict in verdicts):
            break
    return tuple(verdicts)


def read_recorded(path: Path) -> list[Recorded]:
    """Reads exchanges from JSON: one saved generation, a list of them, or the `scored.json` of held-out texts.

    A `scored.json` does not say where a prompt ends: its first labelled token counts as the answer's first; where no
    token is labelled, all are the answer's.

    Raises:
        ArtefactError: the file is missing, is not JSON, or holds no recorded scores.
    """
    try:
        raw = json.loads(path.read_bytes())
    except OSError as error:
        raise ArtefactError(f"{path} cannot be read: {error.strerror}; save a generation with `to_json`") from error
    except ValueError as error:  # bad UTF-8 too
        raise ArtefactError(f"{path} is not JSON: {error}; save the generation again") from error
    if isinstance(raw, dict) and "scorers" in raw:
        return _from_scored(path)
    rows = raw.get("exchanges", [raw]) if isinstance(raw, dict) else raw
    try:
        return [recorded_exchange(row) for row in rows]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ArtefactError(
            f"{path} holds no recorded exchange ({type(error).__name__}: {error}); give what `Generation.to_json` or "
            "`pilotfish fit` (scored.json) writes"
        ) from error


def recorded_exchange(raw: Mapping[str, Any]) -> Recorded:
    """One exchange from its JSON (`Generation.to_dict`); a missing key raises as it does on any mapping."""
    tokens = tuple(
        RecordedToken(
            int(row["position"]), str(row["text"]), _scores(row), row["origin"] == "prompt", int(row.get("round", 0))
        )
        for row in raw["tokens"]
    )
    rounds = tuple(
        RecordedRound(
            int(row["round"]), int(row["start"]), tuple(_scores(each) for each in row["drafted"] if "scores" in each)
        )
        for row in raw.get("rounds", [])
    )
    return Recorded(
        str(raw.get("title", "")),
        tokens,
        rounds,
        {metric: float(value) for metric, value in raw.get("thresholds", {}).items()},
        bool(raw.get("starts_reasoning", False)),
    )


def _scores(row: Mapping[str, Any]) -> Scores:
    """Scores of a token's row; a number that is no probability is an unscored token here too."""
    values, running = row.get("scores", {}), row.get("running", {})
    found = {
        metric: TokenScore.scored(float(value), row.get("reader", "draft"), running=float(running.get(metric, value)))
        for metric, value in values.items()
    }
    return found | {
        metric: TokenScore.unscored(str(why) or "unknown") for metric, why in row.get("unscored", {}).items()
    }


def _from_scored(path: Path) -> list[Recorded]:
    """The texts of the first scorer of tokens, which is the head."""
    from pilotfish.scores import read_scored

    content = read_scored(path)
    texts = next((texts for texts in content.by_scorer.values() if texts and texts[0].token_scores is not None), [])
    found = []
    for text in texts:
        values, running = (part.tolist() if part is not None else [] for part in (text.token_scores, text.judged))
        labelled = (text.token_labels == text.token_labels).nonzero()
        begin = int(labelled[0, 0]) if len(labelled) else 0
        pieces: Sequence[str] = text.pieces or [""] * len(values)
        rows = zip(pieces, values, running, strict=True)
        tokens = tuple(
            RecordedToken(i, piece, {content.metric: TokenScore.scored(value, running=so_far)}, i < begin)
            for i, (piece, value, so_far) in enumerate(rows)
        )
        found.append(Recorded(text.id, tokens))
    return found
