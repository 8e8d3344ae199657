"""Replay against a real Postgres: what it finds, where it may begin."""

from __future__ import annotations

import asyncio

import pytest

from cocoon.contracts.events import DepositCredited
from cocoon.eventlog.read import read_batch
from services.billing import verify
from services.billing.audit import keep_snapshots
from tests.support import job_world as world
from tests.support.books_world import Books, overdraw


@pytest.mark.parametrize("batch", [1, 3, 7, 2048])
async def test_log_and_tables_agree_whatever_the_size_of_the_batches(
    books: Books, batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    await books.jobs_end(4)
    whole = await books.replay()
    monkeypatch.setattr(verify, "BATCH", batch)
    report = await books.decide_again()
    assert report.differences == report.notes == []
    assert (report.events, report.decisions) == (22, 10)
    assert report.derived_sha256 == report.live_sha256 == whole.live_sha256


async def test_a_log_that_the_ledger_has_not_read_to_its_end_agrees_too(books: Books) -> None:
    await books.jobs_end(2)
    posted = (await books.replay()).derived_sha256
    await books.put("more", books.billing, "account/acct_1", _deposit(5))
    report = await books.replay()
    assert (report.differences, report.events) == ([], 13)
    assert report.derived_sha256 == report.live_sha256 == posted


@pytest.mark.parametrize(
    ("forgery", "said"),
    [
        ("UPDATE ledger.entries SET amount = amount + 1 WHERE position = 4 AND line = 0",
         "the log gives the line (4 0 client:acct_1"),
        ("DELETE FROM ledger.entries WHERE position = 7 AND line = 2", "the log gives the line"),
        ("INSERT INTO ledger.entries VALUES (1, 3, 0, 'client:x', 1)", "the log gives the line"),
        ("INSERT INTO ledger.entries VALUES (1, 99, 0, 'client:x', 1)", "a line of position 99"),
        ("UPDATE ledger.settlements SET provider_id = 'me'", "the log gives the line (7 paid"),
        ("UPDATE ledger.settlements SET fee = fee + 1, price = price + 1", "the log gives the li"),
        ("DELETE FROM ledger.settlements", "the tables (nothing)"),
        ("UPDATE ledger.settlements SET position = 900", "(nothing)"),
        ("UPDATE ledger.balances SET amount = amount + 1 WHERE account = 'platform:fees'",
         "platform:fees: the log says 15 nanoTON, the table 16; last touched at positions 7"),
        ("INSERT INTO ledger.balances VALUES (1, 'client:x', 1)", "client:x: the log says 0"),
        ("DELETE FROM ledger.balances WHERE account = 'client:acct_1'", "the table 0"),
    ],
)  # fmt: skip
async def test_a_forged_row_is_a_difference(books: Books, forgery: str, said: str) -> None:
    await books.jobs_end(1)
    assert (await books.replay()).differences == []
    await books.sql(forgery)
    report = await books.replay()
    assert any(said in text for text in report.differences), report.differences
    if "99" not in forgery:
        assert report.derived_sha256 != report.live_sha256 or "settlements SET position" in forgery


def _deposit(nanoton: int) -> DepositCredited:
    return DepositCredited(
        account_id="acct_1", amount_nanoton=nanoton, source="dev", reference=str(nanoton)
    )


# ---- snapshots ----


async def test_a_replay_from_a_snapshot_equals_one_from_the_beginning(books: Books) -> None:
    await books.jobs_end(3)
    at = await books.head()
    assert await books.snapshot() is True
    await books.jobs_end(2)
    whole, late = await books.decide_again(), await books.decide_again(at + 1)
    assert (late.snapshot, late.differences, late.notes) == (at, [], [])
    assert late.events == whole.events - at
    assert late.derived_sha256 == late.live_sha256 == whole.derived_sha256 == whole.live_sha256
    early = await books.replay(at)  # the snapshot of a position holds it: this one needs an older
    assert (early.snapshot, early.derived_sha256, early.differences) == (0, "", [])
    assert early.notes == [f"there is no snapshot below position {at}: no table is compared"]


async def test_the_newest_snapshot_below_is_the_one(books: Books) -> None:
    taken = []
    for _ in range(3):
        await books.jobs_end(1)
        taken.append(await books.head())
        assert await books.snapshot() is True
        await books.post()
    whole = await books.replay()
    assert whole.differences == []
    for first in range(2, await books.head() + 1):
        report = await books.replay(first)
        assert report.snapshot == max((at for at in taken if at < first), default=0)
        assert report.differences == []
        assert not report.snapshot or report.derived_sha256 == whole.derived_sha256


async def test_the_log_names_what_replay_prints_for_the_position(books: Books) -> None:
    await books.jobs_end(1)
    at = await books.head()
    assert await books.snapshot() is True
    async with books.pool.acquire() as conn:
        event = (await read_batch(conn, 1, at + 1, 1))[0].decode()
    await books.post()
    assert event.model_dump() == {
        "shard": 1, "position": at, "sha256": (await books.replay(1, at)).derived_sha256,
    }  # fmt: skip


async def test_a_snapshot_waits_for_enough_events(books: Books) -> None:
    await books.jobs_end(1)
    assert await books.snapshot(8) is None
    assert await books.snapshot(7) is True
    await books.jobs_end(1)
    assert await books.snapshot(7) is None
    assert await books.snapshot(6) is True


@pytest.mark.parametrize(
    "forgery",
    [
        "UPDATE ledger.snapshots SET data = replace(encode(data, 'escape'), ' 15', ' 16')::bytea",
        "UPDATE ledger.snapshots SET data = ''",
    ],
)
async def test_a_tampered_snapshot_is_a_difference(books: Books, forgery: str) -> None:
    await books.jobs_end(1)
    at = await books.head()
    await books.snapshot()
    await books.sql(forgery)
    assert (await books.replay(at + 1)).differences == [
        f"the snapshot of position {at} is not the one that the log names"
    ]
    await books.post()
    assert (await books.replay()).differences == []  # nothing needs it from the beginning


async def test_a_snapshot_that_the_log_does_not_name_is_not_used(books: Books) -> None:
    await books.jobs_end(1)
    at = await books.head()
    await books.sql(f"INSERT INTO ledger.snapshots VALUES (1, {at - 1}, 'lines 0 00')")  # noqa: S608
    report = await books.replay(at)
    assert (report.snapshot, report.differences) == (0, [])
    assert await books.snapshot() is True


async def test_a_false_snapshot_in_the_log_is_found_from_the_beginning(books: Books) -> None:
    await books.jobs_end(1)
    await books.snapshot()
    at = await books.head()
    await books.sql(
        'UPDATE log.events SET data = regexp_replace(data, \'"sha256":"..\', \'"sha256":"00\')'  # noqa: S608
        f" WHERE shard = 1 AND position = {at}",
        f"UPDATE log.events e SET hash = {_HASH} WHERE shard = 1 AND position = {at}",  # noqa: S608
        "UPDATE log.head SET hash = (SELECT hash FROM log.events"  # noqa: S608
        f" WHERE shard = 1 AND position = {at}) WHERE shard = 1",
    )
    await books.post()
    said = (await books.replay()).differences
    assert said == [f"the log's snapshot of position {at - 1} has another sha256"]


_HASH = (
    "sha256((SELECT p.hash FROM log.events p WHERE p.shard = e.shard"
    " AND p.position = e.position - 1) || convert_to(concat_ws(E'\\n', shard, position, stream,"
    " version, type, schema_version, event_id, causation_id, correlation_id, actor, recorded_at,"
    " data), 'UTF8'))"
)


async def test_no_snapshot_is_taken_where_log_and_tables_differ(books: Books) -> None:
    await books.jobs_end(1)
    await books.sql("UPDATE ledger.balances SET amount = amount + 1 WHERE account = 'faucet'")
    at = await books.head()
    assert await books.snapshot() is False
    assert await books.head() == at


async def test_billing_goes_on_taking_snapshots(
    books: Books, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.billing.audit.LOOK_S", 0.01)
    keeping = asyncio.create_task(keep_snapshots(books.pool, {1: books.billing}, 7))
    try:
        for _ in range(2):
            await books.jobs_end(2)
            before = await books.head()
            while await books.head() == before:  # noqa: ASYNC110 - the log tells it
                await asyncio.sleep(0.01)
            await books.post()
    finally:
        keeping.cancel()
        await asyncio.gather(keeping, return_exceptions=True)
    report = await books.replay(await books.head())
    assert (report.differences, report.snapshot > 0) == ([], True)


# ---- what stands aside ----


async def test_what_stands_aside_is_named_and_no_difference(books: Books) -> None:
    await overdraw(books)
    await books.jobs_end(1)
    report = await books.replay()
    assert (report.differences, report.parked) == ([], 5)  # with the account's next job
    assert "negative_balance" in report.notes[0]
    assert "account_frozen" in report.notes[1]
    assert "behind_parked" in report.notes[2]
    assert await books.snapshot() is False  # it may be posted yet, behind the snapshot


async def test_what_was_posted_late_is_no_difference(books: Books) -> None:
    await overdraw(books)
    await books.post()
    await books.put("more", books.billing, "account/acct_1", _deposit(10))
    await books.post()
    await books.ledger.unpark(f"job/{world.hex16('poor')}")
    report = await books.replay()
    assert (report.differences, report.parked) == ([], 0)
    assert report.notes == [
        "position 3 was not covered when it came: client:acct_1 would fall below zero"
    ]
    assert report.derived_sha256 == report.live_sha256


@pytest.mark.parametrize("reason", ["negative_balance", "behind_parked"])
async def test_nothing_can_be_hidden_by_parking_it(books: Books, reason: str) -> None:
    await books.jobs_end(1)
    await books.sql(
        f"INSERT INTO log.parked VALUES (1, 'ledger', 2, 'account/acct_1', '{reason}', 1)",  # noqa: S608
        "DELETE FROM ledger.entries WHERE position = 2",
        "DELETE FROM ledger.balances WHERE account = 'faucet'",
        "UPDATE ledger.balances SET amount = amount - 10000 WHERE account = 'client:acct_1'",
    )
    said = (await books.replay()).differences
    assert said[0] == "position 2 stands aside, but nothing kept it from posting"
