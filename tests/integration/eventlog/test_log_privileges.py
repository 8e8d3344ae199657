"""Who may write what in the database: every role tries everything, and only this table works."""

# ruff: noqa: S608 - the names in these statements are the database's own
from __future__ import annotations

import functools
import io
import itertools
from collections.abc import AsyncIterator, Awaitable, Callable

import asyncpg
import pytest

from cocoon.contracts import catalogue
from cocoon.contracts.events import ALL_EVENTS, EventData
from cocoon.eventlog import migrate
from cocoon.eventlog.append import Appended, acquire_term, append_once
from cocoon.eventlog.batch import prepare
from cocoon.eventlog.connection import NotGranted, connect
from tests.support.example_events import EXAMPLES, as_item
from tests.support.servers import DB_ROLES, SHARDS, Database

LOG_TABLES = (
    "head", "owners", "streams", "events", "commands", "checkpoints", "parked", "may_append",
    "may_follow",
)  # fmt: skip
WRITERS = ("cocoon_attestation", "cocoon_billing", "cocoon_matcher")

# (role, table) -> the verbs that work; "UPDATE column" where only one column may be written.
ALLOWED: dict[tuple[str, str], set[str]] = {
    **{(role, f"log.{table}"): {"SELECT"} for role in DB_ROLES for table in LOG_TABLES},
    ("cocoon_billing", "ledger.entries"): {"SELECT", "INSERT"},
    ("cocoon_billing", "ledger.settlements"): {"SELECT", "INSERT"},
    ("cocoon_billing", "ledger.snapshots"): {"SELECT", "INSERT", "UPDATE", "DELETE"},
    ("cocoon_billing", "ledger.earnings"): {"SELECT", "INSERT", "UPDATE"},
    ("cocoon_billing", "ledger.refusals"): {"SELECT", "INSERT"},
    ("cocoon_billing", "ledger.balances"): {"SELECT", "INSERT", "UPDATE", "DELETE"},
    **{
        ("cocoon_reader", f"ledger.{t}"): {"SELECT"}
        for t in ("entries", "balances", "settlements", "snapshots", "earnings", "refusals")
    },
    ("cocoon_gateway", "gateway.api_keys"): {"SELECT", "INSERT", "UPDATE revoked_at"},
    ("cocoon_attestation", "attestation.evidence"): {"SELECT", "INSERT", "UPDATE", "DELETE"},
    ("cocoon_attestation", "attestation.bans"): {"SELECT", "INSERT", "UPDATE", "DELETE"},
    ("cocoon_attestation", "attestation.floors"): {"SELECT", "INSERT", "UPDATE"},
    ("cocoon_attestation", "attestation.berths"): {"SELECT", "INSERT", "UPDATE", "DELETE"},
    ("cocoon_attestation", "attestation.manifests"): {
        "SELECT", "INSERT", "UPDATE offered_ms", "DELETE",
    },
    ("cocoon_matcher", "matcher.secrets"): {"SELECT", "INSERT", "DELETE"},
    **{
        ("cocoon_reader", f"attestation.{t}"): {"SELECT"}
        for t in ("evidence", "bans", "floors", "berths", "manifests")
    },
}  # fmt: skip
CALLS = {
    (role, f"log.{name}")
    for role in WRITERS
    for name in ("append", "acquire_term", "save_checkpoint", "park", "unpark")
} | {("cocoon_gateway", "gateway.tell_key_change")}  # a trigger's: it does nothing when called


@pytest.fixture
async def admin(database: Database) -> AsyncIterator[asyncpg.Connection]:
    conn = await asyncpg.connect(database.admin_dsn, timeout=10)
    yield conn
    await conn.close()


async def works(conn: asyncpg.Connection, attempt: Callable[[], Awaitable[object]]) -> bool:
    """Whether a login may do it; that it then fails for another reason does not count."""
    change = conn.transaction()
    await change.start()
    try:
        await attempt()
    except (
        asyncpg.InsufficientPrivilegeError,
        asyncpg.WrongObjectTypeError,  # a view takes no such verb, whoever asks
        asyncpg.ObjectNotInPrerequisiteStateError,
    ):
        return False
    except asyncpg.PostgresError:
        return True
    finally:
        await change.rollback()
    return True


