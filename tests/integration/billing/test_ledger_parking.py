"""One account that is overdrawn in the log stands aside; every other is posted. Real Postgres."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass

import asyncpg
import pytest

from cocoon.contracts import events as e
from cocoon.contracts.envelope import AppendItem, NewEvent, StoredEvent
from cocoon.contracts.messages import OpenAccountRequest
from cocoon.eventlog.append import Appended, LogAppender, LogTransaction, transaction
from cocoon.eventlog.connection import create_pool
from cocoon.eventlog.read import checkpoint, read_batch
from cocoon.kernel import canonical
from cocoon.kernel.errors import Conflict, Unavailable
from cocoon.telemetry import metrics
from services.billing import store
from services.billing.handlers import Operator
from services.billing.ledger import LEDGER_CONSUMER, Ledger
from services.billing.results import LiveJobs
from services.matcher.memory import Memory
from tests.support.job_world import hex16, hex32
from tests.support.servers import Database


@dataclass
class World:
    """Billing's ledger over a log that anybody wrote into; `post` brings it up to date."""

    database: Database
    pool: asyncpg.Pool
    ledger: Ledger
    operator: Operator
    matcher: LogAppender
    billing: LogAppender
    commands: int = 0

    async def append(self, writer: LogAppender, stream: str, *events: e.EventData) -> None:
        self.commands += 1
        new = tuple(NewEvent(stream, event) for event in events)
        item = AppendItem(f"c-{self.commands}", b"{}", "test", stream, (), new)
        assert isinstance(await writer.append(item), Appended)

    async def deposit(self, account: str, nanoton: int) -> None:
        await self.append(
            self.billing, f"account/{account}",
            e.DepositCredited(
                account_id=account, amount_nanoton=nanoton, source="dev", reference=str(nanoton)
            ),
        )  # fmt: skip

    async def hold(self, job: str, account: str, nanoton: int) -> None:
        held = e.FundsHeld(job_id=hex16(job), account_id=account, amount_nanoton=nanoton)
        await self.append(self.matcher, f"job/{hex16(job)}", held)

    async def settle(self, job: str, account: str, held: int, price: int) -> None:
        paid = e.PaymentSettled(
            job_id=hex16(job), account_id=account, api_key_id="key_1", provider_id="prov_1",
            epoch=1, quote_id=hex32("quote"), held_nanoton=held, price_nanoton=price,
            provider_nanoton=price, fee_nanoton=0, released_nanoton=held - price,
        )  # fmt: skip
        await self.append(self.billing, f"job/{hex16(job)}", paid)

    async def rows(self, first: int = 1) -> Sequence[StoredEvent]:
        async with self.pool.acquire() as conn:
            return await read_batch(conn, 1, first, 512)

    async def post(self) -> None:
        async with self.pool.acquire() as conn:
            done = await checkpoint(conn, 1, LEDGER_CONSUMER)
        await self.ledger.on_events(await self.rows(done + 1))

    async def restart(self) -> None:
        self.ledger = Ledger(self.pool, 1, self.billing.term, LiveJobs())
        await self.ledger.load()

    async def balances(self) -> dict[str, int]:
        async with self.pool.acquire() as conn:
            rows = await conn.fetch("SELECT account, amount FROM ledger.balances WHERE shard = 1")
            sums = await store.sums(conn)
        assert sums.get(1, 0) == 0
        return {row["account"]: row["amount"] for row in rows}

    async def parked(self) -> list[tuple[str, str, int]]:
        reply = await self.operator.answer("parked", b"{}")
        assert reply.ok
        streams = canonical.loads_object((reply.data or "").encode())["streams"]
        return [(s["stream"], s["reason"], s["events"]) for s in streams]


@pytest.fixture
async def world(database: Database) -> AsyncIterator[World]:
    writers = [
        LogAppender(database.dsn("cocoon_matcher"), 1, "matcher"),
        LogAppender(database.dsn("cocoon_billing"), 1, "billing"),
    ]
    for writer in writers:
        await writer.acquire_term()
    pool = await create_pool(database.dsn("cocoon_billing"), "test")
    ledger = Ledger(pool, 1, writers[1].term, LiveJobs())
    await ledger.load()
    yield World(database, pool, ledger, Operator(writers[1], pool, 1, ledger), *writers)
    for writer in writers:
        await writer.close()
    await pool.close()


def parked_so_far() -> float:
    return metrics.REGISTRY.get_sample_value("cocoon_parked_total", {"consumer": "ledger"}) or 0.0


JOB = {name: f"job/{hex16(name)}" for name in ("a", "b", "c", "d")}


async def test_an_overdrawn_account_stands_aside_and_the_others_are_posted(world: World) -> None:
    before = parked_so_far()
    await world.deposit("poor", 10)
    await world.deposit("rich", 100)
    await world.hold("a", "poor", 15)  # more than there is: a matcher's fault, or a forged append
    await world.hold("b", "rich", 40)
    await world.settle("a", "poor", 15, 15)
    await world.settle("b", "rich", 40, 30)
    await world.post()
    assert await world.balances() == {
        "client:poor": 10, "client:rich": 70, "provider:prov_1": 30, "faucet": -110,
    }  # fmt: skip
    assert await world.parked() == [(JOB["a"], "negative_balance", 2)]
    assert parked_so_far() == before + 1


