"""An item that waited too long to be written is refused, and then never written; real Postgres."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import asyncpg
import pytest

from cocoon.eventlog import append
from cocoon.eventlog.append import (
    Appended,
    Conflict,
    LogAppender,
    StaleTerm,
    acquire_term,
    renew_term,
)
from cocoon.eventlog.connection import connect
from cocoon.kernel.errors import Unavailable
from tests.support.log_items import job, job_item, whole_log
from tests.support.servers import Database


def appended(outcome: Appended | Conflict) -> Appended:
    assert isinstance(outcome, Appended)
    return outcome


@asynccontextmanager
async def cuttable(target: int) -> AsyncIterator[tuple[int, Callable[[], None]]]:
    """A port that leads to `target`, and what breaks every connection that came through it."""
    writers: list[asyncio.StreamWriter] = []

    async def pipe(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers.append(writer)
        try:
            while data := await reader.read(65_536):
                writer.write(data)
        except OSError:
            pass
        writer.close()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there = await asyncio.open_connection("127.0.0.1", target)
        await asyncio.gather(pipe(reader, there[1]), pipe(there[0], writer))

    def cut() -> None:
        for writer in writers:
            writer.transport.abort()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1], cut
    finally:
        cut()
        server.close()


async def test_an_item_that_waited_too_long_is_refused_and_never_written(
    own_postgres: Database,
) -> None:
    writer = LogAppender(own_postgres.dsn("cocoon_matcher"), 1, "matcher", wait_limit_s=0.2)
    await writer.acquire_term()
    appended(await writer.append(job_item(0)))
    await asyncio.to_thread(own_postgres.server.kill)
    waiting = asyncio.gather(
        *(writer.append(job_item(n)) for n in range(1, 40)), return_exceptions=True
    )
    await asyncio.sleep(0.5)
    await asyncio.to_thread(own_postgres.server.start)
    refused = await waiting
    assert {(type(e), getattr(e, "code", "")) for e in refused} == {(Unavailable, "log_away")}
    appended(await writer.append(job_item(40)))
    await writer.close()
    streams = {event.stream for event in await whole_log(own_postgres.admin_dsn)}
    assert streams == {f"job/{job(0)}", f"job/{job(40)}"}


@pytest.mark.parametrize("goes_on", [True, False], ids=["it came in", "it ended"])
async def test_a_late_item_whose_call_was_cut_off_is_answered_as_the_log_has_it(
    database: Database, goes_on: bool
) -> None:
    """The call waits for the head when its connection goes; then it comes in, or it has ended."""
    async with cuttable(database.server.port) as (port, cut):
        dsn = database.dsn("cocoon_matcher").replace(f":{database.server.port}/", f":{port}/")
        writer = LogAppender(dsn, 1, "matcher", wait_limit_s=0.2)
        await writer.acquire_term()
        admin = await connect(database.admin_dsn, "test")
        watching = await connect(database.admin_dsn, "test")
        async with admin.transaction():
            await admin.execute("SELECT 1 FROM log.head WHERE shard = 1 FOR UPDATE")
            appending = asyncio.create_task(writer.append(job_item(1)))
            while not await _waiting_calls(watching):  # noqa: ASYNC110
                await asyncio.sleep(0.01)
            for _ in range(50):  # longer than the limit
                cut()
                for pid in () if goes_on else await _waiting_calls(watching):
                    await watching.execute("SELECT pg_terminate_backend($1)", pid)
                await asyncio.sleep(0.01)
            await asyncio.sleep(1.0)  # the writer is back, and the call still waits
        outcome = (await asyncio.gather(appending, return_exceptions=True))[0]
        log = await whole_log(database.admin_dsn)
        assert len(log) == (3 if goes_on else 0)
        assert isinstance(outcome, Appended if goes_on else Unavailable)
        appended(await writer.append(job_item(2)))
        await writer.close()
        await admin.close()
        await watching.close()


async def _waiting_calls(conn: asyncpg.Connection) -> list[int]:
    """The backends whose append waits for the head."""
    rows = await conn.fetch(
        "SELECT pid FROM pg_stat_activity WHERE wait_event_type = 'Lock'"
        " AND query LIKE '%log.append%'"
    )
    return [row["pid"] for row in rows]


async def test_a_late_writer_whose_shard_was_taken_over_stops(own_postgres: Database) -> None:
    writer = LogAppender(own_postgres.dsn("cocoon_matcher"), 1, "matcher", wait_limit_s=0.2)
    await writer.acquire_term()
    conn = await connect(own_postgres.dsn("cocoon_matcher"), "test")
    term = await acquire_term(conn, 1, "matcher")
    with pytest.raises(StaleTerm):
        await renew_term(conn, 1, "matcher", writer.term)
    assert await renew_term(conn, 1, "matcher", term) == term + 1
    with pytest.raises(StaleTerm):
        await writer.append(job_item(1))
    await conn.close()
    await writer.close()


@pytest.mark.parametrize("taken_over", [False, True])
async def test_a_renewal_whose_answer_was_lost_stops_only_who_was_taken_over(
    database: Database, monkeypatch: pytest.MonkeyPatch, taken_over: bool
) -> None:
    writer = LogAppender(database.dsn("cocoon_matcher"), 1, "matcher", wait_limit_s=0.2)
    await writer.acquire_term()
    once, renew = append.append_once, append.renew_term
    until_s = asyncio.get_running_loop().time() + 0.4
    renewals = 0

    async def away(*call: Any) -> Any:
        if asyncio.get_running_loop().time() < until_s:
            raise Unavailable("the connection to Postgres was lost")
        return await once(*call)

    async def lost(conn: Any, *call: Any) -> int:
        nonlocal renewals
        renewals += 1
        term = await renew(conn, *call)
        if renewals == 1:  # committed, and the line ends before anybody hears of it
            if taken_over:
                await acquire_term(conn, 1, "matcher")
            conn.terminate()
            raise Unavailable("the connection to Postgres was lost")
        return term

    monkeypatch.setattr(append, "append_once", away)
    monkeypatch.setattr(append, "renew_term", lost)
    with pytest.raises(Unavailable):
        await writer.append(job_item(1))
    if taken_over:
        with pytest.raises(StaleTerm):
            await writer.append(job_item(2))
    else:
        appended(await writer.append(job_item(2)))
    await writer.close()
