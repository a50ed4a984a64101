"""Words on a command line in, an exit code out; one frozen dataclass a verb.

Exit codes: 0 done, 1 an error that the message explains, 2 a wrong flag, 130 interrupted; `check` has 10, 11 and
12 for its verdicts.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from typing import Annotated

import tyro

from pilotfish.cli.discover_verbs import Discover, DiscoverPromote
from pilotfish.cli.policy_verbs import PolicyCheck, PolicyDryRun
from pilotfish.cli.server_verbs import Keys, Serve
from pilotfish.cli.steer_verbs import Steer, SteerCalibrate, SteerVerify
from pilotfish.cli.terminal import quieten_transformers
from pilotfish.cli.verbs import BenchTax, Chat, Check, Contrast, Demo, Fit, Labels, Report, Score, Threshold, Tune
from pilotfish.errors import PilotfishError

__all__ = ["main"]

Verb = (
    Annotated[Demo, tyro.conf.subcommand("demo")]
    | Annotated[Chat, tyro.conf.subcommand("chat")]
    | Annotated[Score, tyro.conf.subcommand("score")]
    | Annotated[Fit, tyro.conf.subcommand("fit")]
    | Annotated[Tune, tyro.conf.subcommand("tune")]
    | Annotated[Labels, tyro.conf.subcommand("labels")]
    | Annotated[Contrast, tyro.conf.subcommand("contrast")]
    | Annotated[Report, tyro.conf.subcommand("report")]
    | Annotated[Threshold, tyro.conf.subcommand("threshold")]
    | Annotated[Check, tyro.conf.subcommand("check")]
    | Annotated[Serve, tyro.conf.subcommand("serve")]
    | Annotated[Keys, tyro.conf.subcommand("keys")]
    | Annotated[PolicyCheck, tyro.conf.subcommand("policy-check")]
    | Annotated[PolicyDryRun, tyro.conf.subcommand("policy-dry-run")]
    | Annotated[Steer, tyro.conf.subcommand("steer")]
    | Annotated[SteerCalibrate, tyro.conf.subcommand("steer-calibrate")]
    | Annotated[SteerVerify, tyro.conf.subcommand("steer-verify")]
    | Annotated[Discover, tyro.conf.subcommand("discover")]
    | Annotated[DiscoverPromote, tyro.conf.subcommand("discover-promote")]
    | Annotated[BenchTax, tyro.conf.subcommand("bench-tax")]
)

TWO_WORDS = {
    ("bench", "tax"),
    ("discover", "promote"),
    ("policy", "check"),
    ("policy", "dry-run"),
    ("steer", "calibrate"),
    ("steer", "verify"),
}


def main(args: Sequence[str] | None = None) -> int:
    """Runs one verb; the `pilotfish` command."""
    given = list(sys.argv[1:] if args is None else args)
    if tuple(given[:2]) in TWO_WORDS:  # read as two words, told to the parser as one
        given[:2] = ["-".join(given[:2])]
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    try:
        verb: Verb = tyro.cli(
            Verb,
            prog="pilotfish",
            args=given,
            description="Monitor heads on the draft of speculative decoding.",
            config=(tyro.conf.OmitArgPrefixes, tyro.conf.FlagConversionOff),
        )
        quieten_transformers()
        return verb.run()
    except PilotfishError as error:
        print(f"pilotfish: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:
        return 1
    except KeyboardInterrupt:
        print(
            "\npilotfish: interrupted; nothing half-written was left, the same command picks up again", file=sys.stderr
        )
        return 130
