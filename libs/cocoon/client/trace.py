"""W3C trace context without a tracer: one line that ties a job's spans together.

Carries random ids only; never content.
"""

from __future__ import annotations

import re

from cocoon.kernel.clock import Randomness

_FORM = re.compile(r"[0-9a-f]{2}-([0-9a-f]{32})-[0-9a-f]{16}-([0-9a-f]{2})(?:-|\Z)")
_SAMPLED = "01"


def child_traceparent(parent: str | None, randomness: Randomness) -> str:
    """A `traceparent` for one job: inside `parent`'s trace where that is valid, else a new one."""
    match = _FORM.match(parent) if parent else None
    span = _id(randomness, 8)
    if match is None or parent is None or parent.startswith("ff") or not int(match[1], 16):
        return f"00-{_id(randomness, 16)}-{span}-{_SAMPLED}"
    return f"00-{match[1]}-{span}-{match[2]}"


def _id(randomness: Randomness, size: int) -> str:
    raw = randomness.token(size)
    return (raw if any(raw) else b"\x01".rjust(size, b"\0")).hex()  # an id of zeros is invalid
