"""A TCP proxy that behaves as a bad network does: cuts, partitions, half-open lines, delays.

Each direction is a flow of its own. What a flow swallows is lost for good, so `heal` resets the
connections that lost something, as a firewall does that has forgotten them; the others go on.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal, TypeVar

Direction = Literal["up", "down"]  # to the server, to the client
Target = Callable[[], tuple[str, int]]
_CHUNK, _WAITING = 16_384, 262_144
_RESET = struct.pack("ii", 1, 0)  # SO_LINGER that turns a close into a reset
T = TypeVar("T")


@dataclass(slots=True)
class Flow:
    """What happens to the bytes of one direction, of every connection."""

    delay_s: float = 0.0
    jitter_s: float = 0.0
    bytes_per_s: float = 0.0  # 0: as fast as it can
    swallowed: int = 0  # bytes so far


@dataclass(eq=False, slots=True)
class _Pair:
    """One connection: two streams and what they lost."""

    client: asyncio.StreamWriter
    server: asyncio.StreamWriter | None = None
    swallows: set[Direction] = field(default_factory=set)
    lost: bool = False
    tasks: list[asyncio.Task[None]] = field(default_factory=list)

    def reset(self) -> None:
        for task in self.tasks:
            task.cancel()
        for writer in (self.client, self.server):
            sock = writer.get_extra_info("socket") if writer else None
            if writer is None or sock is None:
                continue
            with contextlib.suppress(OSError):
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            writer.transport.abort()


class FaultProxy:
    """One listening port before one server. Its methods run in the loop that it lives in.

    `target` is asked at each connection, so that a server may come later or move.
    """

    def __init__(self, target: Target, seed: int = 0, host: str = "127.0.0.1") -> None:
        self._host = host
        self._target, self._random = target, random.Random(seed)  # noqa: S311
        self._server: asyncio.Server | None = None
        self._pairs: set[_Pair] = set()
        self._partitioned = False
        self.port = 0
        self.flows: dict[Direction, Flow] = {"up": Flow(), "down": Flow()}

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._accept, self._host, 0)
        self.port = self._server.sockets[0].getsockname()[1]

    async def close(self) -> None:
        if self._server is not None:
            self._server.close()
        self.cut()
        tasks = [task for pair in self._pairs for task in pair.tasks]
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._server is not None:
            await self._server.wait_closed()

    @property
    def connections(self) -> int:
        return len(self._pairs)

    @property
    def swallowed(self) -> int:
        """Bytes lost so far, both ways."""
        return sum(flow.swallowed for flow in self.flows.values())

    # ---- faults ----

    def cut(self) -> None:
        """Reset every connection; new ones come through."""
        for pair in tuple(self._pairs):
            pair.reset()

    def partition(self) -> None:
        """Swallow everything both ways: connections stay, and new ones meet silence."""
        self._partitioned = True
        for pair in self._pairs:
            pair.swallows = {"up", "down"}

    def half_open(self, *lost: Direction) -> None:
        """Swallow directions of the connections that stand, as if the other side had gone without
        a word; new ones come through."""
        for pair in self._pairs:
            pair.swallows.update(lost)

    def delay(self, seconds: float, jitter_s: float = 0.0) -> None:
        """Let every chunk wait so long, and up to `jitter_s` more; their order stays."""
        for flow in self.flows.values():
            flow.delay_s, flow.jitter_s = seconds, jitter_s

    def slow(self, bytes_per_s: float, direction: Direction = "down") -> None:
        """Let so much through a second; what waits behind presses back on its sender."""
        self.flows[direction].bytes_per_s = bytes_per_s

    def heal(self) -> None:
        """No fault any more; connections that lost bytes are reset."""
        self._partitioned = False
        for flow in self.flows.values():
            flow.delay_s = flow.jitter_s = flow.bytes_per_s = 0.0
        for pair in tuple(self._pairs):
            pair.swallows.clear()
            if pair.lost:
                pair.reset()

    # ---- inside ----

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        pair = _Pair(writer)
        self._pairs.add(pair)
        task = asyncio.current_task()
        assert task is not None
        pair.tasks.append(task)
        try:
            await self._serve(pair, reader)
        except asyncio.CancelledError:
            pass  # reset
        finally:
            self._pairs.discard(pair)
            for end in (pair.client, pair.server):
                if end is not None:
                    end.close()

    async def _serve(self, pair: _Pair, reader: asyncio.StreamReader) -> None:
        if self._partitioned:
            pair.lost = True  # a partition: nobody there answers
            while data := await reader.read(_CHUNK):
                self.flows["up"].swallowed += len(data)
            return
        try:
            back, pair.server = await asyncio.open_connection(*self._target())
        except OSError:
            pair.reset()
            return
        ways: tuple[tuple[Direction, asyncio.StreamReader, asyncio.StreamWriter], ...] = (
            ("up", reader, pair.server), ("down", back, pair.client),
        )  # fmt: skip
        for way, source, sink in ways:
            pair.tasks.append(asyncio.create_task(self._pump(pair, way, source, sink)))
        done, _ = await asyncio.wait(pair.tasks[1:])
        for task in done:
            with contextlib.suppress(asyncio.CancelledError, OSError):
                task.result()

    async def _pump(
        self, pair: _Pair, way: Direction, source: asyncio.StreamReader, sink: asyncio.StreamWriter
    ) -> None:
        """Read into a bounded queue of chunks with their times; another task writes them."""
        loop, flow = asyncio.get_running_loop(), self.flows[way]
        queue: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(_WAITING // _CHUNK)
        writing = asyncio.create_task(self._write(flow, queue, sink))
        due_s = 0.0
        try:
            while True:
                data = await source.read(_CHUNK)
                if way in pair.swallows:
                    pair.lost = True
                    flow.swallowed += len(data)
                    if not data:  # not even the end is heard
                        await asyncio.Event().wait()
                    continue
                wait_s = flow.delay_s + self._random.uniform(0, flow.jitter_s)
                due_s = max(due_s, loop.time() + wait_s)
                await queue.put((due_s, data))
                if not data:
                    break
            await writing
        except OSError:  # a reset on one side is one on the other
            pair.reset()
        finally:
            writing.cancel()
            await asyncio.gather(writing, return_exceptions=True)

    async def _write(
        self, flow: Flow, queue: asyncio.Queue[tuple[float, bytes]], sink: asyncio.StreamWriter
    ) -> None:
        loop = asyncio.get_running_loop()
        while True:
            due_s, data = await queue.get()
            if (left_s := due_s - loop.time()) > 0:
                await asyncio.sleep(left_s)
            if not data:
                if sink.can_write_eof():
                    sink.write_eof()
                return
            if flow.bytes_per_s:
                await asyncio.sleep(len(data) / flow.bytes_per_s)
            sink.write(data)
            await sink.drain()


class Line:
    """A proxy in a thread's loop, told what to do from another thread."""

    def __init__(self, proxy: FaultProxy, loop: asyncio.AbstractEventLoop) -> None:
        self._proxy, self._loop = proxy, loop
        self.port = proxy.port

    def tell(self, what: Callable[[FaultProxy], T]) -> T:
        """Run `what(proxy)` in the proxy's loop and return what it returns."""
        told: Future[T] = Future()

        def run() -> None:
            try:
                told.set_result(what(self._proxy))
            except Exception as error:  # noqa: BLE001 - whoever asked hears of it
                told.set_exception(error)

        self._loop.call_soon_threadsafe(run)
        return told.result(10)


@contextmanager
def lines(*targets: Target, host: str = "127.0.0.1") -> Iterator[list[Line]]:
    """A proxy before each target, in one thread of their own, until the block ends."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="fault-proxy", daemon=True)
    thread.start()
    proxies = [FaultProxy(target, seed, host) for seed, target in enumerate(targets)]
    try:
        for proxy in proxies:
            asyncio.run_coroutine_threadsafe(proxy.start(), loop).result(10)
        yield [Line(proxy, loop) for proxy in proxies]
    finally:
        for proxy in proxies:
            asyncio.run_coroutine_threadsafe(proxy.close(), loop).result(10)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
        loop.close()