_OWN = "n.nspname !~ '^pg_' AND n.nspname <> 'information_schema'"


async def tables(admin: asyncpg.Connection) -> dict[str, list[str]]:
    """Every table of the database but the system's, with its columns."""
    rows = await admin.fetch(
        "SELECT n.nspname || '.' || c.relname AS name, array_agg(a.attname::text) AS columns"
        " FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace JOIN pg_attribute a"
        " ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped"
        f" WHERE c.relkind IN ('r', 'p', 'v', 'm') AND {_OWN} GROUP BY 1"
    )
    return {row["name"]: row["columns"] for row in rows}


async def grant(conn: asyncpg.Connection, table: str) -> None:
    """Postgres only warns a login that has nothing to give."""
    await conn.execute(f"GRANT ALL ON {table} TO PUBLIC")
    if not await conn.fetchval("SELECT has_table_privilege('public', $1, 'SELECT')", table):
        raise asyncpg.InsufficientPrivilegeError("nothing was granted")


async def tried(conn: asyncpg.Connection, table: str, columns: list[str]) -> set[str]:
    """The verbs that work on a table."""
    schema, name = table.split(".")
    attempts: dict[str, Callable[[], Awaitable[object]]] = {
        verb: functools.partial(conn.execute, sql)
        for verb, sql in {
            "SELECT": f"SELECT * FROM {table} LIMIT 1",
            "INSERT": f"INSERT INTO {table} DEFAULT VALUES",
            "UPDATE": f"UPDATE {table} SET {', '.join(f'{c} = DEFAULT' for c in columns)}"
            " WHERE false",
            **{f"UPDATE {c}": f"UPDATE {table} SET {c} = DEFAULT WHERE false" for c in columns},
            "DELETE": f"DELETE FROM {table} WHERE false",
            "TRUNCATE": f"TRUNCATE {table} CASCADE",
            "LOCK": f"LOCK TABLE {table} IN ACCESS EXCLUSIVE MODE",
            "ALTER": f"ALTER TABLE {table} ADD COLUMN x integer",
            "TRIGGER": f"CREATE TRIGGER t BEFORE INSERT ON {table} EXECUTE FUNCTION log.append()",
            "INDEX": f"CREATE INDEX ON {table} ({columns[0]})",
            "COMMENT": f"COMMENT ON TABLE {table} IS 'mine'",
            "DROP": f"DROP TABLE {table} CASCADE",
            "COPY TO PROGRAM": f"COPY {table} TO PROGRAM 'cat'",
            "COPY FROM FILE": f"COPY {table} FROM '/dev/null'",
        }.items()
    }
    attempts["GRANT"] = functools.partial(grant, conn, table)
    attempts["COPY TO"] = lambda: conn.copy_from_query(
        f"SELECT * FROM {table}", output=io.BytesIO(), timeout=10
    )
    attempts["COPY FROM"] = lambda: conn.copy_to_table(
        name, schema_name=schema, source=io.BytesIO(b"x\n"), timeout=10
    )
    return {verb for verb, attempt in attempts.items() if await works(conn, attempt)}


def expected(role: str, table: str, columns: list[str]) -> set[str]:
    """What the table above means in the verbs that are tried."""
    verbs = set(ALLOWED.get((role, table), ()))
    if "SELECT" in verbs:
        verbs.add("COPY TO")
    if "INSERT" in verbs:
        verbs.add("COPY FROM")
    if "UPDATE" in verbs:
        verbs |= {f"UPDATE {column}" for column in columns}
    if verbs & {"UPDATE", "DELETE"}:
        verbs.add("LOCK")  # Postgres gives the lock with the verb
    return verbs


@pytest.mark.parametrize("role", DB_ROLES)
async def test_every_verb_on_every_table_works_or_is_refused_as_listed(
    database: Database, admin: asyncpg.Connection, role: str
) -> None:
    found = await tables(admin)
    partitions = {name for name in found if name.startswith("log.events_")}
    assert partitions
    assert {table for _, table in ALLOWED} | partitions | {"public.schema_migrations"} == set(found)
    conn = await asyncpg.connect(database.dsn(role), timeout=10)
    try:
        got = {table: await tried(conn, table, columns) for table, columns in found.items()}
    finally:
        await conn.close()
    wanted = {table: expected(role, table, columns) for table, columns in found.items()}
    assert {t: got[t] ^ wanted[t] for t in found if got[t] != wanted[t]} == {}


