"""Billing and a matcher over one account shard of a real Postgres, for tests of its books."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from dataclasses import dataclass

import asyncpg
import pytest

from cocoon.contracts.envelope import AppendItem, NewEvent
from cocoon.contracts.events import EventData, FundsHeld, ProviderEnrolled
from cocoon.domain.job import JobState, fold
from cocoon.domain.leasing import decide_request_job
from cocoon.domain.settling import decide_settle_result
from cocoon.eventlog.append import Appended, LogAppender
from cocoon.eventlog.connection import create_pool
from cocoon.eventlog.read import checkpoint, head, read_batch
from services.billing import decide as billing
from services.billing import replay
from services.billing.audit import take_snapshot
from services.billing.handlers import Operator
from services.billing.ledger import LEDGER_CONSUMER, Ledger
from services.billing.redecide import Report
from services.billing.results import LiveJobs
from services.matcher import decide as matcher
from tests.support import job_world as world
from tests.support.servers import Database

FUNDS = 1_000_000


@dataclass
class Books:
    """Billing and a matcher over one account shard; jobs go from request to payment at once."""

    database: Database
    pool: asyncpg.Pool
    matcher: LogAppender
    billing: LogAppender
    ledger: Ledger
    jobs: int = 0

    async def jobs_end(self, count: int) -> None:
        for _ in range(count):
            self.jobs += 1
            name = f"job{self.jobs}"
            request = world.job_request(name)
            asked = matcher.request_command(
                request, FUNDS, tuple(p.candidate() for p in world.PROVIDERS),
                world.LEASE_TTL_MS, world.hex32(name), world.NOW_MS,
            )  # fmt: skip
            events = decide_request_job(JobState(), asked)
            done = await self.matcher.append(matcher.request_item(request, asked, events, 2, ""))
            assert isinstance(done, Appended)
            state = fold(events)
            settle = world.settle_command(state)
            paid = decide_settle_result(state, settle)
            await self.billing.append(billing.settle_item(settle, state, paid, ""))
        await self.post()

    async def post(self) -> None:
        async with self.pool.acquire() as conn:
            done = await checkpoint(conn, 1, LEDGER_CONSUMER)
            rows = await read_batch(conn, 1, done + 1, 4096)
        if rows:
            await self.ledger.on_events(rows)

    async def put(self, name: str, writer: LogAppender, stream: str, event: EventData) -> None:
        """An event whose command says nothing."""
        item = AppendItem(name, b"{}", "test", stream, (), (NewEvent(stream, event),))
        assert isinstance(await writer.append(item), Appended)

    async def put_on_the_network_shard(self) -> None:
        writer = LogAppender(self.database.dsn("cocoon_attestation"), 0, "attestation")
        await writer.acquire_term()
        enrolled = ProviderEnrolled(
            provider_id="prov_1", identity_key=world.hex32("key"), tier="simulated"
        )
        await self.put("enrolled", writer, "provider/prov_1", enrolled)
        await writer.close()

    async def head(self) -> int:
        async with self.pool.acquire() as conn:
            return (await head(conn, 1)).position

    async def snapshot(self, every: int = 1) -> bool | None:
        return await take_snapshot(self.pool, 1, self.billing, every)

    async def sql(self, *statements: str) -> None:
        conn = await asyncpg.connect(self.database.admin_dsn)
        for statement in statements:
            await conn.execute(statement)
        await conn.close()

    async def replay(self, first: int = 1, last: int | None = None) -> Report:
        dsn = self.database.dsn("cocoon_reader")
        reports = await replay.replay(dsn, [1], first, last, decisions=False)
        return reports[0]

    async def decide_again(self, first: int = 1) -> Report:
        dsn = self.database.dsn("cocoon_reader")
        return (await replay.replay(dsn, [1], first, None, decisions=True))[0]


@pytest.fixture
async def books(database: Database) -> AsyncIterator[Books]:
    writers = [
        LogAppender(database.dsn("cocoon_matcher"), 1, "matcher"),
        LogAppender(database.dsn("cocoon_billing"), 1, "billing"),
    ]
    for writer in writers:
        await writer.acquire_term()
    pool = await create_pool(database.dsn("cocoon_billing"), "test")
    ledger = Ledger(pool, 1, writers[1].term, LiveJobs())
    await ledger.load()
    operator = Operator(writers[1], pool, 1, ledger)
    for verb, body in (
        ("open_account", {"account_id": "acct_1"}),
        ("credit_deposit", {"account_id": "acct_1", "amount_nanoton": FUNDS, "reference": "first"}),
    ):
        reply = await operator.answer(verb, json.dumps(body).encode())
        assert reply.ok, reply
    yield Books(database, pool, *writers, ledger)
    for writer in writers:
        await writer.close()
    await pool.close()


async def overdraw(books: Books) -> None:
    held = FundsHeld(job_id=world.hex16("poor"), account_id="acct_1", amount_nanoton=FUNDS + 5)
    await books.put("overdraft", books.matcher, f"job/{held.job_id}", held)
