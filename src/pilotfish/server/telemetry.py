"""What happens in a server in; Prometheus metrics out, named after those of vLLM where it has the same thing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from pilotfish.actions import Verdict
from pilotfish.engines import Generation
from pilotfish.server.exchanges import Tally

PREFIX = "pilotfish:"
SCORE_STEPS = (0.01, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 1.0)
LAG_STEPS = (0.0, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0)


class _Load(Collector):
    """Gauges that are read when somebody asks."""

    def __init__(self, load: Callable[[], tuple[int, int]], outbox: Callable[[], dict[tuple[str, str], int]]) -> None:
        self._load, self._outbox = load, outbox

    def collect(self) -> Iterator[Metric]:
        running, waiting = self._load()
        yield GaugeMetricFamily(f"{PREFIX}num_requests_running", "Requests that have a place.", running)
        yield GaugeMetricFamily(f"{PREFIX}num_requests_waiting", "Requests in the queue.", waiting)
        family = GaugeMetricFamily(
            f"{PREFIX}alert_deliveries", "Deliveries of alerts in the store.", labels=("sink", "state")
        )
        for (sink, state), count in self._outbox().items():
            family.add_metric((sink, state), count)
        yield family


class Telemetry:
    """The metrics of one server, in a registry of their own."""

    def __init__(self, load: Callable[[], tuple[int, int]], outbox: Callable[[], dict[tuple[str, str], int]]) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_Load(load, outbox))
        self._drafts = self._counter("spec_decode_num_drafts", "Rounds of speculation.")
        self._draft_tokens = self._counter("spec_decode_num_draft_tokens", "Tokens that the draft proposed.")
        self._accepted = self._counter("spec_decode_num_accepted_tokens", "Of these, tokens that the target accepted.")
        self._accepted_at = self._counter(
            "spec_decode_num_accepted_tokens_per_pos", "Accepted tokens by their place in the draft.", "position"
        )
        self._prompt_tokens = self._counter("prompt_tokens", "Tokens of prompts.")
        self._generation_tokens = self._counter("generation_tokens", "Tokens that were generated.")
        self._finished = self._counter("request_success", "Requests that ended, by how.", "finished_reason")
        self._scored = self._counter("monitor_tokens_scored", "Tokens, of prompts too, that every head scored.")
        self._missed = self._counter("monitor_tokens_missed", "Tokens that were left unscored.")
        self._taxed = self._counter("monitor_tax_mode_forwards", "Passes of the draft for the scores alone.")
        self._flags = self._counter("monitor_flags", "Alerts, by metric and action.", "head", "action")
        self._attempts = self._counter(
            "alert_attempts", "Tries to deliver an alert, by how they went.", "sink", "outcome"
        )
        self._errors = self._counter("monitor_errors", "Requests that the server could not answer, by kind.", "kind")
        self._score = self._histogram("monitor_score", "Highest score of an exchange.", SCORE_STEPS, "head")
        self._lag = self._histogram(
            "monitor_detection_lag_tokens", "Tokens sent from a flagged one to its alert.", LAG_STEPS
        )
        self._latency = self._histogram("e2e_request_latency_seconds", "From request to last token.", None)
        self._first = self._histogram("time_to_first_token_seconds", "From request to first token.", None)
        self._store = self._histogram("monitor_overhead_seconds", "Time that a record of an exchange took.", None)
        self._coverage = Gauge(
            f"{PREFIX}monitor_coverage_ratio",
            "Share of the last exchange's tokens that were scored.",
            registry=self._registry,
        )

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"{PREFIX}{name}", text, labels, registry=self._registry)

    def _histogram(self, name: str, text: str, steps: Sequence[float] | None, *labels: str) -> Histogram:
        buckets = {"buckets": steps} if steps is not None else {}
        return Histogram(f"{PREFIX}{name}", text, labels, registry=self._registry, **buckets)  # type: ignore[arg-type]

    def text(self) -> bytes:
        """All metrics in Prometheus's text format; raises StoreError when the outbox cannot be read."""
        return generate_latest(self._registry)

    def count_generation(self, generation: Generation, found: Tally, *, seconds: float, finish: str) -> None:
        """An answer has ended, one way or another."""
        num_tokens = len(generation.tokens)
        self._prompt_tokens.inc(generation.num_prompt_tokens)
        self._generation_tokens.inc(len(generation.committed))
        self._scored.inc(found.num_scored)
        self._missed.inc(num_tokens - found.num_scored)
        self._taxed.inc(generation.num_taxed_reads)
        if num_tokens:
            self._coverage.set(found.num_scored / num_tokens)
        for item in generation.rounds:
            self._drafts.inc()
            self._draft_tokens.inc(len(item.drafted))
            self._accepted.inc(item.num_accepted)
            for place in range(item.num_accepted):
                self._accepted_at.labels(str(place)).inc()
        for metric in found.metrics:
            sides = (side[metric] for side in (found.in_prompt, found.in_answer) if metric in side)
            self._score.labels(metric).observe(max(sides))
        self._finished.labels(finish).inc()
        self._latency.observe(seconds)

    def count_flag(self, verdict: Verdict, *, lag: int) -> None:
        self._flags.labels(verdict.metric, verdict.action).inc()
        self._lag.observe(lag)

    def count_attempt(self, sink: str, outcome: str) -> None:
        self._attempts.labels(sink, outcome).inc()

    def count_error(self, kind: str) -> None:
        self._errors.labels(kind).inc()

    def observe_first_token(self, seconds: float) -> None:
        self._first.observe(seconds)

    def observe_record(self, seconds: float) -> None:
        self._store.observe(seconds)
