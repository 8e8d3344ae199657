"""Composition of billing: settings -> resources -> run. It also relays the log to the bus."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from functools import partial
from typing import TYPE_CHECKING

from cocoon.bus.connection import broker, close, connect
from cocoon.bus.ingress import IngressWorker
from cocoon.bus.permissions import INGRESS_DURABLE, inbox_prefix
from cocoon.bus.service import Stop, announce_ready, run
from cocoon.bus.streams import declare_ingress_consumer
from cocoon.contracts import subjects
from cocoon.contracts.envelope import StoredEvent
from cocoon.eventlog.append import LogAppender
from cocoon.eventlog.connection import create_pool, leadership
from cocoon.eventlog.relay import Relay
from cocoon.eventlog.tail import Tail
from cocoon.kernel.clock import SystemClock
from cocoon.kernel.errors import Transient
from cocoon.telemetry.observe import serve_observe
from services.billing.audit import keep_snapshots
from services.billing.gauges import keep_gauges
from services.billing.handlers import Ingress, Operator
from services.billing.ledger import LEDGER_CONSUMER, ROLE, Ledger
from services.billing.market import Market
from services.billing.provider_books import ProviderBooks
from services.billing.results import LiveJobs, Results
from services.billing.settings import BillingSettings

if TYPE_CHECKING:
    from faststream.nats import NatsBroker, NatsMessage

    from cocoon.bus.client import BusClient
    from cocoon.eventlog.connection import Pool

LEADER_SHARD = 0
RETRY_S = 0.25
GATHER_S = 0.1  # the ledger's transaction waits this long for more events: a commit costs more
SETTLE_S = 0.02  # and so do payments: no client waits for one, and its commit holds up the matches'
GATHER_EVENTS = 512
ASKING = 8  # providers' questions that are answered at once; more wait in the subscription


def main() -> None:
    run("billing", BillingSettings, serve)


async def serve(settings: BillingSettings, stop: Stop) -> None:
    """Become the one active billing, then follow, relay and settle until stopped."""
    dsn = settings.postgres_dsn_file.read_text(encoding="utf-8").strip()
    prefix = inbox_prefix("billing")
    shards = settings.account_shards
    async with contextlib.AsyncExitStack() as stack:
        await stack.enter_async_context(leadership(dsn, LEADER_SHARD, ROLE))
        nc = await connect(settings.nats_url, settings.nats_seed_file, "billing", prefix, stop)
        stack.push_async_callback(close, nc)
        pool = await create_pool(dsn, "cocoon-billing", size=8)
        stack.push_async_callback(pool.close)
        # a replay reads long, and its statements wait longer than a payment's may
        replays = await create_pool(dsn, "cocoon-billing-replay", size=1, patient=True)
        stack.push_async_callback(replays.close)
        asked = await create_pool(dsn, "cocoon-billing-books", size=2)  # by providers
        stack.push_async_callback(asked.close)
        appenders = {shard: LogAppender(dsn, shard, ROLE, gather_s=SETTLE_S) for shard in shards}
        for appender in appenders.values():
            await appender.acquire_term()
            stack.push_async_callback(appender.close)
        live = LiveJobs()
        results = Results(appenders, pool, live)
        ledgers = {shard: Ledger(pool, shard, appenders[shard].term, live) for shard in shards}
        for ledger in ledgers.values():
            await ledger.load()
        market = Market()
        _follow(dsn, nc, pool, results, market, ledgers, stop, stack)
        ingress = Ingress(results, nc, settings.result_wait_s)
        listening = broker(settings.nats_url, settings.nats_seed_file, "billing", prefix, stop)
        worker = IngressWorker(
            nc, subjects.INGRESS_STREAM, INGRESS_DURABLE, ingress.on_message,
            declare=declare_ingress_consumer, workers=settings.result_workers,
        )  # fmt: skip
        for shard in shards:
            _answer(listening, shard, Operator(appenders[shard], pool, shard, ledgers[shard]))
        _answer_providers(listening, ProviderBooks(asked, shards, market, SystemClock()))
        await listening.start()
        stack.push_async_callback(listening.stop)
        snapshots = keep_snapshots(replays, appenders, settings.snapshot_events)
        _watch([("ingress", worker.run()), ("snapshots", snapshots)], stop, stack)
        port, closer = await serve_observe(
            settings.observe_host,
            settings.observe_port,
            lambda: {"bus": nc.is_connected, "leading": stop.error is None},
        )
        stack.push_async_callback(closer)
        announce_ready("billing", observe_port=port, shards=list(shards))
        await stop.wait()


def _follow(
    dsn: str,
    nc: BusClient,
    pool: Pool,
    results: Results,
    market: Market,
    ledgers: dict[int, Ledger],
    stop: Stop,
    stack: contextlib.AsyncExitStack,
) -> None:
    """Start the relay and the tails: shard 0 for identities, each account shard for the ledger."""

    async def on_network(batch: Sequence[StoredEvent]) -> None:
        for stored in batch:
            results.on_network_event(stored)
            market.apply(stored)

    relay = Relay(dsn, nc, (subjects.NETWORK_SHARD, *ledgers))  # the tails read what it reads

    def ledger_tail(shard: int) -> Tail:
        return Tail(dsn, relay.feed(shard), shard, consumer=LEDGER_CONSUMER)

    zero = subjects.NETWORK_SHARD
    network = partial(Tail, dsn, relay.feed(zero), zero, from_position=1)
    follow = [("tail-0", _tail(network, on_network))]
    for shard, ledger in ledgers.items():
        follow.append((f"tail-{shard}", _post(partial(ledger_tail, shard), ledger)))
    follow.append(("relay", relay.run()))
    gauges = keep_gauges(pool, lambda: relay.positions, tuple(ledgers), LEDGER_CONSUMER)
    follow.append(("gauges", gauges))
    _watch(follow, stop, stack)


def _watch(
    work: Sequence[tuple[str, Coroutine[None, None, None]]],
    stop: Stop,
    stack: contextlib.AsyncExitStack,
) -> None:
    """Run named work until the stack is left; the process stops if any of it ends before."""
    tasks = [stop.watch(asyncio.create_task(item, name=name)) for name, item in work]

    async def end() -> None:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    stack.push_async_callback(end)


async def _tail(
    tail: Callable[[], Tail], on_events: Callable[[Sequence[StoredEvent]], Awaitable[None]]
) -> None:
    """Follow for ever; after a lost connection go on from what was really committed."""
    while True:
        with contextlib.suppress(Transient):
            async with tail() as following:
                async for batch in following:
                    await on_events(batch)
        await asyncio.sleep(RETRY_S)


async def _post(tail: Callable[[], Tail], ledger: Ledger) -> None:
    """Follow an account shard: its jobs are known at once, its money moves in groups."""
    now_s = asyncio.get_running_loop().time
    while True:
        with contextlib.suppress(Transient):
            async with tail() as following:
                async for first in following:
                    ledger.hear(first)
                    events, until_s = list(first), now_s() + GATHER_S
                    while following.live and (left_s := until_s - now_s()) > 0:
                        room = GATHER_EVENTS - len(events)
                        if room <= 0:
                            break
                        more = await following.gather(left_s, room)
                        ledger.hear(more)
                        events += more
                    await ledger.on_events(events)
        await asyncio.sleep(RETRY_S)


def _answer(listening: NatsBroker, shard: int, operator: Operator) -> None:
    @listening.subscriber(subjects.billing(shard, "*"), no_reply=True)
    async def on_request(message: NatsMessage) -> None:
        raw = message.raw_message
        verb = raw.subject.rpartition(".")[2]
        reply = await operator.answer(verb, raw.data)
        if raw.reply:
            await raw.respond(reply.to_canonical())


def _answer_providers(listening: NatsBroker, books: ProviderBooks) -> None:
    """The bus lets a provider ask under its own id only."""

    @listening.subscriber(subjects.books("*", "*"), no_reply=True, max_workers=ASKING)
    async def on_request(message: NatsMessage) -> None:
        raw = message.raw_message
        _, _, provider_id, verb = raw.subject.split(".")
        reply = await books.answer(provider_id, verb, raw.data)
        if raw.reply:
            await raw.respond(reply.to_canonical())
