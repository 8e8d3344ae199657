"""The relay against raw nats-py: the same events into an equal stream, as fast as it takes them.

The relay reads Postgres, checks the chain and fences every position; raw nats-py publishes the
same subjects, headers and bytes from memory, with as many unacknowledged, and fences nothing.
"""

from __future__ import annotations

import asyncio
import time

import asyncpg
import nats as nats_py
import uvloop
from nats.aio.msg import Msg

from benchmarks.append import _load
from benchmarks.report import Column, Finding, Question, Row, Rows, middle
from benchmarks.servers import (
    SHARD,
    Clock,
    nats,
    new_name,
    postgres,
    prepare_log,
    request_item,
    scratch,
)
from cocoon.bus.client import BusClient
from cocoon.bus.connection import close, connect
from cocoon.bus.streams import api, declare_streams, events_config
from cocoon.contracts import subjects
from cocoon.eventlog.append import LogAppender
from cocoon.eventlog.read import head, read_batch
from cocoon.eventlog.relay import Relay

WINDOW, TIMEOUT_S, POLL_S = 1024, 120, 0.005
RELAY, RAW = "relay", "raw nats-py"

RELAYED = Question(
    "relay",
    "Relay of the log to JetStream, against raw nats-py publishing the same bytes",
    (
        Column("events_per_s", "events/s"), Column("own_us", "CPU an event, Python, us", 1),
        Column("nats_us", "NATS, us", 1), Column("postgres_us", "Postgres, us", 1),
        Column("of_raw", "of raw", 2),
    ),
    lambda rows: [],
)  # fmt: skip


async def _relay(dsn: str, nc: BusClient, last: int) -> None:
    relay = Relay(dsn, nc, (SHARD,), window=WINDOW)
    task = asyncio.create_task(relay.run())
    end_s = time.monotonic() + TIMEOUT_S
    while relay.positions[SHARD] < last:
        if task.done() or time.monotonic() > end_s:
            raise RuntimeError("the relay did not reach the log's end")
        await asyncio.sleep(POLL_S)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


class RawPublisher:
    """Plain nats-py with a window of unacknowledged messages."""

    def __init__(self, messages: list[tuple[str, bytes, dict[str, str]]]) -> None:
        self._messages = messages
        self._acked = 0
        self._progress = asyncio.Event()

    async def _on_ack(self, message: Msg) -> None:
        if b'"error"' in message.data:
            raise RuntimeError("the stream refused a message")
        self._acked += 1
        self._progress.set()

    async def run(self, url: str) -> None:
        nc = await nats_py.connect(url)
        inbox = nc.new_inbox()
        await nc.subscribe(f"{inbox}.*", cb=self._on_ack)
        for number, (subject, data, headers) in enumerate(self._messages):
            while number - self._acked >= WINDOW:
                self._progress.clear()
                await self._progress.wait()
            await nc.publish(subject, data, reply=f"{inbox}.{number}", headers=headers)
        while self._acked < len(self._messages):
            self._progress.clear()
            await self._progress.wait()
        await nc.close()


async def _fresh(nc: BusClient, name: str, subject: str) -> None:
    """An empty stream with the configuration of an event stream."""
    wanted = {**events_config(SHARD), "name": name, "subjects": [subject]}
    if any(name == one for one in (await api(nc, "STREAM.NAMES"))["streams"] or []):
        await api(nc, f"STREAM.DELETE.{name}")
    await api(nc, f"STREAM.CREATE.{name}", wanted)


async def _messages(dsn: str) -> list[tuple[str, bytes, dict[str, str]]]:
    conn = await asyncpg.connect(dsn)
    last = (await head(conn, SHARD)).position
    events = await read_batch(conn, SHARD, 1, last)
    await conn.close()
    return [
        ("raw." + subjects.event(SHARD, e.stream, e.type)[4:], e.data, e.to_headers())
        for e in events
    ]


async def _measure(dsn: str, url: str, pids: dict[str, int], rounds: int, jobs: int) -> Rows:
    await prepare_log(dsn)
    appender = LogAppender(dsn, SHARD, "matcher")
    await appender.acquire_term()
    await _load(appender.append, [request_item(new_name())[0] for _ in range(jobs)], 256)
    await appender.close()
    messages = await _messages(dsn)
    nc = await connect(url, None, "benchmark", "_INBOX")
    await declare_streams(nc, (0, SHARD))
    groups = {name: frozenset({pid}) for name, pid in pids.items()}
    found: dict[str, list[Row]] = {RELAY: [], RAW: []}
    for _ in range(rounds):
        await _fresh(nc, subjects.events_stream(SHARD), f"evt.{SHARD}.>")
        with Clock(groups) as clock:
            await _relay(dsn, nc, len(messages))
        found[RELAY].append(_row(clock, len(messages)))
        await _fresh(nc, "RAW", f"raw.{SHARD}.>")
        with Clock(groups) as clock:
            async with asyncio.timeout(TIMEOUT_S):
                await RawPublisher(messages).run(url)
        found[RAW].append(_row(clock, len(messages)))
    await close(nc)
    rows = {name: middle(one) for name, one in found.items()}
    rows[RELAY]["of_raw"] = rows[RELAY]["events_per_s"] / rows[RAW]["events_per_s"]
    return rows


def _row(clock: Clock, events: int) -> Row:
    row = {"events_per_s": events / clock.seconds, "own_us": clock.own_cpu_s / events * 1e6}
    return row | {f"{name}_us": used / events * 1e6 for name, used in clock.cpu_s.items()}


def relay(*, rounds: int, jobs: int) -> Finding:
    with scratch() as folder, postgres(folder) as log, nats(folder) as bus:
        assert log.pid is not None
        assert bus.pid is not None
        pids = {"postgres": log.pid, "nats": bus.pid}
        return Finding(uvloop.run(_measure(log.dsn(), bus.url, pids, rounds, jobs)))
