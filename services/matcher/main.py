"""Composition of the matcher: settings -> resources -> run. No decision is made here."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import nats.errors
from pydantic import ValidationError

from cocoon.bus.connection import broker, close, connect, is_connected
from cocoon.bus.permissions import inbox_prefix, matcher_name
from cocoon.bus.service import Stop, announce_ready, run
from cocoon.contracts import messages, subjects
from cocoon.contracts.commands import RequestJob
from cocoon.contracts.envelope import StoredEvent
from cocoon.contracts.matching import BALANCED, MatchingPolicy
from cocoon.contracts.messages import CancelJob, DispatchReport, Heartbeat, JobRequest, MatchUpdate
from cocoon.eventlog.append import LogAppender
from cocoon.eventlog.connection import acquired, create_pool
from cocoon.eventlog.connection import connect as connect_log
from cocoon.eventlog.read import head, job_of_command, requests_of_jobs
from cocoon.eventlog.tail import Tail
from cocoon.kernel.clock import SystemClock, SystemRandomness
from cocoon.kernel.errors import ConfigurationError, Transient
from cocoon.telemetry import metrics
from cocoon.telemetry.logs import get_logger
from cocoon.telemetry.observe import serve_observe
from cocoon.telemetry.tracing import inject, span
from services.matcher.handlers import Matcher
from services.matcher.lease import News
from services.matcher.leases import Leases
from services.matcher.memory import Memory
from services.matcher.seeds import Seeds
from services.matcher.settings import MatcherSettings
from services.matcher.store import Secrets

if TYPE_CHECKING:
    from faststream.nats import NatsBroker, NatsMessage
    from nats.aio.msg import Msg

    from cocoon.bus.client import BusClient

log = get_logger(__name__)
MAX_REQUESTS_IN_FLIGHT = 8192
CROWDED_S = (
    0.004  # less than from a match to its first token, which is what its commit must not hold
)
SEEDS_S = 1.0
DECISION_HOLDS_S = 3.0  # a match that the log has not taken by then is not to follow a revocation


def main() -> None:
    run("matcher", MatcherSettings, serve)


async def serve(settings: MatcherSettings, stop: Stop) -> None:
    """Take the shard over, catch up with the log, then answer gateways until stopped."""
    dsn = settings.postgres_dsn_file.read_text(encoding="utf-8").strip()
    prefix = inbox_prefix(matcher_name(settings.shard))
    async with contextlib.AsyncExitStack() as stack:
        nc = await connect(settings.nats_url, settings.nats_seed_file, "matcher", prefix, stop)
        stack.push_async_callback(close, nc)
        appender = LogAppender(
            dsn, settings.shard, "matcher", crowded_s=CROWDED_S, wait_limit_s=DECISION_HOLDS_S
        )
        await appender.acquire_term()
        stack.push_async_callback(appender.close)
        memory = Memory(
            settings.fee_bps, settings.provider_silence_s, len(settings.account_shards),
            _policy(settings.matching_policy_file),
        )  # fmt: skip
        clock, randomness = SystemClock(), SystemRandomness()
        news = _news(nc)
        pool = await create_pool(dsn, "cocoon-matcher-commands", size=2)
        stack.callback(pool.terminate)
        seeds = Seeds(settings, memory, appender, Secrets(pool, settings.shard), clock, randomness)
        leases = Leases(settings, memory, appender, news, clock, seeds, stop)
        stack.push_async_callback(leases.close)

        async def find_job(command_id: str) -> str | None:
            async with acquired(pool) as conn:
                return await job_of_command(conn, settings.shard, command_id)

        async def find_requests(job_ids: Sequence[str]) -> list[RequestJob]:
            async with acquired(pool) as conn:
                return await requests_of_jobs(conn, settings.shard, job_ids)

        matcher = Matcher(
            settings, memory, leases, appender, news, clock, seeds, stop, find_job, find_requests
        )
        tasks = await _follow(settings, dsn, nc, matcher, appender.recent, stop, stack)
        await seeds.begin()
        await seeds.tick()
        tasks.append(stop.watch(asyncio.create_task(_keep_seeds(seeds), name="seeds")))
        await matcher.resume()
        listening = _broker(settings, matcher, leases, prefix, stop)
        await listening.start()
        stack.push_async_callback(listening.stop)
        await _answer(settings, nc, matcher, leases, stack)
        sweeping = _sweep(settings, matcher, lambda: nc.is_connected and is_connected(listening))
        tasks.append(stop.watch(asyncio.create_task(sweeping, name="sweep")))
        port, closer = await serve_observe(
            settings.observe_host,
            settings.observe_port,
            lambda: {"bus": nc.is_connected, "leading": stop.error is None},
        )
        stack.push_async_callback(closer)
        announce_ready("matcher", observe_port=port, shard=settings.shard)
        await stop.wait()


def _policy(path: Path | None) -> MatchingPolicy:
    """Raises ConfigurationError for a file that holds none."""
    if path is None:
        return BALANCED
    try:
        return MatchingPolicy.model_validate_json(path.read_bytes())
    except (OSError, ValidationError):
        raise ConfigurationError(
            f"{path} is not a matching policy; `./cocoon matching show` prints one"
        ) from None


def _news(nc: BusClient) -> News:
    async def publish(gateway_id: str, job_id: str, update: MatchUpdate, traceparent: str) -> None:
        metrics.MATCHES.inc(update.kind)
        headers = {messages.H_TRACEPARENT: traceparent} if traceparent else None
        body = update.model_dump_json().encode()
        # a decision goes on without its news: the gateway asks again, or the log
        with contextlib.suppress(nats.errors.Error):
            await nc.publish(subjects.match_updates(gateway_id, job_id), body, headers=headers)

    return publish


async def _follow(
    settings: MatcherSettings,
    dsn: str,
    nc: BusClient,
    matcher: Matcher,
    appended: dict[int, StoredEvent],
    stop: Stop,
    stack: contextlib.AsyncExitStack,
) -> list[asyncio.Task[None]]:
    """Fold both shards up to their heads before anything is decided, then follow them."""
    tasks: list[asyncio.Task[None]] = []
    stack.push_async_callback(_cancel, tasks)
    for shard, apply, known in (
        (subjects.NETWORK_SHARD, matcher.on_network_event, None),
        (settings.shard, matcher.on_shard_event, appended),
    ):
        conn = await connect_log(dsn, "cocoon-matcher-head")
        try:
            goal = (await head(conn, shard)).position
        finally:
            await conn.close(timeout=2)
        caught_up = asyncio.Event()
        tail = Tail(dsn, nc, shard, from_position=1, own=known)
        follow = _tail(tail, goal, caught_up, apply)
        task = stop.watch(asyncio.create_task(follow, name=f"tail-{shard}"))
        tasks.append(task)
        waiting = asyncio.create_task(caught_up.wait())
        await asyncio.wait({waiting, task}, return_when=asyncio.FIRST_COMPLETED)
        waiting.cancel()
        if task.done():
            task.result()
    return tasks


async def _tail(
    tail: Tail, goal: int, caught_up: asyncio.Event, apply: Callable[[StoredEvent], None]
) -> None:
    if goal == 0:
        caught_up.set()
    async with tail:
        async for batch in tail:
            for stored in batch:
                apply(stored)
            if batch[-1].position >= goal:
                caught_up.set()


async def _cancel(tasks: list[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def _broker(
    settings: MatcherSettings, matcher: Matcher, leases: Leases, prefix: str, stop: Stop
) -> NatsBroker:
    """What comes seldom: heartbeats and cancellations."""
    listening = broker(settings.nats_url, settings.nats_seed_file, "matcher", prefix, stop)

    @listening.subscriber(subjects.HEARTBEATS, no_reply=True)
    async def on_heartbeat(message: NatsMessage) -> None:
        beat = Heartbeat.model_validate_json(message.raw_message.data)
        if message.raw_message.subject == subjects.heartbeat(beat.provider_id):
            leases.on_heartbeat(beat)

    @listening.subscriber(subjects.cancel_at_matcher(settings.shard), no_reply=True)
    async def on_cancel_job(message: NatsMessage) -> None:
        await matcher.on_cancel(CancelJob.model_validate_json(message.raw_message.data))

    return listening


async def _answer(
    settings: MatcherSettings, nc: BusClient, matcher: Matcher, leases: Leases,
    stack: contextlib.AsyncExitStack,
) -> None:  # fmt: skip
    """The hot routes: raw nats-py, one task a request, bounded; reports at once."""
    running: set[asyncio.Task[None]] = set()

    async def handle(message: Msg) -> None:
        try:
            request = JobRequest.model_validate_json(message.data)
        except ValidationError:
            log.warning("bad_job_request", size=len(message.data))
            return
        parent = (message.headers or {}).get(messages.H_TRACEPARENT, "")
        began_s = time.perf_counter()
        with span("matcher.request_job", parent, {"job_id": request.job_id}):
            await matcher.on_job_request(request, inject() or parent)
        metrics.MATCH_SECONDS.observe(time.perf_counter() - began_s)

    def on_request(message: Msg) -> None:
        if len(running) >= MAX_REQUESTS_IN_FLIGHT:
            return  # the gateway's wait for an answer ends in a 503
        task = asyncio.create_task(handle(message))
        running.add(task)
        task.add_done_callback(running.discard)

    def on_report(message: Msg) -> None:
        leases.on_report(DispatchReport.model_validate_json(message.data))

    for subject, handler in (
        (subjects.request_job(settings.shard), on_request),
        (subjects.report_dispatch(settings.shard), on_report),
    ):
        subscription = await nc.subscribe_direct(subject, handler)
        stack.push_async_callback(subscription.unsubscribe)


async def _keep_seeds(seeds: Seeds) -> None:
    """Begin and reveal periods for ever. The log or the table may be away meanwhile."""
    while True:
        await asyncio.sleep(SEEDS_S)
        try:
            await seeds.tick()
        except Transient as error:
            log.warning("seeds_wait", code=error.code)


async def _sweep(settings: MatcherSettings, matcher: Matcher, hears: Callable[[], bool]) -> None:
    """Sweep for ever. What was not heard while the bus was away is no provider's fault."""
    now_s = asyncio.get_running_loop().time
    while True:
        began_s = now_s()
        await asyncio.sleep(settings.sweep_s)
        if now_s() - began_s > settings.provider_silence_s / 2 or not hears():
            matcher.deaf()
        await matcher.sweep()
