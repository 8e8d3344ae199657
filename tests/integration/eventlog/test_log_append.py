"""The append: dense, chained, deduplicated, fenced; on a real Postgres."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace

import asyncpg
import pytest

from cocoon.contracts.envelope import AppendItem, NewEvent
from cocoon.contracts.events import DepositCredited
from cocoon.eventlog.append import (
    Appended,
    Conflict,
    LogAppender,
    StaleTerm,
    acquire_term,
    append_once,
    transaction,
)  # fmt: skip
from cocoon.eventlog.batch import prepare
from cocoon.eventlog.connection import connect, leadership
from cocoon.eventlog.read import checkpoint, read_commands, stream_events
from cocoon.kernel.errors import Fatal, LogCorrupt, Unavailable
from tests.support.log_items import COMMAND, assert_sound, deposit, job, job_item, whole_log
from tests.support.servers import Database


@pytest.fixture
async def appender(database: Database) -> AsyncIterator[LogAppender]:
    writer = LogAppender(database.dsn("cocoon_matcher"), 1, "matcher")
    await writer.acquire_term()
    yield writer
    await writer.close()


@pytest.fixture
async def billing(database: Database) -> AsyncIterator[LogAppender]:
    writer = LogAppender(database.dsn("cocoon_billing"), 1, "billing")
    await writer.acquire_term()
    yield writer
    await writer.close()


@pytest.fixture
async def conn(database: Database) -> AsyncIterator[asyncpg.Connection]:
    opened = await connect(database.admin_dsn, "test")
    yield opened
    await opened.close()


def appended(outcome: Appended | Conflict) -> Appended:
    assert isinstance(outcome, Appended)
    return outcome


async def test_the_answer_equals_what_is_stored(appender: LogAppender, database: Database) -> None:
    outcomes = await asyncio.gather(*(appender.append(job_item(n)) for n in range(50)))
    answered = [event for outcome in outcomes for event in appended(outcome).events]
    stored = await whole_log(database.dsn("cocoon_reader"))
    assert sorted(answered, key=lambda event: event.position) == stored
    assert [event.traceparent for event in stored] == [job_item(0).traceparent] * 150
    assert_sound(stored)


async def test_repeated_command_gives_its_first_positions_and_writes_nothing(
    appender: LogAppender, database: Database
) -> None:
    first = appended(await appender.append(job_item(1)))
    await appender.append(job_item(2))
    again = appended(await appender.append(job_item(1)))
    assert not first.repeated
    assert again == replace(first, repeated=True)
    assert len(await whole_log(database.admin_dsn)) == 6


async def test_command_queued_twice_at_once_is_written_once(
    appender: LogAppender, database: Database
) -> None:
    outcomes = await asyncio.gather(*(appender.append(job_item(1)) for _ in range(5)))
    assert sorted(appended(outcome).repeated for outcome in outcomes) == [False] + [True] * 4
    assert len({appended(outcome).positions for outcome in outcomes}) == 1
    assert len(await whole_log(database.admin_dsn)) == 3


async def test_command_without_events_is_remembered(appender: LogAppender) -> None:
    item = replace(job_item(1), events=())
    assert appended(await appender.append(item)).positions == ()
    again = appended(await appender.append(item))
    assert again.repeated
    assert again.positions == ()


async def test_conflict_is_reported_for_its_item_alone(conn: asyncpg.Connection) -> None:
    term = await acquire_term(conn, 1, "matcher")
    await append_once(conn, 1, "matcher", term, [prepare(job_item(7))])
    batch = [
        job_item(1),
        job_item(7, name="again"),  # expects version 0, the stream is at 3
        job_item(2),
        job_item(1, name="late"),  # expects 0, but the first item of this call has grown it
        job_item(1, name="right", expects=3),
    ]
    outcomes = await append_once(conn, 1, "matcher", term, [prepare(item) for item in batch])
    assert outcomes[1] == Conflict(f"job/{job(7)}", 0, 3)
    assert outcomes[3] == Conflict(f"job/{job(1)}", 0, 3)
    assert appended(outcomes[0]).positions == (4, 5, 6)
    assert appended(outcomes[2]).positions == (7, 8, 9)
    assert appended(outcomes[4]).versions == (4, 5, 6)


async def test_only_named_streams_conflict(appender: LogAppender, billing: LogAppender) -> None:
    await billing.append(deposit("acct_1", "a"))
    guarded = replace(job_item(1), expects=((f"job/{job(1)}", 0), ("account/acct_1", 0)))
    assert await appender.append(guarded) == Conflict("account/acct_1", 0, 1)
    assert appended(await appender.append(job_item(1))).versions == (1, 2, 3)


async def test_older_term_is_refused_for_the_whole_call(
    appender: LogAppender, database: Database
) -> None:
    await appender.append(job_item(1))
    successor = LogAppender(database.dsn("cocoon_matcher"), 1, "matcher")
    assert await successor.acquire_term() == appender.term + 1
    with pytest.raises(StaleTerm):
        await appender.append(job_item(2))
    with pytest.raises(StaleTerm):  # and it stays so
        await appender.append(job_item(1))
    appended(await successor.append(job_item(3)))
    await successor.close()
    assert [e.stream for e in await whole_log(database.admin_dsn)][3:] == [f"job/{job(3)}"] * 3


async def test_term_never_issued_is_refused(conn: asyncpg.Connection) -> None:
    with pytest.raises(StaleTerm):
        await append_once(conn, 1, "billing", 1, [prepare(job_item(1))])


async def test_new_term_sees_what_the_old_one_still_commits(
    conn: asyncpg.Connection, database: Database
) -> None:
    term = await acquire_term(conn, 1, "matcher")
    other = await connect(database.admin_dsn, "successor")
    async with transaction(conn, 1, "matcher", term) as tx:
        await tx.append([job_item(1)])
        taking_over = asyncio.create_task(acquire_term(other, 1, "matcher"))
        await asyncio.sleep(0.1)
        assert not taking_over.done()
    assert await taking_over == term + 1
    assert len(await stream_events(other, 1, f"job/{job(1)}")) == 3
    await other.close()


async def test_two_roles_write_one_dense_log(appender: LogAppender, database: Database) -> None:
    billing = LogAppender(database.dsn("cocoon_billing"), 1, "billing", batch_limit=7)
    await billing.acquire_term()
    await asyncio.gather(
        *(appender.append(job_item(n, expects=None)) for n in range(150)),
        *(billing.append(job_item(n, 2, None, "settle", "billing")) for n in range(150)),
    )
    await asyncio.gather(*(appender.append(job_item(n, 1, None, "end")) for n in range(150)))
    await billing.close()
    events = await whole_log(database.admin_dsn)
    assert len(events) == 900
    assert_sound(events)


async def test_a_writer_that_gathers_takes_later_items_into_the_same_commit(
    database: Database,
) -> None:
    writer = LogAppender(database.dsn("cocoon_matcher"), 1, "matcher", gather_s=0.2)
    await writer.acquire_term()
    first = asyncio.create_task(writer.append(job_item(1)))
    await asyncio.sleep(0.02)
    later = asyncio.create_task(writer.append(job_item(2)))
    one, other = appended(await first), appended(await later)
    assert one.events[0].recorded_at_us == other.events[0].recorded_at_us  # one call's time
    waiting = asyncio.create_task(writer.append(job_item(3)))
    await asyncio.sleep(0)
    await writer.close()
    with pytest.raises(Unavailable):
        await waiting
    assert len(await whole_log(database.admin_dsn)) == 6


async def test_shards_have_their_own_positions_and_chains(database: Database) -> None:
    writers = [LogAppender(database.dsn("cocoon_billing"), shard, "billing") for shard in (0, 1, 2)]
    for writer in writers:
        await writer.acquire_term()
        for number in range(3):
            await writer.append(deposit("acct_1", f"r{number}"))
        await writer.close()
    for shard in (0, 1, 2):
        events = await whole_log(database.admin_dsn, shard)
        assert_sound(events)
        assert len(events) == 3


async def test_data_is_stored_byte_for_byte(billing: LogAppender, conn: asyncpg.Connection) -> None:
    data = DepositCredited(
        account_id="acct_1", amount_nanoton=2**63 - 1, source="ton", reference='q"\\u0041/{}'
    )
    item = AppendItem("c-1", COMMAND, "billing", "acct_1", (), (NewEvent("account/acct_1", data),))
    await billing.append(item)
    (event,) = await stream_events(conn, 1, "account/acct_1")
    assert event.data == data.to_canonical()
    assert event.decode() == data
    (command,) = await read_commands(conn, 1, 1, 1)
    assert (command.command_id, command.data, command.last_position) == ("c-1", COMMAND, 1)


async def test_recorded_time_never_goes_back(
    appender: LogAppender, conn: asyncpg.Connection
) -> None:
    ahead_us = 4_000_000_000_000_000
    await conn.execute("UPDATE log.head SET recorded_at = $1 WHERE shard = 1", ahead_us)
    assert appended(await appender.append(job_item(1))).events[0].recorded_at_us == ahead_us


async def test_a_refused_item_does_not_take_the_others_with_it(
    appender: LogAppender, database: Database
) -> None:
    bad = replace(job_item(1), actor="two\nlines")
    results = await asyncio.gather(
        *(appender.append(job_item(n)) for n in range(2, 6)),
        appender.append(bad),
        return_exceptions=True,
    )
    assert [type(result) for result in results] == [Appended] * 4 + [Fatal]
    assert "two" not in str(results[-1])
    assert_sound(await whole_log(database.admin_dsn))


async def test_a_command_is_answered_again_while_the_rest_of_its_call_is_refused(
    appender: LogAppender,
) -> None:
    async def twice() -> list[Appended]:
        return [appended(await appender.append(job_item(1))) for _ in range(2)]

    async with asyncio.timeout(20):
        first, bad = await asyncio.gather(
            twice(),
            appender.append(replace(job_item(2), actor="two\nlines")),
            return_exceptions=True,
        )
    assert isinstance(bad, Fatal)
    assert isinstance(first, list)
    assert [outcome.repeated for outcome in first] == [False, True]
    assert first[0].positions == first[1].positions


async def test_a_fault_that_nobody_foresaw_is_told_to_everybody_who_waits(
    database: Database, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    writer = LogAppender(database.dsn("cocoon_matcher"), 1, "matcher", batch_limit=2)
    await writer.acquire_term()

    async def breaks(*_: object) -> list[Appended | Conflict]:
        raise KeyError("canary")

    with monkeypatch.context() as patched:
        patched.setattr("cocoon.eventlog.append.append_once", breaks)
        async with asyncio.timeout(20):
            told = await asyncio.gather(
                *(writer.append(job_item(n)) for n in range(5)), return_exceptions=True
            )
    assert [type(outcome) for outcome in told] == [Fatal] * 5
    async with asyncio.timeout(20):
        with pytest.raises(Fatal, match="restart"):
            await writer.append(job_item(9))
    await writer.close()
    assert "writer has failed" in caplog.text
    assert "canary" not in caplog.text


async def test_too_large_an_item_is_refused_before_it_is_queued(appender: LogAppender) -> None:
    with pytest.raises(ValueError, match="at most"):
        await appender.append(job_item(1, events=257))
    with pytest.raises(ValueError, match="at most"):
        await appender.append(replace(job_item(1), command=b" " * 1_048_577))
    appended(await appender.append(job_item(1)))


async def test_full_queue_refuses_instead_of_growing(database: Database) -> None:
    writer = LogAppender(database.dsn("cocoon_matcher"), 1, "matcher", queue_limit=3, batch_limit=1)
    await writer.acquire_term()
    blocker = await connect(database.admin_dsn, "blocker")
    async with blocker.transaction():
        await blocker.execute("SELECT FROM log.head WHERE shard = 1 FOR UPDATE")
        waiting = [asyncio.create_task(writer.append(job_item(n))) for n in range(10)]
        done, _ = await asyncio.wait(waiting, timeout=0.2)
        assert 6 <= len(done) <= 7  # one of ten is on its way, three wait, or three wait
        for task in done:
            with pytest.raises(Unavailable, match="queue is full"):
                task.result()
    await asyncio.gather(*waiting, return_exceptions=True)
    await writer.close()
    await blocker.close()


async def test_partitions_are_made_ahead(appender: LogAppender, conn: asyncpg.Connection) -> None:
    await conn.execute("UPDATE log.head SET position = 999998 WHERE shard = 1")
    outcome = appended(await appender.append(job_item(1, events=4)))
    assert outcome.positions == (999_999, 1_000_000, 1_000_001, 1_000_002)
    assert await conn.fetchval("SELECT to_regclass('log.events_000002')") == "log.events_000002"
    await conn.execute("UPDATE log.head SET position = 1999999 WHERE shard = 1")
    assert appended(await appender.append(job_item(2))).positions[-1] == 2_000_002


async def test_broken_chain_and_holes_are_found(
    appender: LogAppender, conn: asyncpg.Connection, database: Database
) -> None:
    for number in range(4):
        await appender.append(job_item(number))
    await conn.execute("UPDATE log.events SET actor = 'mallory' WHERE shard = 1 AND position = 5")
    with pytest.raises(LogCorrupt, match="position 5"):
        await whole_log(database.admin_dsn)
    await conn.execute("DELETE FROM log.events WHERE shard = 1 AND position = 5")
    with pytest.raises(LogCorrupt, match="no position 5"):
        await whole_log(database.admin_dsn)


# ---- one transaction for effects, appends and checkpoint ----


@pytest.fixture
async def effects(conn: asyncpg.Connection) -> AsyncIterator[int]:
    await conn.execute("CREATE TABLE public.effects (n integer PRIMARY KEY)")
    return await acquire_term(conn, 1, "billing")


async def test_effects_appends_and_checkpoint_commit_together(
    conn: asyncpg.Connection, effects: int, database: Database
) -> None:
    async with transaction(conn, 1, "billing", effects) as tx:
        await tx.conn.execute("INSERT INTO public.effects VALUES (1)")
        appended((await tx.append([deposit("acct_1", "a")]))[0])
        await tx.checkpoint("ledger", 17)
    assert await checkpoint(conn, 1, "ledger") == 17
    with pytest.raises(RuntimeError):  # noqa: PT012 - the transaction is what is tested
        async with transaction(conn, 1, "billing", effects) as tx:
            await tx.conn.execute("INSERT INTO public.effects VALUES (2)")
            await tx.append([deposit("acct_1", "b")])
            await tx.checkpoint("ledger", 18)
            raise RuntimeError
    assert await conn.fetchval("SELECT count(*) FROM public.effects") == 1
    assert await checkpoint(conn, 1, "ledger") == 17
    assert len(await whole_log(database.admin_dsn)) == 1


async def test_checkpoint_never_goes_back_and_obeys_the_term(
    conn: asyncpg.Connection, effects: int
) -> None:
    async with transaction(conn, 1, "billing", effects) as tx:
        await tx.checkpoint("ledger", 5)
    for position in (4, 5):
        with pytest.raises(Fatal):
            async with transaction(conn, 1, "billing", effects) as tx:
                await tx.checkpoint("ledger", position)
    await acquire_term(conn, 1, "billing")
    with pytest.raises(StaleTerm):
        async with transaction(conn, 1, "billing", effects) as tx:
            await tx.checkpoint("ledger", 6)
    assert await checkpoint(conn, 1, "ledger") == 5


async def test_only_one_process_leads(database: Database) -> None:
    entered = asyncio.Event()

    async def follow() -> None:
        async with leadership(database.dsn("cocoon_billing"), 1, "billing", poll_s=0.02):
            entered.set()

    async with leadership(database.dsn("cocoon_billing"), 1, "billing"):
        second = asyncio.create_task(follow())
        await asyncio.sleep(0.15)
        assert not entered.is_set()
        async with leadership(database.dsn("cocoon_billing"), 2, "billing"):
            pass  # another shard is another lead
    await second
    assert entered.is_set()


# ---- grants (the rest: test_log_privileges) ----


@pytest.mark.parametrize(
    ("login", "role"),
    [
        ("cocoon_matcher", "billing"),
        ("cocoon_billing", "matcher"),
        ("cocoon_gateway", "gateway"),
        ("cocoon_gateway", "matcher"),
        ("cocoon_reader", "billing"),
    ],
)
async def test_a_login_appends_in_its_own_role_only(
    database: Database, login: str, role: str
) -> None:
    admin = await connect(database.admin_dsn, "test")
    term = await acquire_term(admin, 1, "billing" if role == "gateway" else role)
    service = await connect(database.dsn(login), "test")
    try:
        with pytest.raises(Fatal, match="42501"):
            await acquire_term(service, 1, role)
        with pytest.raises(Fatal, match="42501"):
            await append_once(service, 1, role, term, [prepare(job_item(1))])
    finally:
        await service.close()
        await admin.close()
    assert await whole_log(database.admin_dsn) == []


# ---- crashes ----


async def test_kill_9_of_postgres_loses_nothing_acknowledged(own_postgres: Database) -> None:
    writer = LogAppender(own_postgres.dsn("cocoon_matcher"), 1, "matcher")
    await writer.acquire_term()
    acknowledged: dict[str, tuple[int, ...]] = {}
    numbers = iter(range(900))

    async def append_all() -> None:
        for number in numbers:
            outcome = appended(await writer.append(job_item(number)))
            acknowledged[outcome.events[0].stream] = outcome.positions

    workers = [asyncio.create_task(append_all()) for _ in range(32)]
    for threshold in (150, 500):
        while len(acknowledged) < threshold:  # noqa: ASYNC110
            await asyncio.sleep(0.002)
        await asyncio.to_thread(own_postgres.server.kill)
        await asyncio.to_thread(own_postgres.server.start)
    await asyncio.gather(*workers)
    await writer.close()
    events = await whole_log(own_postgres.admin_dsn)
    assert_sound(events)
    stored: dict[str, tuple[int, ...]] = {}
    for event in events:
        stored[event.stream] = (*stored.get(event.stream, ()), event.position)
    assert stored == acknowledged
    assert len(stored) == 900
