"""Writing the log: group commit for many deciders, and one transaction for a projection.

An append whose outcome is unknown is repeated with the same command ids before anything else is
sent, so an item is never written twice and never forgotten. A stale term stops the process.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import asyncpg

from cocoon.contracts.envelope import AppendItem
from cocoon.eventlog.batch import (
    APPEND_SQL,
    Appended,
    Conflict,
    Prepared,
    Repeated,
    call_arguments,
    outcomes,
    prepare,
    repeated,
)
from cocoon.eventlog.connection import (
    StaleTerm,
    acquired,
    connect,
    dropped_when_silent,
    tree_errors,
)
from cocoon.eventlog.read import read_batch
from cocoon.kernel.errors import CocoonError, Fatal, Transient, Unavailable
from cocoon.telemetry import metrics

if TYPE_CHECKING:
    from cocoon.contracts.envelope import StoredEvent
    from cocoon.eventlog.connection import Connection, Pool

__all__ = ["Appended", "Conflict", "LogAppender", "LogTransaction", "StaleTerm", "transaction"]

_log = logging.getLogger("cocoon.eventlog")
_STREAMS_ARGUMENT = 10
_RECENT = 1024
_FIRST_RETRY_S, _LONGEST_RETRY_S = 0.02, 1.0


async def append_once(
    conn: Connection, shard: int, role: str, term: int, batch: Sequence[Prepared]
) -> list[Appended | Conflict]:
    """One call of log.append in whatever transaction `conn` is in; each command named once.

    Raises StaleTerm, Unavailable (the outcome is unknown) or Fatal.
    """
    arguments = call_arguments(shard, role, term, batch)
    with tree_errors():
        row = await conn.fetchrow(APPEND_SQL, *arguments)
    if row is None:
        raise Fatal("log.append gave no answer")
    result: list[Appended | Conflict] = []
    for outcome in outcomes(shard, batch, arguments[_STREAMS_ARGUMENT], dict(row)):
        if isinstance(outcome, Repeated):
            count = outcome.last - outcome.first + 1
            events = await read_batch(conn, shard, outcome.first, count) if count else []
            result.append(repeated(events))
        else:
            result.append(outcome)
    return result


async def acquire_term(conn: Connection, shard: int, role: str) -> int:
    """Become the shard's one writer in this role; every older term is refused from now on."""
    with tree_errors():
        return int(await conn.fetchval("SELECT log.acquire_term($1, $2)", shard, role))


async def renew_term(
    conn: Connection,
    shard: int,
    role: str,
    term: int,
    begins: Callable[[str], None] = lambda _: None,
) -> int:
    """Raise one's own term: what was sent under it and has not come in never will.

    `begins` hears the transaction's id before the commit, whose outcome may stay unknown: ask
    `transaction_status` then. Raises StaleTerm when another process has taken over.
    """
    with tree_errors():
        async with conn.transaction():
            renewed = await acquire_term(conn, shard, role)
            if renewed != term + 1:
                raise StaleTerm("another process owns this shard now; this one must stop")
            begins(await conn.fetchval("SELECT pg_current_xact_id()::text"))
            return renewed


async def transaction_status(conn: Connection, transaction_id: str) -> str | None:
    """What became of it: "committed", "aborted" or "in progress"; None if that is forgotten."""
    with tree_errors():
        status: str | None = await conn.fetchval(
            "SELECT pg_xact_status($1::text::xid8)", transaction_id
        )
    return status


async def commands_there(conn: Connection, shard: int, command_ids: Sequence[str]) -> set[str]:
    """Those of the commands that the log has."""
    sql = "SELECT command_id FROM log.commands WHERE shard = $1 AND command_id = ANY($2)"
    with tree_errors():
        return {row["command_id"] for row in await conn.fetch(sql, shard, command_ids)}


@dataclass(slots=True, eq=False)
class _Waiting:
    prepared: Prepared
    futures: list[asyncio.Future[Appended | Conflict]]
    since_s: float  # of the loop's clock

    def resolve(self, outcome: Appended | Conflict) -> None:
        for index, future in enumerate(self.futures):
            if not future.done():
                if index > 0 and isinstance(outcome, Appended):
                    outcome = replace(outcome, repeated=True)
                future.set_result(outcome)

    def fail(self, error: CocoonError) -> None:
        for future in self.futures:
            if not future.done():
                future.set_exception(error)


