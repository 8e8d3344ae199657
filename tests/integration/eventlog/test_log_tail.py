"""Whoever follows the log hears every event once, whatever happens to the bus; on real servers."""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
from dataclasses import replace

import asyncpg
import pytest

from cocoon.contracts.envelope import StoredEvent
from cocoon.eventlog.append import Appended, LogAppender, acquire_term, transaction
from cocoon.eventlog.connection import connect
from cocoon.eventlog.tail import Tail
from cocoon.kernel.errors import LogCorrupt
from tests.support.log_items import assert_sound, job_item, whole_log
from tests.support.log_world import (
    Collector,
    append_many,
    eventually,
    relaying,
    sample,
)
from tests.support.servers import Bus, Database


async def test_tail_is_gap_free_under_appends_and_restarts_of_nats(
    appender: LogAppender, database: Database, bus: Bus
) -> None:
    await append_many(appender, 0, 50)
    async with relaying(database, bus):
        tails = [
            Collector(Tail(database.dsn("cocoon_billing"), await bus.connect(role), 1, batch=64))
            for role in ("matcher", "attestation")
        ]
        await append_many(appender, 100, 200)
        for first in (1000, 2000):
            load = asyncio.create_task(append_many(appender, first, 200, waiters=4))
            await asyncio.sleep(0.15)
            await asyncio.to_thread(bus.server.kill)
            await asyncio.sleep(0.1)
            await asyncio.to_thread(bus.server.start)
            await load
        bus.server.kill()
        bus.server.wipe()
        await append_many(appender, 3000, 50)
        await asyncio.to_thread(bus.server.start)
        await append_many(appender, 4000, 50)
        for collector in tails:
            await eventually(lambda collector=collector: len(collector.events) >= 2250)
            await eventually(lambda collector=collector: collector.tail.live)
        await append_many(appender, 5000, 50)
        log = await whole_log(database.admin_dsn)
        assert_sound(log)
        for collector in tails:
            await eventually(lambda collector=collector: len(collector.events) >= len(log))
            assert collector.events == log
            assert collector.live_batches > 0
            await collector.stop()


async def test_tail_starts_after_its_checkpoint(
    appender: LogAppender, database: Database, bus: Bus
) -> None:
    await append_many(appender, 0, 10)
    conn = await connect(database.dsn("cocoon_billing"), "test")
    term = await acquire_term(conn, 1, "billing")
    async with transaction(conn, 1, "billing", term) as tx:
        await tx.checkpoint("ledger", 12)
    await conn.close()
    async with Tail(database.dsn("cocoon_billing"), None, 1, consumer="ledger") as tail:
        batch = await anext(tail)
        assert [event.position for event in batch] == list(range(13, 31))
    async with Tail(database.dsn("cocoon_matcher"), None, 1, from_position=30) as tail:
        assert [event.position for event in await anext(tail)] == [30]


async def test_tail_without_a_bus_follows_the_log(
    appender: LogAppender, database: Database
) -> None:
    collector = Collector(Tail(database.dsn("cocoon_reader"), None, 1))
    await append_many(appender, 0, 60, waiters=1)
    await eventually(lambda: len(collector.events) == 180)
    await collector.stop()
    assert collector.events == await whole_log(database.admin_dsn)


async def test_tail_follows_the_log_while_no_relay_runs(
    appender: LogAppender, database: Database, bus: Bus
) -> None:
    collector = Collector(Tail(database.dsn("cocoon_reader"), await bus.connect("matcher"), 1))
    await append_many(appender, 0, 20)
    await eventually(lambda: len(collector.events) == 60)
    await append_many(appender, 100, 20)
    await eventually(lambda: len(collector.events) == 120)
    await collector.stop()


