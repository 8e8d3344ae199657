"""Bring a database up to date: the log's schema, then every service's migrations, each once.

What each role may append and follow is written anew each time, from the contracts' catalogue. It
runs as the schema's owner, never as a service.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import importlib.util
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path

import asyncpg

from cocoon.contracts import catalogue
from cocoon.kernel.errors import ConfigurationError

SCHEMA_FILE = Path(__file__).with_name("schema.sql")
MIGRATIONS = SCHEMA_FILE.with_name("migrations")
_LOCK = 0x636F636F6F6E01  # any constant: two migrators of one database wait for each other
_SCRAM_ROUNDS = 4096
_FORGET_APPEND = (
    "DELETE FROM log.may_append WHERE (role, type, aggregate)"
    " NOT IN (SELECT * FROM unnest($1::text[], $2::text[], $3::text[]))"
)
_ALLOW_APPEND = (
    "INSERT INTO log.may_append (role, type, aggregate)"
    " SELECT * FROM unnest($1::text[], $2::text[], $3::text[]) ON CONFLICT DO NOTHING"
)
_FORGET_FOLLOW = (
    "DELETE FROM log.may_follow WHERE (role, consumer)"
    " NOT IN (SELECT * FROM unnest($1::text[], $2::text[]))"
)
_ALLOW_FOLLOW = (
    "INSERT INTO log.may_follow (role, consumer)"
    " SELECT * FROM unnest($1::text[], $2::text[]) ON CONFLICT DO NOTHING"
)


def migration_files() -> list[tuple[str, Path]]:
    """(name, file) of every migration, in the order to run: the log first, then by service."""
    found = [("eventlog/schema.sql", SCHEMA_FILE)]
    found += [(f"eventlog/{file.name}", file) for file in sorted(MIGRATIONS.glob("*.sql"))]
    spec = importlib.util.find_spec("services")
    for root in (spec.submodule_search_locations or []) if spec else []:
        for file in sorted(Path(root).glob("*/migrations/*.sql")):
            found.append((f"{file.parent.parent.name}/{file.name}", file))
    return found


async def apply_schema(dsn: str, shards: Sequence[int] = (0, 1)) -> list[str]:
    """Run what the database has not seen yet and make sure that the shards exist.

    Returns the names of the migrations that ran. Raises ConfigurationError if a file that ran
    before has changed since.
    """
    ran = []
    connection = await asyncpg.connect(dsn, timeout=10, command_timeout=60)
    try:
        async with connection.transaction():
            await connection.execute("SELECT pg_advisory_xact_lock($1)", _LOCK)
            await connection.execute(
                "CREATE TABLE IF NOT EXISTS public.schema_migrations ("
                "name text PRIMARY KEY, sha256 text NOT NULL,"
                "applied_at timestamptz NOT NULL DEFAULT now())"
            )
            rows = await connection.fetch("SELECT name, sha256 FROM public.schema_migrations")
            seen = {row["name"]: row["sha256"] for row in rows}
            for name, file in migration_files():
                sql = file.read_text(encoding="utf-8")
                digest = hashlib.sha256(sql.encode()).hexdigest()
                if name in seen:
                    if seen[name] != digest:
                        raise ConfigurationError(
                            f"migration {name} changed after it ran; add a new file instead"
                        )
                    continue
                await connection.execute(sql)
                await connection.execute(
                    "INSERT INTO public.schema_migrations (name, sha256) VALUES ($1, $2)",
                    name,
                    digest,
                )
                ran.append(name)
            await _grant_rows(connection)
            for shard in shards:
                await connection.execute("SELECT log.ensure_shard($1)", shard)
    finally:
        await connection.close(timeout=5)
    return ran


async def _grant_rows(connection: asyncpg.Connection[asyncpg.Record]) -> None:
    """Make log.may_append and log.may_follow equal to the catalogue; unchanged rows stay."""
    events = [(who, name, kind) for name, (kind, who, _) in catalogue.EVENTS.items()]
    followers = [(who, consumer) for consumer, who in catalogue.CONSUMERS.items()]
    await connection.execute(_FORGET_APPEND, *map(list, zip(*events, strict=True)))
    await connection.execute(_ALLOW_APPEND, *map(list, zip(*events, strict=True)))
    await connection.execute(_FORGET_FOLLOW, *map(list, zip(*followers, strict=True)))
    await connection.execute(_ALLOW_FOLLOW, *map(list, zip(*followers, strict=True)))


async def set_role_passwords(dsn: str, passwords: Mapping[str, str]) -> None:
    """Give login roles their passwords; only SCRAM verifiers (RFC 5803) travel to the server."""
    connection = await asyncpg.connect(dsn, timeout=10, command_timeout=10)
    try:
        for role, password in passwords.items():
            if not role.replace("_", "").isalnum():
                raise ConfigurationError("a role's name holds letters, digits and underscores")
            await connection.execute(
                f"ALTER ROLE {role} PASSWORD '{scram_verifier(password, secrets.token_bytes(16))}'"
            )
    finally:
        await connection.close(timeout=5)


def scram_verifier(password: str, salt: bytes) -> str:
    """What Postgres stores for an ASCII password under SCRAM-SHA-256."""
    salted = hashlib.pbkdf2_hmac("sha256", password.encode("ascii"), salt, _SCRAM_ROUNDS)
    client = hashlib.sha256(hmac.digest(salted, b"Client Key", "sha256")).digest()
    server = hmac.digest(salted, b"Server Key", "sha256")
    return (
        f"SCRAM-SHA-256${_SCRAM_ROUNDS}:{base64.b64encode(salt).decode()}"
        f"${base64.b64encode(client).decode()}:{base64.b64encode(server).decode()}"
    )
