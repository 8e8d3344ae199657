"""Following the log: every event once, in order, without a gap, whatever happens to the bus.

Postgres is read until nothing is left, then JetStream (or the relay, in its own process) from the
next position on. A gap, a broken hash, silence while the log grows: back to Postgres. JetStream
only makes it fast, so losing the bus costs time and never an event.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections import deque
from collections.abc import AsyncIterator
from types import TracebackType
from typing import TYPE_CHECKING

import asyncpg
import nats.errors

from cocoon.bus.streams import api
from cocoon.contracts import subjects
from cocoon.contracts.envelope import StoredEvent
from cocoon.eventlog.connection import connect, tree_errors
from cocoon.eventlog.feed import Feed, FeedReader
from cocoon.eventlog.read import checkpoint, hash_at, head, read_batch
from cocoon.kernel.errors import CocoonError, Transient
from cocoon.telemetry import metrics

if TYPE_CHECKING:
    from nats.aio.subscription import Subscription

    from cocoon.bus.client import BusClient

_NS = 1_000_000_000
_SILENCE_S = 0.5  # after this long without a message the head of the log is looked at
_DEAD_S = 4.0  # after this long without even a heartbeat the consumer is gone
_POLL_S = 0.25  # how long a lost LISTEN can delay an event
_RETRY_S = 1.0  # between attempts to follow JetStream
_JOIN_S = 1.0  # to begin or end following it: nothing is heard of the log meanwhile
_BUFFER = 65_536
_STATUS = b"NATS/1.0 "  # how a message of the server's own begins
_ACK_WORDS, _SEQUENCE = 9, 5  # $JS.ACK.<stream>.<consumer>.<deliveries>.<sequence>...


class _Live:
    """A push consumer that delivers EVENTS_<shard> from one position on into a bounded buffer."""

    def __init__(self, nc: BusClient, shard: int, own: dict[int, StoredEvent]) -> None:
        self._nc, self._stream, self._own = nc, subjects.events_stream(shard), own
        self._name = f"tail_{secrets.token_hex(8)}"
        self._buffer: deque[tuple[bytes, bytes, bytes]] = deque()  # reply, headers, data
        self._arrived = asyncio.Event()
        self._subscription: Subscription | None = None
        self._heard_s = asyncio.get_running_loop().time()
        self._made = False  # the consumer, as far as is known
        self.overflowed = False

    async def open(self, first: int) -> None:
        """Start delivery at a position. Raises Transient, NotFound or Fatal."""
        inbox = self._nc.new_inbox()
        try:
            self._subscription = await self._nc.subscribe_raw(inbox, self._on_message)
        except nats.errors.Error:
            raise Transient("the bus is not connected") from None
        config = {
            "name": self._name,
            "deliver_subject": inbox,
            "deliver_policy": "by_start_sequence",
            "opt_start_seq": first,
            "ack_policy": "none",
            "replay_policy": "instant",
            "flow_control": True,
            "idle_heartbeat": _NS,
            "inactive_threshold": 10 * _NS,
            "mem_storage": True,
            "num_replicas": 1,
        }
        await api(
            self._nc,
            f"CONSUMER.CREATE.{self._stream}.{self._name}",
            {"stream_name": self._stream, "config": config},
        )
        self._made = True

    async def take(self, limit: int, timeout_s: float) -> list[StoredEvent]:
        """Up to `limit` events; none after `timeout_s` without any, fewer before a bad one."""
        if not self._buffer:
            self._arrived.clear()
            # not wait_for: until Python 3.12 it can swallow a cancellation
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(timeout_s):
                    await self._arrived.wait()
        taken: list[StoredEvent] = []
        while self._buffer and len(taken) < limit:
            reply, headers, data = self._buffer.popleft()
            if headers.startswith(_STATUS):
                await self._answer(reply, headers)
                continue
            try:
                taken.append(self._event(reply, headers, data))
            except (KeyError, ValueError):
                self.overflowed = True
                break
        return taken

    def _event(self, reply: bytes, headers: bytes, data: bytes) -> StoredEvent:
        """The event of a message: one that this process has appended is known by its hash."""
        words = reply.split(b".")
        own = self._own.pop(int(words[_SEQUENCE]), None) if len(words) == _ACK_WORDS else None
        if own is not None and b"\r\nce-hash: %b\r\n" % own.hash.hex().encode() in headers:
            return own
        return StoredEvent.from_message(self._nc.read_headers(headers), data)

    def silent_for_s(self) -> float:
        return asyncio.get_running_loop().time() - self._heard_s

    async def close(self) -> None:
        with contextlib.suppress(nats.errors.Error, OSError):
            if self._subscription is not None:
                await self._subscription.unsubscribe()
        # The server drops it by itself after ten seconds without interest.
        if self._made and self._nc.is_connected:
            with contextlib.suppress(CocoonError, TimeoutError):
                async with asyncio.timeout(_JOIN_S):
                    await api(self._nc, f"CONSUMER.DELETE.{self._stream}.{self._name}")

    def _on_message(self, reply: bytes, headers: bytes, data: bytes) -> None:
        self._heard_s = asyncio.get_running_loop().time()
        if len(self._buffer) >= _BUFFER:
            self.overflowed = True
            return
        self._buffer.append((reply, headers, data))
        self._arrived.set()

    async def _answer(self, reply: bytes, headers: bytes) -> None:
        # Flow control is answered when the buffer has been read up to it: that is what bounds it.
        told = self._nc.read_headers(headers).get("Nats-Consumer-Stalled", "")
        subject = reply.decode("utf-8", "replace") or told
        if subject:
            with contextlib.suppress(nats.errors.Error):
                await self._nc.publish(subject, b"")


class Tail:
    """An async iterator of non-empty batches of events; use it as an async context manager.

    It starts at `from_position`, or after the checkpoint of `consumer`, or at 1. New events come
    from the bus, from this process's own relay (a Feed), or else by LISTEN. `own` are events by
    position that this process has appended: they are not read again. Raises Fatal when the log
    itself is broken; waits out everything else.
    """

    def __init__(
        self,
        dsn: str,
        source: BusClient | Feed | None,
        shard: int,
        *,
        consumer: str | None = None,
        from_position: int | None = None,
        batch: int = 512,
        own: dict[int, StoredEvent] | None = None,
    ) -> None:
        self._dsn, self._source, self._shard = dsn, source, shard
        self._consumer, self._batch, self._own = consumer, batch, {} if own is None else own
        self._next = from_position or 0
        self._hash: bytes | None = None
        self._conn: asyncpg.Connection[asyncpg.Record] | None = None
        self._live: _Live | FeedReader | None = None
        self._retry_live_s = 0.0
        self._grown = asyncio.Event()
        self._listening = False

    @property
    def position(self) -> int:
        """The last position delivered (before the first batch: one less than the start)."""
        return max(self._next - 1, 0)

    @property
    def live(self) -> bool:
        """Whether events come as they happen, from JetStream or the relay."""
        return self._live is not None

    async def __aenter__(self) -> Tail:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    def __aiter__(self) -> AsyncIterator[list[StoredEvent]]:
        return self

    async def __anext__(self) -> list[StoredEvent]:
        while True:
            try:
                events = await (self._from_bus() if self._live else self._from_log())
            except Transient:
                self._count_resubscription()
                await self._drop_connection()
                await asyncio.sleep(_POLL_S)
                continue
            if events:
                self._next, self._hash = events[-1].position + 1, events[-1].hash
                return events

    async def gather(self, wait_s: float, limit: int) -> list[StoredEvent]:
        """Up to `limit` events more that come within `wait_s`, maybe none: for a consumer that
        writes many at the price of one.
        """
        if self._live is None:
            return []
        events = await self._take(self._live, wait_s, limit)
        if events:
            self._next, self._hash = events[-1].position + 1, events[-1].hash
        return events

    async def close(self) -> None:
        await self._leave_bus()
        await self._drop_connection()

    # ---- Postgres ----

    async def _from_log(self) -> list[StoredEvent]:
        conn = await self._connection()
        if self._next == 0:
            done = await checkpoint(conn, self._shard, self._consumer) if self._consumer else 0
            self._next = done + 1
        if self._hash is None and self._next > 1:
            self._hash = await hash_at(conn, self._shard, self._next - 1)
        await self._listen(conn)
        self._grown.clear()
        events = await read_batch(conn, self._shard, self._next, self._batch, self._hash)
        if not events and not await self._join_bus():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_POLL_S):
                    await self._grown.wait()
        return events

    async def _connection(self) -> asyncpg.Connection[asyncpg.Record]:
        if self._conn is None or self._conn.is_closed():
            self._conn = await connect(self._dsn, f"cocoon-tail-{self._shard}")
            self._listening = False
        return self._conn

    async def _listen(self, conn: asyncpg.Connection[asyncpg.Record]) -> None:
        if not self._listening:
            with tree_errors():
                await conn.add_listener(f"log_{self._shard}", self._on_notify)
            self._listening = True

    async def _unlisten(self) -> None:
        # While events come anyway, a wake-up for every commit would only cost time.
        if self._listening and self._conn is not None:
            self._listening = False
            with tree_errors():
                await self._conn.remove_listener(f"log_{self._shard}", self._on_notify)

    def _on_notify(self, *_: object) -> None:
        self._grown.set()

    async def _drop_connection(self) -> None:
        conn, self._conn = self._conn, None
        if conn is not None and not conn.is_closed():
            conn.terminate()
            await asyncio.sleep(0)

    # ---- as they happen ----

    async def _join_bus(self) -> bool:
        now_s = asyncio.get_running_loop().time()
        source = self._source
        if source is None or not source.is_connected or now_s < self._retry_live_s:
            return False
        live = source.reader() if isinstance(source, Feed) else self._from_jetstream(source)
        try:
            async with asyncio.timeout(_JOIN_S):
                await live.open(self._next)
        except (CocoonError, TimeoutError):
            await live.close()
            self._retry_live_s = asyncio.get_running_loop().time() + _RETRY_S
            return False
        self._live = live
        await self._unlisten()
        return True

    def _from_jetstream(self, nc: BusClient) -> _Live:
        return _Live(nc, self._shard, self._own)

    async def _leave_bus(self) -> None:
        live, self._live = self._live, None
        self._retry_live_s = asyncio.get_running_loop().time() + _RETRY_S
        if live is not None:
            await live.close()

    async def _from_bus(self) -> list[StoredEvent]:
        live = self._live
        assert live is not None  # noqa: S101 - the caller has looked
        events = await self._take(live, _SILENCE_S, self._batch)
        nothing = not events and self._live is live
        if nothing and (live.silent_for_s() > _DEAD_S or await self._head_is_ahead()):
            self._count_resubscription()
            await self._leave_bus()
        return events

    async def _take(self, live: _Live | FeedReader, wait_s: float, limit: int) -> list[StoredEvent]:
        """The next events from the bus. Leaves it at a gap: the log knows what is missing."""
        events: list[StoredEvent] = []
        position, prev_hash = self._next, self._hash
        for event in await live.take(limit, wait_s):
            if event.position < position:
                continue  # a stream that lost its end to a crash is filled up again
            if event.position != position or prev_hash not in (None, event.prev_hash):
                live.overflowed = True
                break
            events.append(event)
            position, prev_hash = position + 1, event.hash
        if live.overflowed:
            self._count_resubscription()
            await self._leave_bus()
        return events

    def _count_resubscription(self) -> None:
        metrics.TAIL_RESUBSCRIPTIONS.inc(self._shard, self._consumer or "memory")

    async def _head_is_ahead(self) -> bool:
        conn = await self._connection()
        return (await head(conn, self._shard)).position >= self._next
