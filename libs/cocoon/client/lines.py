"""HTTP/1.1 to one gateway over kept connections: what a sealed request needs, and no more.

httptools parses. One request at a time is on a connection, and every wait and every buffer has a
bound. It follows no redirect, takes no proxy from the environment and keeps no cookie.
"""

from __future__ import annotations

import asyncio
import ssl
from collections import deque
from collections.abc import Mapping
from typing import Final, cast
from urllib.parse import quote, urlsplit

import httptools
import httpx

from cocoon.client.dialing import dial

MAX_CONNECTIONS: Final = 256
KEEP_ALIVE_S: Final = 15.0  # shorter than the gateway's, so that an idle line is not found dead
CONNECT_TIMEOUT_S: Final = 5.0
POOL_TIMEOUT_S: Final = 15.0  # for a connection that another request has
WRITE_TIMEOUT_S: Final = 15.0  # without a piece of the body taken: nobody reads
MAX_OVERHEAD_BYTES: Final = 64 * 1024  # of what is no content, at a stretch: a head, trailers
WINDOW_BYTES: Final = 256 * 1024  # of content that has come and was not taken
PIECE_BYTES: Final = 256 * 1024  # one write of more would hold up the loop, where it is encrypted


class LineError(Exception):
    """Something between here and the gateway failed. Says nothing about the job."""


class Unreached(LineError):
    """No connection was made: the gateway has not seen the request."""


class Silent(LineError):
    """The gateway holds the line and says nothing."""


class Broken(LineError):
    """The line ended, or spoke no HTTP, before the answer was whole."""


