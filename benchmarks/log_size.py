"""What a job costs the log by the log's length: ten thousand, a million, ten million events.

One Postgres, a database for each length, filled by log_fill.sql with jobs like a real one, their
entries and settlements. Then new jobs, 64 at once, through the product's deciders, appender and
ledger; and old jobs read back by their streams, as the gateway and billing do for what they do not
hold in memory. CPU of this process and of all of Postgres.
"""

from __future__ import annotations

import hashlib
import random
import sys
from contextlib import AsyncExitStack
from pathlib import Path

import asyncpg
import uvloop

from benchmarks.append import _load
from benchmarks.report import Aim, Column, Finding, Question, Row, Rows, middle, ratio
from benchmarks.servers import (
    SHARD,
    Clock,
    new_name,
    prepare_log,
    request_item,
    scratch,
)
from cocoon.contracts.envelope import AppendItem
from cocoon.devnet.postgres import PostgresServer
from cocoon.domain.job import JobState
from cocoon.domain.settling import decide_settle_result
from cocoon.eventlog.append import Appended, LogAppender
from cocoon.eventlog.connection import create_pool
from cocoon.eventlog.read import checkpoint, head, read_batch, stream_events
from services.billing import decide as billing
from services.billing.ledger import LEDGER_CONSUMER, Ledger
from services.billing.results import LiveJobs
from tests.support import job_world as world

AT_ONCE, EVENTS_A_JOB, JOBS_A_CALL, EVENTS_A_BATCH = 64, 5, 5_000, 512
FILL_SQL = Path(__file__).with_name("log_fill.sql")
# its own rest after the filling, so that nobody vacuums one log while another is measured
_SETTINGS = {"autovacuum": "off", "max_wal_size": "4GB"}


def _name(events: int) -> str:
    return f"{events:,} events"


LOG_SIZE = Question(
    "log_size",
    "CPU a job by the log's length: append of request and payment, books; and one old job read",
    (
        Column("cpu_us", "CPU a job, us"), Column("own_us", "Python, us"),
        Column("postgres_us", "Postgres, us"), Column("jobs_per_s", "jobs/s"),
        Column("read_us", "an old job read, us"),
    ),
    lambda rows: [
        Aim(f"cost a job, {_name(large)} of {_name(10_000)}", "at most", 1.2,
            ratio(rows, _name(large), _name(10_000), "cpu_us"))
        for large in (1_000_000, 10_000_000)
    ],
)  # fmt: skip


class Log:
    """One database with a log of so many events, and who writes it."""

    def __init__(self, server: PostgresServer, events: int) -> None:
        self.events, self._server = events, server
        self._dsn = server.dsn(f"log{events}")
        self._filled = max(1, events // EVENTS_A_JOB)
        self._random = random.Random(1)  # noqa: S311 - which old jobs are read

    async def open(self, stack: AsyncExitStack) -> None:
        admin = await asyncpg.connect(self._server.dsn())
        await admin.execute(f"CREATE DATABASE log{self.events}")
        await admin.close()
        await prepare_log(self._dsn)
        self._matching = LogAppender(self._dsn, SHARD, "matcher")
        self._paying = LogAppender(self._dsn, SHARD, "billing")
        for appender in (self._matching, self._paying):
            await appender.acquire_term()
            stack.push_async_callback(appender.close)
        self._pool = await create_pool(self._dsn, "benchmark", size=4)
        stack.push_async_callback(self._pool.close)
        self._ledger = Ledger(self._pool, SHARD, self._paying.term, LiveJobs())
        await self._ledger.load()
        model = request_item(new_name())
        await self._job(model)
        await self._books()
        await self._fill(model[0].correlation_id)

    async def _fill(self, model: str) -> None:
        conn = await asyncpg.connect(self._dsn)
        await conn.execute("SET synchronous_commit = off")
        await conn.execute(FILL_SQL.read_text(encoding="utf-8"))
        await conn.execute("SELECT bench.take($1)", model)
        await conn.execute("SELECT bench.drop_indexes()")
        for first in range(0, self._filled, JOBS_A_CALL):
            last = min(first + JOBS_A_CALL, self._filled) - 1
            await conn.execute("SELECT bench.fill($1, $2, $3)", model, first, last)
            if first % (JOBS_A_CALL * 20) == 0:
                print(f"  {_name(self.events)}: {first * EVENTS_A_JOB:,}", file=sys.stderr)
        await conn.execute("SELECT bench.make_indexes()")
        await conn.execute("VACUUM (FREEZE, ANALYZE)")
        await conn.execute("CHECKPOINT")
        await conn.close()

    async def _job(self, work: tuple[AppendItem, JobState]) -> None:
        item, state = work
        assert isinstance(await self._matching.append(item), Appended)
        settle = world.settle_command(state)
        paid = decide_settle_result(state, settle)
        await self._paying.append(billing.settle_item(settle, state, paid, ""))

    async def _books(self) -> None:
        """The ledger up to the log's head."""
        async with self._pool.acquire() as conn:
            position = await checkpoint(conn, SHARD, LEDGER_CONSUMER)
            last = (await head(conn, SHARD)).position
            while position < last:
                batch = await read_batch(conn, SHARD, position + 1, EVENTS_A_BATCH)
                await self._ledger.on_events(batch)
                position = batch[-1].position

    async def measure(self, jobs: int, reads: int) -> Row:
        assert self._server.pid is not None
        groups = {"postgres": frozenset({self._server.pid})}
        await _load(self._job, [request_item(new_name()) for _ in range(AT_ONCE)], AT_ONCE)  # warm
        await self._books()
        work = [request_item(new_name()) for _ in range(jobs)]
        with Clock(groups) as clock:
            await _load(self._job, work, AT_ONCE)
            await self._books()
        old = [self._random.randrange(self._filled) for _ in range(reads)]
        with Clock(groups) as reading:
            async with self._pool.acquire() as conn:
                for number in old:
                    job = hashlib.md5(f"job{number}".encode()).hexdigest()  # noqa: S324 - a name
                    found = await stream_events(conn, SHARD, f"job/{job}")
                    assert len(found) == EVENTS_A_JOB
        own_us = clock.own_cpu_s / jobs * 1e6
        postgres_us = clock.cpu_s["postgres"] / jobs * 1e6
        return {
            "cpu_us": own_us + postgres_us, "own_us": own_us, "postgres_us": postgres_us,
            "jobs_per_s": jobs / clock.seconds,
            "read_us": (reading.own_cpu_s + reading.cpu_s["postgres"]) / reads * 1e6,
        }  # fmt: skip


async def _measure(
    server: PostgresServer, lengths: tuple[int, ...], rounds: int, jobs: int
) -> Rows:
    found: dict[str, list[Row]] = {}
    async with AsyncExitStack() as stack:
        logs = [Log(server, events) for events in lengths]
        for log in logs:
            await log.open(stack)
        for _ in range(rounds):
            for log in logs:
                row = await log.measure(jobs, jobs)
                found.setdefault(_name(log.events), []).append(row)
    return {name: middle(rows) for name, rows in found.items()}


def log_size(*, lengths: tuple[int, ...], rounds: int, jobs: int) -> Finding:
    with scratch() as folder:
        server = PostgresServer(folder / "postgres", settings=_SETTINGS)
        server.start()
        try:
            return Finding(uvloop.run(_measure(server, lengths, rounds, jobs)))
        finally:
            server.stop("immediate")
