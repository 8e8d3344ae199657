"""From the log to JetStream: position p becomes sequence p, exactly once, whatever crashes.

The broker refuses a message unless p - 1 is its last sequence, so duplicates, gaps and racing
relays cannot happen; and unless the event before it is its last message, so the acknowledgement of
a batch's last event speaks for all of it. A refusal or a silence rewinds to the broker's last
sequence. The relay never changes the log, and halts when the stream holds what the log does not.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import logging
import secrets
from collections.abc import Sequence
from typing import TYPE_CHECKING

import asyncpg
import nats.errors

from cocoon.bus.streams import EVENTS_MAX, EVENTS_WINDOW_S, api, create_events_stream
from cocoon.contracts import subjects
from cocoon.contracts.envelope import StoredEvent
from cocoon.eventlog.connection import connect, tree_errors
from cocoon.eventlog.feed import Feed
from cocoon.eventlog.read import first_position_since, hash_at, head, read_batch
from cocoon.kernel.clock import Clock, SystemClock
from cocoon.kernel.errors import Fatal, LogCorrupt, NotFound, Transient
from cocoon.telemetry import metrics

if TYPE_CHECKING:
    from nats.aio.msg import Msg

    from cocoon.bus.client import BusClient

_log = logging.getLogger("cocoon.relay")
_POLL_S = 0.25  # how long a lost LISTEN can delay an event
_ACK_TIMEOUT_S = 2.0
_FIRST_RETRY_S, _LONGEST_RETRY_S = 0.02, 1.0
_BATCH = 512
_GATHER_S = 0.005  # a commit seldom comes alone, and nobody waits for the copy
_LOOK_S = 5.0  # how often a relay with nothing to send looks whether the stream is whole
_HASH = "ce-hash: "


class Relay:
    """Publishes the logs of `shards`; `run` ends only by cancellation or a Fatal error."""

    def __init__(
        self,
        dsn: str,
        nc: BusClient,
        shards: Sequence[int],
        *,
        window: int = 1024,
        replicas: int = 1,
        clock: Clock | None = None,
    ) -> None:
        self._shards = [
            _ShardRelay(dsn, nc, shard, window, replicas, clock or SystemClock())
            for shard in shards
        ]

    def feed(self, shard: int) -> Feed:
        """What the relay reads of one of its shards, for a Tail in this process."""
        return next(relay.feed for relay in self._shards if relay.shard == shard)

    @property
    def positions(self) -> dict[int, int]:
        """The last position of each shard that the stream has acknowledged."""
        return {relay.shard: relay.acked for relay in self._shards}

    async def run(self) -> None:
        """Relay until cancelled. Raises Fatal: page someone, the stream and the log disagree."""
        async with contextlib.AsyncExitStack() as stack:
            tasks = [asyncio.create_task(relay.run()) for relay in self._shards]
            stack.push_async_callback(_cancel_all, tasks)
            await asyncio.gather(*tasks)


def _is_foreign(headers: str) -> bool:
    """Whether no relay wrote this: an acknowledgement, or a message that JetStream fetched."""
    return _HASH not in headers or "Nats-Stream:" in headers


async def _cancel_all(tasks: Sequence[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


class _ShardRelay:
    def __init__(
        self, dsn: str, nc: BusClient, shard: int, window: int, replicas: int, clock: Clock
    ) -> None:
        self.shard = shard
        self.acked = 0
        self.feed = Feed()
        self._dsn, self._nc, self._window = dsn, nc, window
        self._replicas, self._clock = replicas, clock
        self._stream = subjects.events_stream(shard)
        self._generation = ""  # acks of an earlier attempt are recognised and ignored
        self._refused_at = 0  # the first position that the broker refused, 0 for none
        self._more = True  # whether the log may hold events that were not sent
        self._silent_s = 0.0
        self._idle_s = 0.0
        self._progress = asyncio.Event()

    async def run(self) -> None:
        delay_s = _FIRST_RETRY_S
        inbox = self._nc.new_inbox()
        subscription = await self._nc.subscribe_direct(f"{inbox}.*.*", self._on_ack)
        try:
            while True:
                before = self.acked
                try:
                    await self._follow(inbox)
                except LogCorrupt:
                    metrics.RELAY_HALTED.set(1, self.shard)
                    raise
                except (Transient, nats.errors.Error) as error:
                    metrics.RELAY_REWINDS.inc(self.shard)
                    _log.info(
                        "relay rewinds", extra={"shard": self.shard, "kind": type(error).__name__}
                    )
                longer_s = min(delay_s * 2, _LONGEST_RETRY_S)
                delay_s = _FIRST_RETRY_S if self.acked > before else longer_s
                await asyncio.sleep(delay_s)
        finally:
            with contextlib.suppress(nats.errors.Error):
                await subscription.unsubscribe()

    async def _follow(self, inbox: str) -> None:
        """Publish from the stream's end on, until something goes wrong (Transient) or for ever."""
        conn = await connect(self._dsn, f"cocoon-relay-{self.shard}")
        try:
            with tree_errors():
                await conn.add_listener(f"log_{self.shard}", self._on_notify)
            last = await self._align(conn)
            metrics.RELAY_HALTED.set(0, self.shard)
            prev_hash = await hash_at(conn, self.shard, last)
            self.acked, self._refused_at, self._silent_s = last, 0, 0.0
            self._generation = secrets.token_hex(4)
            sent, self._more = last, True
            self.feed.is_connected = True
            while True:
                self._progress.clear()
                room = min(_BATCH, self._window - (sent - self.acked))
                if room and self._more:
                    self._more = False
                    events = await read_batch(conn, self.shard, sent + 1, room, prev_hash)
                    if events:
                        self.feed.push(events)
                        await self._publish(events, inbox)
                        sent, prev_hash = events[-1].position, events[-1].hash
                        self._more = self._more or len(events) == room
                        continue
                await self._wait(waits_for_ack=sent > self.acked)
                if self._idle_s > _LOOK_S:
                    self._idle_s = 0.0
                    await self._look()
                if self._more:
                    await asyncio.sleep(_GATHER_S)
                if self._refused_at:
                    raise Transient("the broker refused a position")
        finally:
            self._generation, self.feed.is_connected = "", False
            conn.terminate()
            await asyncio.sleep(0)

    async def _look(self) -> None:
        """Raises Transient when the stream has gone or lost its end: it is filled again."""
        try:
            info = await api(self._nc, f"STREAM.INFO.{self._stream}")
        except NotFound:
            raise Transient("the stream is gone") from None
        if int(info["state"]["last_seq"]) < self.acked:
            raise Transient("the stream has lost its end")

    async def _align(self, conn: asyncpg.Connection[asyncpg.Record]) -> int:
        """Return the stream's last sequence, having made sure that it is a prefix of the log."""
        try:
            info = await api(self._nc, f"STREAM.INFO.{self._stream}")
        except NotFound:
            return await self._create(conn)
        state = info["state"]
        last = int(state["last_seq"])
        if last == 0:
            # Declared anew: if the log is older than the stream's window, begin inside the window.
            if await self._window_start(conn) == 1:
                return 0
            await api(self._nc, f"STREAM.DELETE.{self._stream}")
            return await self._create(conn)
        headers = await self._headers_at(last) if int(state["messages"]) else None
        # What stands where a position was refused: later ones may have gone in behind it.
        there = self._refused_at if 0 < self._refused_at < last else 0
        found = [headers, await self._headers_at(there) if there else None]
        if any(text is not None and _is_foreign(text) for text in found):
            # Not a relay's: whoever may ask JetStream for anything names any subject for the
            # answer. The stream is a copy, so it is made anew.
            _log.error("foreign message in the stream", extra={"shard": self.shard})
            await api(self._nc, f"STREAM.DELETE.{self._stream}")
            return await self._create(conn)
        if last > (await head(conn, self.shard)).position:
            raise LogCorrupt(
                f"{self._stream} holds sequence {last}, which the log does not; the database was"
                " set back: restore it, or delete the stream once the loss is understood"
            )
        if headers is not None:
            wanted = (await hash_at(conn, self.shard, last)).hex()
            if f"{_HASH}{wanted}" not in headers:
                raise LogCorrupt(f"{self._stream} and the log differ at position {last}")
        return last

    async def _headers_at(self, position: int) -> str | None:
        """The message's headers, or None if it has expired meanwhile."""
        try:
            found = await api(self._nc, f"STREAM.MSG.GET.{self._stream}", {"seq": position})
        except (NotFound, Fatal):
            return None
        return base64.b64decode(found["message"].get("hdrs", "")).decode("utf-8", "replace")

    async def _create(self, conn: asyncpg.Connection[asyncpg.Record]) -> int:
        first = await self._window_start(conn)
        await create_events_stream(self._nc, self.shard, first, self._replicas)
        return first - 1

    async def _window_start(self, conn: asyncpg.Connection[asyncpg.Record]) -> int:
        since_us = (self._clock.now_ms() - EVENTS_WINDOW_S * 1000) * 1000
        newest = (await head(conn, self.shard)).position - EVENTS_MAX + 1
        return max(newest, await first_position_since(conn, self.shard, since_us))

    async def _publish(self, events: Sequence[StoredEvent], inbox: str) -> None:
        """Each names its predecessor's position and id, so the last one's ack speaks for all."""
        before = ""
        for event in events:
            headers = event.to_headers()
            headers["Nats-Expected-Last-Sequence"] = str(event.position - 1)
            if before:
                headers["Nats-Expected-Last-Msg-Id"] = before
            headers["Nats-Msg-Id"] = before = event.event_id
            last = event is events[-1]
            await self._nc.publish(
                subjects.event(self.shard, event.stream, event.type),
                event.data,
                reply=f"{inbox}.{self._generation}.{event.position}" if last else "",
                headers=headers,
            )

    def _on_ack(self, message: Msg) -> None:
        _, generation, position_text = message.subject.rsplit(".", 2)
        if generation != self._generation:
            return
        position = int(position_text)
        try:
            answer = json.loads(message.data)
            accepted = "error" not in answer and int(answer["seq"]) == position
        except (ValueError, KeyError):
            accepted = False  # for example "no responders": JetStream is away
        if accepted and not self._refused_at:
            self.acked = max(self.acked, position)
        elif not accepted:
            self._refused_at = min(position, self._refused_at or position)
        self._progress.set()

    def _on_notify(self, *_: object) -> None:
        self._more = True
        self._progress.set()

    async def _wait(self, *, waits_for_ack: bool) -> None:
        """Wait for an ack or for more of the log; look at the log again after `_POLL_S`."""
        now_s = asyncio.get_running_loop().time
        started_s, acked = now_s(), self.acked
        try:
            # not wait_for: until Python 3.12 it can swallow a cancellation
            async with asyncio.timeout(_POLL_S):
                await self._progress.wait()
        except TimeoutError:
            self._more = True
            self._idle_s = 0.0 if waits_for_ack else self._idle_s + now_s() - started_s
        else:
            self._idle_s = 0.0
        # that the log grows says nothing of the broker
        silent = waits_for_ack and self.acked == acked
        self._silent_s = self._silent_s + now_s() - started_s if silent else 0.0
        if self._silent_s > _ACK_TIMEOUT_S:
            raise Transient("the broker does not acknowledge")
