"""The hot connection on a real nats-server: direct handlers, order, reconnection, flush."""

from __future__ import annotations

import asyncio

import pytest
from nats.aio.msg import Msg

from tests.support.servers import Bus


async def test_a_direct_handler_gets_every_message_in_order(bus: Bus) -> None:
    mine = bus.providers[0]
    matcher, provider = await bus.connect("matcher"), await bus.connect(mine)
    heard: list[bytes] = []
    everything = asyncio.Event()

    def on_message(message: Msg) -> None:
        heard.append(message.data)
        if len(heard) == 500:
            everything.set()

    await matcher.subscribe_direct("hb.provider.*", on_message)
    await matcher.flush()
    for number in range(500):
        await provider.publish(f"hb.provider.{mine}", b"%d" % number)
    async with asyncio.timeout(10):
        await everything.wait()
    assert heard == [b"%d" % number for number in range(500)]


async def test_a_failing_direct_handler_loses_its_message_only(
    bus: Bus, caplog: pytest.LogCaptureFixture
) -> None:
    mine = bus.providers[0]
    matcher, provider = await bus.connect("matcher"), await bus.connect(mine)
    heard: asyncio.Queue[bytes] = asyncio.Queue()

    def on_message(message: Msg) -> None:
        if message.data == b"poison":
            raise RuntimeError("poison")
        heard.put_nowait(message.data)

    await matcher.subscribe_direct("hb.provider.*", on_message)
    await matcher.flush()
    for body in (b"poison", b"good"):
        await provider.publish(f"hb.provider.{mine}", body)
    async with asyncio.timeout(10):
        assert await heard.get() == b"good"
    assert "poison" not in caplog.text
    assert any(getattr(record, "kind", "") == "RuntimeError" for record in caplog.records)


@pytest.mark.parametrize(
    "block", [b"NATS/1.0 \xff\xfe\xfd\r\n\r\n", b"NATS/1.0 503 \xff\xfe\r\n\r\n", b"NATS/1.0"]
)
@pytest.mark.parametrize("direct", [True, False])
async def test_a_header_block_that_is_none_does_not_deafen_the_connection(
    bus: Bus, block: bytes, direct: bool
) -> None:
    mine = bus.providers[0]
    matcher, provider = await bus.connect("matcher"), await bus.connect(mine)
    heard: asyncio.Queue[Msg] = asyncio.Queue()
    if direct:
        await matcher.subscribe_direct("hb.provider.*", heard.put_nowait)
    else:
        await matcher.subscribe("hb.provider.*", cb=heard.put)
    await matcher.flush()
    sizes = f"{len(block)} {len(block) + 3}"
    hostile = f"HPUB hb.provider.{mine} {sizes}\r\n".encode() + block + b"bad\r\n"
    await provider._send_command(hostile)
    await provider.publish(f"hb.provider.{mine}", b"good", headers={"A": "b"})
    await provider.flush()
    async with asyncio.timeout(10):
        bad, good = await heard.get(), await heard.get()
    assert (bad.data, bad.headers) == (b"bad", None)
    assert (good.data, good.headers) == (b"good", {"A": "b"})


async def test_a_direct_subscription_survives_a_lost_connection(bus: Bus) -> None:
    mine = bus.providers[0]
    matcher, provider = await bus.connect("matcher"), await bus.connect(mine)
    heard: asyncio.Queue[bytes] = asyncio.Queue()
    await matcher.subscribe_direct("hb.provider.*", lambda m: heard.put_nowait(m.data))
    await matcher.flush()
    await matcher.force_reconnect()
    async with asyncio.timeout(10):
        while heard.empty():
            await provider.publish(f"hb.provider.{mine}", b"again")
            await asyncio.sleep(0.05)
    assert await heard.get() == b"again"


async def test_what_was_published_before_a_flush_has_arrived_after_it(bus: Bus) -> None:
    mine = bus.providers[0]
    matcher, provider = await bus.connect("matcher"), await bus.connect(mine)
    heard: list[bytes] = []
    await matcher.subscribe_direct("hb.provider.*", lambda m: heard.append(m.data))
    await matcher.flush()
    for number in range(100):
        await provider.publish(f"hb.provider.{mine}", b"%d" % number)
    await provider.flush()
    await matcher.flush()
    assert len(heard) == 100


async def test_an_unsubscribed_direct_handler_hears_nothing_more(bus: Bus) -> None:
    mine = bus.providers[0]
    matcher, provider = await bus.connect("matcher"), await bus.connect(mine)
    heard: list[bytes] = []
    subscription = await matcher.subscribe_direct("hb.provider.*", lambda m: heard.append(m.data))
    await matcher.flush()
    await subscription.unsubscribe()
    await matcher.flush()
    await provider.publish(f"hb.provider.{mine}", b"late")
    await provider.flush()
    await matcher.flush()
    assert heard == []
