"""A model of Postgres around ModelLog: terms, appends, reads, the ledger's tables, LISTEN.

A call travels, is served whole at one moment, and its answer travels back: a caller that dies or
loses its connection between the two never learns whether it was committed.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from cocoon.contracts.envelope import GENESIS_HASH, StoredEvent
from cocoon.eventlog.batch import Appended, Conflict, Prepared
from cocoon.eventlog.connection import StaleTerm
from cocoon.eventlog.read import Head
from cocoon.kernel.errors import CocoonError, Fatal, Unavailable
from services.billing.decide import Projection
from tests.sim.faults import Faults
from tests.sim.loop import SimLoop, current_process
from tests.support.model_log import ModelLog

T = TypeVar("T")
BASE_US = 1_790_000_000_000_000


@dataclass
class Tables:
    """One shard's ledger. The checks are those of 0001_ledger.sql."""

    applied: int = 0
    entries: list[tuple[int, int, int, str, int]] = field(default_factory=list)
    balances: dict[str, int] = field(default_factory=dict)
    settlements: dict[str, tuple[int, int, int, int]] = field(default_factory=dict)
    parked: list[tuple[int, str]] = field(default_factory=list)
    keys: set[tuple[int, int]] = field(default_factory=set)

    def write(self, projection: Projection) -> None:
        """Raises Fatal, having changed nothing, when a table's check or key refuses the batch."""
        changed = {}
        for account, change in projection.changes.items():
            changed[account] = self.balances.get(account, 0) + change
            if changed[account] < 0 and not account.startswith(("faucet", "escrow:")):
                raise Fatal(f"Postgres refused a statement (the balance of {account})")
        keys = [(row[1], row[2]) for row in projection.entries]
        jobs = [done.event.job_id for done in projection.settlements]
        if not self.keys.isdisjoint(keys) or not self.settlements.keys().isdisjoint(jobs):
            raise Fatal("Postgres refused a statement (a key is there already)")
        self.keys.update(keys)
        self.entries += projection.entries
        for account, amount in changed.items():
            if amount:
                self.balances[account] = amount
            else:
                self.balances.pop(account, None)
        for done in projection.settlements:
            event = done.event
            self.settlements[event.job_id] = (
                done.position, event.price_nanoton, event.provider_nanoton, event.fee_nanoton,
            )  # fmt: skip


class Database:
    """One Postgres server with both shards."""

    def __init__(self, loop: SimLoop, faults: Faults, start_s: float) -> None:
        self.loop, self.faults = loop, faults
        self.skew_us = 0
        self._start_s = start_s
        self.logs = {shard: ModelLog(shard, self.now_us) for shard in (0, 1)}
        self.tables = {1: Tables()}
        self.down = False
        self.connections: list[Connection] = []
        self.secrets: dict[bytes, None] = {}  # the matcher's, unrevealed
        self.appends = 0
        self.transactions = 0  # renewals of terms, in order
        self.renewals: set[str] = set()  # those that were committed

    def now_us(self) -> int:
        return BASE_US + int((self.loop.now_s - self._start_s) * 1_000_000) + self.skew_us

    def restart(self) -> None:
        """Every connection breaks; what was committed stays."""
        for conn in tuple(self.connections):
            conn.terminate()

    def notify(self, shard: int) -> None:
        """Tell the listeners that a log has grown; a NOTIFY may be late, and its loss is polled."""
        for conn in self.connections:
            for channel, callback in tuple(conn.listeners):
                if channel == f"log_{shard}" and not self.faults.happens("drop"):
                    delay_s = self.faults.random.uniform(0.0005, 0.003)
                    self.loop.at(delay_s, "notify", conn.notified, callback, process=conn.process)

    # ---- what is served ----

    def append(
        self, shard: int, role: str, term: int, batch: Sequence[Prepared]
    ) -> list[Appended | Conflict]:
        log = self.logs[shard]
        before = len(log.events)
        found = [log.append(prepared.item, role, term) for prepared in batch]
        self.appends += 1
        if len(log.events) > before:
            self.notify(shard)
        return found

    def head(self, shard: int) -> Head:
        events = self.logs[shard].events
        last = events[-1] if events else None
        return Head(len(events), *((last.hash, last.recorded_at_us) if last else (GENESIS_HASH, 0)))