class LogAppender:
    """Appends for one role on one shard, over one connection.

    Whatever was queued while a call was being committed goes into the next call. A call costs more
    than many items: with `gather_s` each waits that long for more of them, with `crowded_s` only
    one that follows another within twice that time. With
    `wait_limit_s` an item that could not be written for so long is refused: what it was decided on
    may hold no more.
    """

    def __init__(
        self,
        dsn: str,
        shard: int,
        role: str,
        *,
        queue_limit: int = 8192,
        batch_limit: int = 256,
        gather_s: float = 0.0,
        crowded_s: float = 0.0,
        wait_limit_s: float | None = None,
    ) -> None:
        self._dsn, self._shard, self._role = dsn, shard, role
        self._queue_limit, self._batch_limit = queue_limit, batch_limit
        self._gather_s, self._crowded_s = gather_s, crowded_s
        self._wait_limit_s = wait_limit_s
        self._ended_s = float("-inf")  # the last call's end
        self.recent: dict[int, StoredEvent] = {}  # appended, by position: a Tail takes them out
        self._queue: deque[_Waiting] = deque()
        self._by_command: dict[str, _Waiting] = {}
        self._wake = asyncio.Event()
        self._conn: asyncpg.Connection[asyncpg.Record] | None = None
        self._term = 0
        self._renewing: str | None = None  # the transaction of a renewal of unknown outcome
        self._task: asyncio.Task[None] | None = None
        self._closed: CocoonError | None = None

    @property
    def term(self) -> int:
        """The term of this writer, 0 before `acquire_term`."""
        return self._term

    @property
    def queued(self) -> int:
        """Items that wait for a call."""
        return len(self._queue)

    async def acquire_term(self) -> int:
        """Become the shard's writer; call it once, before the first append.

        Raises Unavailable or Fatal.
        """
        if self._task is not None:
            raise Fatal("this appender has its term; make another one to take over again")
        conn = await self._connection()
        self._term = await acquire_term(conn, self._shard, self._role)
        self._task = asyncio.create_task(self._run(), name=f"append-{self._shard}-{self._role}")
        return self._term

    async def append(self, item: AppendItem) -> Appended | Conflict:
        """Append one item; returns after the commit, whatever happens to the connection meanwhile.

        Raises Unavailable at once when the queue is full or later when the item waited too long,
        StaleTerm when another process has taken over, Fatal when Postgres refuses the item,
        ValueError when it is too large.
        """
        if self._closed is not None:
            raise self._closed
        if self._task is None:
            raise Fatal("take a term before the first append")
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Appended | Conflict] = loop.create_future()
        waiting = self._by_command.get(item.command_id)
        if waiting is not None:
            waiting.futures.append(future)
            return await future
        if len(self._queue) >= self._queue_limit:
            raise Unavailable("the log's queue is full; try again shortly", code="log_queue_full")
        waiting = _Waiting(prepare(item), [future], loop.time())
        self._by_command[item.command_id] = waiting
        self._queue.append(waiting)
        self._wake.set()
        return await future

    async def close(self) -> None:
        """Finish the call that is under way and refuse what still waits."""
        self._closed = self._closed or Unavailable("the log's writer is closed")
        self._wake.set()
        if self._task is not None:
            await asyncio.gather(self._task, return_exceptions=True)
        self._refuse_waiting()
        await self._drop_connection()

    # ---- inside ----

    async def _run(self) -> None:
        try:
            await self._work()
        except Exception as error:  # noqa: BLE001 - whoever waits must hear of it, whatever it is
            _log.error(
                "the log's writer has failed",
                extra={"shard": self._shard, "role": self._role, "kind": type(error).__name__},
            )
            self._closed = Fatal("the log's writer has failed; restart this process")
        finally:
            self._refuse_waiting()

    async def _work(self) -> None:
        while self._closed is None:
            if not self._queue:
                self._wake.clear()
                await self._wake.wait()
                continue
            wait_s = self._wait_s()
            if wait_s and len(self._queue) < self._batch_limit:
                await asyncio.sleep(wait_s)
                if self._closed is not None:
                    break
            count = min(len(self._queue), self._batch_limit)
            batch = [self._queue.popleft() for _ in range(count)]
            await self._commit(batch)
            self._ended_s = asyncio.get_running_loop().time()

    def _wait_s(self) -> float:
        """How long the next call waits for more items."""
        since_s = asyncio.get_running_loop().time() - self._ended_s
        return self._crowded_s if since_s < 2 * self._crowded_s else self._gather_s

    async def _commit(self, batch: list[_Waiting], *, sent: bool = False) -> None:
        delay_s = _FIRST_RETRY_S
        while True:
            try:
                conn = await self._connection()
                batch = await self._without_late(conn, batch, sent)
                if not batch:
                    return
                sent = True
                began_s = time.perf_counter()
                results = await append_once(
                    conn, self._shard, self._role, self._term, [w.prepared for w in batch]
                )
                metrics.APPEND_SECONDS.observe(time.perf_counter() - began_s, self._role)
                metrics.APPEND_BATCH.observe(len(batch), self._role)
            except StaleTerm as error:
                self._closed = error
                self._fail(batch, error)
                return
            except Transient as error:
                await self._drop_connection()
                if self._closed is not None:
                    self._fail(batch, error)
                    return
                await asyncio.sleep(delay_s)
                delay_s = min(delay_s * 2, _LONGEST_RETRY_S)
                continue
            except CocoonError as error:
                # One item that Postgres refuses must not take the others with it.
                if len(batch) == 1:
                    self._fail(batch, error)
                    return
                for waiting in batch:
                    await self._commit([waiting], sent=True)
                return
            for waiting, outcome in zip(batch, results, strict=True):
                if not isinstance(outcome, Appended):
                    metrics.APPEND_CONFLICTS.inc(self._role)
                elif not outcome.repeated:
                    self._remember(outcome.events)
                self._forget(waiting)
                waiting.resolve(outcome)
            return

    def _remember(self, events: Sequence[StoredEvent]) -> None:
        for event in events:
            self.recent[event.position] = event
        while len(self.recent) > _RECENT:
            del self.recent[next(iter(self.recent))]

    async def _without_late(
        self, conn: Connection, batch: list[_Waiting], sent: bool
    ) -> list[_Waiting]:
        """The batch without what waited too long, which is refused unless the log has it.

        What was `sent` may still come in: the term is renewed before anybody looks.
        """
        limit_s, now_s = self._wait_limit_s, asyncio.get_running_loop().time()
        late = {w for w in batch if limit_s is not None and now_s - w.since_s > limit_s}
        if late and sent:
            await self._renew_term(conn)
            names = [w.prepared.item.command_id for w in late]
            there = await commands_there(conn, self._shard, names)
            late = {w for w in late if w.prepared.item.command_id not in there}
        if late:
            error = Unavailable("the log was away for too long; try again", code="log_away")
            self._fail(late, error)
        return [w for w in batch if w not in late]

    async def _renew_term(self, conn: Connection) -> None:
        """One whose commit was not answered may be in: then the term is this one's, and raised."""
        if self._renewing is not None:
            status = await transaction_status(conn, self._renewing)
            if status == "in progress":
                raise Unavailable("the term's renewal is still being written")
            self._renewing = None
            if status == "committed":
                self._term += 1
                return
        self._term = await renew_term(
            conn, self._shard, self._role, self._term, self._renewal_begins
        )
        self._renewing = None

    def _renewal_begins(self, transaction_id: str) -> None:
        self._renewing = transaction_id

    def _forget(self, waiting: _Waiting) -> None:
        """Before it is told: whoever appends the same command from now on asks Postgres anew."""
        del self._by_command[waiting.prepared.item.command_id]

    def _fail(self, batch: Iterable[_Waiting], error: CocoonError) -> None:
        for waiting in batch:
            self._forget(waiting)
            waiting.fail(error)

    async def _connection(self) -> asyncpg.Connection[asyncpg.Record]:
        if self._conn is None or self._conn.is_closed():
            self._conn = await connect(self._dsn, f"cocoon-append-{self._role}-{self._shard}")
        return self._conn

    async def _drop_connection(self) -> None:
        conn, self._conn = self._conn, None
        if conn is not None and not conn.is_closed():
            conn.terminate()
            await asyncio.sleep(0)  # let the transport close before the loop may end

    def _refuse_waiting(self) -> None:
        self._closed = self._closed or Unavailable("the log's writer is closed")
        self._queue.clear()
        self._fail(list(self._by_command.values()), self._closed)


