"""Lines to Postgres that died without a word: nobody waits for ever, and nobody's lock stays."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from typing import Any
from urllib.parse import urlsplit

import pytest

from cocoon.eventlog.append import (
    Appended,
    LogAppender,
    LogTransaction,
    acquire_term,
    transaction,
)
from cocoon.eventlog.connection import (
    acquired,
    connect,
    create_pool,
    tree_errors,
)
from cocoon.kernel.errors import Unavailable
from tests.support.fault_proxy import FaultProxy
from tests.support.log_items import deposit, job_item, whole_log
from tests.support.servers import Database

Pool = Any  # asyncpg.Pool
Through = Callable[[str], str]


@pytest.fixture
async def proxy(database: Database) -> AsyncIterator[FaultProxy]:
    found = FaultProxy(lambda: ("127.0.0.1", database.server.port))
    await found.start()
    yield found
    await found.close()


@pytest.fixture
def through(proxy: FaultProxy) -> Through:
    def by_proxy(dsn: str) -> str:
        return dsn.replace(f":{urlsplit(dsn).port}/", f":{proxy.port}/")

    return by_proxy


async def test_an_append_through_a_line_that_died_is_written_once(
    database: Database, proxy: FaultProxy, through: Through
) -> None:
    appender = LogAppender(through(database.dsn("cocoon_matcher")), 1, "matcher")
    await appender.acquire_term()
    await appender.append(job_item(2))
    proxy.half_open("down")  # the next one is committed, and nobody hears of it

    outcome = await appender.append(job_item(1))

    assert isinstance(outcome, Appended)
    assert outcome.repeated
    assert len(await whole_log(database.admin_dsn)) == 6
    await appender.close()


async def test_a_transaction_whose_client_vanished_gives_the_shard_back(
    database: Database, proxy: FaultProxy, through: Through
) -> None:
    lost = await connect(through(database.dsn("cocoon_billing")), "lost")
    term = await acquire_term(lost, 1, "billing")
    matcher = LogAppender(database.dsn("cocoon_matcher"), 1, "matcher")
    await matcher.acquire_term()
    account = "00" * 16
    vanished = lost.transaction()
    await vanished.start()
    await LogTransaction(lost, 1, "billing", term).append([deposit(account, "one")])
    proxy.half_open("up", "down")

    outcome = await matcher.append(job_item(1))

    assert isinstance(outcome, Appended)
    assert outcome.positions == (1, 2, 3)  # what the vanished one had begun is undone
    lost.terminate()
    await matcher.close()


async def test_a_pooled_line_that_died_serves_nobody_else(
    database: Database, proxy: FaultProxy, through: Through
) -> None:
    pool = await create_pool(through(database.dsn("cocoon_billing")), "pool", size=1)
    async with acquired(pool) as conn:
        term = await acquire_term(conn, 1, "billing")
    proxy.half_open("up")

    with pytest.raises(Unavailable):
        async with transaction(pool, 1, "billing", term) as tx:
            await tx.checkpoint("ledger", 1)
    async with transaction(pool, 1, "billing", term) as tx:
        await tx.checkpoint("ledger", 1)

    await asyncio.wait_for(pool.close(), 10)


@pytest.mark.parametrize("kind", ["acquired", "transaction"])
@pytest.mark.parametrize("error", [TimeoutError(), Unavailable("the bus is away")])
async def test_who_waited_for_something_else_leaves_the_connection_to_others(
    database: Database, kind: str, error: Exception
) -> None:
    pool = await create_pool(database.dsn("cocoon_billing"), "test", size=1)
    backend, term = await _backend(pool), await _term(pool)
    with pytest.raises(Unavailable):
        async with _block(pool, kind, term):
            raise error
    assert await _backend(pool) == backend
    await pool.close()


async def test_what_postgres_itself_refused_leaves_the_connection_to_others(
    database: Database,
) -> None:
    pool = await create_pool(database.dsn("cocoon_billing"), "test", size=1)
    backend, term = await _backend(pool), await _term(pool)
    with pytest.raises(Unavailable):
        await _run(pool, "transaction", term, "DO $$ BEGIN RAISE SQLSTATE '40P01'; END $$")
    assert await _backend(pool) == backend
    await pool.close()


@pytest.mark.parametrize("kind", ["acquired", "transaction"])
async def test_a_statement_without_an_answer_drops_its_connection(
    database: Database, kind: str
) -> None:
    pool = await create_pool(database.dsn("cocoon_billing"), "test", size=1)
    backend, term = await _backend(pool), await _term(pool)
    with pytest.raises(Unavailable):
        await _run(pool, kind, term, "SELECT pg_sleep(3)")
    assert await _backend(pool) != backend
    await pool.close()


def _block(pool: Pool, kind: str, term: int) -> AbstractAsyncContextManager[Any]:
    return acquired(pool) if kind == "acquired" else transaction(pool, 1, "billing", term)


async def _run(pool: Pool, kind: str, term: int, statement: str) -> None:
    async with _block(pool, kind, term) as found:
        conn = found.conn if isinstance(found, LogTransaction) else found
        with tree_errors():
            await conn.execute(statement, timeout=0.3)


async def _backend(pool: Pool) -> int:
    async with acquired(pool) as conn:
        found: int = await conn.fetchval("SELECT pg_backend_pid()")
        return found


async def _term(pool: Pool) -> int:
    async with acquired(pool) as conn:
        return await acquire_term(conn, 1, "billing")
