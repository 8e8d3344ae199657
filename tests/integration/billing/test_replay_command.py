"""`./cocoon replay` over a real Postgres: its exit codes, its last line, a log as a file."""

from __future__ import annotations

import asyncio
from pathlib import Path

import asyncpg
import pytest

from services.billing import logfile, replay, verify
from tests.support.books_world import Books, overdraw


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
    await overdraw(books)
    await books.jobs_end(1)
    dsn, file = books.database.dsn("cocoon_reader"), tmp_path / "log.gz"
    await replay.export(dsn, [1], file)
    live, shard = await books.replay(), (await logfile.replay_file(file, decisions=False))[0]
    assert (shard.parked, shard.differences) == (5, [])
    assert shard.derived_sha256 == live.live_sha256
