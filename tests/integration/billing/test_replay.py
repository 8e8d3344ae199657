"""Replay against a real Postgres: what it finds, how it ends, where it may begin."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import asyncpg
import pytest

from cocoon.contracts.envelope import AppendItem, NewEvent
from cocoon.contracts.events import DepositCredited, EventData, FundsHeld, ProviderEnrolled
from cocoon.domain.job import JobState, fold
from cocoon.domain.leasing import decide_request_job
from cocoon.domain.settling import decide_settle_result
from cocoon.eventlog.append import Appended, LogAppender
from cocoon.eventlog.connection import create_pool
from cocoon.eventlog.read import checkpoint, head, read_batch
from services.billing import decide as billing
from services.billing import logfile, replay, verify
from services.billing.audit import keep_snapshots, take_snapshot
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


async def _overdraw(books: Books) -> None:
    held = FundsHeld(job_id=world.hex16("poor"), account_id="acct_1", amount_nanoton=FUNDS + 5)
    await books.put("overdraft", books.matcher, f"job/{held.job_id}", held)


async def test_what_stands_aside_is_named_and_no_difference(books: Books) -> None:
    await _overdraw(books)
    await books.jobs_end(1)
    report = await books.replay()
    assert (report.differences, report.parked) == ([], 5)  # with the account's next job
    assert "negative_balance" in report.notes[0]
    assert "account_frozen" in report.notes[1]
    assert "behind_parked" in report.notes[2]
    assert await books.snapshot() is False  # it may be posted yet, behind the snapshot


async def test_what_was_posted_late_is_no_difference(books: Books) -> None:
    await _overdraw(books)
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


# ---- the command's exit codes, and a log as a file ----


class Command:
    """`cocoon replay` over this database."""

    def __init__(self, books: Books, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        dsn_file = folder / "dsn"
        dsn_file.write_text(books.database.dsn("cocoon_reader"))
        monkeypatch.setenv(replay.DSN_FILE, str(dsn_file))

    async def __call__(self, *arguments: str) -> int:
        try:
            return await asyncio.to_thread(replay.main, ["--shards=1", *arguments])
        except SystemExit as ended:
            return int(str(ended.code))


@pytest.fixture
def command(books: Books, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Command:
    return Command(books, tmp_path, monkeypatch)


async def test_the_exit_codes_are_0_1_2_and_64(
    books: Books, command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    await books.jobs_end(1)
    at = await books.head()
    await books.snapshot()
    await books.post()
    assert await command("--verify", "--decisions") == 0
    assert await command("--verify", f"--from={at + 1}") == 0
    assert f"(the books from the snapshot of {at})" in capsys.readouterr().out
    await books.sql("UPDATE ledger.snapshots SET data = 'x'")
    assert await command("--verify", f"--from={at + 1}") == 1
    assert await command("--verify", "--shards=9") == 64
    assert await command("--export", "x", "--from=2") == 64
    assert await command("--file", "nowhere") == 64
    assert "Traceback" not in capsys.readouterr().err
    for corruption in (
        "UPDATE log.events SET data = replace(data, '1', '2') WHERE shard = 1 AND position = 4",
        "UPDATE log.events SET actor = 'me' WHERE shard = 1 AND position = 4",
        "UPDATE log.events SET hash = sha256(hash) WHERE shard = 1 AND position = 4",
        "UPDATE log.head SET hash = sha256(hash) WHERE shard = 1",
        "DELETE FROM log.events WHERE shard = 1 AND position = 4",
        f"DELETE FROM log.events WHERE shard = 1 AND position > {at - 1}",  # noqa: S608
    ):
        conn = await asyncpg.connect(books.database.admin_dsn)
        await conn.execute("CREATE TABLE kept AS TABLE log.events")
        await conn.execute("CREATE TABLE kept_head AS TABLE log.head")
        await conn.execute(corruption)
        assert await command("--verify") == 2, corruption
        await conn.execute("DELETE FROM log.events")
        await conn.execute("INSERT INTO log.events SELECT * FROM kept")
        await conn.execute(
            "UPDATE log.head h SET hash = k.hash FROM kept_head k WHERE k.shard = h.shard"
        )
        await conn.execute("DROP TABLE kept; DROP TABLE kept_head")
        await conn.close()
    assert await command("--verify") == 0


async def test_a_shard_that_ends_before_the_range_has_nothing_to_check(
    books: Books, command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    await books.jobs_end(1)
    at = await books.head()
    both = "--shards=0,1"
    assert await command("--verify", both, f"--from={at}") == 0
    said = capsys.readouterr().out
    assert said.startswith(f"shard 0: ends at 0, nothing from {at} on\nshard 1: 1 events")
    assert said.endswith("\nchain holds\n")  # no snapshot: no table was compared
    assert await command("--verify", "--decisions", both, f"--from={at - 1}") == 0
    assert capsys.readouterr().out.endswith("\nchain and decisions hold\n")
    assert await command("--verify", both) == 0
    assert capsys.readouterr().out.endswith("\nequal\n")
    assert await command("--verify", both, f"--to={at - 1}") == 0  # entries are compared
    said = capsys.readouterr().out
    assert "balances are those of the log's end" in said
    assert said.endswith("\nequal\n")
    assert await command("--verify", "--shards=0") == 0
    assert capsys.readouterr().out == (
        "shard 0: ends at 0\nnothing to check: there are no events\n"
    )


async def test_a_range_without_events_is_wrong_usage(
    books: Books, command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    at = await books.head()
    for wrong, says in (
        ((f"--from={at + 1}",), f"nothing from position {at + 1} on; the log ends on shard 1 at"),
        (("--from=2", "--to=1"), "--from 2 is above --to 1"),
        (("--to=0",), "positions begin at 1"),
    ):
        assert await command("--verify", *wrong) == 64
        told = capsys.readouterr()
        assert says in told.err
        assert told.out == ""


async def test_a_good_shard_without_books_does_not_read_as_a_failure(
    books: Books, command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    await books.put_on_the_network_shard()
    assert await command("--verify", "--shards=0") == 0
    assert capsys.readouterr().out == (
        "shard 0: 1 events, positions 1 to 1, chain and density hold\n"
        "  no money moves in this range: this shard has no books\nchain holds\n"
    )


@pytest.mark.parametrize("batch", [1, 4, 2048])
async def test_an_exported_log_is_verified_without_the_database(
    books: Books, command: Command, tmp_path: Path, batch: int, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    for module in (verify, replay, logfile):
        monkeypatch.setattr(module, "BATCH", batch)
    await books.jobs_end(3)
    await books.snapshot()
    await books.jobs_end(1)
    file = tmp_path / "log.gz"
    assert await command("--export", str(file), "--shards=0,1") == 0
    assert await command("--export", str(file)) == 64  # it is never written over
    live = await books.decide_again()
    network, shard = await logfile.replay_file(file, decisions=True)
    assert (network.shard, network.events, network.differences) == (0, 0, [])
    assert (shard.derived_sha256, shard.head_hash) == (live.live_sha256, live.head_hash)
    assert (shard.events, shard.decisions) == (live.events, live.decisions)
    monkeypatch.setenv(replay.DSN_FILE, "nowhere")
    assert await command("--file", str(file), "--decisions") == 0
    said = capsys.readouterr().out
    assert said.endswith("\nchain and decisions hold\n")  # a file has no tables to equal
    assert "tables" not in said
    assert await command("--file", str(file)) == 0
    assert capsys.readouterr().out.endswith("\nchain holds\n")


async def test_a_file_keeps_what_stands_aside(books: Books, tmp_path: Path) -> None:
    await _overdraw(books)
    await books.jobs_end(1)
    dsn, file = books.database.dsn("cocoon_reader"), tmp_path / "log.gz"
    await replay.export(dsn, [1], file)
    live, shard = await books.replay(), (await logfile.replay_file(file, decisions=False))[0]
    assert (shard.parked, shard.differences) == (5, [])
    assert shard.derived_sha256 == live.live_sha256
