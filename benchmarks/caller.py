"""The caller: asks an arm for answers and measures them, in a process of its own.

    echo SPEC | python -m benchmarks.caller

A raw asyncio client over keep-alive connections: it costs less than any arm. For the SDK's arm it
asks through the sealed transport, so that this process does the sealing. It says "ready" after
its warm-up, begins at the next line of its input, and prints its figures as one JSON line.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, cast
from urllib.parse import urlsplit

import uvloop

from benchmarks.zero_work_engine import MODEL, WORD

PROMPT = "How much does the path add? " * 20
TIMEOUT_S = 60.0
MAX_OPEN = 512  # of a paced load: an arm that is slower than its pace is measured no further
Mode = Literal["one", "closed", "paced"]


@dataclass(frozen=True)
class Spec:
    """What to ask, how often, of whom."""

    url: str
    key: str
    headers: dict[str, str] = field(default_factory=dict)
    trust: str = ""  # the SDK's: a trust file; `url` is then the gateway's
    mode: Mode = "one"
    stream: bool = False
    words: int = 32
    count: int = 0  # one: how many, `pause_s` apart
    pause_s: float = 0.05
    at_once: int = 1  # closed
    seconds: float = 0.0  # closed, paced
    rate: float = 0.0  # paced: a second
    warm_up: int = 4

    def body(self) -> bytes:
        value: dict[str, Any] = {
            "model": MODEL, "messages": [{"role": "user", "content": PROMPT}],
            "max_tokens": self.words,
        }  # fmt: skip
        if self.stream:
            value["stream"] = True
        return json.dumps(value).encode()


@dataclass(slots=True)
class Answer:
    """What came back: when the first word did, how many words, in how many events."""

    first_s: float = 0.0
    words: int = 0
    events: int = 0
    _tail: bytes = b""

    def take(self, data: bytes) -> None:
        """Count what may be cut anywhere."""
        seen = self._tail + data
        self.words += seen.count(WORD) - self._tail.count(WORD)
        self.events += seen.count(b"data: ") - self._tail.count(b"data: ")
        if self.words and not self.first_s:
            self.first_s = time.perf_counter()
        self._tail = seen[-5:]  # shorter than an event's mark, as long as a word


class Asks(Protocol):
    """Something that answers one request."""

    async def ask(self) -> Answer: ...

    async def close(self) -> None: ...


class Gone(Exception):
    """The connection ended before the answer."""


class _Connection(asyncio.Protocol):
    """One keep-alive connection with one request at a time."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self.closed = False
        self._done: asyncio.Future[Answer] | None = None

    def connection_lost(self, exc: Exception | None) -> None:
        self.closed = True
        if self._done is not None and not self._done.done():
            self._done.set_exception(Gone("the connection ended before the answer"))

    async def ask(self, request: bytes) -> Answer:
        self._done = asyncio.get_running_loop().create_future()
        self._answer, self._head = Answer(), b""
        self._left: int | None = None  # None: chunked
        self._end = b""
        self._transport.write(request)
        return await self._done

    def close(self) -> None:
        self._transport.close()

    def data_received(self, data: bytes) -> None:
        if self._head is not None:
            self._head += data
            head, found, data = self._head.partition(b"\r\n\r\n")
            if not found:
                return
            self._head = None  # type: ignore[assignment]
            self._begin(head)
        self._answer.take(data)
        if self._left is None:
            self._end = (self._end + data)[-7:]
            ended = self._end.endswith(b"\r\n0\r\n\r\n")
        else:
            self._left -= len(data)
            ended = self._left <= 0
        if ended and self._done is not None and not self._done.done():
            self._done.set_result(self._answer)

    def _begin(self, head: bytes) -> None:
        lines = head.lower().split(b"\r\n")
        if lines[0].split(b" ", 2)[1] != b"200":
            told = lines[0].decode("latin-1")
            if self._done is not None and not self._done.done():
                self._done.set_exception(RuntimeError(f"refused: {told}"))
            self._transport.close()
            return
        for line in lines[1:]:
            if line.startswith(b"content-length:"):
                self._left = int(line[15:])


