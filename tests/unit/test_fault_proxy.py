"""The network's faults, tried on an echo and a sink: what is lost, what comes, in what order."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from tests.support.fault_proxy import FaultProxy, lines


@asynccontextmanager
async def echo() -> AsyncIterator[tuple[FaultProxy, bytearray]]:
    """A proxy before a server that gives back what it gets, and all that the server got."""
    got = bytearray()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(4096):
                got.extend(data)
                writer.write(data)
                await writer.drain()
        except OSError:
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    proxy = FaultProxy(lambda: ("127.0.0.1", server.sockets[0].getsockname()[1]))
    await proxy.start()
    try:
        yield proxy, got
    finally:
        await proxy.close()
        server.close()


async def dial(proxy: FaultProxy) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    return await asyncio.open_connection("127.0.0.1", proxy.port)


async def said(
    line: tuple[asyncio.StreamReader, asyncio.StreamWriter], text: bytes, timeout_s: float = 5
) -> bytes:
    line[1].write(text)
    async with asyncio.timeout(timeout_s):
        return await line[0].readexactly(len(text))


async def silent(reader: asyncio.StreamReader) -> bool:
    """Whether nothing comes, not even an end, for a moment."""
    try:
        async with asyncio.timeout(0.1):
            await reader.read(1)
    except TimeoutError:
        return True
    return False


async def test_without_a_fault_bytes_and_ends_come_through_both_ways() -> None:
    async with echo() as (proxy, got):
        line = await dial(proxy)
        text = bytes(range(256)) * 4000
        line[1].write(text)
        line[1].write_eof()

        assert await line[0].read(-1) == text
        assert bytes(got) == text
        line[1].close()


async def test_a_cut_resets_what_stands_and_lets_new_connections_through() -> None:
    async with echo() as (proxy, _):
        line = await dial(proxy)
        assert await said(line, b"one") == b"one"
        proxy.cut()

        with pytest.raises(ConnectionResetError):
            await line[0].readexactly(1)
        again = await dial(proxy)
        assert await said(again, b"two") == b"two"
        again[1].close()


async def test_a_partition_is_silence_and_what_lost_bytes_is_reset_when_it_heals() -> None:
    async with echo() as (proxy, got):
        line, idle = await dial(proxy), await dial(proxy)
        assert await said(line, b"one") == b"one"
        assert await said(idle, b"idle") == b"idle"
        proxy.partition()
        line[1].write(b"two")
        newcomer = await dial(proxy)
        newcomer[1].write(b"new")

        assert await silent(line[0])
        assert await silent(newcomer[0])
        assert bytes(got) == b"oneidle"
        assert proxy.swallowed == len(b"twonew")
        proxy.heal()
        for lost in (line, newcomer):
            with pytest.raises(ConnectionResetError):
                await lost[0].readexactly(1)
        assert await said(idle, b"still") == b"still"
        again = await dial(proxy)
        assert await said(again, b"three") == b"three"
        for open_line in (idle, again):
            open_line[1].close()


async def test_an_end_is_not_heard_through_a_partition() -> None:
    async with echo() as (proxy, _):
        line = await dial(proxy)
        assert await said(line, b"one") == b"one"
        proxy.partition()
        line[1].write_eof()

        assert await silent(line[0])
        proxy.heal()
        with pytest.raises(ConnectionResetError):
            await line[0].readexactly(1)


@pytest.mark.parametrize(("lost", "server_got"), [("up", b"one"), ("down", b"onetwo")])
async def test_a_half_open_line_loses_one_direction(lost: str, server_got: bytes) -> None:
    async with echo() as (proxy, got):
        line = await dial(proxy)
        assert await said(line, b"one") == b"one"
        proxy.half_open("up" if lost == "up" else "down")
        line[1].write(b"two")

        assert await silent(line[0])
        assert bytes(got) == server_got
        newcomer = await dial(proxy)
        assert await said(newcomer, b"new") == b"new"
        newcomer[1].close()
        proxy.heal()
        with pytest.raises(ConnectionResetError):
            await line[0].readexactly(1)


async def test_delayed_chunks_come_late_and_in_their_order() -> None:
    async with echo() as (proxy, _):
        line = await dial(proxy)
        proxy.delay(0.05, jitter_s=0.05)
        began_s = time.monotonic()
        text = b"".join(b"%06d" % n for n in range(20_000))
        line[1].write(text)

        assert await line[0].readexactly(len(text)) == text
        assert time.monotonic() - began_s >= 0.1  # there and back
        line[1].close()


async def test_a_slow_line_presses_back_on_its_sender() -> None:
    async with echo() as (proxy, got):
        line = await dial(proxy)
        proxy.slow(100_000, "up")
        text = bytes(8 * 1024 * 1024)
        line[1].write(text)

        assert await silent(line[0]) or len(got) < len(text)
        assert len(got) < len(text) // 2
        proxy.heal()
        assert await line[0].readexactly(len(text)) == text
        line[1].close()


async def test_a_server_that_is_away_is_a_reset() -> None:
    proxy = FaultProxy(lambda: ("127.0.0.1", 1))
    await proxy.start()
    line = await dial(proxy)

    with pytest.raises((ConnectionResetError, asyncio.IncompleteReadError)):
        await line[0].readexactly(1)
    await proxy.close()


def test_lines_live_in_a_thread_of_their_own_and_hear_what_they_are_told() -> None:
    async def through(port: int) -> bytes:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            writer.write(b"hello")
            async with asyncio.timeout(2):
                return await reader.readexactly(5)
        finally:
            writer.close()

    async def tried(port: int, targets: list[int]) -> bytes:
        async with echo() as (far, _):
            targets[:] = [far.port]
            return await through(port)

    targets: list[int] = []
    with lines(lambda: ("127.0.0.1", targets[0])) as (line,):
        assert asyncio.run(tried(line.port, targets)) == b"hello"
        line.tell(FaultProxy.partition)
        with pytest.raises(TimeoutError):
            asyncio.run(through(line.port))
        assert line.tell(lambda proxy: proxy.swallowed) == 5
