"""The launchers of the two real servers: crashes, leftovers, secrets and folders' modes."""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

import asyncpg
import pytest

from cocoon.devnet.nats_server import NatsServer
from cocoon.devnet.postgres import PostgresServer
from cocoon.eventlog.migrate import apply_schema, migration_files
from cocoon.kernel.errors import ConfigurationError
from tests.support.servers import SHARDS, Database, scratch

CANARY = "canary-7f3a"


@pytest.fixture
def folder() -> Iterator[Path]:
    made = scratch("launch")
    yield made
    shutil.rmtree(made, ignore_errors=True)


def others(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode) & 0o077


def command_line(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_text()


def owner_of(pid: int) -> int:
    return Path(f"/proc/{pid}").stat().st_uid


async def ping(dsn: str) -> int:
    conn = await asyncpg.connect(dsn, timeout=10)
    try:
        return int(await conn.fetchval("SELECT 1"))
    finally:
        await conn.close()


async def test_postgres_survives_kill_9_and_a_leftover_pid_file(folder: Path) -> None:
    server = PostgresServer(folder / "closed" / "pg")
    (folder / "closed").mkdir(mode=0o700)
    try:
        server.start()
        assert await ping(server.dsn()) == 1
        server.kill()
        # The pid of a live process that is no Postgres of this folder.
        pid_file = server.cluster_dir / "postmaster.pid"
        pid_file.write_text(pid_file.read_text().replace(pid_file.read_text().split()[0], "1", 1))
        server.start()
        assert await ping(server.dsn()) == 1
        with pytest.raises(ConfigurationError, match="already serves"):
            PostgresServer(server.data_dir).start()
        server.stop()
        server.start()  # and again, from a clean stop
        assert await ping(server.dsn()) == 1
    finally:
        server.stop("immediate")


async def test_postgres_folders_are_closed_and_its_log_holds_no_value(folder: Path) -> None:
    server = PostgresServer(folder / "pg")
    try:
        server.start()
        conn = await asyncpg.connect(server.dsn(), timeout=10)
        await conn.execute("CREATE TABLE t (a text CHECK (a = 'x'))")
        for statement in ("INSERT INTO t VALUES ($1)", "SELECT $1::text::integer"):
            with pytest.raises(asyncpg.PostgresError):
                await conn.execute(statement, CANARY)
        with pytest.raises(asyncpg.PostgresError):
            await conn.execute("INSERT INTO t VALUES ('" + CANARY + "')")  # noqa: S608
        await conn.close()
        with pytest.raises(asyncpg.InvalidPasswordError):
            await ping(server.dsn(password="wrong"))
        log = server.log_file.read_text()
        password = server.password_file.read_text()
        assert password not in log
        assert "INSERT" not in log
        assert CANARY not in log
        assert others(server.password_file) == others(server.log_file) == 0
        assert others(server.cluster_dir) == 0
        assert others(server.data_dir) in {0, 0o011}  # passed through, never listed
        assert server.pid is not None
        assert password not in command_line(server.pid)
        if os.geteuid() == 0:
            assert owner_of(server.pid) != 0
    finally:
        server.stop("immediate")


async def test_migrations_run_once_and_refuse_to_change(
    database: Database, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert await apply_schema(database.admin_dsn, SHARDS) == []
    changed = tmp_path / "0001.sql"
    changed.write_text("CREATE TABLE public.one (n integer);")
    files = [*migration_files(), ("test/0001.sql", changed)]
    monkeypatch.setattr("cocoon.eventlog.migrate.migration_files", lambda: files)
    assert await apply_schema(database.admin_dsn, SHARDS) == ["test/0001.sql"]
    assert await apply_schema(database.admin_dsn, SHARDS) == []
    changed.write_text("CREATE TABLE public.two (n integer);")
    with pytest.raises(ConfigurationError, match="changed after it ran"):
        await apply_schema(database.admin_dsn, SHARDS)


def test_nats_keeps_its_configuration_to_itself(folder: Path) -> None:
    server = NatsServer(folder / "nats")
    try:
        server.start()
        assert others(server.config_file) == others(server.log_file) == 0
        assert others(server.store_dir) == 0
        server.kill()
        server.start()
        server.stop()
        assert server.pid is None
        server.wipe()
        assert not server.jetstream_dir.exists()
    finally:
        server.kill()
