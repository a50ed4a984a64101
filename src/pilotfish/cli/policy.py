"""`pilotfish policy check` and `policy dry-run`: a policy in, what it does or would have done out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from pilotfish import actions
from pilotfish.actions import Policy, Recorded, Rule, Verdict, read_policy, read_recorded
from pilotfish.cli.policy_verbs import PolicyCheck, PolicyDryRun
from pilotfish.cli.terminal import table
from pilotfish.runs import write_json


def check(config: PolicyCheck) -> int:
    _describe(read_policy(config.file))
    return 0


def dry_run(config: PolicyDryRun) -> int:
    policy = read_policy(config.file)
    exchanges = [exchange for path in config.on for exchange in read_recorded(path)]
    found = [actions.dry_run(policy, exchange) for exchange in exchanges]
    for exchange, verdicts in zip(exchanges, found, strict=True):
        _print(exchange, verdicts, config.show)
    num_stopped = sum(any(verdict.action == "stop" for verdict in verdicts) for verdicts in found)
    num_touched = sum(bool(verdicts) for verdicts in found)
    print(
        f"\n{num_stopped} of {len(found)} exchanges stopped, {num_touched} with any verdict. What an action would have "
        "changed is not in a recording."
    )
    if config.json is not None:
        rows: list[dict[str, Any]] = [
            {"title": exchange.title, "verdicts": [asdict(verdict) for verdict in verdicts]}
            for exchange, verdicts in zip(exchanges, found, strict=True)
        ]
        write_json(config.json, {"policy": actions.policy_to_dict(policy), "exchanges": rows})
    return 0


def _describe(policy: Policy) -> None:
    rows = [
        [rule.metric, rule.action, rule.scope, rule.aggregate, _gate(rule), _unscored(rule)] for rule in policy.rules
    ]
    print(table(["metric", "action", "scope", "aggregate", "gate", "an unscored token"], rows))
    kept = f", and {policy.margin} judged ones stay back" if policy.margin else ""
    print(f"\n{'Tokens wait for their scores' if policy.holds else 'Tokens leave at once; scores follow'}{kept}.")


def _gate(rule: Rule) -> str:
    if not rule.judges:
        return "-"
    up = "the bank's threshold" if rule.threshold is None else f"{rule.threshold:g}"
    down = "" if rule.release is None else f", down under {rule.release:g}"
    return f"up at {up}{f' x {rule.min_tokens}' if rule.min_tokens > 1 else ''}{down}"


def _unscored(rule: Rule) -> str:
    return {"pass": "passes", "flag": "is flagged", "stop": "stops the answer"}[rule.on_unscored]


def _print(exchange: Recorded, verdicts: Sequence[Verdict], num_shown: int) -> None:
    counts = Counter(verdict.action for verdict in verdicts)
    said = ", ".join(f"{count} x {action}" for action, count in counts.items()) or "nothing"
    print(f"{exchange.title or 'exchange'}: {said}")
    texts = {token.position: token.text for token in exchange.tokens}
    for verdict in verdicts[:num_shown]:
        print(f"  {verdict.action} at token {verdict.position} {texts[verdict.position]!r}: {verdict.reason}")
    if len(verdicts) > num_shown:
        print(f"  … and {len(verdicts) - num_shown} more")
