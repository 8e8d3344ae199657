"""Who may come in: bounds on jobs, on reads, each also per key, and on unanswered requests.

Counters only. A refusal says 429 and when to come back; nothing waits here.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator
from contextlib import contextmanager

from cocoon.kernel.errors import RateLimited
from cocoon.telemetry.metrics import BUFFERED_BYTES, IN_FLIGHT
from services.gateway.budget import ByteBudget, Share
from services.gateway.settings import GatewaySettings


class Slot:
    """One admitted job's part of the bounds: its body and what waits of its answer."""

    __slots__ = ("_admission", "_asked", "answer", "body")

    def __init__(self, admission: Admission, api_key_id: str) -> None:
        self._admission = admission
        self._asked: int | None = None  # the shard whose matcher owes an answer
        self.body: Share = admission.budget.share(api_key_id)
        self.answer: Share = admission.budget.share(api_key_id)

    def asking(self, shard: int) -> None:
        """A shard's matcher is about to be asked. Raises RateLimited when too many wait for it:
        one that stands still keeps nobody from the others.
        """
        if self._admission.unmatched_of[shard] >= self._admission.max_unmatched:
            raise _full("too many jobs wait for the matcher")
        self._admission.unmatched_of[shard] += 1
        self._asked = shard

    def answered(self) -> None:
        if self._asked is not None:
            self._admission.unmatched_of[self._asked] -= 1
            self._asked = None

    def leave(self) -> None:
        self.answered()
        self.body.give_back()
        self.answer.give_back()


class _Doorway:
    """How many are inside, all together and of each key."""

    def __init__(self, limit: int, per_key: int, whose: str = "API key") -> None:
        self.inside = 0
        self._whose = whose
        self._limit, self._per_key_limit = limit, per_key
        self._per_key: dict[str, int] = {}

    def enter(self, api_key_id: str, what: str, code: str) -> None:
        """Count one more of this key. Raises RateLimited."""
        here = self._per_key.get(api_key_id, 0)
        if here >= self._per_key_limit:
            raise RateLimited(
                f"this {self._whose} has {here} {what} open, which is the limit; finish one first",
                code=code,
                retry_after_s=1,
            )
        if self.inside >= self._limit:
            raise _full(f"the gateway has as many {what} open as it may")
        self.inside += 1
        self._per_key[api_key_id] = here + 1

    def leave(self, api_key_id: str) -> None:
        self.inside -= 1
        left = self._per_key[api_key_id] - 1
        if left:
            self._per_key[api_key_id] = left
        else:
            del self._per_key[api_key_id]


class Admission:
    """The gateway's bounds. `draining` refuses everybody new."""

    def __init__(self, settings: GatewaySettings) -> None:
        self.draining = False
        self.unmatched_of = dict.fromkeys(settings.account_shards, 0)
        self.max_unmatched = settings.max_unmatched_jobs
        self.budget = ByteBudget(settings.buffer_bytes, settings.buffer_per_key_bytes)
        self._jobs = _Doorway(settings.max_jobs, settings.max_jobs_per_key)
        self._reads = _Doorway(settings.max_reads, settings.max_reads_per_key)
        self._public = _Doorway(
            settings.max_public_reads, settings.max_public_reads_per_address, "address"
        )

    @property
    def unmatched(self) -> int:
        """How many jobs wait for an answer of any shard's matcher."""
        return sum(self.unmatched_of.values())

    @contextmanager
    def enter(self, api_key_id: str) -> Iterator[Slot]:
        """Admit a job of this key for the block. Raises RateLimited."""
        self._refuse_new()
        self._jobs.enter(api_key_id, "jobs", "too_many_streams")
        IN_FLIGHT.set(self._jobs.inside)
        slot = Slot(self, api_key_id)
        try:
            yield slot
        finally:
            slot.leave()
            self._jobs.leave(api_key_id)
            IN_FLIGHT.set(self._jobs.inside)
            BUFFERED_BYTES.set(self.budget.used_bytes)

    @contextmanager
    def enter_read(self, api_key_id: str) -> Iterator[Share]:
        """Admit a read of this key for the block. Raises RateLimited."""
        self._refuse_new()
        self._reads.enter(api_key_id, "reads", "too_many_reads")
        share = self.budget.share(api_key_id)
        try:
            yield share
        finally:
            share.give_back()
            self._reads.leave(api_key_id)

    @contextmanager
    def enter_public_read(self, address: str) -> Iterator[None]:
        """Admit a read that needs no key, from this peer, for the block. Raises RateLimited."""
        self._refuse_new()
        peer = peer_of(address)
        self._public.enter(peer, "reads", "too_many_reads")
        try:
            yield
        finally:
            self._public.leave(peer)

    def _refuse_new(self) -> None:
        if self.draining:
            raise _full("this gateway is shutting down")


def peer_of(address: str) -> str:
    """Whom an IP address stands for: an IPv4 address itself, an IPv6 address its /64."""
    try:
        known = ipaddress.ip_address(address)
    except ValueError:
        return ""
    if isinstance(known, ipaddress.IPv4Address):
        return str(known)
    if known.ipv4_mapped is not None:
        return str(known.ipv4_mapped)
    return known.packed[:8].hex()


def _full(what: str) -> RateLimited:
    return RateLimited(f"{what}; try again in a second", code="gateway_full", retry_after_s=1)
