"""The platform's processes of the simulated network, each composed of the service's own parts:
the matcher, billing (relay, results, ledger) and gateways. Nothing is decided here.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cocoon.bus.service import Stop
from cocoon.contracts import subjects
from cocoon.contracts.commands import RequestJob
from cocoon.contracts.envelope import StoredEvent
from cocoon.contracts.messages import (
    CancelJob,
    DispatchReport,
    Heartbeat,
    JobRequest,
    MatchUpdate,
)
from cocoon.eventlog.append import LogAppender
from cocoon.eventlog.relay import Relay
from cocoon.eventlog.tail import Tail
from cocoon.kernel.errors import Fatal, Transient
from services.billing.decide import project
from services.billing.handlers import Ingress
from services.billing.results import LiveJobs, Results
from services.gateway.handlers import Gateway
from services.gateway.settings import GatewaySettings
from services.matcher.handlers import Matcher
from services.matcher.lease import News
from services.matcher.leases import Leases
from services.matcher.main import DECISION_HOLDS_S
from services.matcher.memory import Memory
from services.matcher.seeds import Seeds
from services.matcher.settings import MatcherSettings
from tests.sim import database as db
from tests.sim.bus import Message, Nats
from tests.sim.loop import Process
from tests.support.job_world import FEE_BPS, LEASE_TTL_MS
from tests.support.matcher_world import requests_in

if TYPE_CHECKING:
    from tests.sim.world import World

SHARD = 1
NOWHERE = Path("unused")
MATCHER = MatcherSettings(
    nats_url="nats://127.0.0.1:1", nats_seed_file=NOWHERE, postgres_dsn_file=NOWHERE, shard=SHARD,
    fee_bps=FEE_BPS, lease_ttl_ms=LEASE_TTL_MS, sweep_s=0.25, seed_period_s=5.0,
    seed_revealed_after_s=10.0, waiting_limit=12,
    waiting_limit_per_account=6,
)  # fmt: skip
GATEWAY = GatewaySettings(
    nats_url="nats://127.0.0.1:1", postgres_dsn_file=NOWHERE, job_timeout_s=240.0,
    first_byte_timeout_s=60.0,
)  # fmt: skip
RESULT_WAIT_S = 15.0


async def run_matcher(world: World, process: Process) -> None:
    """Take the shard over, catch up, answer; returns when it has to stop."""
    stop = Stop()
    nc: Any = Nats(world.bus, process)
    dsn: Any = world.database
    clock, randomness = world.new_clock(), world.randomness
    appender = LogAppender(dsn, SHARD, "matcher", wait_limit_s=DECISION_HOLDS_S)
    await appender.acquire_term()
    memory = Memory(MATCHER.fee_bps, MATCHER.provider_silence_s)
    news = _news(nc)
    seeds = Seeds(MATCHER, memory, appender, db.KeptSecrets(world.database), clock, randomness)
    leases = Leases(MATCHER, memory, appender, news, clock, seeds, stop)

    async def find_job(command_id: str) -> str | None:
        conn = await db.connect(dsn, "matcher-commands")
        try:
            return await conn.ask(lambda: world.database.logs[SHARD].job_of_command(command_id))
        finally:
            conn.terminate()

    async def find_requests(job_ids: Sequence[str]) -> list[RequestJob]:
        conn = await db.connect(dsn, "matcher-commands")
        try:
            return await conn.ask(lambda: requests_in(world.database.logs[SHARD], job_ids))
        finally:
            conn.terminate()

    matcher = Matcher(
        MATCHER, memory, leases, appender, news, clock, seeds, stop, find_job, find_requests
    )
    for shard, apply in ((0, matcher.on_network_event), (SHARD, matcher.on_shard_event)):
        goal = world.database.head(shard).position
        caught_up = asyncio.Event()
        follow = _fold(Tail(dsn, nc, shard, from_position=1), goal, caught_up, apply)
        stop.watch(asyncio.create_task(follow, name=f"tail-{shard}"))
        await caught_up.wait()
    await seeds.begin()
    stop.watch(asyncio.create_task(_keep_seeds(seeds, stop), name="seeds"))
    await matcher.resume()
    world.remains[process] = lambda: {
        "leases": len(leases.live),
        "jobs in memory": len(memory.jobs),
        "pending holds": len(memory.pending_holds),
        "waiting requests": len(matcher.waiting),
        "providers' live jobs": sum(len(view.live_jobs) for view in memory.providers.values()),
    }
    for subject, handle in (
        (subjects.HEARTBEATS, _heartbeats(leases)),
        (subjects.report_dispatch(SHARD), _reports(leases)),
        (subjects.cancel_at_matcher(SHARD), _cancels(matcher)),
        (subjects.request_job(SHARD), _requests(matcher)),
    ):
        await nc.subscribe(subject, cb=handle)
    stop.watch(asyncio.create_task(_sweep(matcher, nc), name="sweep"))
    await stop.wait()


def _news(nc: Nats) -> News:
    async def publish(gateway_id: str, job_id: str, update: MatchUpdate, traceparent: str) -> None:
        body = update.model_dump_json().encode()
        await nc.publish(subjects.match_updates(gateway_id, job_id), body)

    return publish


async def _fold(
    tail: Tail, goal: int, caught_up: asyncio.Event, apply: Callable[[StoredEvent], object]
) -> None:
    if goal == 0:
        caught_up.set()
    async for batch in tail:
        for stored in batch:
            apply(stored)
        if batch[-1].position >= goal:
            caught_up.set()


async def _keep_seeds(seeds: Seeds, stop: Stop) -> None:
    while True:
        try:
            await seeds.tick()
        except Transient:
            pass  # it is tried again
        except Fatal as error:
            stop(error)
            return
        await asyncio.sleep(1.0)


async def _sweep(matcher: Matcher, nc: Nats) -> None:
    """Sweep for ever. What was not heard meanwhile is no provider's fault."""
    now_s = asyncio.get_running_loop().time
    while True:
        began_s = now_s()
        await asyncio.sleep(MATCHER.sweep_s)
        if now_s() - began_s > MATCHER.provider_silence_s / 2 or not nc.is_connected:
            matcher.deaf()
        await matcher.sweep()


