"""A line that died without a word is left, whatever it still owes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from cocoon.bus import connection, permissions
from cocoon.bus.client import BusClient
from tests.support.servers import Bus


class Freezing:
    """Carries connections to a port. Once `frozen`, nobody reads from the first any more."""

    def __init__(self, target: int) -> None:
        self.target, self.frozen, self.count, self.url = target, asyncio.Event(), 0, ""
        self._tasks: list[asyncio.Task[None]] = []
        self._writers: list[asyncio.StreamWriter] = []

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.url = f"nats://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for writer in self._writers:
            writer.transport.abort()
        self._server.close()
        await asyncio.sleep(0.1)

    async def _accept(self, near: asyncio.StreamReader, to_near: asyncio.StreamWriter) -> None:
        first, self.count = self.count == 0, self.count + 1
        far, to_far = await asyncio.open_connection("127.0.0.1", self.target)
        self._writers += [to_near, to_far]

        async def pipe(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            while data := await reader.read(65536):
                if first and self.frozen.is_set():
                    reader._transport.pause_reading()  # type: ignore[attr-defined]
                    await asyncio.sleep(3600)
                writer.write(data)
                await writer.drain()

        self._tasks += [asyncio.create_task(pipe(near, to_far))]
        self._tasks += [asyncio.create_task(pipe(far, to_near))]


@pytest.fixture
async def proxy(bus: Bus) -> AsyncIterator[Freezing]:
    made = Freezing(bus.server.port)
    await made.start()
    yield made
    await made.close()


async def through(proxy: Freezing, bus: Bus) -> BusClient:
    prefix = permissions.inbox_prefix("billing")
    client = await connection.connect(proxy.url, bus.seed_file("billing"), "billing", prefix)
    bus.opened.append(client)
    return client


@pytest.mark.parametrize("size", [100, 100_000])
async def test_a_dead_line_is_left_whatever_was_not_sent(
    bus: Bus, proxy: Freezing, size: int
) -> None:
    nc = await through(proxy, bus)
    proxy.frozen.set()

    async def flood() -> None:
        for _ in range(120):
            await nc.publish("evt.0.x", b"x" * size)

    task = asyncio.create_task(flood())
    async with asyncio.timeout(20):  # TCP itself would give up after a quarter of an hour
        while proxy.count < 2 or not nc.is_connected:  # noqa: ASYNC110 - the pings' time
            await asyncio.sleep(0.1)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_closing_a_dead_line_ends(bus: Bus, proxy: Freezing) -> None:
    nc = await through(proxy, bus)
    proxy.frozen.set()
    for _ in range(100):
        await nc.publish("evt.0.x", b"x" * 100_000)
        await asyncio.sleep(0)
    async with asyncio.timeout(20):
        await connection.close(nc)
    assert nc.is_closed
