"""Who may come in: bounds on jobs, jobs of a key, unanswered requests and bytes in memory.

Counters only. A refusal says 429 and when to come back; nothing waits here.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from cocoon.kernel.errors import RateLimited
from cocoon.telemetry.metrics import IN_FLIGHT
from services.gateway.settings import GatewaySettings


class Slot:
    """One admitted job's part of the bounds."""

    __slots__ = ("_admission", "_body_bytes", "_unmatched")

    def __init__(self, admission: Admission) -> None:
        self._admission = admission
        self._body_bytes = 0
        self._unmatched = False

    def grow(self, size: int) -> None:
        """Account for more bytes of the request's body. Raises RateLimited."""
        if self._admission.body_bytes + size > self._admission.max_body_bytes:
            raise _full("the gateway holds as many sealed bytes as it may")
        self._admission.body_bytes += size
        self._body_bytes += size

    def asking(self) -> None:
        """The matcher is about to be asked. Raises RateLimited when too many wait for it."""
        if self._admission.unmatched >= self._admission.max_unmatched:
            raise _full("too many jobs wait for the matcher")
        self._admission.unmatched += 1
        self._unmatched = True

    def answered(self) -> None:
        if self._unmatched:
            self._unmatched = False
            self._admission.unmatched -= 1

    def leave(self) -> None:
        self.answered()
        self._admission.body_bytes -= self._body_bytes
        self._body_bytes = 0


class Admission:
    """The gateway's bounds. `draining` refuses everybody new."""

    def __init__(self, settings: GatewaySettings) -> None:
        self.draining = False
        self.jobs = 0
        self.unmatched = 0
        self.body_bytes = 0
        self.max_unmatched = settings.max_unmatched_jobs
        self.max_body_bytes = settings.max_body_mib * 1024 * 1024
        self._max_jobs = settings.max_jobs
        self._max_per_key = settings.max_jobs_per_key
        self._per_key: dict[str, int] = {}

    @contextmanager
    def enter(self, api_key_id: str) -> Iterator[Slot]:
        """Admit a job of this key for the block. Raises RateLimited."""
        running = self._per_key.get(api_key_id, 0)
        if self.draining:
            raise _full("this gateway is shutting down")
        if running >= self._max_per_key:
            raise RateLimited(
                f"this API key has {running} jobs open, which is the limit; finish one first",
                code="too_many_streams",
                retry_after_s=1,
            )
        if self.jobs >= self._max_jobs:
            raise _full("the gateway has as many jobs open as it may")
        self.jobs += 1
        self._per_key[api_key_id] = running + 1
        IN_FLIGHT.set(self.jobs)
        slot = Slot(self)
        try:
            yield slot
        finally:
            slot.leave()
            self.jobs -= 1
            IN_FLIGHT.set(self.jobs)
            left = self._per_key[api_key_id] - 1
            if left:
                self._per_key[api_key_id] = left
            else:
                del self._per_key[api_key_id]


def _full(what: str) -> RateLimited:
    return RateLimited(f"{what}; try again in a second", code="gateway_full", retry_after_s=1)
