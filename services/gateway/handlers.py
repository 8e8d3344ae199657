"""The hot path's door: admit one sealed job and run it; what every job shares.

It sees ciphertext, sizes and the public header; it opens nothing.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from typing import TYPE_CHECKING, NamedTuple, Protocol

import nats.errors

from cocoon.bus.sealed import CHUNK_BYTES, read_sealed
from cocoon.contracts import messages, subjects
from cocoon.contracts.matching import Preferences
from cocoon.contracts.messages import CancelJob
from cocoon.kernel.clock import Clock
from cocoon.kernel.errors import Conflict, DeadlineExceeded, NotFound, Unavailable
from cocoon.sealing.envelope import RequestHeader
from cocoon.telemetry.tracing import span
from services.gateway import jobs
from services.gateway.admission import Admission, Slot
from services.gateway.decide import Relay
from services.gateway.frames import Mailbox, Switchboard
from services.gateway.run import JobRun, now_ms
from services.gateway.settings import GatewaySettings
from services.gateway.store import ApiKey

if TYPE_CHECKING:
    from nats.js import JetStreamContext

    from cocoon.bus.client import BusClient
    from cocoon.eventlog.connection import Pool
    from services.gateway.budget import Share


class RunJob(NamedTuple):
    """An authenticated request: the envelope, its parsed header and req_hash (hex)."""

    key: ApiKey
    header: RequestHeader
    envelope: bytes
    req_hash: str
    idempotency_key: str
    traceparent: str
    preferences: Preferences | None = None
    affinity: str = ""


class JobResponse(Protocol):
    """Where the answer goes. After `start`, ending without `finish` truncates the body."""

    async def start(self, headers: list[tuple[bytes, bytes]], length: int | None) -> None: ...
    async def send_within(self, data: bytes, timeout_s: float, *, last: bool = False) -> bool: ...
    async def finish(self) -> None: ...
    def watch(self, on_gone: Callable[[], None]) -> asyncio.Task[None]: ...


class Gateway:
    """What every job shares. All methods run on one event loop."""

    def __init__(
        self,
        settings: GatewaySettings,
        gateway_id: str,
        nc: BusClient,
        js: JetStreamContext,
        pool: Pool,
        clock: Clock,
    ) -> None:
        self.settings, self.gateway_id = settings, gateway_id
        self.nc, self.js, self.pool, self.clock = nc, js, pool, clock
        self.switchboard = Switchboard(gateway_id)
        self.admission = Admission(settings)
        self.timing = settings.timing()
        self.fetches = asyncio.Semaphore(settings.max_fetches)

    async def do_run_job(self, request: RunJob, response: JobResponse, slot: Slot) -> None:
        """Run one job to its end. Raises what to answer if nothing was sent yet."""
        job_id = request.header.job_id.hex()
        shard = self.settings.shard_of(request.key.account_id)
        not_after_in_ms = request.header.not_after_ms - self.clock.now_ms()
        owner = (request.key.account_id, request.req_hash)
        runs_here = self.switchboard.owner_of(job_id)
        if runs_here is not None and runs_here != owner:
            raise Conflict("this job id was used before; draw a new one", code="job_id_used")
        attached = runs_here is not None
        if not attached and not_after_in_ms <= 0:
            # Too late for a first run, but a repeat still gets its response.
            if await jobs.read_job(self.pool, shard, job_id) is None:
                raise DeadlineExceeded(
                    "the request's not_after has passed; seal it again", code="expired"
                )
            attached = True
        if attached:
            not_after_in_ms = self.timing.first_byte_ms
        else:
            slot.asking(shard)
        box = Mailbox(self.settings.job_buffer_bytes, owner, slot.answer)
        relay = Relay(
            stream=request.header.stream,
            attached=attached,
            timing=self.timing,
            buffer_limit=(
                self.settings.job_buffer_bytes
                if request.header.stream
                else self.settings.whole_body_bytes
            ),
            not_after_in_ms=not_after_in_ms,
            now_ms=now_ms(),
        )
        self.switchboard.add(job_id, box)
        try:
            with span("gateway.run_job", request.traceparent, {"job_id": job_id}):
                await JobRun(self, request, response, slot, box, relay).run()
        finally:
            self.switchboard.remove(job_id, box)

    async def cancel(self, shard: int, job_id: str, provider_id: str, epoch: int) -> None:
        """Tell the matcher, and the provider if one is known, to stop a job."""
        body = CancelJob(job_id=job_id, epoch=epoch).model_dump_json().encode()
        await self.publish(subjects.cancel_at_matcher(shard), body)
        if provider_id:
            await self.publish(subjects.cancel_job(provider_id), body)

    async def publish(self, subject: str, body: bytes, traceparent: str = "") -> None:
        """Publish without waiting. Raises Unavailable when the bus is away for too long."""
        headers = {messages.H_TRACEPARENT: traceparent} if traceparent else None
        try:
            await self.nc.publish(subject, body, headers=headers)
        except nats.errors.Error:
            raise Unavailable("the bus is away; try again", retry_after_s=1) from None

    async def stored_bytes(
        self, provider_id: str, digest: str, offset: int, total: int, share: Share
    ) -> AsyncGenerator[bytes, None]:
        """A stored response from `offset` on, piece by piece; two pieces count against `share`.

        Raises NotFound (expired or damaged), Unavailable or RateLimited (memory); the whole is
        checked against its digest before its last piece is given.
        """
        window_bytes = min(total, 2 * CHUNK_BYTES)
        share.need(window_bytes)
        try:
            at, stored = 0, read_sealed(self.nc, provider_id, digest, total)
            while at < total:
                async with self.fetches:
                    piece = await anext(stored, b"")
                if not piece or at + len(piece) > total:
                    raise NotFound("the stored response has another size than the log says")
                at += len(piece)
                if at > offset:
                    yield piece[max(0, len(piece) - (at - offset)) :]
        finally:
            share.keep(share.used_bytes - window_bytes)
