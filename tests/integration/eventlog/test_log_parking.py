"""Parking holds back one stream, keeps its order, and survives a failed replay."""

from __future__ import annotations

from collections.abc import AsyncIterator

import asyncpg
import pytest

from cocoon.eventlog.append import acquire_term, transaction
from cocoon.eventlog.connection import connect
from cocoon.eventlog.parking import Parked, park, parked, parked_streams, unpark
from tests.support.servers import Database


@pytest.fixture
async def conn(database: Database) -> AsyncIterator[asyncpg.Connection]:
    opened = await connect(database.dsn("cocoon_billing"), "test")
    yield opened
    await opened.close()


async def test_a_parked_stream_is_replayed_in_order(conn: asyncpg.Connection) -> None:
    for position, stream in ((9, "job/a"), (5, "job/a"), (7, "job/b"), (6, "job/a")):
        await park(conn, 1, "ledger", position, stream, "LogCorrupt")
    await park(conn, 1, "other", 5, "job/a", "Fatal")
    assert await parked_streams(conn, 1, "ledger") == {"job/a", "job/b"}
    assert await unpark(conn, 1, "ledger", "job/a") == [5, 6, 9]
    assert await parked_streams(conn, 1, "ledger") == {"job/b"}
    assert [entry.consumer for entry in await parked(conn, 1)] == ["other", "ledger"]
    assert await unpark(conn, 1, "ledger", "job/a") == []


async def test_each_attempt_is_counted(conn: asyncpg.Connection) -> None:
    for error in ("Fatal", "ValidationError"):
        await park(conn, 1, "ledger", 5, "job/a", error)
    assert await parked(conn, 1, "ledger") == [
        Parked(1, "ledger", 5, "job/a", "ValidationError", 2)
    ]


async def test_a_failed_replay_parks_again(conn: asyncpg.Connection) -> None:
    term = await acquire_term(conn, 1, "billing")
    async with transaction(conn, 1, "billing", term) as tx:
        await park(tx.conn, 1, "ledger", 5, "job/a", "Fatal")
        await tx.checkpoint("ledger", 5)
    with pytest.raises(RuntimeError):  # noqa: PT012 - the transaction is what is tested
        async with transaction(conn, 1, "billing", term) as tx:
            assert await unpark(tx.conn, 1, "ledger", "job/a") == [5]
            raise RuntimeError
    assert await parked_streams(conn, 1, "ledger") == {"job/a"}