class _Connection(asyncio.Protocol):
    """One connection and the answer that is on its way on it."""

    status: int  # 0 until the answer's head is there
    ended: bool  # the answer is whole

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._parser = httptools.HttpResponseParser(self)
        self._waiter: asyncio.Future[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._deadline_s = 0.0
        self._writable = True
        self.lost = False  # nothing more comes, and nothing more can be sent
        self.idle_s = 0.0  # since when nobody uses it
        self._begin(0.0)

    def _begin(self, read_timeout_s: float) -> None:
        self._read_timeout_s = read_timeout_s
        self.status = 0
        self.headers: dict[str, str] = {}
        self.ended = False
        self._parts: list[bytes] = []
        self._waiting_bytes = 0
        self._overhead_bytes = 0
        self._sent = False  # the request is whole
        self._again = False  # another request may follow on this connection

    # ---- one request ----

    async def ask(self, head: bytes, body: bytes, read_timeout_s: float) -> None:
        """Send a request; returns when the answer's head is there. Raises Silent, Broken."""
        self._begin(read_timeout_s)
        self._transport.write(head + body[:PIECE_BYTES])
        for start in range(PIECE_BYTES, len(body), PIECE_BYTES):
            until_s = self._loop.time() + WRITE_TIMEOUT_S
            while not (self._writable or self.lost or self.status):
                await self._change(until_s)
            if self.lost or self.status:
                break
            self._transport.write(body[start : start + PIECE_BYTES])
        else:
            self._sent = True
        until_s = self._loop.time() + read_timeout_s  # for all of the head, however it drips
        while not self.status:
            if self.lost:
                raise Broken("the line ended")
            await self._change(until_s)

    async def next(self) -> bytes:
        """What has come of the body, b"" at its end. Raises Silent, Broken."""
        until_s = 0.0
        while not self._parts:
            if self.ended:
                return b""
            if self.lost:
                raise Broken("the line ended")
            until_s = until_s or self._loop.time() + self._read_timeout_s
            await self._change(until_s)
        parts, self._parts = self._parts, []
        if self._waiting_bytes > WINDOW_BYTES:
            self._transport.resume_reading()
        self._waiting_bytes = 0
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def release(self) -> bool:
        """The request is over: whether the connection can carry another one."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        return self.ended and self._sent and self._again and not self.lost and not self._parts

    def abort(self) -> None:
        self.release()
        self.lost = True
        self._transport.abort()

    async def _change(self, until_s: float) -> None:
        """Wait for anything to happen. Raises Silent when nothing does until then.

        A request has one timer, which looks again when it finds that there is time left.
        """
        self._deadline_s = until_s
        if self._timer is not None and self._timer.when() > until_s:
            self._timer.cancel()
            self._timer = None
        if self._timer is None:
            self._timer = self._loop.call_at(self._deadline_s, self._look)
        self._waiter = self._loop.create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def _look(self) -> None:
        self._timer = None
        if self._waiter is None or self._waiter.done():
            return
        if self._loop.time() < self._deadline_s:
            self._timer = self._loop.call_at(self._deadline_s, self._look)
        else:
            self._waiter.set_exception(Silent("nothing came"))

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    # ---- asyncio's protocol ----

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self._overhead_bytes += len(data)  # what is content takes itself off again
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade):
            self.abort()
        if self._overhead_bytes > MAX_OVERHEAD_BYTES:
            self.abort()
        self._wake()

    def connection_lost(self, exc: Exception | None) -> None:
        lost, self.lost = self.lost, True
        framed = "content-length" in self.headers or "transfer-encoding" in self.headers
        if self.status and not framed and exc is None and not lost:
            self.ended = True  # an old proxy's way to end a body
        self._wake()

    def pause_writing(self) -> None:
        self._writable = False

    def resume_writing(self) -> None:
        self._writable = True
        self._wake()

    # ---- httptools' callbacks: an exception in them is a parser's error ----

    def on_message_begin(self) -> None:
        if self.ended:
            raise ValueError("an answer that nobody asked for")

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self.status:
            self.headers.setdefault(name.decode("latin-1").lower(), value.decode("latin-1"))

    def on_headers_complete(self) -> None:
        status = self._parser.get_status_code()
        if status < 200:  # the answer itself is still to come
            self.headers.clear()
            return
        self.status = status
        self._overhead_bytes = 0
        self._again = self._parser.should_keep_alive()

    def on_body(self, body: bytes) -> None:
        self._parts.append(body)
        self._overhead_bytes = 0
        before, self._waiting_bytes = self._waiting_bytes, self._waiting_bytes + len(body)
        if before <= WINDOW_BYTES < self._waiting_bytes:
            self._transport.pause_reading()

    def on_message_complete(self) -> None:
        self.ended = self.status > 0


class Line:
    """An answer whose body is still to come. Close it: that is how one leaves early."""

    __slots__ = ("_connection", "_lines", "headers", "status")

    def __init__(self, lines: Lines, connection: _Connection) -> None:
        self._lines = lines
        self._connection: _Connection | None = connection
        self.status = connection.status
        self.headers: Mapping[str, str] = connection.headers  # names in lower case

    @property
    def ended(self) -> bool:
        """Whether all of the body has come."""
        return self._connection is None or self._connection.ended

    async def next(self) -> bytes:
        """The bytes that have come, b"" at the body's end. Raises Silent or Broken."""
        return b"" if self._connection is None else await self._connection.next()

    def close(self) -> None:
        """Give the connection back if the body was read whole; else end it."""
        connection, self._connection = self._connection, None
        if connection is not None:
            self._lines.give_back(connection)


class Lines:
    """Connections to one gateway. Belongs to one event loop; close it.

    Over TLS the gateway is checked against certifi's roots, whatever the environment names.
    """

    def __init__(self, base_url: str) -> None:
        url = urlsplit(base_url)
        secure = url.scheme == "https"
        self.base_url = base_url.rstrip("/").removesuffix("/v1")
        self._host = url.hostname or ""
        self._port = url.port or (443 if secure else 80)
        self._tls: ssl.SSLContext | None = None
        if secure:
            self._tls = httpx.create_ssl_context(trust_env=False)
        self._prefix = quote(urlsplit(self.base_url).path, safe="/%:@!$&'()*+,;=~")
        name = self._host.encode("idna").decode() if not self._host.isascii() else self._host
        name = f"[{name}]" if ":" in name else name
        port = f":{url.port}" if url.port else ""
        self._always = f"host: {name}{port}\r\nuser-agent: cocoon\r\naccept-encoding: identity\r\n"
        self._free = asyncio.Semaphore(MAX_CONNECTIONS)
        self._idle: deque[_Connection] = deque()  # the last used at the right

    async def open(
        self, method: str, target: str, headers: Mapping[str, str], body: bytes | None, *,
        read_timeout_s: float,
    ) -> Line:  # fmt: skip
        """Send, and return any answer once its head is there. Raises LineError.

        read_timeout_s bounds the wait for the head, and each wait for more of the body.
        """
        head = self._head(method, target, headers, body)
        await self._place()
        connection: _Connection | None = None
        try:
            connection = self._kept()
            if connection is not None and body is None:
                try:  # it may end just now, and what has no body may be asked twice
                    await connection.ask(head, b"", read_timeout_s)
                    return Line(self, connection)
                except Broken:
                    connection.abort()
                    connection = None
            if connection is None:
                connection = await self._connect()
            await connection.ask(head, body or b"", read_timeout_s)
        except BaseException:
            if connection is not None:
                connection.abort()
            self._free.release()
            raise
        return Line(self, connection)

    def give_back(self, connection: _Connection) -> None:
        """For a line that is closed."""
        self._free.release()
        if not connection.release():
            connection.abort()
            return
        now_s = asyncio.get_running_loop().time()
        connection.idle_s = now_s
        self._idle.append(connection)
        while self._idle[0].lost or now_s - self._idle[0].idle_s > KEEP_ALIVE_S:
            self._idle.popleft().abort()

    async def aclose(self) -> None:
        while self._idle:
            self._idle.pop().abort()
        await asyncio.sleep(0)  # for the transports to close

    async def _place(self) -> None:
        if not self._free.locked():
            await self._free.acquire()
            return
        try:
            async with asyncio.timeout(POOL_TIMEOUT_S):
                await self._free.acquire()
        except TimeoutError:
            raise Unreached("no free connection") from None

    def _kept(self) -> _Connection | None:
        oldest_s = asyncio.get_running_loop().time() - KEEP_ALIVE_S
        while self._idle:
            connection = self._idle.pop()
            if not connection.lost and connection.idle_s >= oldest_s:
                return connection
            connection.abort()
        return None

    async def _connect(self) -> _Connection:
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                line = await dial(self._host, self._port)
                try:
                    _, connection = await asyncio.get_running_loop().create_connection(
                        _Connection, sock=line, ssl=self._tls,
                        server_hostname=self._host if self._tls else None,
                    )  # fmt: skip
                except BaseException:
                    line.close()
                    raise
        except (OSError, UnicodeError) as error:  # a TimeoutError is an OSError
            raise Unreached(type(error).__name__) from None
        return connection

    def _head(
        self, method: str, target: str, headers: Mapping[str, str], body: bytes | None
    ) -> bytes:
        lines = "".join([f"{name}: {value}\r\n" for name, value in headers.items()])
        if lines.count("\n") != len(headers) or lines.count("\r") != len(headers):
            raise ValueError("a header's value is one line")
        size = "" if body is None else f"content-length: {len(body)}\r\n"
        head = f"{method} {self._prefix}{target} HTTP/1.1\r\n{self._always}{size}{lines}\r\n"
        return head.encode("ascii")
