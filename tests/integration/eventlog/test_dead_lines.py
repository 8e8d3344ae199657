"""Lines to Postgres that died without a word: nobody waits for ever, and nobody's lock stays."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from urllib.parse import urlsplit

import pytest

from cocoon.eventlog.append import (
    Appended,
    LogAppender,
    LogTransaction,
    acquire_term,
    transaction,
)
from cocoon.eventlog.connection import acquired, connect, create_pool
from cocoon.kernel.errors import Unavailable
from tests.support.fault_proxy import FaultProxy
from tests.support.log_items import deposit, job_item, whole_log
from tests.support.servers import Database

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
