"""Two account shards' books in one database: neither stands in the other's way."""

from __future__ import annotations

from cocoon.contracts import events as e
from cocoon.contracts.envelope import AppendItem, NewEvent
from cocoon.eventlog.append import Appended, LogAppender
from cocoon.eventlog.connection import create_pool
from cocoon.eventlog.read import read_batch
from services.billing.ledger import Ledger
from services.billing.results import LiveJobs
from tests.support.job_world import hex16, hex32
from tests.support.servers import Database

JOB = hex16("job")


async def append(writer: LogAppender, command: str, stream: str, event: e.EventData) -> None:
    item = AppendItem(command, b"{}", "test", stream, (), (NewEvent(stream, event),))
    assert isinstance(await writer.append(item), Appended)


async def fill(database: Database, shard: int, billing: LogAppender) -> None:
    """A deposit, and a job under the id that the other shard's job has too."""
    matcher = LogAppender(database.dsn("cocoon_matcher"), shard, "matcher")
    await matcher.acquire_term()
    deposit = e.DepositCredited(
        account_id="acct_1", amount_nanoton=100, source="dev", reference="first"
    )
    held = e.FundsHeld(job_id=JOB, account_id="acct_1", amount_nanoton=40)
    paid = e.PaymentSettled(
        job_id=JOB, account_id="acct_1", api_key_id="key_1", provider_id="prov_1", epoch=1,
        quote_id=hex32("quote"), held_nanoton=40, price_nanoton=10 * shard,
        provider_nanoton=10 * shard, fee_nanoton=0, released_nanoton=40 - 10 * shard,
    )  # fmt: skip
    await append(billing, "c-1", "account/acct_1", deposit)
    await append(matcher, "c-2", f"job/{JOB}", held)
    await append(billing, "c-3", f"job/{JOB}", paid)
    await matcher.close()


async def test_jobs_of_one_id_on_two_shards_are_both_paid(database: Database) -> None:
    pool = await create_pool(database.dsn("cocoon_billing"), "test")
    for shard in (1, 2):
        billing = LogAppender(database.dsn("cocoon_billing"), shard, "billing")
        await billing.acquire_term()
        await fill(database, shard, billing)
        ledger = Ledger(pool, shard, billing.term, LiveJobs())
        await ledger.load()
        async with pool.acquire() as conn:
            rows = await read_batch(conn, shard, 1, 16)
        await ledger.on_events(rows)
        await billing.close()

    async with pool.acquire() as conn:
        paid = await conn.fetch("SELECT shard, price FROM ledger.settlements ORDER BY shard")
        held = await conn.fetch(
            "SELECT shard, amount FROM ledger.balances WHERE account = 'provider:prov_1'"
            " ORDER BY shard"
        )
    await pool.close()
    assert [tuple(row) for row in paid] == [(1, 10), (2, 20)]
    assert [tuple(row) for row in held] == [(1, 10), (2, 20)]