async def test_tail_reads_the_log_while_jetstream_does_not_answer(
    appender: LogAppender, database: Database, bus: Bus
) -> None:
    nc = await bus.connect("matcher")
    assert bus.server.pid is not None
    os.kill(bus.server.pid, signal.SIGSTOP)
    try:
        collector = Collector(Tail(database.dsn("cocoon_reader"), nc, 1))
        await asyncio.sleep(0.5)  # it has asked JetStream to deliver from here on
        for first in (0, 100):
            await append_many(appender, first, 20)
            # A revocation may be late by 5 s in all, and a decision holds for three of them.
            await eventually(lambda count=first // 100: len(collector.events) == 60 * count + 60, 3)
        await collector.stop()
    finally:
        os.kill(bus.server.pid, signal.SIGCONT)


def sealed_by_itself(event: StoredEvent) -> StoredEvent:
    return replace(event, hash=event.compute_hash())


@pytest.mark.parametrize("kind", ["noise", "wrong hash", "fork", "gap"])
async def test_foreign_messages_in_the_stream_never_reach_a_consumer(
    appender: LogAppender, database: Database, bus: Bus, kind: str
) -> None:
    async with relaying(database, bus) as relay:
        await append_many(appender, 0, 10)
        await eventually(lambda: relay.positions[1] == 30)
    collector = Collector(Tail(database.dsn("cocoon_reader"), await bus.connect("matcher"), 1))
    await eventually(lambda: collector.tail.live and len(collector.events) == 30)
    nc = await bus.connect("billing")
    last = (await whole_log(database.admin_dsn))[-1]
    fork = sealed_by_itself(replace(last, position=31, prev_hash=bytes(32)))  # another history
    gap = sealed_by_itself(replace(last, position=33, prev_hash=last.hash))  # a hole before it
    headers = {
        "noise": {"ce-position": "31"},
        "wrong hash": {**last.to_headers(), "ce-position": "31"},
        "fork": fork.to_headers(),
        "gap": gap.to_headers(),
    }
    left = sample("cocoon_tail_resubscriptions_total", shard="1", consumer="memory")
    await nc.jetstream().publish("evt.1.job.x.funds_held", last.data, headers=headers[kind])
    await append_many(appender, 100, 10)
    await eventually(lambda: len(collector.events) >= 60)
    await collector.stop()
    assert sample("cocoon_tail_resubscriptions_total", shard="1", consumer="memory") > left
    assert collector.events == await whole_log(database.admin_dsn)


async def test_a_writers_own_events_come_back_as_the_ones_that_it_appended(
    appender: LogAppender, database: Database, bus: Bus
) -> None:
    async with relaying(database, bus):
        nc = await bus.connect("matcher")
        tail = Tail(database.dsn("cocoon_reader"), nc, 1, own=appender.recent)
        collector = Collector(tail)
        await append_many(appender, 0, 1)
        await eventually(lambda: tail.live and len(collector.events) == 3)
        mine = await appender.append(job_item(7))
        assert isinstance(mine, Appended)
        await eventually(lambda: len(collector.events) == 6)
        await collector.stop()
    assert collector.events == await whole_log(database.admin_dsn)
    assert [id(event) for event in collector.events[3:]] == [id(event) for event in mine.events]


async def test_a_tail_in_the_relays_process_follows_what_it_reads(
    appender: LogAppender, database: Database, bus: Bus
) -> None:
    async with relaying(database, bus) as relay:
        collector = Collector(Tail(database.dsn("cocoon_reader"), relay.feed(1), 1))
        # A relay that is slower than the tail's patience is left for the log, and met again.
        jobs = itertools.count(0, 20)
        async with asyncio.timeout(30):
            while not collector.live_batches:
                await append_many(appender, next(jobs), 20)
                await asyncio.sleep(0.1)
    await append_many(appender, next(jobs), 20)  # the relay is gone: the log itself is read
    whole = await whole_log(database.admin_dsn)
    await eventually(lambda: len(collector.events) == len(whole))
    await collector.stop()
    assert collector.events == await whole_log(database.admin_dsn)


async def test_tail_outlives_a_crash_of_postgres(own_postgres: Database) -> None:
    writer = LogAppender(own_postgres.dsn("cocoon_matcher"), 1, "matcher")
    await writer.acquire_term()
    collector = Collector(Tail(own_postgres.dsn("cocoon_reader"), None, 1))
    await append_many(writer, 0, 20)
    await asyncio.to_thread(own_postgres.server.kill)
    await asyncio.sleep(0.3)
    await asyncio.to_thread(own_postgres.server.start)
    await append_many(writer, 100, 20)
    await eventually(lambda: len(collector.events) == 120)
    await collector.stop()
    await writer.close()
    assert_sound(collector.events)


async def test_tail_stops_at_a_corrupt_log(appender: LogAppender, database: Database) -> None:
    await append_many(appender, 0, 5)
    admin = await asyncpg.connect(database.admin_dsn, timeout=10)
    await admin.execute("UPDATE log.events SET data = '{}' WHERE position = 7")
    await admin.close()
    async with Tail(database.dsn("cocoon_reader"), None, 1) as tail:
        with pytest.raises(LogCorrupt, match="position 7"):
            await anext(tail)
