"""`pilotfish serve`: a pair, or an upstream and a reader, in; an HTTP server out, until it is told to end."""

from __future__ import annotations

import asyncio
import os
from typing import Any

from pilotfish.actions import Policy, read_policy
from pilotfish.cli.server_verbs import Serve
from pilotfish.cli.session import find_banks, flag_policy, start_engine
from pilotfish.cli.verbs import DEMO_PAIR
from pilotfish.errors import SettingError
from pilotfish.heads import HeadBank, joined
from pilotfish.models import load_model
from pilotfish.steering import load_directions


def run(config: Serve) -> int:
    if config.vllm_args or config.num_drafted is not None:
        raise SettingError("--num-drafted, and whatever follows --, are for vLLM's server; add --engine vllm")
    try:
        from pilotfish.server import ServerSettings, Service, Store, make_server
    except ModuleNotFoundError as error:
        raise missing_extra("serve", error) from error
    settings = ServerSettings(
        host=config.host,
        port=config.port,
        keep_days=config.keep_days,
        max_streams=config.max_streams,
        max_queue=config.max_queue,
        request_timeout_s=config.request_timeout_s,
        requests_per_minute=config.requests_per_minute,
    )
    sinks, tracer = _sinks(config), _tracer(config)
    store = Store(config.store, sinks=[sink.name for sink in sinks], redact=config.redact)
    backend, banks = _embedded(config) if config.upstream is None else _proxy(config)
    policy = flag_policy(banks, action=config.action, threshold=config.threshold, hold=True)
    if config.policy is not None:
        policy = read_policy(config.policy)
    try:
        service = Service(backend, store, settings, policy=policy, sinks=sinks, tracer=tracer)
        asyncio.run(backend.check(service.policy))
        names = ", ".join(sink.name for sink in sinks) or "the store alone"
        beside = f" (read by {backend.info.draft}, at a tax)" if backend.info.is_taxed else ""
        print(f"{backend.info.model}{beside}: {_rules(service.policy)}; alerts go to {names}", flush=True)
        if backend.info.directions:
            print(f"clients may steer along {', '.join(one.name for one in backend.info.directions)}", flush=True)
        server = make_server(service, lambda url: print(f"serving on {url}/v1; the page: {url}/", flush=True))
        server.run()
    finally:
        backend.close()
    return 0 if server.started else 1


def _embedded(config: Serve) -> tuple[Any, list[HeadBank]]:
    from pilotfish.server import EmbeddedBackend

    if config.model is not None:
        raise SettingError("--model names a model of an upstream; give --upstream too, or name your own with --pair")
    engine = start_engine(config, score_limit_s=config.score_limit_s)
    identity = engine.pair.target_identity
    found = [one for folder in config.directions for one in load_directions(folder, identity=identity).values()]
    room = {"max_streams": config.max_streams, "max_queue": config.max_queue}
    backend = EmbeddedBackend(engine, directions=found, max_dose=config.max_dose, **room)
    return backend, list(engine.banks.values())


def _proxy(config: Serve) -> tuple[Any, list[HeadBank]]:
    from pilotfish.server import ProxyBackend, Upstream
    from pilotfish.server.steering import ELSEWHERE

    if config.model is None:
        raise SettingError("with --upstream say which of its models answers: --model NAME")
    if config.draft is not None or config.pair != DEMO_PAIR:
        raise SettingError("--pair and --draft name models of your own; behind an upstream name the --reader")
    if config.directions:
        raise SettingError(f"--directions cannot be served: {ELSEWHERE}")
    key = os.environ.get(config.upstream_key_env, "")
    upstream = Upstream(config.upstream or "", config.model, api_key=key, timeout_s=config.upstream_timeout_s)
    reader = load_model(config.reader, device=config.device, dtype=config.dtype)
    bank = joined(find_banks(config.banks, (reader.identity,)))
    room = {"max_streams": config.max_streams, "max_queue": config.max_queue}
    backend = ProxyBackend(upstream, reader, bank, score_limit_s=config.score_limit_s, **room)
    return backend, [bank]


def missing_extra(extra: str, error: ModuleNotFoundError) -> SettingError:
    return SettingError(f"the package {error.name!r} is not installed; run: pip install 'pilotfish[{extra}]'")


def _sinks(config: Serve) -> list[Any]:
    from pilotfish.server import JsonlSink, WebhookSink

    sinks: list[Any] = []
    if config.webhook is not None:
        secret = os.environ.get(config.webhook_secret_env)
        if secret is None:
            raise SettingError(
                f"the environment variable {config.webhook_secret_env} is not set; put the webhook's secret into it: "
                f'export {config.webhook_secret_env}="$(pilotfish keys secret)"'
            )
        sinks.append(WebhookSink(config.webhook, secret))
    if config.alerts_file is not None:
        sinks.append(JsonlSink(config.alerts_file))
    if config.otel is not None:
        try:
            from pilotfish.server.otel import OtelSink
        except ModuleNotFoundError as error:
            raise missing_extra("otel", error) from error
        sinks.append(OtelSink.over_http(config.otel))
    return sinks


def _tracer(config: Serve) -> Any:
    if config.otel_traces is None:
        return None
    try:
        from pilotfish.server.otel import OtelTracer
    except ModuleNotFoundError as error:
        raise missing_extra("otel", error) from error
    return OtelTracer.over_http(config.otel_traces)


def _rules(policy: Policy) -> str:
    named = ", ".join(f"{rule.action} on {rule.metric}" for rule in policy.rules if rule.action != "observe")
    return named or "scores are observed"