@pytest.mark.parametrize("role", DB_ROLES)
async def test_every_function_is_called_or_refused_as_listed(
    database: Database, admin: asyncpg.Connection, role: str
) -> None:
    rows = await admin.fetch(
        "SELECT n.nspname || '.' || p.proname AS name, p.pronargs AS arguments FROM pg_proc p"
        f" JOIN pg_namespace n ON n.oid = p.pronamespace WHERE {_OWN}"
    )
    conn = await asyncpg.connect(database.dsn(role), timeout=10)
    called = set()
    try:
        for row in rows:
            nulls = ", ".join(["NULL"] * row["arguments"])
            try:
                await conn.execute(f"SELECT {row['name']}({nulls})")
            except asyncpg.InsufficientPrivilegeError as error:
                if "this login may not act as" in str(error):  # the function's own word
                    called.add((role, row["name"]))
            except asyncpg.FeatureNotSupportedError:
                called.add((role, row["name"]))
            else:
                pytest.fail(f"{role} called {row['name']} with nothing, and it worked")
    finally:
        await conn.close()
    assert called == {call for call in CALLS if call[0] == role}


@pytest.mark.parametrize("role", DB_ROLES)
async def test_nobody_becomes_somebody_else(database: Database, role: str) -> None:
    conn = await asyncpg.connect(database.dsn(role), timeout=10)
    others = [other for other in DB_ROLES if other != role]
    owner = database.admin_dsn.partition("://")[2].partition(":")[0]
    try:
        for other in (*others, owner, "pg_write_all_data", "pg_read_server_files"):
            for statement in (
                f"SET ROLE {other}", f"SET SESSION AUTHORIZATION {other}",
                f"GRANT {other} TO {role}", f"ALTER ROLE {other} PASSWORD 'mine'",
                f"DROP ROLE {other}",
            ):  # fmt: skip
                with pytest.raises((asyncpg.InsufficientPrivilegeError, asyncpg.ReservedNameError)):
                    await conn.execute(statement)
        for statement in (
            f"ALTER ROLE {role} SUPERUSER", "CREATE ROLE mine", "CREATE DATABASE mine",
            "CREATE SCHEMA mine", "CREATE TABLE public.mine (n integer)",
            "CREATE FUNCTION pg_temp.f() RETURNS int LANGUAGE internal AS 'x'",
            "ALTER SYSTEM SET fsync = off",
            "SELECT pg_read_file('postgresql.conf')", "SET session_replication_role = replica",
        ):  # fmt: skip
            with pytest.raises(asyncpg.InsufficientPrivilegeError):
                await conn.execute(statement)
    finally:
        await conn.close()


# ---- event types and consumers ----

_ROLES = ("attestation", "billing", "matcher")
_STREAMS = {kind: f"{kind}/1" for kind, _, _ in catalogue.EVENTS.values()}


def test_every_event_is_one_roles_and_every_writer_is_tried() -> None:
    assert set(catalogue.EVENTS) == {event.event_type for event in ALL_EVENTS}
    assert {who for _, who, _ in catalogue.EVENTS.values()} == set(_ROLES)
    assert {f"cocoon_{role}" for role in _ROLES} == set(WRITERS)


@pytest.mark.parametrize("role", _ROLES)
async def test_a_role_appends_its_own_event_types_into_their_own_streams_only(
    database: Database, role: str
) -> None:
    conn = await connect(database.dsn(f"cocoon_{role}"), "test")
    try:
        term = await acquire_term(conn, 1, role)
        for event, stream in itertools.product(EXAMPLES, _STREAMS.values()):
            kind, who, _ = catalogue.EVENTS[event.event_type]
            batch = [prepare(as_item(f"{event.event_type}-{stream}", stream, event))]
            if (who, _STREAMS[kind]) == (role, stream):
                (outcome,) = await append_once(conn, 1, role, term, batch)
                assert isinstance(outcome, Appended)
                continue
            with pytest.raises(NotGranted, match=f"{role} may not append {event.event_type} to"):
                await append_once(conn, 1, role, term, batch)
    finally:
        await conn.close()


