"""The append against raw group commit: the same rows, the same Postgres, the same fsync.

Cocoon's: LogAppender and log.append (term, versions, duplicates, dense positions, chain), one
item of three events a call. Raw: plain asyncpg, whatever queued up during the last commit goes
into one unnest insert, into tables with the same columns, keys and checks.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import asyncpg
import uvloop

from benchmarks.report import Aim, Column, Finding, Question, Row, Rows, middle, ratio
from benchmarks.servers import (
    EVENTS_A_REQUEST,
    SHARD,
    Clock,
    new_name,
    postgres,
    prepare_log,
    request_item,
    scratch,
)
from cocoon.contracts.envelope import AppendItem
from cocoon.eventlog.append import LogAppender
from cocoon.eventlog.batch import call_arguments, prepare

WAITERS = (64, 256)
BATCH = 256  # the appender's own limit
_RAW = """
CREATE SCHEMA raw;
CREATE TABLE raw.events (LIKE log.events INCLUDING ALL);
CREATE TABLE raw.commands (LIKE log.commands INCLUDING ALL);
"""
_INSERT = """
WITH commands AS (
  INSERT INTO raw.commands SELECT * FROM unnest(
    $15::int[], $16::text[], $17::bigint[], $18::bigint[], $19::text[])
)
INSERT INTO raw.events SELECT * FROM unnest(
  $1::int[], $2::bigint[], $3::text[], $4::bigint[], $5::text[], $6::int[], $7::text[], $8::text[],
  $9::text[], $10::text[], $11::text[], $12::bigint[], $13::text[], $14::bytea[])
"""
_HASH = bytes(32)

APPEND = Question(
    "append",
    "Append: jobs of three events and their command, against raw group commit of the same rows",
    (
        Column("events_per_s", "events/s"), Column("jobs_per_s", "calls of one job/s"),
        Column("own_us", "CPU a job, Python, us"), Column("postgres_us", "Postgres, us"),
    ),
    lambda rows: [
        Aim(f"append of raw group commit, {waiters} waiters", "at least", 0.60,
            ratio(rows, _name("log.append", waiters), _name("raw", waiters), "events_per_s"))
        for waiters in WAITERS
    ],
)  # fmt: skip


def _name(arm: str, waiters: int) -> str:
    return f"{arm}, {waiters} waiters"


class RawAppender:
    """Group commit and nothing else: rows as they come, one insert at a time."""

    def __init__(self, conn: asyncpg.Connection[asyncpg.Record]) -> None:
        self._conn, self._position = conn, 0
        self._queue: deque[tuple[list[Any], asyncio.Future[None]]] = deque()
        self._wake = asyncio.Event()
        self._task = asyncio.create_task(self._work())

    async def append(self, rows: list[Any]) -> None:
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._queue.append((rows, done))
        self._wake.set()
        await done

    async def close(self) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    async def _work(self) -> None:
        insert = await self._conn.prepare(_INSERT)
        while True:
            if not self._queue:
                self._wake.clear()
                await self._wake.wait()
            batch = [self._queue.popleft() for _ in range(min(BATCH, len(self._queue)))]
            events, commands = [], []
            for (rows, command), _ in batch:
                first = self._position + 1
                for row in rows:
                    self._position += 1
                    events.append((SHARD, self._position, *row))
                commands.append((SHARD, command[0], first, self._position, command[1]))
            await insert.fetch(*map(list, zip(*events)), *map(list, zip(*commands)))  # noqa: B905
            for _, done in batch:
                done.set_result(None)


def raw_rows(item: AppendItem) -> list[Any]:
    """What log.append writes for an item, but for positions and hashes."""
    found = prepare(item)
    call = call_arguments(SHARD, "matcher", 1, [found])
    streams, types, versions = call[10], call[14], call[15]
    rows = [
        (
            streams[call[13][n] - 1], n + 1, types[n], versions[n], found.event_ids[n],
            item.command_id, item.correlation_id, item.actor, "", 0, found.data[n], _HASH,
        )
        for n in range(len(item.events))
    ]  # fmt: skip
    return [rows, (item.command_id, found.command)]


async def _load(ask: Callable[[Any], Awaitable[object]], work: Sequence[Any], waiters: int) -> None:
    """Each waiter asks for the next as soon as its last is durable."""
    left = iter(work)

    async def wait() -> None:
        for one in left:
            await ask(one)

    await asyncio.gather(*(wait() for _ in range(waiters)))


async def _measure(dsn: str, postgres_pid: int, rounds: int, jobs: int) -> Rows:
    await prepare_log(dsn)
    conn = await asyncpg.connect(dsn)
    await conn.execute(_RAW)
    appender, raw = LogAppender(dsn, SHARD, "matcher"), RawAppender(conn)
    await appender.acquire_term()
    arms: tuple[tuple[str, Callable[[Any], Awaitable[object]], Callable[[AppendItem], Any]], ...]
    arms = (("log.append", appender.append, lambda item: item), ("raw", raw.append, raw_rows))
    found: dict[str, list[Row]] = {}
    for turn in range(rounds + 1):
        for waiters in WAITERS:
            for name, ask, shape in arms:
                work = [shape(request_item(new_name())[0]) for _ in range(jobs)]
                with Clock({"postgres": frozenset({postgres_pid})}) as clock:
                    await _load(ask, work, waiters)
                if turn:  # the first is the warm-up
                    found.setdefault(_name(name, waiters), []).append(_row(clock, jobs))
    await appender.close()
    await raw.close()
    await conn.close()
    return {name: middle(rows) for name, rows in found.items()}


def _row(clock: Clock, jobs: int) -> Row:
    return {
        "events_per_s": jobs * EVENTS_A_REQUEST / clock.seconds,
        "jobs_per_s": jobs / clock.seconds,
        "own_us": clock.own_cpu_s / jobs * 1e6,
        "postgres_us": clock.cpu_s["postgres"] / jobs * 1e6,
    }


def append(*, rounds: int, jobs: int) -> Finding:
    with scratch() as folder, postgres(folder) as server:
        assert server.pid is not None
        return Finding(uvloop.run(_measure(server.dsn(), server.pid, rounds, jobs)))
