"""The settings of the verbs around the server, beside `verbs`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from pilotfish.cli.verbs import Models

DEFAULT_STORE = "sqlite:///pilotfish.db"


@dataclass(frozen=True, slots=True, kw_only=True)
class Serve(Models):
    """Serves the pair, or a proxy before another server, as OpenAI's API, every token scored (extra `serve`)."""

    engine: Literal["embedded", "vllm"] = "embedded"
    """Our own, or vLLM's server with the monitor in it (extra `vllm`)."""
    vllm_args: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """After `--`: flags of vLLM's own server."""
    num_drafted: int | None = None
    """Tokens that the draft proposes a step, inside vLLM; 3 where it is not given."""

    upstream: str | None = None
    """Instead of a pair: another OpenAI-compatible server (https://HOST/v1), whose text a small model scores."""
    model: str | None = None
    """Name of the upstream's model."""
    reader: str = "demo:qwen-coder-0.5b"
    """The small model that reads along behind an upstream: a demo model, a local folder or a hub name."""
    upstream_key_env: str = "PILOTFISH_UPSTREAM_KEY"
    """NAME of the environment variable with the upstream's API key; where it is not set, none is sent."""
    upstream_timeout_s: float = 120.0
    """Longest silence of the upstream."""

    directions: tuple[Path, ...] = ()
    """Folders of calibrated directions that clients may steer the target along, and no others."""
    max_dose: float = 1.0
    """The most that a client may ask for, in calibrated doses of the direction."""

    host: str = "127.0.0.1"
    """Another than this machine's own needs an API key: `pilotfish keys add`."""
    port: int = 8000
    """0 takes a free one."""
    store: str = DEFAULT_STORE
    """Of exchanges and alerts: sqlite:///FILE or postgresql://USER:PASSWORD@HOST/NAME."""
    policy: Path | None = None
    """TOML or JSON of the policy to begin with; without it, one rule a head with the two settings below."""
    action: Literal["observe", "flag", "stop"] = "flag"
    """What to do at the bank's threshold."""
    threshold: float | None = None
    """Instead of the bank's calibrated threshold."""
    webhook: str | None = None
    """URL that alerts are posted to."""
    webhook_secret_env: str = "PILOTFISH_WEBHOOK_SECRET"
    """NAME of the environment variable with the key that signs them; `pilotfish keys secret` makes one."""
    alerts_file: Path | None = None
    """JSONL that alerts are appended to."""
    otel: str | None = None
    """OTLP address that alerts go to as log events, such as http://localhost:4318/v1/logs (extra `otel`)."""
    otel_traces: str | None = None
    """OTLP address that a span of each answer goes to, such as http://localhost:4318/v1/traces (extra `otel`)."""
    redact: bool = False
    """Store no text and no token ids, only scores, positions and verdicts."""
    keep_days: float = 30.0
    """Exchanges are deleted after this."""
    max_streams: int = 8
    """Answers generated at the same time."""
    max_queue: int = 32
    """Requests that wait; one more is refused with 429."""
    request_timeout_s: float = 600.0
    """Longest time from request to last token."""
    score_limit_s: float = 30.0
    """Heads that take longer for one reading leave its tokens unscored; the policy says what then."""
    requests_per_minute: int = 600
    """Of one API key."""

    def run(self) -> int:
        from pilotfish.cli import serve, serve_vllm

        return serve_vllm.run(self) if self.engine == "vllm" else serve.run(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class Keys:
    """Makes and revokes API keys of a server, and secrets for webhooks."""

    do: Annotated[Literal["add", "list", "revoke", "secret"], tyro.conf.Positional]
    """add NAME, list, revoke ID, or secret (for a webhook)."""
    name: Annotated[str, tyro.conf.Positional] = ""
    """The new key's name, or the ID of the one to revoke."""
    scopes: tuple[Literal["use", "read", "admin"], ...] = ("use",)
    """use: generate and score. read: transcripts, alerts, metrics. admin: replace the policy."""
    store: str = DEFAULT_STORE
    """Of the server."""

    def run(self) -> int:
        from pilotfish.cli.keys import run

        return run(self)
