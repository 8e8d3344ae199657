"""What benchmarks.log_size fills a log with is a log: dense, chained, its books in balance."""

from __future__ import annotations

from contextlib import AsyncExitStack

import asyncpg

from benchmarks.log_size import EVENTS_A_JOB, Log
from benchmarks.servers import ACCOUNTS, SHARD
from cocoon.domain.job import JobStatus, fold
from cocoon.eventlog.read import head, read_batch, stream_events
from tests.support.servers import Database

EVENTS = 100


_INDEXES = "SELECT indexdef FROM pg_indexes WHERE schemaname IN ('log', 'ledger') ORDER BY 1"


async def test_the_filled_log_holds_whole_jobs_in_a_valid_chain(database: Database) -> None:
    admin = await asyncpg.connect(database.admin_dsn)
    try:
        async with AsyncExitStack() as stack:
            await Log(database.server, EVENTS).open(stack)
        conn = await asyncpg.connect(database.server.dsn(f"log{EVENTS}"))
        try:
            last = (await head(conn, SHARD)).position
            before = ACCOUNTS * 2 + EVENTS_A_JOB
            assert last == before + EVENTS
            events = await read_batch(conn, SHARD, 1, last)  # raises at a hole or a broken chain
            assert len({event.event_id for event in events}) == last
            first = await stream_events(conn, SHARD, events[before].stream)
            state = fold(event.decode() for event in first)
            assert state.status is JobStatus.SETTLED
            paid = await conn.fetchval("SELECT count(*) FROM ledger.settlements")
            assert paid == EVENTS / EVENTS_A_JOB + 1
            assert await conn.fetchval("SELECT sum(amount) FROM ledger.entries") == 0
            fresh = await asyncpg.connect(database.admin_dsn)
            wanted = {row[0] for row in await fresh.fetch(_INDEXES)}
            await fresh.close()
            assert {row[0] for row in await conn.fetch(_INDEXES)} == wanted
        finally:
            await conn.close()
    finally:
        await admin.execute(f"DROP DATABASE IF EXISTS log{EVENTS} WITH (FORCE)")
        await admin.close()
