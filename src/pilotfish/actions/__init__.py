"""A policy and scores in, verdicts out: what to do about a token. Plain data, no tensors, shared by every engine."""

from pilotfish.actions.aggregate import Aggregation
from pilotfish.actions.files import policy_from_dict, policy_to_dict, read_policy, write_policy
from pilotfish.actions.look_ahead import LookAhead, Warned, look_ahead
from pilotfish.actions.policy import Action, Policy, Rule, Scope, Verdict
from pilotfish.actions.recorded import Recorded, dry_run, read_recorded, recorded_exchange
from pilotfish.actions.watch import Reasoning, Watch

__all__ = [
    "Action",
    "Aggregation",
    "LookAhead",
    "Policy",
    "Reasoning",
    "Recorded",
    "Rule",
    "Scope",
    "Verdict",
    "Warned",
    "Watch",
    "dry_run",
    "look_ahead",
    "policy_from_dict",
    "policy_to_dict",
    "read_policy",
    "read_recorded",
    "recorded_exchange",
    "write_policy",
]
