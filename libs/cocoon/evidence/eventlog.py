"""Replay a TDX event log against a quote's registers, recomputing every digest that can be.

A log whose payload was edited under its old digest still replays; it is refused here. Firmware
events (registers 0 to 2) carry digests of things outside the log: only their replay counts.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Annotated

from pydantic import Field, TypeAdapter, ValidationError

from cocoon.contracts.base import Contract, Count
from cocoon.evidence.policy import Hex48
from cocoon.evidence.verdict import Verdict, reject

MAX_LOG_BYTES = 1024 * 1024
RUNTIME_EVENT = 0x0800_0001
_RUNTIME_REGISTER = 3


class Event(Contract):
    """One extension of a register; the names are those of the usual JSON form."""

    imr: Annotated[int, Field(ge=0, le=3)]
    event_type: Count
    digest: Hex48
    event: Annotated[str, Field(max_length=256)]
    event_payload: Annotated[str, Field(pattern=r"^(?:[0-9a-f]{2})*$", max_length=65_536)]

    def own_digest(self) -> str:
        """SHA-384 over the type (4 bytes, little-endian), the name and the payload."""
        parts = (
            self.event_type.to_bytes(4, "little"),
            self.event.encode(),
            bytes.fromhex(self.event_payload),
        )
        return hashlib.sha384(b":".join(parts)).hexdigest()


_LOG = TypeAdapter(Annotated[list[Event], Field(max_length=4096)])


def check_event_log(data: bytes, rtmrs: Sequence[str]) -> Verdict | None:
    """Check a log's JSON against four registers (hex, from an authentic quote's facts).

    None means that it replays and that every run-time payload is what was measured; otherwise a
    refusal: malformed, event_digest or rtmr_mismatch.
    """
    try:
        if len(data) > MAX_LOG_BYTES:
            raise ValueError  # its text would show nowhere
        events = _LOG.validate_json(data)
    except (ValidationError, ValueError):
        return reject("malformed", "The event log cannot be read.")
    registers = [bytes(48)] * 4
    for item in events:
        if item.imr == _RUNTIME_REGISTER and not _is_own(item):
            return reject("event_digest")
        joined = registers[item.imr] + bytes.fromhex(item.digest)
        registers[item.imr] = hashlib.sha384(joined).digest()
    replayed = [register.hex() for register in registers]
    return None if replayed == list(rtmrs) else reject("rtmr_mismatch")


def _is_own(item: Event) -> bool:
    """A colon in a name would let two events share a digest."""
    runtime = item.event_type == RUNTIME_EVENT and ":" not in item.event
    return runtime and item.own_digest() == item.digest
