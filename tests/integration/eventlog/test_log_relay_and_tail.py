"""From the log to every service: once, in order, through crashes; on real servers."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import os
import signal
from collections.abc import AsyncIterator, Callable
from dataclasses import replace

import asyncpg
import pytest
from nats.aio.msg import Msg

from cocoon.bus import streams
from cocoon.contracts.envelope import StoredEvent
from cocoon.eventlog.append import Appended, LogAppender, acquire_term, transaction
from cocoon.eventlog.connection import connect
from cocoon.eventlog.relay import Relay
from cocoon.eventlog.tail import Tail
from cocoon.kernel.errors import LogCorrupt, NotFound
from cocoon.telemetry import metrics
from tests.support.log_items import assert_sound, job_item, whole_log
from tests.support.servers import SHARDS, Bus, Database


@pytest.fixture
async def appender(database: Database) -> AsyncIterator[LogAppender]:
    writer = LogAppender(database.dsn("cocoon_matcher"), 1, "matcher")
    await writer.acquire_term()
    yield writer
    await writer.close()


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


async def test_sequence_is_position_on_every_shard(database: Database, bus: Bus) -> None:
    writers = [LogAppender(database.dsn("cocoon_matcher"), shard, "matcher") for shard in SHARDS]
    async with relaying(database, bus, SHARDS) as relay:
        for writer in writers:
            await writer.acquire_term()
            await append_many(writer, 0, 20)
            await writer.close()
        await eventually(lambda: relay.positions == dict.fromkeys(SHARDS, 60))
        for shard in SHARDS:
            await assert_stream_equals_log(bus, database, shard)


async def test_relay_is_exactly_once_through_kill_9_and_a_wipe(
    appender: LogAppender, database: Database, bus: Bus
) -> None:
    async with relaying(database, bus) as relay:
        load = asyncio.create_task(append_many(appender, 0, 900, waiters=4))
        for published in (200, 900, 1600):
            await eventually(lambda published=published: relay.positions[1] >= published)
            await asyncio.to_thread(bus.server.kill)
            await asyncio.to_thread(bus.server.start)
        await load
        await eventually(lambda: relay.positions[1] == 2700)
        await assert_stream_equals_log(bus, database)
        await asyncio.to_thread(bus.server.kill)
        bus.server.wipe()
        await asyncio.to_thread(bus.server.start)
        await append_many(appender, 1000, 10)
        await eventually(lambda: relay.positions[1] == 2730)
        await assert_stream_equals_log(bus, database)


async def test_racing_relays_publish_each_position_once(
    appender: LogAppender, database: Database, bus: Bus
) -> None:
    async with relaying(database, bus) as one, relaying(database, bus) as two:
        await append_many(appender, 0, 200)
        await eventually(lambda: max(one.positions[1], two.positions[1]) == 600)
        await assert_stream_equals_log(bus, database)


async def test_restarted_relay_goes_on_where_the_stream_ends(
    appender: LogAppender, database: Database, bus: Bus
) -> None:
    for first in (0, 100):
        async with relaying(database, bus) as relay:
            await append_many(appender, first, 50)
            await eventually(
                lambda relay=relay, first=first: relay.positions[1] == 150 * (1 + first // 100)
            )
    await assert_stream_equals_log(bus, database)


async def test_wiped_stream_of_an_old_log_begins_inside_its_window(
    appender: LogAppender, database: Database, bus: Bus
) -> None:
    await append_many(appender, 0, 10)
    admin = await connect(database.admin_dsn, "test")
    month_us = 30 * 86_400 * 1_000_000
    await admin.execute(
        "UPDATE log.events SET recorded_at = recorded_at - $1 WHERE position <= 20", month_us
    )
    await admin.close()
    async with relaying(database, bus):
        with contextlib.suppress(LogCorrupt, TimeoutError):
            await eventually(lambda: False, 1.0)
    # The rows were touched, so their hashes no longer hold; the stream's start is what counts here.
    found = await state(bus)
    assert found["first_seq"] == 21


async def test_wiped_stream_of_a_long_log_holds_its_latest_events(
    appender: LogAppender, database: Database, bus: Bus, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cocoon.eventlog.relay.EVENTS_MAX", 12)
    await append_many(appender, 0, 10)
    async with relaying(database, bus) as relay:
        await eventually(lambda: relay.positions[1] == 30)
    found = await state(bus)
    assert (found["first_seq"], found["last_seq"]) == (19, 30)


async def test_a_stream_that_was_lost_is_filled_again_though_nothing_happens(
    appender: LogAppender, database: Database, bus: Bus
) -> None:
    async with relaying(database, bus) as relay:
        await append_many(appender, 0, 10)
        await eventually(lambda: relay.positions[1] == 30)
        billing = await bus.connect("billing")
        await streams.api(billing, "STREAM.DELETE.EVENTS_1")
        async with asyncio.timeout(20):
            while await messages_of(bus) != 30:  # noqa: ASYNC110
                await asyncio.sleep(0.1)
    await assert_stream_equals_log(bus, database)


async def messages_of(bus: Bus) -> int:
    """How many EVENTS_1 holds, 0 where there is no such stream."""
    with contextlib.suppress(NotFound):
        return int((await state(bus))["messages"])
    return 0


async def test_stream_ahead_of_the_log_halts_the_relay(
    appender: LogAppender, database: Database, bus: Bus
) -> None:
    async with relaying(database, bus) as relay:
        await append_many(appender, 0, 10)
        await eventually(lambda: relay.positions[1] == 30)
    admin = await connect(database.admin_dsn, "test")
    # A failover that lost the last two positions.
    await admin.execute("DELETE FROM log.events WHERE position > 28")
    await admin.execute(
        "UPDATE log.head SET position = 28, hash = (SELECT hash FROM log.events"
        " WHERE shard = 1 AND position = 28) WHERE shard = 1"
    )
    await admin.close()
    lost = Relay(database.dsn("cocoon_billing"), await bus.connect("billing"), (1,))
    with pytest.raises(LogCorrupt, match="holds sequence 30"):
        await asyncio.wait_for(lost.run(), 10)
    assert sample("cocoon_relay_halted", shard="1") == 1
    # ... and one that has grown again with other events is found by the hash.
    again = LogAppender(database.dsn("cocoon_matcher"), 1, "matcher")
    await again.acquire_term()
    await append_many(again, 500, 5)
    await again.close()
    forked = Relay(database.dsn("cocoon_billing"), await bus.connect("billing"), (1,))
    with pytest.raises(LogCorrupt, match="differ at position 30"):
        await asyncio.wait_for(forked.run(), 10)


async def test_an_answer_that_infrastructure_has_sent_into_the_stream_does_not_stop_the_relay(
    appender: LogAppender, database: Database, bus: Bus
) -> None:
    """Providers and gateways cannot: the bus keeps their answers apart."""
    infra = await bus.connect("infra")
    async with relaying(database, bus) as relay:
        await append_many(appender, 0, 10)
        await eventually(lambda: relay.positions[1] == 30)
        await infra.publish("$JS.API.STREAM.INFO.EVENTS_1", b"", reply="evt.1.job.x.funds_held")
        await infra.flush()
        async with asyncio.timeout(5):
            while (await state(bus))["last_seq"] == 30:  # noqa: ASYNC110 - a server's state
                await asyncio.sleep(0.01)
        await append_many(appender, 100, 10)
        await eventually(lambda: relay.positions[1] == 60, 5.0)
    await assert_stream_equals_log(bus, database)


# ---- the tail ----


async def test_tail_is_gap_free_under_appends_and_restarts_of_nats(
    appender: LogAppender, database: Database, bus: Bus
) -> None:
    await append_many(appender, 0, 50)
    async with relaying(database, bus):
        tails = [
            Collector(Tail(database.dsn("cocoon_billing"), await bus.connect(role), 1, batch=64))
            for role in ("matcher", "attestation")
        ]
        await append_many(appender, 100, 200)
        for first in (1000, 2000):
            load = asyncio.create_task(append_many(appender, first, 200, waiters=4))
            await asyncio.sleep(0.15)
            await asyncio.to_thread(bus.server.kill)
            await asyncio.sleep(0.1)
            await asyncio.to_thread(bus.server.start)
            await load
        bus.server.kill()
        bus.server.wipe()
        await append_many(appender, 3000, 50)
        await asyncio.to_thread(bus.server.start)
        await append_many(appender, 4000, 50)
        for collector in tails:
            await eventually(lambda collector=collector: len(collector.events) >= 2250)
            await eventually(lambda collector=collector: collector.tail.live)
        await append_many(appender, 5000, 50)
        log = await whole_log(database.admin_dsn)
        assert_sound(log)
        for collector in tails:
            await eventually(lambda collector=collector: len(collector.events) >= len(log))
            assert collector.events == log
            assert collector.live_batches > 0
            await collector.stop()


async def test_tail_starts_after_its_checkpoint(
    appender: LogAppender, database: Database, bus: Bus
) -> None:
    await append_many(appender, 0, 10)
    conn = await connect(database.dsn("cocoon_billing"), "test")
    term = await acquire_term(conn, 1, "billing")
    async with transaction(conn, 1, "billing", term) as tx:
        await tx.checkpoint("ledger", 12)
    await conn.close()
    async with Tail(database.dsn("cocoon_billing"), None, 1, consumer="ledger") as tail:
        batch = await anext(tail)
        assert [event.position for event in batch] == list(range(13, 31))
    async with Tail(database.dsn("cocoon_matcher"), None, 1, from_position=30) as tail:
        assert [event.position for event in await anext(tail)] == [30]


async def test_tail_without_a_bus_follows_the_log(
    appender: LogAppender, database: Database
) -> None:
    collector = Collector(Tail(database.dsn("cocoon_reader"), None, 1))
    await append_many(appender, 0, 60, waiters=1)
    await eventually(lambda: len(collector.events) == 180)
    await collector.stop()
    assert collector.events == await whole_log(database.admin_dsn)


async def test_tail_follows_the_log_while_no_relay_runs(
    appender: LogAppender, database: Database, bus: Bus
) -> None:
    collector = Collector(Tail(database.dsn("cocoon_reader"), await bus.connect("matcher"), 1))
    await append_many(appender, 0, 20)
    await eventually(lambda: len(collector.events) == 60)
    await append_many(appender, 100, 20)
    await eventually(lambda: len(collector.events) == 120)
    await collector.stop()


async def test_a_relay_notices_a_silent_broker_while_the_log_grows(
    appender: LogAppender, database: Database, bus: Bus
) -> None:
    async with relaying(database, bus) as relay:
        await append_many(appender, 0, 2)
        await eventually(lambda: relay.positions[1] == 6)
        assert bus.server.pid is not None
        before = sample("cocoon_relay_rewinds_total", shard="1")
        os.kill(bus.server.pid, signal.SIGSTOP)
        try:
            async with asyncio.timeout(4):  # before the connection's own pings tell
                for number in range(100, 200):
                    await append_many(appender, number, 1)
                    await asyncio.sleep(0.1)
                    if sample("cocoon_relay_rewinds_total", shard="1") > before:
                        break
        finally:
            os.kill(bus.server.pid, signal.SIGCONT)
        last = len(await whole_log(database.admin_dsn))
        await eventually(lambda: relay.positions[1] == last)


async def test_tail_reads_the_log_while_jetstream_does_not_answer(
    appender: LogAppender, database: Database, bus: Bus
) -> None:
    nc = await bus.connect("matcher")
    assert bus.server.pid is not None
    os.kill(bus.server.pid, signal.SIGSTOP)
    try:
        collector = Collector(Tail(database.dsn("cocoon_reader"), nc, 1))
        await asyncio.sleep(0.5)  # it has asked JetStream to deliver from here on
        for first in (0, 100):
            await append_many(appender, first, 20)
            # A revocation may be late by 5 s in all, and a decision holds for three of them.
            await eventually(lambda count=first // 100: len(collector.events) == 60 * count + 60, 3)
        await collector.stop()
    finally:
        os.kill(bus.server.pid, signal.SIGCONT)


def sealed_by_itself(event: StoredEvent) -> StoredEvent:
    return replace(event, hash=event.compute_hash())


@pytest.mark.parametrize("kind", ["noise", "wrong hash", "fork", "gap"])
async def test_foreign_messages_in_the_stream_never_reach_a_consumer(
    appender: LogAppender, database: Database, bus: Bus, kind: str
) -> None:
    async with relaying(database, bus) as relay:
        await append_many(appender, 0, 10)
        await eventually(lambda: relay.positions[1] == 30)
    collector = Collector(Tail(database.dsn("cocoon_reader"), await bus.connect("matcher"), 1))
    await eventually(lambda: collector.tail.live and len(collector.events) == 30)
    nc = await bus.connect("billing")
    last = (await whole_log(database.admin_dsn))[-1]
    fork = sealed_by_itself(replace(last, position=31, prev_hash=bytes(32)))  # another history
    gap = sealed_by_itself(replace(last, position=33, prev_hash=last.hash))  # a hole before it
    headers = {
        "noise": {"ce-position": "31"},
        "wrong hash": {**last.to_headers(), "ce-position": "31"},
        "fork": fork.to_headers(),
        "gap": gap.to_headers(),
    }
    left = sample("cocoon_tail_resubscriptions_total", shard="1", consumer="memory")
    await nc.jetstream().publish("evt.1.job.x.funds_held", last.data, headers=headers[kind])
    await append_many(appender, 100, 10)
    await eventually(lambda: len(collector.events) >= 60)
    await collector.stop()
    assert sample("cocoon_tail_resubscriptions_total", shard="1", consumer="memory") > left
    assert collector.events == await whole_log(database.admin_dsn)


async def test_a_writers_own_events_come_back_as_the_ones_that_it_appended(
    appender: LogAppender, database: Database, bus: Bus
) -> None:
    async with relaying(database, bus):
        nc = await bus.connect("matcher")
        tail = Tail(database.dsn("cocoon_reader"), nc, 1, own=appender.recent)
        collector = Collector(tail)
        await append_many(appender, 0, 1)
        await eventually(lambda: tail.live and len(collector.events) == 3)
        mine = await appender.append(job_item(7))
        assert isinstance(mine, Appended)
        await eventually(lambda: len(collector.events) == 6)
        await collector.stop()
    assert collector.events == await whole_log(database.admin_dsn)
    assert [id(event) for event in collector.events[3:]] == [id(event) for event in mine.events]


async def test_a_foreign_message_among_those_in_flight_has_the_stream_made_anew(
    appender: LogAppender, database: Database, bus: Bus
) -> None:
    """It takes one event's place; the ones behind it name their predecessor and are refused."""
    await append_many(appender, 0, 4)
    nc = await bus.connect("billing")

    class Interrupted:
        """The relay's connection, on which a stranger's message comes in between, once."""

        def __init__(self) -> None:
            self.intruded = False

        def __getattr__(self, name: str) -> object:
            return getattr(nc, name)

        async def publish(self, subject: str, *args: object, **kinds: object) -> None:
            if not self.intruded and kinds["headers"]["ce-position"] == "5":  # type: ignore[index]
                self.intruded = True
                await nc.publish("evt.1.job.x.funds_held", b"{}")
            await nc.publish(subject, *args, **kinds)  # type: ignore[arg-type]

    relay = Relay(database.dsn("cocoon_billing"), Interrupted(), (1,))  # type: ignore[arg-type]
    task = asyncio.create_task(relay.run())
    await eventually(lambda: relay.positions[1] == 12)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    for event in await whole_log(database.admin_dsn):
        found = await streams.api(nc, "STREAM.MSG.GET.EVENTS_1", {"seq": event.position})
        assert base64.b64decode(found["message"]["data"]) == event.data


