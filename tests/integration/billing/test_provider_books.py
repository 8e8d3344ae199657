"""A provider's questions on a real Postgres: its sums are the ledger's, whatever the batches."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from cocoon.contracts.books import Earnings, LostJobs, Simulated
from cocoon.contracts.commands import SettleResult
from cocoon.contracts.envelope import StoredEvent
from cocoon.contracts.events import PaymentSettled
from cocoon.domain.job import JobState, fold
from cocoon.domain.leasing import decide_request_job
from cocoon.domain.settling import decide_settle_result
from cocoon.eventlog.append import Appended
from cocoon.eventlog.read import read_batch
from cocoon.sealing.receipt import verify_receipt
from services.billing import decide as billing
from services.billing import provider_store as store
from services.billing.market import Market
from services.billing.provider_books import AT_ONCE, ProviderBooks
from services.matcher import decide as matcher
from tests.support import job_world as world
from tests.support.books_world import FUNDS, Books
from tests.support.job_world import PROVIDERS


class StillClock:
    """A clock that a test sets."""

    def __init__(self, now_ms: int = world.NOW_MS) -> None:
        self.ms = now_ms

    def now_ms(self) -> int:
        return self.ms

    def monotonic_s(self) -> float:
        return self.ms / 1000


def market() -> Market:
    found, position = Market(), 0
    for provider in PROVIDERS:
        for event in provider.network_events():
            position += 1
            found.apply(
                StoredEvent(
                    shard=0, position=position, stream=f"provider/{provider.id}", version=1,
                    type=event.event_type, schema_version=1, event_id=str(position),
                    causation_id="c", correlation_id="c", actor="test", recorded_at_us=1,
                    data=event.to_canonical(), prev_hash=bytes(32), hash=bytes(32), traceparent="",
                )
            )  # fmt: skip
    return found


def asked_of(books: Books) -> ProviderBooks:
    return ProviderBooks(books.pool, (1,), market(), StillClock())


async def ask(own: ProviderBooks, provider: world.Provider, verb: str, **body: object) -> Any:
    reply = await own.answer(provider.id, verb, json.dumps(body).encode())
    assert reply.ok, reply
    kind = {"earnings": Earnings, "lost": LostJobs, "simulate": Simulated}[verb]
    return kind.model_validate_json(reply.data)


async def matched(books: Books, name: str, **changes: object) -> JobState:
    """A job that was matched and has no result yet."""
    request = world.job_request(name)
    asked = matcher.request_command(
        request, FUNDS, tuple(p.candidate() for p in PROVIDERS), world.LEASE_TTL_MS,
        world.hex32(name), world.NOW_MS,
    ).model_copy(update=changes)  # fmt: skip
    events = decide_request_job(JobState(), asked)
    assert isinstance(
        await books.matcher.append(matcher.request_item(request, asked, events, 2, "")), Appended
    )
    return fold(events)


async def settled(books: Books, state: JobState, command: SettleResult) -> None:
    events = decide_settle_result(state, command)
    await books.billing.append(billing.settle_item(command, state, events, ""))


async def all_rows(own: ProviderBooks, provider: world.Provider, by: str, limit: int) -> list[Any]:
    rows, after = [], ""
    while True:
        page = await ask(own, provider, "earnings", by=by, limit=limit, after=after)
        assert len(page.rows) <= limit
        rows += page.rows
        after = page.next
        if not after:
            return rows


@pytest.mark.parametrize("batch", [1, 2, 3, 4096])
async def test_days_models_and_jobs_sum_to_the_ledgers_balance(books: Books, batch: int) -> None:
    for number in range(9):
        state = await matched(books, f"n{number}")
        await settled(books, state, world.settle_command(state))
    await posted_in(books, batch)
    own, worked = asked_of(books), 0
    for provider in PROVIDERS:
        told = await ask(own, provider, "earnings")
        async with books.pool.acquire() as conn:
            balance = await store.balance(conn, [1], provider.id)
        assert told.balance_nanoton == told.total.earned_nanoton == balance
        for by in ("day", "model", "job"):
            rows = await all_rows(own, provider, by, 2)
            assert sum(row.earned_nanoton for row in rows) == balance, by
            assert sum(row.jobs for row in rows) == told.total.jobs, by
            for count in ("input_tokens", "cached_input_tokens", "output_tokens"):
                assert sum(getattr(row, count) for row in rows) == getattr(told.total, count)
            if by != "day":
                assert {(row.model_id, row.model) for row in rows} <= {(world.MODEL, "skills-1")}
        worked += told.total.jobs
    assert worked == 9
    assert (await books.replay()).differences == []


async def posted_in(books: Books, batch: int) -> None:
    async with books.pool.acquire() as conn:
        position = 1
        while rows := await read_batch(conn, 1, position, batch):
            await books.ledger.on_events(rows)
            position = rows[-1].position + 1


async def test_a_day_before_the_first_asked_for_does_not_count(books: Books) -> None:
    await books.jobs_end(3)
    own = asked_of(books)
    async with books.pool.acquire() as conn:
        event = (await read_batch(conn, 1, 7, 1))[0]
    assert isinstance(event.decode(), PaymentSettled)
    day = event.recorded_at_us // 86_400_000_000
    for provider in PROVIDERS:
        today = await ask(own, provider, "earnings", since_day=day)
        later = await ask(own, provider, "earnings", since_day=day + 1, by="job")
        assert today.total.earned_nanoton == today.balance_nanoton == later.balance_nanoton
        assert (later.total.jobs, later.rows) == (0, ())


async def test_a_job_without_a_result_is_in_transit_until_it_has_one(books: Books) -> None:
    await books.post()
    state = await matched(books, "slow")
    await books.post()
    assert state.match is not None
    provider = world.provider_of(state.match)
    told = await ask(asked_of(books), provider, "earnings")
    most = state.held_nanoton * (10_000 - world.FEE_BPS) // 10_000
    assert (told.in_transit.jobs, told.in_transit.most_nanoton) == (1, most)
    await settled(books, state, world.settle_command(state))
    await books.post()
    told = await ask(asked_of(books), provider, "earnings")
    assert (told.in_transit.jobs, told.total.jobs) == (0, 1)


async def test_a_refused_result_is_told_with_its_reason(books: Books) -> None:
    await books.post()
    state = await matched(books, "dear")
    assert state.match is not None
    provider = world.provider_of(state.match)
    await settled(books, state, world.settle_command(state, price_nanoton=9_999))
    await books.post()
    told = await ask(asked_of(books), provider, "earnings")
    assert [(one.job_id, one.reason) for one in told.refused] == [
        (state.request.job_id, "wrong_price")  # type: ignore[union-attr]
    ]
    assert (told.refused_results, told.total.jobs, told.balance_nanoton) == (1, 0, 0)
    assert (await books.replay()).differences == []
    answer = await ask(asked_of(books), provider, "lost", job_id=world.hex16("dear"))
    assert answer.told == "this provider's result was refused: wrong_price"


async def test_receipts_are_the_ones_that_were_paid_and_their_key_is_told(books: Books) -> None:
    await books.jobs_end(4)
    found = 0
    for provider in PROVIDERS:
        for row in (await ask(asked_of(books), provider, "earnings", by="job", receipts=True)).rows:
            receipt = verify_receipt(bytes.fromhex(row.receipt), bytes.fromhex(row.signing_key))
            assert receipt.job_id.hex() == row.job_id
            assert receipt.price_nanoton == row.price_nanoton
            found += 1
    assert found == 4


@pytest.mark.parametrize(
    "forgery",
    [
        "UPDATE ledger.earnings SET earned = earned + 1",
        "UPDATE ledger.earnings SET output_tokens = 0",
        "UPDATE ledger.earnings SET day = day + 1",
        "DELETE FROM ledger.earnings",
        "INSERT INTO ledger.earnings VALUES ('me', 1, 0, '', 1, 0, 0, 0, 0, 1)",
        "UPDATE ledger.refusals SET reason = 'none'",
        "DELETE FROM ledger.refusals",
        "INSERT INTO ledger.refusals VALUES (1, 3, 'me', 'job', 1, 'why')",
        "INSERT INTO ledger.refusals VALUES (1, 900, 'me', 'job', 1, 'why')",
    ],
)
async def test_a_forged_row_is_a_difference_of_replay(books: Books, forgery: str) -> None:
    await books.jobs_end(1)
    state = await matched(books, "dear")
    await settled(books, state, world.settle_command(state, price_nanoton=9_999))
    await books.post()
    assert (await books.replay()).differences == []
    await books.sql(forgery)
    assert len((await books.replay()).differences) == 1


async def test_what_stands_aside_is_in_no_sum_until_it_is_posted(books: Books) -> None:
    await books.post()
    state = await matched(books, "parked")
    await settled(books, state, world.settle_command(state))
    await books.sql("UPDATE ledger.balances SET amount = 0 WHERE account = 'client:acct_1'")
    await books.post()
    assert (await ask(asked_of(books), PROVIDERS[0], "earnings")).total.jobs == 0
    assert FUNDS == 1_000_000
    await books.sql("UPDATE ledger.balances SET amount = 1000000 WHERE account = 'client:acct_1'")
    await books.ledger.unpark(f"job/{world.hex16('parked')}")
    jobs = [(await ask(asked_of(books), p, "earnings")).total.jobs for p in PROVIDERS]
    assert sum(jobs) == 1
    assert (await books.replay()).differences == []


# ---- who may ask, and how much ----


@pytest.mark.parametrize(
    ("who", "verb", "body", "code"),
    [
        ("prov_1", "earnings", "{}", "identity_mismatch"),
        (PROVIDERS[0].id, "balance", "{}", "bad_request"),
        (PROVIDERS[0].id, "earnings", '{"limit": 0}', "bad_request"),
        (PROVIDERS[0].id, "earnings", '{"limit": 9999}', "bad_request"),
        (PROVIDERS[0].id, "earnings", '{"after": "7.7", "by": "job"}', "bad_request"),
        (PROVIDERS[0].id, "earnings", '{"after": "x", "by": "day"}', "bad_request"),
        (PROVIDERS[0].id, "earnings", '{"receipts": true}', "bad_request"),
        (PROVIDERS[0].id, "earnings", "nonsense", "bad_request"),
    ],
)
async def test_a_wrong_question_is_refused_with_a_sentence(
    books: Books, who: str, verb: str, body: str, code: str
) -> None:
    reply = await asked_of(books).answer(who, verb, body.encode())
    assert reply.error is not None
    assert reply.error.code == code


async def test_one_provider_has_two_questions_answered_at_once(books: Books) -> None:
    own = asked_of(books)
    replies = await asyncio.gather(
        *(own.answer(PROVIDERS[0].id, "earnings", b"{}") for _ in range(AT_ONCE + 3)),
        own.answer(PROVIDERS[1].id, "earnings", b"{}"),
    )
    codes = [reply.error.code if reply.error else "ok" for reply in replies]
    assert codes == ["ok"] * AT_ONCE + ["too_many_questions"] * 3 + ["ok"]
    assert (await own.answer(PROVIDERS[0].id, "earnings", b"{}")).ok


# ---- what went elsewhere, and what a price would bring ----


async def test_lost_jobs_come_page_by_page_and_each_has_a_winner_that_lost_none_of_them(
    books: Books,
) -> None:
    await books.jobs_end(6)
    own, lost = asked_of(books), 0
    for provider in PROVIDERS:
        rows, after = [], ""
        while True:
            page = await ask(own, provider, "lost", after=after, limit=2)
            rows += page.rows
            after = page.next
            if not after:
                break
        won = {r.job_id for r in await all_rows(own, provider, "job", 50)}
        assert won.isdisjoint(row.job_id for row in rows)
        assert len(rows) + len(won) == 6
        lost += len(rows)
        for row in rows:
            (one,) = (await ask(own, provider, "lost", job_id=row.job_id)).rows
            assert one == row
    assert lost == 12


async def test_a_simulation_of_too_little_demand_says_so(books: Books) -> None:
    await books.jobs_end(5)
    told = await ask(
        asked_of(books), PROVIDERS[0], "simulate", model="skills-1", input_nanoton_per_mtok=1,
        cached_input_nanoton_per_mtok=1, output_nanoton_per_mtok=1,
    )  # fmt: skip
    assert (told.enough, told.jobs, told.model_id) == (False, 5, world.MODEL)
    assert told.told.startswith("too little demand in the log: 5 jobs")


async def test_a_simulation_of_real_demand_is_the_same_each_time_and_knows_a_price_too_dear(
    books: Books,
) -> None:
    await books.post()
    for number in range(60):
        state = await matched(books, f"d{number}", now_ms=world.NOW_MS - (60 - number) * 60_000)
        await settled(books, state, world.settle_command(state))
    own = asked_of(books)

    async def at(output: int) -> Simulated:
        found = await ask(
            own, PROVIDERS[0], "simulate", model="skills-1", hours=744,
            input_nanoton_per_mtok=1_000_000, cached_input_nanoton_per_mtok=250_000,
            output_nanoton_per_mtok=output,
        )  # fmt: skip
        assert isinstance(found, Simulated)
        return found

    usual, again, dear = await at(4_000_000), await at(4_000_000), await at(100_000_000)
    assert usual == again
    assert usual.enough
    assert (usual.jobs, usual.others) == (60, 2)
    assert 0 < usual.won < 60
    assert 0 < usual.low_nanoton <= usual.per_hour_nanoton <= usual.high_nanoton
    assert (dear.won, dear.per_hour_nanoton, dear.high_nanoton) == (0, 0, 0)


async def test_a_provider_simulates_only_so_often(books: Books) -> None:
    """Whoever asks for ever keeps billing from payments, and other providers from an answer."""
    clock = StillClock()
    own = ProviderBooks(books.pool, (1,), market(), clock)
    prices = dict.fromkeys(
        ("input_nanoton_per_mtok", "cached_input_nanoton_per_mtok", "output_nanoton_per_mtok"), "1"
    )
    body = json.dumps({"model": "skills-1", **prices}).encode()

    async def codes(provider: world.Provider, times: int) -> list[str]:
        told = [await own.answer(provider.id, "simulate", body) for _ in range(times)]
        return [reply.error.code if reply.error else "ok" for reply in told]

    hasty, other = PROVIDERS[:2]
    assert await codes(hasty, 30) == ["ok"] * 10 + ["too_many_simulations"] * 20
    assert await codes(other, 1) == ["ok"]
    clock.ms += 10_000
    assert await codes(hasty, 2) == ["ok", "too_many_simulations"]


async def test_a_model_that_nobody_offers_has_no_demand(books: Books) -> None:
    reply = await asked_of(books).answer(
        PROVIDERS[0].id, "simulate",
        b'{"model":"none","input_nanoton_per_mtok":"1","cached_input_nanoton_per_mtok":"1",'
        b'"output_nanoton_per_mtok":"1"}',
    )  # fmt: skip
    assert reply.error is not None
    assert reply.error.code == "model_not_found"