def _heartbeats(leases: Leases) -> Callable[[Message], Any]:
    async def on_heartbeat(message: Message) -> None:
        leases.on_heartbeat(Heartbeat.model_validate_json(message.data))

    return on_heartbeat


def _reports(leases: Leases) -> Callable[[Message], Any]:
    async def on_report(message: Message) -> None:
        leases.on_report(DispatchReport.model_validate_json(message.data))

    return on_report


def _cancels(matcher: Matcher) -> Callable[[Message], Any]:
    async def on_cancel(message: Message) -> None:
        await matcher.on_cancel(CancelJob.model_validate_json(message.data))

    return on_cancel


def _requests(matcher: Matcher) -> Callable[[Message], Any]:
    async def on_request(message: Message) -> None:
        await matcher.on_job_request(JobRequest.model_validate_json(message.data), "")

    return on_request


async def run_billing(world: World, process: Process) -> None:
    """Relay both logs, settle results, post the ledger; returns when it has to stop."""
    stop = Stop()
    nc: Any = Nats(world.bus, process)
    dsn: Any = world.database
    pool: Any = db.Pool(world.database)
    appender = LogAppender(dsn, SHARD, "billing")
    await appender.acquire_term()
    live = LiveJobs()
    results = Results({SHARD: appender}, pool, live)

    async def on_network(batch: Sequence[StoredEvent]) -> None:
        for stored in batch:
            results.on_network_event(stored)

    async def on_shard(batch: Sequence[StoredEvent]) -> None:
        for stored in batch:
            live.apply(stored)
        async with db.transaction(pool, SHARD, "billing", appender.term) as tx:
            await db.write(tx.conn, SHARD, project(batch))
            await tx.checkpoint("ledger", batch[-1].position)

    relay = Relay(dsn, nc, (0, SHARD), clock=world.new_clock())
    network, shard = relay.feed(0), relay.feed(SHARD)
    for name, work in (
        ("tail-0", _follow(lambda: Tail(dsn, network, 0, from_position=1), on_network)),
        ("tail-1", _follow(lambda: Tail(dsn, shard, SHARD, consumer="ledger"), on_shard)),
        ("relay", relay.run()),
    ):
        stop.watch(asyncio.create_task(work, name=name))
    world.bus.worker = (process, Ingress(results, nc, RESULT_WAIT_S).on_message)
    world.deposits = (process, appender)
    await stop.wait()


async def _follow(
    tail: Callable[[], AsyncIterator[list[StoredEvent]]],
    on_events: Callable[[Sequence[StoredEvent]], Any],
) -> None:
    """Follow for ever; after a lost connection go on from what was really committed."""
    while True:
        try:
            async for batch in tail():
                await on_events(batch)
        except Transient:
            await asyncio.sleep(0.25)


class Door:
    """One gateway."""

    def __init__(self, world: World, process: Process, name: str) -> None:
        self.process = process
        nc: Any = Nats(world.bus, self.process)
        pool: Any = db.Pool(world.database)
        self.gateway = Gateway(GATEWAY, name, nc, nc.jetstream(), pool, world.new_clock())
        self.listening = False
        admission = self.gateway.admission
        world.remains[process] = lambda: {
            "bytes held": admission.budget.used_bytes,
            "keys with open shares": admission.budget.keys,
            "unmatched requests": admission.unmatched,
        }

    async def run(self) -> None:
        nc: Any = self.gateway.nc
        await self.gateway.switchboard.listen(nc)
        self.listening = True
        await asyncio.get_running_loop().create_future()
