"""A log that is relayed to a bus, and somebody who follows it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable

from nats.aio.msg import Msg

from cocoon.bus import streams
from cocoon.contracts.envelope import StoredEvent
from cocoon.eventlog.append import LogAppender
from cocoon.eventlog.relay import Relay
from cocoon.eventlog.tail import Tail
from cocoon.telemetry import metrics
from tests.support.log_items import job_item, whole_log
from tests.support.servers import Bus, Database


@contextlib.asynccontextmanager
async def relaying(
    database: Database, bus: Bus, shards: tuple[int, ...] = (1,)
) -> AsyncIterator[Relay]:
    relay = Relay(database.dsn("cocoon_billing"), await bus.connect("billing"), shards)
    task = asyncio.create_task(relay.run())
    try:
        yield relay
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def eventually(condition: Callable[[], bool], timeout_s: float = 30.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110 - any condition, also of another process
            await asyncio.sleep(0.01)


async def append_many(appender: LogAppender, first: int, count: int, waiters: int = 16) -> None:
    numbers = iter(range(first, first + count))

    async def one() -> None:
        for number in numbers:
            await appender.append(job_item(number))

    await asyncio.gather(*(one() for _ in range(waiters)))


def sample(name: str, **labels: str) -> float:
    return metrics.REGISTRY.get_sample_value(name, labels) or 0.0


class Collector:
    """Runs a tail and keeps what it delivers."""

    def __init__(self, tail: Tail) -> None:
        self.tail = tail
        self.events: list[StoredEvent] = []
        self.live_batches = 0
        self.task = asyncio.create_task(self._run())

    async def _run(self) -> None:
        async with self.tail:
            async for batch in self.tail:
                self.events += batch
                self.live_batches += self.tail.live

    async def stop(self) -> None:
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)


async def state(bus: Bus, shard: int = 1) -> dict[str, int]:
    info = await streams.api(await bus.connect("operator"), f"STREAM.INFO.EVENTS_{shard}")
    found: dict[str, int] = info["state"]
    return found


async def assert_stream_equals_log(bus: Bus, database: Database, shard: int = 1) -> None:
    """Invariant 3: sequence == position and the bytes are the log's, by a bare consumer."""
    log = await whole_log(database.admin_dsn, shard)
    nc = await bus.connect("attestation")
    inbox = nc.new_inbox()
    received: list[tuple[int, StoredEvent]] = []

    async def on_message(message: Msg) -> None:
        headers = message.headers or {}
        if "Status" not in headers:
            sequence = message.metadata.sequence.stream
            assert headers["Nats-Expected-Last-Sequence"] == str(sequence - 1)  # the fence
            assert headers["Nats-Msg-Id"] == headers["ce-id"]
            received.append((sequence, StoredEvent.from_message(headers, message.data)))

    await nc.subscribe(inbox, cb=on_message)
    config = {"name": "check", "deliver_subject": inbox, "deliver_policy": "all",
              "ack_policy": "none", "mem_storage": True, "num_replicas": 1}  # fmt: skip
    await streams.api(
        nc,
        f"CONSUMER.CREATE.EVENTS_{shard}.check",
        {"stream_name": f"EVENTS_{shard}", "config": config},
    )
    await eventually(lambda: len(received) >= len(log))
    await streams.api(nc, f"CONSUMER.DELETE.EVENTS_{shard}.check")
    assert [sequence for sequence, _ in received] == [event.position for event in log]
    assert [event for _, event in received] == log


# ---- the relay ----