@dataclass(frozen=True, slots=True)
class LogTransaction:
    """A projection's effects, its appends and its checkpoint: all committed, or none."""

    conn: Connection
    shard: int
    role: str
    term: int

    async def append(self, items: Sequence[AppendItem]) -> list[Appended | Conflict]:
        """Append in this transaction; a conflict leaves the transaction usable.

        It holds the shard's head until the commit: do it last, with the checkpoint.
        """
        if not items:
            return []
        batch = [prepare(item) for item in items]
        return await append_once(self.conn, self.shard, self.role, self.term, batch)

    async def checkpoint(self, consumer: str, position: int) -> None:
        """Record that everything up to `position` has its effects in this transaction.

        Raises StaleTerm, or Fatal if the consumer was further already (a second instance).
        """
        with tree_errors():
            await self.conn.execute(
                "SELECT log.save_checkpoint($1, $2, $3, $4, $5)",
                self.shard, self.role, self.term, consumer, position,
            )  # fmt: skip


@contextlib.asynccontextmanager
async def transaction(
    conn_or_pool: Connection | Pool, shard: int, role: str, term: int
) -> AsyncIterator[LogTransaction]:
    """Open one transaction on a connection or a pool; commit on leaving, roll back on an error.

    asyncpg's errors inside become StaleTerm, Unavailable or Fatal; an Unavailable at the end means
    that the outcome is unknown: read the checkpoint before going on.
    """
    with tree_errors():
        if isinstance(conn_or_pool, asyncpg.Pool):
            async with acquired(conn_or_pool) as conn, conn.transaction():
                with dropped_when_silent(conn):  # else its rollback would wait as long again
                    yield LogTransaction(conn, shard, role, term)
        else:
            async with conn_or_pool.transaction():
                yield LogTransaction(conn_or_pool, shard, role, term)
