"""Every metric's name in one place, with the label values that it may take.

One registry a process. A label value outside its bound counts as "other", so no input, id or
attack can grow the registry.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, cast

import prometheus_client as prom
from prometheus_client import GCCollector, PlatformCollector, ProcessCollector

REGISTRY: Final = prom.CollectorRegistry()
ProcessCollector(registry=REGISTRY)
PlatformCollector(registry=REGISTRY)
GCCollector(registry=REGISTRY)

_MAX_CODES = 64
_MAX_TOLD = 1024  # combinations of values found without looking at each again
_CODE = re.compile(r"[a-z][a-z0-9_]{0,47}\Z")
_FAST_S: Final = (
    0.0005, 0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.02, 0.03, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5,
    5.0, 10.0,
)  # fmt: skip
_SLOW_S: Final = (0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
_BATCH: Final = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


@dataclass(frozen=True, slots=True)
class Label:
    """A label and its values. Without `values`: the first 64 code-shaped texts that occur."""

    name: str
    values: frozenset[str] | None = None


def _label(name: str, *values: str) -> Label:
    return Label(name, frozenset(values) if values else None)


_SHARD = _label("shard", *(str(n) for n in range(64)))


class _Bounded:
    """Maps label values to children, each looked up once."""

    def __init__(
        self, metric: prom.Counter | prom.Gauge | prom.Histogram, labels: Sequence[Label]
    ) -> None:
        self._metric = metric
        self._labels = tuple(labels)
        self._children: dict[tuple[str, ...], prom.Counter | prom.Gauge | prom.Histogram] = {}
        self._codes: dict[str, set[str]] = {label.name: set() for label in labels}
        self._told: dict[tuple[object, ...], prom.Counter | prom.Gauge | prom.Histogram] = {}

    def child(self, values: tuple[object, ...]) -> prom.Counter | prom.Gauge | prom.Histogram:
        known = self._told.get(values)
        if known is not None:
            return known
        found = self._find(values)
        if len(self._told) < _MAX_TOLD:
            self._told[values] = found
        return found

    def _find(self, values: tuple[object, ...]) -> prom.Counter | prom.Gauge | prom.Histogram:
        if not self._labels and not values:
            return self._metric
        if len(values) != len(self._labels):
            raise ValueError("give one value for each of the metric's labels")
        key = tuple(
            self._bound(label, str(value))
            for label, value in zip(self._labels, values, strict=True)
        )
        found = self._children.get(key)
        if found is None:
            found = self._children[key] = self._metric.labels(*key)
        return found

    def _bound(self, label: Label, value: str) -> str:
        if label.values is not None:
            return value if value in label.values else "other"
        codes = self._codes[label.name]
        if value in codes:
            return value
        if len(codes) >= _MAX_CODES or _CODE.match(value) is None:
            return "other"
        codes.add(value)
        return value


class Counter:
    """Only rises. `inc(*label_values, amount=1)`."""

    def __init__(self, name: str, text: str, *labels: Label) -> None:
        metric = prom.Counter(name, text, [label.name for label in labels], registry=REGISTRY)
        self._bounded = _Bounded(metric, labels)

    def inc(self, *values: object, amount: float = 1) -> None:
        cast("prom.Counter", self._bounded.child(values)).inc(amount)


class Gauge:
    """Goes up and down. `set(value, *label_values)`, `inc(*label_values, amount=1)`, `dec`."""

    def __init__(self, name: str, text: str, *labels: Label) -> None:
        metric = prom.Gauge(name, text, [label.name for label in labels], registry=REGISTRY)
        self._bounded = _Bounded(metric, labels)

    def set(self, value: float, *values: object) -> None:
        self._child(values).set(value)

    def inc(self, *values: object, amount: float = 1) -> None:
        self._child(values).inc(amount)

    def dec(self, *values: object) -> None:
        self._child(values).dec()

    def _child(self, values: tuple[object, ...]) -> prom.Gauge:
        return cast("prom.Gauge", self._bounded.child(values))


class Histogram:
    """Counts observations in fixed buckets. `observe(value, *label_values)`."""

    def __init__(
        self, name: str, text: str, *labels: Label, buckets: Sequence[float] = _FAST_S
    ) -> None:
        metric = prom.Histogram(
            name, text, [label.name for label in labels], registry=REGISTRY, buckets=buckets
        )
        self._bounded = _Bounded(metric, labels)

    def observe(self, value: float, *values: object) -> None:
        cast("prom.Histogram", self._bounded.child(values)).observe(value)


def render() -> bytes:
    """The registry in Prometheus' text format."""
    return prom.generate_latest(REGISTRY)


# ---- gateway ----
HTTP_REQUESTS = Counter(
    "cocoon_http_requests", "Answered requests.", _label("route"),
    _label("status", "2xx", "3xx", "4xx", "5xx"),
)  # fmt: skip
REFUSALS = Counter("cocoon_refusals", "Refused requests, by code.", _label("code"))
IN_FLIGHT = Gauge("cocoon_jobs_in_flight", "Jobs that a process is working on.")
BUFFERED_BYTES = Gauge(
    "cocoon_gateway_buffered_bytes", "Sealed bytes that the gateway holds for its requests."
)
FIRST_TOKEN_SECONDS = Histogram(
    "cocoon_first_token_seconds", "From the request's arrival to the first byte sent."
)
FIRST_BYTE_HELD_SECONDS = Histogram(
    "cocoon_first_byte_held_seconds", "How long a first byte waited for the commit of its match."
)
JOB_SECONDS = Histogram("cocoon_job_seconds", "From request to last byte.", buckets=_SLOW_S)
DISPATCHES = Counter(
    "cocoon_dispatches", "Dispatches to providers.",
    _label("outcome", "accepted", "busy", "refused", "silent", "lost"),
)  # fmt: skip
FRAMES = Counter("cocoon_frames", "Sealed frames.", _label("outcome", "relayed", "gap", "stale"))

