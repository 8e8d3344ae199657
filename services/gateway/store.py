"""The gateway's SQL: API keys by the hash of their text, and the channel that tells of changes."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from cocoon.eventlog.connection import connect, dropped_when_silent, tree_errors
from cocoon.kernel.errors import CocoonError, Conflict, NotFound, Unavailable
from cocoon.telemetry.logs import get_logger

if TYPE_CHECKING:
    from cocoon.eventlog.connection import Pool

log = get_logger("cocoon.gateway.store")
CHANNEL = "gateway_api_keys"
MAX_LISTED = 1000
LOOKUP_S = 1.0
_CHECK_S = 5.0
_RECONNECT_S = 0.5


class ApiKey(NamedTuple):
    """A live key: its public name and the account that pays."""

    api_key_id: str
    account_id: str


async def find_key(pool: Pool, secret_hash: bytes) -> ApiKey | None:
    """The live key with this hash, or None. Raises Unavailable, within two seconds at most."""
    with tree_errors():
        try:
            async with pool.acquire(timeout=LOOKUP_S) as connection:
                with dropped_when_silent(connection):
                    row = await connection.fetchrow(
                        "SELECT api_key_id, account_id FROM gateway.api_keys"
                        " WHERE secret_hash = $1 AND revoked_at IS NULL",
                        secret_hash,
                        timeout=LOOKUP_S,
                    )
        except TimeoutError:
            raise Unavailable(
                "API keys cannot be checked just now; try again", retry_after_s=1
            ) from None
    return None if row is None else ApiKey(row["api_key_id"], row["account_id"])


async def create_key(
    pool: Pool, api_key_id: str, secret_hash: bytes, account_id: str, label: str
) -> None:
    """Add a key; the same key again changes nothing. Raises Conflict if the name is taken."""
    with tree_errors():
        await pool.execute(
            "INSERT INTO gateway.api_keys (api_key_id, secret_hash, account_id, label)"
            " VALUES ($1, $2, $3, $4) ON CONFLICT DO NOTHING",
            api_key_id,
            secret_hash,
            account_id,
            label,
        )
        same = await pool.fetchval(
            "SELECT secret_hash = $2 AND account_id = $3 FROM gateway.api_keys"
            " WHERE api_key_id = $1",
            api_key_id,
            secret_hash,
            account_id,
        )
    if not same:
        raise Conflict("this API key or its id exists already; make a new one", code="key_exists")


async def list_keys(pool: Pool) -> list[dict[str, Any]]:
    """The newest keys without their hashes, at most 1000; times in Unix milliseconds."""
    with tree_errors():
        rows = await pool.fetch(
            "SELECT api_key_id, account_id, label,"
            " (extract(epoch FROM created_at) * 1000)::bigint AS created_ms,"
            " (extract(epoch FROM revoked_at) * 1000)::bigint AS revoked_ms"
            " FROM gateway.api_keys ORDER BY created_at DESC, api_key_id LIMIT $1",
            MAX_LISTED,
        )
    return [dict(row) for row in rows]


class Revoked(NamedTuple):
    """A revoked key's hash, since when (Unix milliseconds), and whether it was so before."""

    secret_hash: bytes
    revoked_ms: int
    before: bool


async def revoke_key(pool: Pool, api_key_id: str) -> Revoked:
    """Revoke a key; one that is revoked keeps its time. Raises NotFound."""
    with tree_errors():
        found = await pool.fetchrow(
            "WITH old AS (SELECT api_key_id, revoked_at FROM gateway.api_keys"
            " WHERE api_key_id = $1 FOR UPDATE)"
            " UPDATE gateway.api_keys k SET revoked_at = coalesce(old.revoked_at, now())"
            " FROM old WHERE k.api_key_id = old.api_key_id RETURNING k.secret_hash,"
            " (extract(epoch FROM k.revoked_at) * 1000)::bigint AS revoked_ms,"
            " old.revoked_at IS NOT NULL AS before",
            api_key_id,
        )
    if found is None:
        raise NotFound(f"there is no API key {api_key_id}; see `./cocoon keys list`")
    return Revoked(bytes(found["secret_hash"]), found["revoked_ms"], found["before"])


async def follow_changes(
    dsn: str, on_change: Callable[[bytes], None], on_state: Callable[[bool], None]
) -> None:
    """Report the hash of every changed key until cancelled; `on_state` tells whether it hears.

    While it does not hear, a cache of keys must not be used.
    """

    def heard(_connection: object, _pid: int, _channel: str, payload: object) -> None:
        with contextlib.suppress(ValueError):
            on_change(bytes.fromhex(str(payload)))

    while True:
        connection = None
        try:
            connection = await connect(dsn, "cocoon-gateway-keys")
            with tree_errors():
                await connection.add_listener(CHANNEL, heard)
                on_state(True)
                while True:
                    await asyncio.sleep(_CHECK_S)
                    await connection.execute("SELECT 1", timeout=_CHECK_S)
        except CocoonError as error:
            log.warning("key_changes_lost", exc_info=error)
        finally:
            on_state(False)
            if connection is not None:
                connection.terminate()
        await asyncio.sleep(_RECONNECT_S)
