"""What an offer would have earned: the log's latest jobs of a model, decided again with it there.

One at a time and in small pieces, so that payments are not held up; how far it looks is bounded.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from cocoon.contracts.books import Simulated, SimulateRequest
from cocoon.contracts.commands import RequestJob, decode_command
from cocoon.contracts.events import Quote
from cocoon.domain.demand import MIN_JOBS, Estimate, Job, Offer, Simulation
from cocoon.eventlog.connection import acquired
from cocoon.eventlog.read import first_position_since, head, read_commands
from cocoon.kernel.clock import Clock
from cocoon.kernel.errors import NotFound, RateLimited
from services.billing import provider_store as store

if TYPE_CHECKING:
    from cocoon.eventlog.connection import Connection, Pool
    from services.billing.market import Market

MAX_JOBS: Final = 5_000
MAX_EVENTS: Final = 100_000  # of a shard, the latest
STEP: Final = 2_048
WAITING: Final = 4
PIECE: Final = 32  # jobs between two turns of the event loop
HOUR_MS: Final = 3_600_000
DEFAULT_CONTEXT: Final = 4096


class Simulator:
    """`Market` is folded by the caller."""

    def __init__(self, pool: Pool, shards: Sequence[int], market: Market, clock: Clock) -> None:
        self._pool, self._shards, self._market, self._clock = pool, tuple(shards), market, clock
        self._one = asyncio.Lock()
        self._waiting = 0

    async def simulate(self, provider_id: str, asked: SimulateRequest) -> Simulated:
        """Raises NotFound for a model that nobody offers, RateLimited when too many wait."""
        model_id = self._market.resolve(asked.model)
        if model_id is None:
            raise NotFound(
                f"nobody offers {asked.model} on this network, so there is no demand to look at",
                code="model_not_found",
            )
        if self._waiting >= WAITING:
            raise RateLimited(
                "others' simulations are being run; try again in a few seconds",
                code="simulations_busy",
                retry_after_s=5,
            )
        self._waiting += 1
        try:
            async with self._one:
                jobs = await self._jobs(model_id, asked.hours)
                return await self._run(provider_id, model_id, asked, jobs)
        finally:
            self._waiting -= 1

    async def _run(
        self, provider_id: str, model_id: str, asked: SimulateRequest, jobs: Sequence[Job]
    ) -> Simulated:
        others = self._market.others(model_id, provider_id)
        own = self._market.offers.get(provider_id, {}).get(model_id)
        contexts = [one.context_tokens for one in ([own] if own else others)]
        newest = jobs[-1].command if jobs else None
        fee_bps = next((c.quote.fee_bps for c in newest.candidates), 0) if newest else 0
        simulation = Simulation(
            Offer(
                provider_id=provider_id,
                quote=Quote(
                    model_id=model_id,
                    input_nanoton_per_mtok=asked.input_nanoton_per_mtok,
                    cached_input_nanoton_per_mtok=asked.cached_input_nanoton_per_mtok,
                    output_nanoton_per_mtok=asked.output_nanoton_per_mtok,
                    fee_bps=fee_bps,
                ),
                concurrency=asked.concurrency,
                context_tokens=max(contexts, default=DEFAULT_CONTEXT),
                others=len(others),
                policy=newest.policy if newest else None,
                tier=self._market.tiers.get(provider_id),
            )
        )
        for number, job in enumerate(jobs):
            if number % PIECE == 0:
                await asyncio.sleep(0)
            simulation.take(job)
        found = await asyncio.to_thread(simulation.estimate)
        return _told(model_id, found, len(others))

    async def _jobs(self, model_id: str, hours: int) -> list[Job]:
        """The latest of all shards, in order of time."""
        found: list[Job] = []
        since_us = (self._clock.now_ms() - hours * HOUR_MS) * 1000
        async with acquired(self._pool) as conn:
            for shard in self._shards:
                found += await _latest(conn, shard, model_id, max(0, since_us))
        found.sort(key=lambda job: (job.command.now_ms, job.command.job_id))
        return found[-MAX_JOBS:]


async def _latest(conn: Connection, shard: int, model_id: str, since_us: int) -> list[Job]:
    """A shard's jobs of the model since a time, read backwards and bounded."""
    end = (await head(conn, shard)).position
    lowest = max(await first_position_since(conn, shard, since_us), end - MAX_EVENTS + 1)
    found: list[Job] = []
    results: dict[str, store.Result] = {}
    while end >= lowest and len(found) < MAX_JOBS:
        start = max(lowest, end - STEP + 1)
        results |= await store.results(conn, shard, start, end)
        for stored in await read_commands(conn, shard, start, end):
            if stored.first_position < start or model_id.encode() not in stored.data:
                continue
            command = decode_command(stored.data)
            if not isinstance(command, RequestJob) or command.model_id != model_id:
                continue
            result = results.get(command.job_id)
            took_ms = max(1, result.at_ms - command.now_ms) if result else command.lease_ttl_ms
            found.append(Job(command, result.counts if result else None, took_ms))
            await asyncio.sleep(0)
        end = start - 1
    return found


def _told(model_id: str, found: Estimate, others: int) -> Simulated:
    if not found.enough:
        told = f"too little demand in the log: {found.jobs} jobs; {MIN_JOBS} are needed"
    else:
        told = (
            f"of {found.jobs} jobs in {span_text(found.span_ms)} it would have had {found.won}, as "
            "fast as the middle one of the others and with their history"
        )
        if found.span_ms < HOUR_MS:
            told += "; an hour is more than the log has seen"
    return Simulated(
        model_id=model_id, enough=found.enough, told=told, jobs=found.jobs,
        hours_ms=found.span_ms, won=found.won, per_hour_nanoton=found.per_hour,
        low_nanoton=found.low, high_nanoton=found.high, others=others,
    )  # fmt: skip


def span_text(span_ms: int) -> str:
    """In the unit that a person would use; never 0."""
    for unit_ms, name in ((HOUR_MS, "hours"), (HOUR_MS // 60, "minutes"), (1000, "seconds")):
        if span_ms >= 2 * unit_ms:
            return f"{span_ms / unit_ms:.0f} {name}"
    return f"{max(1, span_ms // 1000)} s"