class KeptSecrets:
    """The matcher's table of secrets: it outlives every process."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def load(self) -> list[bytes]:
        return await self._ask(lambda: list(self._database.secrets))

    async def keep(self, secret: bytes) -> None:
        await self._ask(lambda: self._database.secrets.setdefault(secret))

    async def forget(self, secret: bytes) -> None:
        await self._ask(lambda: self._database.secrets.pop(secret, None))

    async def _ask(self, serve: Callable[[], T]) -> T:
        conn = await connect(self._database, "matcher-secrets")
        try:
            return await conn.ask(serve)
        finally:
            conn.terminate()


class Connection:
    """What the services use of an asyncpg connection, and the calls that the log's SQL makes."""

    def __init__(self, database: Database) -> None:
        self.database, self.process = database, current_process()
        self.listeners: list[tuple[str, Callable[..., None]]] = []
        self._closed = False

    def is_closed(self) -> bool:
        return self._closed

    def terminate(self) -> None:
        self._closed = True
        if self in self.database.connections:
            self.database.connections.remove(self)

    async def close(self, **_: object) -> None:
        self.terminate()

    async def add_listener(self, channel: str, callback: Callable[..., None]) -> None:
        self.listeners.append((channel, callback))

    async def remove_listener(self, channel: str, callback: Callable[..., None]) -> None:
        self.listeners.remove((channel, callback))

    def notified(self, callback: Callable[..., None]) -> None:
        if not self._closed:
            callback()

    async def ask(self, serve: Callable[[], T]) -> T:
        """Have something done by the server. Raises Unavailable when the outcome is unknown."""
        database, faults = self.database, self.database.faults
        if self._closed or database.down:
            raise Unavailable("the connection to Postgres is closed")
        answer: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        lost = faults.happens("lost_request")
        delay_s = faults.random.uniform(0.0005, 0.004)
        if lost:
            self.terminate()
            await asyncio.sleep(delay_s)
            raise Unavailable("the connection to Postgres was lost")
        if faults.happens("delay", 0.2):
            delay_s += faults.random.uniform(0.05, 1.0)
        database.loop.at(delay_s, "commit", self._serve, serve, answer)
        return await answer

    def _serve(self, serve: Callable[[], T], answer: asyncio.Future[T]) -> None:
        database, faults = self.database, self.database.faults
        result: Any = None
        error: CocoonError | None = None
        if database.down:
            error = Unavailable("the connection to Postgres was lost")
        else:
            try:
                result = serve()
            except CocoonError as refused:
                error = refused
        if self._closed or faults.happens("lost_answer"):
            self.terminate()
            error = Unavailable("the connection to Postgres was lost")
        delay_s = faults.random.uniform(0.0005, 0.002)
        database.loop.at(delay_s, "answer", _answer, answer, result, error, process=self.process)

    async def look(self, read: Callable[[], T]) -> T:
        """A read: one moment, a little later. Raises Unavailable."""
        await asyncio.sleep(self.database.faults.random.uniform(0.0005, 0.003))
        if self.database.faults.happens("lost_answer"):
            self.terminate()
        if self._closed or self.database.down:
            raise Unavailable("the connection to Postgres is closed")
        return read()


def _answer(answer: asyncio.Future[Any], result: Any, error: CocoonError | None) -> None:
    if answer.done():
        return
    if error is None:
        answer.set_result(result)
    else:
        answer.set_exception(error)


class Pool:
    """What the services use of an asyncpg pool."""

    def __init__(self, database: Database) -> None:
        self.database = database

    async def acquire(self, timeout: float = 0.0) -> Connection:  # noqa: ASYNC109 - asyncpg's
        return await connect(self.database)

    async def release(self, connection: Connection) -> None:
        connection.terminate()


# ---- in the place of cocoon.eventlog's functions ----


async def connect(dsn: Any, name: str = "") -> Connection:
    """The DSN is the database itself here."""
    database: Database = dsn
    await asyncio.sleep(0.001)
    if database.down:
        raise Unavailable("the connection to Postgres was lost")
    connection = Connection(database)
    database.connections.append(connection)
    return connection


