"""Traces: one per job, over HTTP, NATS and the log, carried by W3C `traceparent` texts.

Without an endpoint no span is recorded and `traceparent` passes through unchanged. Attributes go
through the redaction; exceptions leave their class and code only.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Final

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.trace import (
    NonRecordingSpan,
    Span,
    SpanContext,
    SpanKind,
    StatusCode,
    TraceFlags,
)

from cocoon.kernel.errors import CocoonError, ConfigurationError
from cocoon.telemetry.redaction import FIELDS, Value, clean, is_event_name

QUEUE_SPANS: Final = 2_048  # then spans are dropped, never the job
BATCH_SPANS: Final = 512
EXPORT_EVERY_MS: Final = 1_000
EXPORT_TIMEOUT_S: Final = 5
MAX_ATTRIBUTES: Final = 24

_TRACEPARENT = re.compile(r"00-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-([0-9a-f]{2})\Z")
_tracer: trace.Tracer | None = None
_passing = ContextVar("cocoon_traceparent", default="")  # what `inject` hands on without a tracer


def configure_tracing(
    service: str, otlp_endpoint: str | None, sample_ratio: float = 1.0
) -> Callable[[], None]:
    """Export this process's spans to `<otlp_endpoint>/v1/traces` (OTLP over HTTP); None: nowhere.

    `sample_ratio` in 0..1 is for traces that begin here; a parent's decision is kept. Returns what
    flushes (at most five seconds) and stops it. Raises ConfigurationError for a bad ratio or URL.
    """
    global _tracer
    if not 0 <= sample_ratio <= 1:
        raise ConfigurationError("the trace sample ratio lies between 0 and 1")
    if otlp_endpoint is None or not otlp_endpoint.strip():
        _tracer = None
        return lambda: None
    if not otlp_endpoint.startswith(("http://", "https://")):
        raise ConfigurationError("the OTLP endpoint is an http:// or https:// URL, without a path")
    # a third of a second to import, which a process without an endpoint need not wait for
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import SERVICE_NAME, Resource
    from opentelemetry.sdk.trace import SpanLimits, TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor
    from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased

    provider = TracerProvider(
        sampler=ParentBased(TraceIdRatioBased(sample_ratio)),
        resource=Resource({SERVICE_NAME: service}),
        span_limits=SpanLimits(
            max_span_attributes=MAX_ATTRIBUTES, max_events=8, max_links=8,
            max_span_attribute_length=128,
        ),
        shutdown_on_exit=False,
    )  # fmt: skip
    provider.add_span_processor(
        BatchSpanProcessor(
            OTLPSpanExporter(
                endpoint=otlp_endpoint.rstrip("/") + "/v1/traces", timeout=EXPORT_TIMEOUT_S
            ),
            max_queue_size=QUEUE_SPANS,
            max_export_batch_size=BATCH_SPANS,
            schedule_delay_millis=EXPORT_EVERY_MS,
            export_timeout_millis=EXPORT_TIMEOUT_S * 1_000,
        )
    )
    _tracer = provider.get_tracer("cocoon")

    def stop() -> None:
        global _tracer
        _tracer = None
        provider.force_flush(EXPORT_TIMEOUT_S * 1_000)
        provider.shutdown()

    return stop


def extract(traceparent: str | None) -> Context:
    """The context that a `traceparent` names; an empty one for a missing or malformed text."""
    found = _TRACEPARENT.match(traceparent or "")
    if found is None:
        return Context()
    context = SpanContext(
        trace_id=int(found[1], 16),
        span_id=int(found[2], 16),
        is_remote=True,
        trace_flags=TraceFlags(int(found[3], 16) & TraceFlags.SAMPLED),
    )
    if not context.is_valid:
        return Context()
    return trace.set_span_in_context(NonRecordingSpan(context), Context())


def inject(context: Context | None = None) -> str:
    """The `traceparent` of a context (default: the current one); "" where there is no trace."""
    if _tracer is None and context is None:
        return _passing.get()
    found = trace.get_current_span(context).get_span_context()
    if not found.is_valid:
        return ""
    return f"00-{found.trace_id:032x}-{found.span_id:016x}-{found.trace_flags & 1:02x}"


@contextmanager
def span(
    name: str,
    parent: Context | str | None = None,
    attributes: Mapping[str, object] | None = None,
    kind: SpanKind = SpanKind.INTERNAL,
) -> Iterator[Span]:
    """Time a piece of work as a child of `parent` (a context, a traceparent, or the current one).

    An exception marks the span with its class and code and goes on. Without an exporter the body
    runs under the parent's context, so that `inject` still hands it on.
    """
    if _tracer is None:
        token = _passing.set(_text(parent))
        try:
            yield trace.INVALID_SPAN
        finally:
            _passing.reset(token)
        return
    context = extract(parent) if isinstance(parent, str) else parent
    started = _tracer.start_span(
        name if is_event_name(name) else "unnamed_span",
        context=context,
        kind=kind,
        attributes=None,
    )
    annotate(started, attributes or {})
    try:
        with trace.use_span(started, record_exception=False, set_status_on_exception=False):
            yield started
    except BaseException as error:
        _mark(started, error)
        raise
    finally:
        started.end()


def _text(parent: Context | str | None) -> str:
    """The valid `traceparent` of a parent, else an empty text."""
    if isinstance(parent, str):
        return parent if _TRACEPARENT.match(parent) else ""
    return inject(parent)


def annotate(target: Span, attributes: Mapping[str, object]) -> None:
    """Set attributes that the allow-list takes (as `cocoon.<name>`); others are dropped."""
    if not target.is_recording():
        return
    for name, value in attributes.items():
        if name in FIELDS:
            kept: Value = clean(name, value)
            if isinstance(kept, bool | int | float | str):
                target.set_attribute(f"cocoon.{name}", kept)


def _mark(target: Span, error: BaseException) -> None:
    annotate(target, {"error_class": type(error).__name__})
    if isinstance(error, CocoonError):
        annotate(target, {"code": error.code})
    target.set_status(StatusCode.ERROR)