async def test_a_foreign_event_among_ones_own_is_refused_with_them(database: Database) -> None:
    conn = await connect(database.dsn("cocoon_matcher"), "test")
    term = await acquire_term(conn, 1, "matcher")
    own: EventData = EXAMPLES[1]
    paid = next(event for event in EXAMPLES if event.event_type == "PaymentSettled")
    batch = [prepare(as_item("c-1", "job/1", own)), prepare(as_item("c-2", "job/2", own, paid))]
    with pytest.raises(NotGranted):
        await append_once(conn, 1, "matcher", term, batch)
    assert await conn.fetchval("SELECT count(*) FROM log.events") == 0
    await conn.close()


async def test_a_role_of_nothing_is_nobody(database: Database, admin: asyncpg.Connection) -> None:
    """NULL compares as unknown, and unknown must not pass for allowed."""
    conn = await asyncpg.connect(database.dsn("cocoon_matcher"), timeout=10)
    for call in (
        "log.acquire_term(1, NULL)",
        "log.save_checkpoint(1, NULL, NULL, 'ledger', 9)",
        "log.append(1, NULL, NULL, '{c}', '{c}', '{a}', '{x}', '{\"\"}', '{0}', '{1}', '{job/1}',"
        " '{}', '{}', '{1}', '{FundsHeld}', '{1}', '{e}', '{d}')",
    ):
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            await conn.execute(f"SELECT {call}")
    await conn.close()
    assert await admin.fetchval("SELECT count(*) FROM log.events") == 0


async def test_a_database_of_the_first_schema_is_brought_up_to_date(
    admin: asyncpg.Connection, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What an older version left: a parked event, a hold, and no word about who may append."""
    everything = migrate.migration_files()
    first = [entry for entry in everything if "/0002" not in entry[0]]
    assert len(first) == len(everything) - 3
    for schema in ("log", "ledger", "gateway", "attestation", "matcher"):
        await admin.execute(f"DROP SCHEMA {schema} CASCADE")
    await admin.execute("DROP TABLE public.schema_migrations")
    for _, file in first:
        await admin.execute(file.read_text(encoding="utf-8"))
    await admin.execute(
        "CREATE TABLE public.schema_migrations (name text PRIMARY KEY, sha256 text NOT NULL,"
        " applied_at timestamptz NOT NULL DEFAULT now())"
    )
    for name, file in first:
        await admin.execute(
            "INSERT INTO public.schema_migrations VALUES ($1, encode(sha256($2), 'hex'))",
            name, file.read_bytes(),
        )  # fmt: skip
    await admin.execute("SELECT log.ensure_shard(1)")
    term = await admin.fetchval("SELECT log.acquire_term(1, 'matcher')")
    await append_once(admin, 1, "matcher", term, [prepare(as_item("c-1", "job/1", *EXAMPLES[:2]))])
    await admin.execute("INSERT INTO ledger.balances VALUES (1, 'hold:1', 1000)")
    ran = await migrate.apply_schema(database.admin_dsn, SHARDS)
    assert ran == [name for name, _ in everything if "/0002" in name]
    assert await migrate.apply_schema(database.admin_dsn, SHARDS) == []
    owner = await admin.fetchval("SELECT owner FROM ledger.balances WHERE account = 'hold:1'")
    assert owner == "acct_1"
    rows = await admin.fetch("SELECT role, type, aggregate FROM log.may_append")
    assert {tuple(row) for row in rows} == {
        (who, name, kind) for name, (kind, who, _) in catalogue.EVENTS.items()
    }


async def test_a_type_that_the_catalogue_takes_away_is_taken_away(
    database: Database, admin: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    fewer = {name: row for name, row in catalogue.EVENTS.items() if name != "FundsHeld"}
    monkeypatch.setattr(catalogue, "EVENTS", fewer)
    await migrate.apply_schema(database.admin_dsn, SHARDS)
    term = await acquire_term(admin, 1, "matcher")
    with pytest.raises(NotGranted, match="matcher may not append FundsHeld"):
        await append_once(admin, 1, "matcher", term, [prepare(as_item("c", "job/1", EXAMPLES[1]))])
