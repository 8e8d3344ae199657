"""W3C trace context: one line that ties a job's spans together, with or without a tracer.

Carries random ids only; never content.
"""

from __future__ import annotations

import re

from opentelemetry import trace

from cocoon.kernel.clock import Randomness
from cocoon.telemetry.tracing import inject

_FORM = re.compile(r"[0-9a-f]{2}-([0-9a-f]{32})-[0-9a-f]{16}-([0-9a-f]{2})(?:-|\Z)")
_SAMPLED = "01"


def child_traceparent(parent: str | None, randomness: Randomness) -> str:
    """A `traceparent` for one job: the span's that is being recorded, or else a new id inside
    `parent`'s trace where that is valid, in a trace of its own where it is not.
    """
    if trace.get_current_span().is_recording():
        return inject()
    match = _FORM.match(parent) if parent else None
    span = _id(randomness, 8)
    if match is None or parent is None or parent.startswith("ff") or not int(match[1], 16):
        return f"00-{_id(randomness, 16)}-{span}-{_SAMPLED}"
    return f"00-{match[1]}-{span}-{match[2]}"


def _id(randomness: Randomness, size: int) -> str:
    raw = randomness.token(size)
    return (raw if any(raw) else b"\x01".rjust(size, b"\0")).hex()  # an id of zeros is invalid