class Lines:
    """Plain HTTP to one address; connections are kept and used again."""

    def __init__(self, spec: Spec) -> None:
        url = urlsplit(spec.url)
        self._host, self._port = url.hostname or "", url.port or 80
        body = spec.body()
        headers = {
            "host": f"{self._host}:{self._port}", "authorization": f"Bearer {spec.key}",
            "content-type": "application/json", "content-length": str(len(body)), **spec.headers,
        }  # fmt: skip
        told = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        self._request = f"POST {url.path}/chat/completions HTTP/1.1\r\n{told}\r\n".encode() + body
        self._idle: list[_Connection] = []

    async def ask(self) -> Answer:
        connection = await self._connection()
        try:
            answer = await connection.ask(self._request)
        except Gone:  # a kept connection may end while the request is on its way
            connection = await self._connection(fresh=True)
            answer = await connection.ask(self._request)
        if not connection.closed:
            self._idle.append(connection)
        return answer

    async def _connection(self, *, fresh: bool = False) -> _Connection:
        while self._idle and not fresh:
            kept = self._idle.pop()
            if not kept.closed:
                return kept
        loop = asyncio.get_running_loop()
        _, made = await loop.create_connection(_Connection, self._host, self._port)
        return made

    async def close(self) -> None:
        for connection in self._idle:
            connection.close()


@dataclass
class Load:
    """One run of a spec: what was measured."""

    spec: Spec
    asks: Asks
    first_ms: list[float] = field(default_factory=list)
    whole_ms: list[float] = field(default_factory=list)
    words: int = 0
    events: int = 0

    async def one(self) -> None:
        """One answer, checked: an arm that drops a word is no arm."""
        began = time.perf_counter()
        async with asyncio.timeout(TIMEOUT_S):
            answer = await self.asks.ask()
        if answer.words != self.spec.words:
            raise RuntimeError(f"{answer.words} words came of {self.spec.words}")
        self.first_ms.append((answer.first_s - began) * 1000)
        self.whole_ms.append((time.perf_counter() - began) * 1000)
        self.words += answer.words
        self.events += answer.events

    async def run(self) -> None:
        modes: dict[Mode, Callable[[], Awaitable[None]]] = {
            "one": self._one_at_a_time, "closed": self._closed, "paced": self._paced,
        }  # fmt: skip
        await modes[self.spec.mode]()

    async def _one_at_a_time(self) -> None:
        for _ in range(self.spec.count):
            await asyncio.sleep(self.spec.pause_s)
            await self.one()

    async def _closed(self) -> None:
        end = time.perf_counter() + self.spec.seconds

        async def work() -> None:
            while time.perf_counter() < end:
                await self.one()

        await asyncio.gather(*(work() for _ in range(self.spec.at_once)))

    async def _paced(self) -> None:
        """An open loop: a slow answer holds up no later request."""
        began = time.perf_counter()
        running: set[asyncio.Task[None]] = set()
        for number in range(max(1, int(self.spec.rate * self.spec.seconds))):
            wait_s = began + number / self.spec.rate - time.perf_counter()
            if wait_s > 0:
                await asyncio.sleep(wait_s)
            if len(running) >= MAX_OPEN:
                raise RuntimeError(f"{MAX_OPEN} answers are open: the pace is too high")
            task = asyncio.create_task(self.one())
            running.add(task)
            task.add_done_callback(running.discard)
        await asyncio.gather(*running)


def _asks(spec: Spec) -> Asks:
    if not spec.trust:
        return Lines(spec)
    from benchmarks.sealed_lines import SealedLines  # only this arm's process pays for it

    return SealedLines(spec)


async def _main() -> None:
    spec = Spec(**json.loads(sys.stdin.readline()))
    asks = _asks(spec)
    warm_up = Load(spec, asks)
    try:
        for _ in range(spec.warm_up):
            await warm_up.one()
        print("ready", flush=True)
        sys.stdin.readline()
        load = Load(spec, asks)
        began_s, cpu_s = time.perf_counter(), time.process_time()
        await load.run()
        figures = {
            "seconds": time.perf_counter() - began_s, "cpu_s": time.process_time() - cpu_s,
            "done": len(load.first_ms), "words": load.words, "events": load.events,
            "first_ms": load.first_ms, "whole_ms": load.whole_ms,
        }  # fmt: skip
    finally:
        await asks.close()
    print(json.dumps(figures), flush=True)


if __name__ == "__main__":
    uvloop.run(_main())