async def acquire_term(conn: Connection, shard: int, role: str) -> int:
    return await conn.ask(lambda: conn.database.logs[shard].acquire_term(role))


async def renew_term(
    conn: Connection, shard: int, role: str, term: int, begins: Callable[[str], None]
) -> int:
    database = conn.database
    database.transactions += 1
    transaction = str(database.transactions)

    def renewed() -> int:
        log = database.logs[shard]
        if conn.is_closed():
            raise Unavailable("the server rolls back what a lost client had not committed")
        if log.terms.get(role) != term:
            raise StaleTerm("another process owns this shard now; this one must stop")
        database.renewals.add(transaction)
        return log.acquire_term(role)

    begins(transaction)
    return await conn.ask(renewed)


async def transaction_status(conn: Connection, transaction: str) -> str:
    return await conn.look(
        lambda: "committed" if transaction in conn.database.renewals else "aborted"
    )


async def commands_there(conn: Connection, shard: int, command_ids: Sequence[str]) -> set[str]:
    return await conn.look(
        lambda: {c for c in command_ids if c in conn.database.logs[shard].commands}
    )


async def append_once(
    conn: Connection, shard: int, role: str, term: int, batch: Sequence[Prepared]
) -> list[Appended | Conflict]:
    return await conn.ask(lambda: conn.database.append(shard, role, term, batch))


async def head(conn: Connection, shard: int) -> Head:
    return await conn.look(lambda: conn.database.head(shard))


async def hash_at(conn: Connection, shard: int, position: int) -> bytes:
    events = conn.database.logs[shard].events
    return await conn.look(lambda: events[position - 1].hash if position else GENESIS_HASH)


async def read_batch(
    conn: Connection, shard: int, first: int, limit: int, prev_hash: bytes | None = None
) -> list[StoredEvent]:
    events = conn.database.logs[shard].events
    return await conn.look(lambda: events[first - 1 : first - 1 + limit])


async def stream_events(conn: Connection, shard: int, stream: str) -> list[StoredEvent]:
    return await conn.look(lambda: list(conn.database.logs[shard].stream(stream)))


async def checkpoint(conn: Connection, shard: int, consumer: str) -> int:
    return await conn.look(lambda: conn.database.tables[shard].applied)


async def first_position_since(conn: Connection, shard: int, recorded_at_us: int) -> int:
    return await conn.look(lambda: 1)


@contextlib.asynccontextmanager
async def acquired(pool: Pool, wait_s: float = 0.0) -> AsyncIterator[Connection]:
    connection = await pool.acquire()
    try:
        yield connection
    finally:
        await pool.release(connection)


@dataclass
class Transaction:
    """A projection's effects and its checkpoint, committed together on leaving."""

    conn: Staged
    position: int = 0

    async def checkpoint(self, consumer: str, position: int) -> None:
        self.position = position


@dataclass
class Staged:
    projections: list[Projection] = field(default_factory=list)
    parked: list[tuple[int, str]] = field(default_factory=list)


@contextlib.asynccontextmanager
async def transaction(pool: Pool, shard: int, role: str, term: int) -> AsyncIterator[Transaction]:
    conn = await pool.acquire()
    tx = Transaction(Staged())
    try:
        yield tx
        await conn.ask(lambda: _commit(pool.database, shard, role, term, tx))
    finally:
        conn.terminate()


def _commit(database: Database, shard: int, role: str, term: int, tx: Transaction) -> None:
    tables = database.tables[shard]
    if database.logs[shard].terms.get(role) != term:
        raise StaleTerm("another process owns this shard now; this one must stop")
    if tx.position and tx.position <= tables.applied:
        raise Fatal("the consumer has already passed this position")
    for projection in tx.conn.projections:
        tables.write(projection)
    tables.parked += tx.conn.parked
    tables.applied = tx.position or tables.applied


async def write(conn: Staged, shard: int, projection: Projection) -> None:
    conn.projections.append(projection)


async def park(
    conn: Staged, shard: int, consumer: str, position: int, stream: str, error_class: str
) -> None:
    conn.parked.append((position, stream))