async def test_a_tail_in_the_relays_process_follows_what_it_reads(
    appender: LogAppender, database: Database, bus: Bus
) -> None:
    async with relaying(database, bus) as relay:
        collector = Collector(Tail(database.dsn("cocoon_reader"), relay.feed(1), 1))
        await append_many(appender, 0, 20)
        await eventually(lambda: collector.tail.live and len(collector.events) == 60)
        seen = collector.live_batches
        await append_many(appender, 100, 20)
        await eventually(lambda: len(collector.events) == 120)
        assert collector.live_batches > seen
    await append_many(appender, 200, 20)  # the relay is gone: the log itself is read
    await eventually(lambda: len(collector.events) == 180)
    await collector.stop()
    assert collector.events == await whole_log(database.admin_dsn)


async def test_tail_outlives_a_crash_of_postgres(own_postgres: Database) -> None:
    writer = LogAppender(own_postgres.dsn("cocoon_matcher"), 1, "matcher")
    await writer.acquire_term()
    collector = Collector(Tail(own_postgres.dsn("cocoon_reader"), None, 1))
    await append_many(writer, 0, 20)
    await asyncio.to_thread(own_postgres.server.kill)
    await asyncio.sleep(0.3)
    await asyncio.to_thread(own_postgres.server.start)
    await append_many(writer, 100, 20)
    await eventually(lambda: len(collector.events) == 120)
    await collector.stop()
    await writer.close()
    assert_sound(collector.events)


async def test_tail_stops_at_a_corrupt_log(appender: LogAppender, database: Database) -> None:
    await append_many(appender, 0, 5)
    admin = await asyncpg.connect(database.admin_dsn, timeout=10)
    await admin.execute("UPDATE log.events SET data = '{}' WHERE position = 7")
    await admin.close()
    async with Tail(database.dsn("cocoon_reader"), None, 1) as tail:
        with pytest.raises(LogCorrupt, match="position 7"):
            await anext(tail)
