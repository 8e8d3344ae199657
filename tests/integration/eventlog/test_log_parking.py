"""Parking holds back one stream, keeps its order, survives a failed replay, and is one role's."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace

import asyncpg
import pytest

from cocoon.contracts.envelope import StoredEvent
from cocoon.eventlog.append import LogTransaction, acquire_term, transaction
from cocoon.eventlog.connection import NotGranted, StaleTerm, connect
from cocoon.eventlog.parking import Parked, park, parked, unpark
from tests.support.example_events import settlement, stored
from tests.support.servers import Database


@pytest.fixture
async def tx(database: Database) -> AsyncIterator[LogTransaction]:
    """Billing's, with a term and outside of any transaction: each statement stands for itself."""
    conn = await connect(database.dsn("cocoon_billing"), "test")
    yield LogTransaction(conn, 1, "billing", await acquire_term(conn, 1, "billing"))
    assert isinstance(conn, asyncpg.Connection)
    await conn.close()


def event(position: int, stream: str) -> StoredEvent:
    (row,) = stored(1, stream, [settlement(held=4, price=2, provider=1, fee=1)])
    return replace(row, position=position)


async def streams(tx: LogTransaction, consumer: str = "ledger") -> set[str]:
    return {entry.stream for entry in await parked(tx.conn, 1, consumer)}


async def test_a_parked_stream_is_replayed_in_order(tx: LogTransaction) -> None:
    rows = [(9, "job/a"), (5, "job/a"), (7, "job/b"), (6, "job/a")]
    await park(tx, "ledger", [(event(*row), "LogCorrupt") for row in rows])
    assert await streams(tx) == {"job/a", "job/b"}
    assert await unpark(tx, "ledger", "job/a") == [5, 6, 9]
    assert await streams(tx) == {"job/b"}
    assert await unpark(tx, "ledger", "job/a") == []


async def test_each_attempt_is_counted(tx: LogTransaction) -> None:
    for error in ("Fatal", "ValidationError"):
        await park(tx, "ledger", [(event(5, "job/a"), error)])
    assert await parked(tx.conn, 1, "ledger") == [
        Parked(1, "ledger", 5, "job/a", "ValidationError", 2)
    ]


async def test_a_failed_replay_parks_again(tx: LogTransaction) -> None:
    async with transaction(tx.conn, 1, "billing", tx.term) as one:
        await park(one, "ledger", [(event(5, "job/a"), "Fatal")])
        await one.checkpoint("ledger", 5)
    with pytest.raises(RuntimeError):  # noqa: PT012 - the transaction is what is tested
        async with transaction(tx.conn, 1, "billing", tx.term) as one:
            assert await unpark(one, "ledger", "job/a") == [5]
            raise RuntimeError
    assert await streams(tx) == {"job/a"}


async def test_nobody_parks_under_an_old_term_or_as_another_roles_consumer(
    tx: LogTransaction, database: Database
) -> None:
    await park(tx, "ledger", [(event(5, "job/a"), "Fatal")])
    for stranger in ("matcher", "attestation"):
        conn = await connect(database.dsn(f"cocoon_{stranger}"), "test")
        other = LogTransaction(conn, 1, stranger, await acquire_term(conn, 1, stranger))
        with pytest.raises(NotGranted, match=f"{stranger} may not follow the log as ledger"):
            await park(other, "ledger", [(event(6, "job/b"), "Fatal")])
        with pytest.raises(NotGranted):
            await unpark(other, "ledger", "job/a")
        with pytest.raises(NotGranted):
            await other.checkpoint("ledger", 100)
        await conn.close()
    await acquire_term(tx.conn, 1, "billing")
    with pytest.raises(StaleTerm):
        await unpark(tx, "ledger", "job/a")
    assert await streams(tx) == {"job/a"}