@pytest.mark.parametrize("restarted", [False, True])
async def test_a_parked_account_cannot_spend_what_is_left(world: World, restarted: bool) -> None:
    await world.deposit("poor", 10)
    await world.hold("a", "poor", 15)
    await world.post()
    if restarted:
        await world.restart()
    await world.hold("b", "poor", 5)  # it would be covered, were the first forgotten
    await world.post()
    assert await world.balances() == {"client:poor": 10, "faucet": -10}
    assert await world.parked() == [
        (JOB["a"], "negative_balance", 1),
        (JOB["b"], "account_frozen", 1),
    ]
    memory = Memory(1, 1.0)
    for stored in await world.rows():
        memory.apply_shard(stored)
    assert memory.available_nanoton("poor") == 0


@contextmanager
def lost_answers() -> Iterator[None]:
    """Every COMMIT arrives; none is answered."""

    @asynccontextmanager
    async def lost(
        pool: asyncpg.Pool, shard: int, role: str, term: int
    ) -> AsyncIterator[LogTransaction]:
        async with transaction(pool, shard, role, term) as tx:
            yield tx
        raise Unavailable("the connection to Postgres was lost")

    with (  # noqa: PT012 - what raises is the block that this surrounds
        pytest.MonkeyPatch.context() as patched,
        pytest.raises(Unavailable),
    ):
        patched.setattr("services.billing.ledger.transaction", lost)
        yield


async def test_what_was_put_aside_by_a_commit_without_an_answer_is_known(world: World) -> None:
    await world.deposit("poor", 10)
    await world.hold("a", "poor", 15)
    with lost_answers():
        await world.post()
    await world.hold("b", "poor", 5)
    await world.post()
    assert await world.parked() == [
        (JOB["a"], "negative_balance", 1),
        (JOB["b"], "account_frozen", 1),
    ]
    await world.deposit("poor", 10)
    await world.post()
    for job in ("a", "b"):
        with lost_answers():
            await world.ledger.unpark(JOB[job])
    await world.settle("a", "poor", 15, 12)
    await world.post()
    assert await world.parked() == []
    assert (await world.balances())["provider:prov_1"] == 12


async def test_a_mended_account_is_posted_in_order_and_goes_on(world: World) -> None:
    await world.deposit("poor", 10)
    await world.hold("a", "poor", 15)
    await world.hold("b", "poor", 5)
    await world.settle("a", "poor", 15, 12)
    await world.post()
    for job, reason in (("a", "negative_balance"), ("b", "account_frozen")):
        with pytest.raises(Conflict, match=f"still cannot be posted .{reason}"):
            await world.ledger.unpark(JOB[job])
    await world.deposit("poor", 7)
    await world.post()
    assert await world.ledger.unpark(JOB["a"]) == 2
    assert await world.ledger.unpark(JOB["b"]) == 1
    await world.hold("c", "poor", 0)
    await world.post()
    assert await world.balances() == {
        f"hold:{hex16('b')}": 5, "provider:prov_1": 12, "faucet": -17,
    }  # fmt: skip
    assert await world.parked() == []


async def test_a_hold_is_never_paid_out_twice(world: World) -> None:
    await world.deposit("rich", 100)
    await world.hold("a", "rich", 40)
    await world.settle("a", "rich", 40, 30)
    await world.settle("a", "rich", 40, 30)
    await world.hold("b", "rich", 60)  # the account itself did nothing wrong
    await world.post()
    assert await world.parked() == [(JOB["a"], "negative_balance", 1)]
    assert (await world.balances())["provider:prov_1"] == 30
    assert (await world.balances())[f"hold:{hex16('b')}"] == 60


async def test_more_than_a_column_holds_stands_aside_too(world: World) -> None:
    await world.deposit("rich", 2**63 - 1)
    await world.deposit("richer", 2**63 - 2)  # the faucet's side would pass the column
    await world.post()
    assert await world.parked() == [("account/richer", "balance_overflow", 1)]


async def test_what_is_held_is_summed_by_account(world: World) -> None:
    await world.deposit("rich", 100)
    await world.deposit("other", 100)
    for job, account, amount in (("a", "rich", 10), ("b", "rich", 20), ("c", "other", 5)):
        await world.hold(job, account, amount)
    await world.post()
    await world.settle("b", "rich", 20, 1)
    await world.post()
    request = OpenAccountRequest(account_id="rich").to_canonical()
    reply = await world.operator.answer("balance", request)
    assert canonical.loads_object((reply.data or "").encode()) == {
        "account_id": "rich", "available_nanoton": "89", "held_nanoton": "10",
    }  # fmt: skip