# ---- matcher ----
JOBS = Counter(
    "cocoon_jobs", "Ended jobs.",
    _label("outcome", "settled", "funds_refused", "failed", "cancelled"),
)  # fmt: skip
MATCHES = Counter(
    "cocoon_matches", "News sent to gateways.",
    _label("outcome", "matched", "committed", "existing", "waiting", "refused", "ended"),
)  # fmt: skip
MATCH_SECONDS = Histogram("cocoon_match_seconds", "From a job request to its committed match.")
LEASES_EXPIRED = Counter("cocoon_leases_expired", "Ended leases, by reason.", _label("reason"))
PROVIDERS = Gauge(
    "cocoon_providers", "Providers that a process knows, by state.",
    _label("state", "enrolled", "attested", "open", "alive", "revoked"),
)  # fmt: skip

# ---- event log ----
APPEND_BATCH = Histogram(
    "cocoon_append_batch_items", "Commands in one append.", _label("role"), buckets=_BATCH
)
APPEND_SECONDS = Histogram("cocoon_append_seconds", "One append, with its commit.", _label("role"))
APPEND_CONFLICTS = Counter("cocoon_append_conflicts", "Refused items of appends.", _label("role"))
RELAY_LAG = Gauge("cocoon_relay_lag_positions", "Log head minus the stream's end.", _SHARD)
RELAY_PUBLISHED = Counter("cocoon_relay_published", "Events published to the stream.", _SHARD)
RELAY_REWINDS = Counter(
    "cocoon_relay_rewinds", "Refused publishes, after which it rewound.", _SHARD
)
RELAY_HALTED = Gauge("cocoon_relay_halted", "1 while the stream is ahead of the log.", _SHARD)
TAIL_LAG = Gauge(
    "cocoon_tail_lag_positions", "Log head minus what a tail has applied.", _SHARD,
    _label("consumer"),
)  # fmt: skip
TAIL_RESUBSCRIPTIONS = Counter(
    "cocoon_tail_resubscriptions", "Gaps, errors and stalls of a tail.", _SHARD, _label("consumer")
)
PARKED = Counter("cocoon_parked", "Streams put aside after a fatal error.", _label("consumer"))
PARKED_EVENTS = Gauge(
    "cocoon_parked_events", "Events that stand aside now; page above 0.", _SHARD, _label("consumer")
)

# ---- bus ----
REDELIVERIES = Counter(
    "cocoon_redeliveries", "Messages that came again.", _label("subject", "submit_result", "event")
)
BUS_DISCONNECTS = Counter("cocoon_bus_disconnects", "Lost connections to NATS.")

# ---- billing ----
SETTLEMENTS = Counter(
    "cocoon_settlements", "Results that billing decided.",
    _label("outcome", "settled", "rejected", "repeated", "early", "dropped"),
)  # fmt: skip
SETTLE_SECONDS = Histogram("cocoon_settle_seconds", "From a submission's arrival to its commit.")
LEDGER_IMBALANCE = Gauge("cocoon_ledger_imbalance_nanoton", "The ledger's sum; 0 or page.", _SHARD)

# ---- provider ----
ANSWERS = Counter(
    "cocoon_answers", "Sealed answers, by their receipt's status.",
    _label("status", "complete", "length", "cancelled", "refused", "failed"),
)  # fmt: skip
TOKENS = Counter(
    "cocoon_tokens", "Tokens of finished jobs.",
    _label("kind", "input", "cached_input", "output", "reasoning"),
)  # fmt: skip
ENGINE_STEP_SECONDS = Histogram("cocoon_engine_step_seconds", "One step of the model's engine.")
ENGINE_ELSEWHERE = Gauge(
    "cocoon_engine_elsewhere",
    "Requests that the engines' servers have from others than this agent, over all its models.",
)
SPOOL_ITEMS = Gauge("cocoon_spool_items", "Sealed results that wait for their acknowledgement.")

# ---- attestation ----
VERDICTS = Counter(
    "cocoon_verdicts", "Decisions over providers' evidence.",
    _label("outcome", "ok", "reject", "error"), _label("code"),
)  # fmt: skip
VERIFY_SECONDS = Histogram(
    "cocoon_verify_seconds", "One verification of evidence.", buckets=_SLOW_S
)
CANARIES = Counter("cocoon_canaries", "Judged audit jobs, by outcome.", _label("outcome"))
REVOCATIONS = Counter("cocoon_revocations", "Revoked attestations, by reason.", _label("reason"))
ENTRIES = Counter(
    "cocoon_bus_entries", "Connections to the bus that asked to come in, by what they got.",
    _label("outcome"),
)  # fmt: skip
NEXT_EXPIRY = Gauge(
    "cocoon_next_expiry_seconds", "Until the first attestation runs out; -1 without any."
)
