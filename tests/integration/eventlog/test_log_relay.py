"""From the log to JetStream: once, in order, through crashes; on real servers."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import os
import signal

import pytest

from cocoon.bus import streams
from cocoon.eventlog.append import LogAppender
from cocoon.eventlog.connection import connect
from cocoon.eventlog.relay import Relay
from cocoon.kernel.errors import LogCorrupt, NotFound
from tests.support.log_items import whole_log
from tests.support.log_world import (
    append_many,
    assert_stream_equals_log,
    eventually,
    relaying,
    sample,
    state,
)
from tests.support.servers import SHARDS, Bus, Database


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
