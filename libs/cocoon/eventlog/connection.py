"""Connections to the log, and Postgres errors put into the project's tree.

asyncpg prints a row's DETAIL in its messages, so none of its errors leaves this package.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Iterator
from typing import TYPE_CHECKING, TypeAlias

import asyncpg

from cocoon.kernel.errors import Fatal, Unavailable

if TYPE_CHECKING:
    from asyncpg.pool import PoolConnectionProxy

    Connection: TypeAlias = asyncpg.Connection[asyncpg.Record] | PoolConnectionProxy[asyncpg.Record]
    Pool: TypeAlias = asyncpg.Pool[asyncpg.Record]

STATEMENT_S = 5.0  # a service's statement; after it the connection counts as lost
PATIENT_STATEMENT_S = 60.0  # one of a replay, which reads much
CONNECT_TIMEOUT_S = 5.0
POOL_WAIT_S = 5.0
_STALE_TERM, _NOT_GRANTED = "CO001", "CO004"
# Connection lost, serialization or deadlock, out of resources, the operator intervened.
_PASSING_CLASSES = ("08", "40", "53", "57", "58")


class StaleTerm(Fatal):
    """Another process has taken over this role on this shard: stop, decide nothing more."""

    default_code = "stale_term"


class NotGranted(Fatal):
    """The role may not append this type of event, or follow the log under this name."""

    default_code = "not_granted"


@contextlib.contextmanager
def tree_errors() -> Iterator[None]:
    """Turn asyncpg's errors into StaleTerm, NotGranted, Unavailable (outcome unknown) or Fatal."""
    try:
        yield
    except asyncpg.PostgresError as error:
        state = error.sqlstate or ""
        if state == _STALE_TERM:
            raise StaleTerm("another process owns this shard now; this one must stop") from None
        if state == _NOT_GRANTED:
            # log.append's own sentence: a role, a type or consumer, a kind of stream
            raise NotGranted(
                f"the log refuses this: {error.args[0]} (see cocoon.contracts.catalogue)"
            ) from None
        if state[:2] in _PASSING_CLASSES:
            raise Unavailable(f"Postgres is not available (SQLSTATE {state})") from None
        raise Fatal(
            f"Postgres refused a statement ({type(error).__name__}, SQLSTATE {state})"
        ) from None
    except asyncpg.InterfaceError as error:
        # A closed connection, or arguments that do not encode: only the first may pass.
        if isinstance(error, asyncpg.exceptions.DataError):
            raise Fatal("Postgres cannot hold a value of this statement") from None
        raise Unavailable("the connection to Postgres is closed") from None
    except (OSError, TimeoutError, asyncpg.InternalClientError):
        raise Unavailable("the connection to Postgres was lost") from None


def _session(name: str, *, patient: bool) -> dict[str, str]:
    """What the server does with this session: one whose client has vanished gives its locks back.

    A machine that died says no goodbye, and a shard's head may be locked by its transaction.
    """
    settings = {
        "application_name": name,
        "tcp_keepalives_idle": "5",
        "tcp_keepalives_interval": "2",
        "tcp_keepalives_count": "3",
        "tcp_user_timeout": "10000",
    }
    if not patient:
        settings["idle_in_transaction_session_timeout"] = "5000"
    return settings


async def connect(
    dsn: str, name: str, *, patient: bool = False
) -> asyncpg.Connection[asyncpg.Record]:
    """Open one connection, named for pg_stat_activity. Raises Unavailable or Fatal.

    `patient`: for a replay, whose statements and pauses may be long.
    """
    with tree_errors():
        return await asyncpg.connect(
            dsn,
            timeout=CONNECT_TIMEOUT_S,
            command_timeout=PATIENT_STATEMENT_S if patient else STATEMENT_S,
            server_settings=_session(name, patient=patient),
        )


async def create_pool(dsn: str, name: str, size: int = 4, *, patient: bool = False) -> Pool:
    """Open a pool of up to `size` connections like those of `connect`. Raises the same."""
    with tree_errors():
        return await asyncpg.create_pool(
            dsn,
            min_size=1,
            max_size=size,
            timeout=CONNECT_TIMEOUT_S,
            command_timeout=PATIENT_STATEMENT_S if patient else STATEMENT_S,
            server_settings=_session(name, patient=patient),
            reset=_keep,
        )


async def _keep(_connection: object) -> None:
    """Nobody changes a pooled session (no SET, LISTEN, session lock), so nothing is reset: asyncpg
    would spend a round trip on each release.
    """


@contextlib.asynccontextmanager
async def acquired(pool: Pool, wait_s: float = POOL_WAIT_S) -> AsyncIterator[Connection]:
    """A connection of the pool for one block.

    Raises Unavailable when Postgres is away or all connections stay busy, Fatal for a refusal.
    """
    with tree_errors():
        async with pool.acquire(timeout=wait_s) as conn:
            with dropped_when_silent(conn):
                yield conn


@contextlib.contextmanager
def dropped_when_silent(conn: Connection) -> Iterator[None]:
    """A connection that gave no answer in time serves nobody else: its line may be dead.

    Then asyncpg has asked the server to cancel a statement, and does not know yet whether it did.
    """
    try:
        yield
    except (TimeoutError, Unavailable):
        if not conn.is_closed() and conn._protocol._is_cancelling():  # type: ignore[union-attr]
            conn.terminate()
        raise


@contextlib.asynccontextmanager
async def leadership(dsn: str, shard: int, role: str, poll_s: float = 0.25) -> AsyncIterator[None]:
    """Wait until this process is the only active one in its role, and hold that while inside.

    It only keeps the hot standbys quiet. What fences a zombie is the term: take one once inside.
    """
    import asyncio

    connection = await connect(dsn, f"cocoon-{role}-leader")
    try:
        while True:
            with tree_errors():
                if await connection.fetchval(
                    "SELECT pg_try_advisory_lock($1, hashtext($2))", shard, role
                ):
                    break
            await asyncio.sleep(poll_s)
        yield
    finally:
        connection.terminate()
