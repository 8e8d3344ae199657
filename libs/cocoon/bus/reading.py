"""A connection's bytes to its messages, on arrival: no stream, no task and no waiting in between.

It takes the place of nats-py's stream reader once a connection stands. Messages of direct handlers
are handed over at once; whatever else the server says goes to nats-py's own parser, in order.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable
from typing import Final, TypeAlias, cast

MAX_QUEUED: Final = 1024  # then the socket is not read on until nats-py has caught up
MAX_LINE_BYTES: Final = 256 * 1024  # INFO names every server of a cluster
# subscription, subject, reply, headers, payload; True if it was for a direct handler
Deliver: TypeAlias = Callable[[int, bytes, bytes, bytes, bytes], bool]


class Reading(asyncio.Protocol):
    """The protocol of one connection. `whole` gives what nats-py has to see, `ended` the end."""

    def __init__(self, inner: asyncio.Protocol, transport: asyncio.Transport, deliver: Deliver):
        self._inner, self._transport, self._deliver = inner, transport, deliver
        self._rest = b""
        self._wanted = 0  # bytes that the message at the beginning of `_rest` has
        self._queued: deque[bytes] = deque()
        self._news = asyncio.Event()
        self._paused = False
        self.ended = False

    def take_over(self, already: bytes) -> None:
        """Hear from the transport from now on, and first what it has said already."""
        self._transport.set_protocol(self)
        if already:
            self.data_received(already)

    async def whole(self) -> bytes:
        """The next line or message for nats-py's parser; nothing at the connection's end."""
        while not self._queued:
            if self.ended:
                return b""
            self._news.clear()
            await self._news.wait()
        found = self._queued.popleft()
        if self._paused and len(self._queued) < MAX_QUEUED // 2:
            self._paused = False
            self._transport.resume_reading()
        return found

    # ---- asyncio's side ----

    def data_received(self, data: bytes) -> None:
        if self._rest:
            data = self._rest + data
            if len(data) < self._wanted:
                self._rest = data
                return
        at, size = 0, len(data)
        while at < size:
            end = data.find(b"\r\n", at)
            if end < 0:
                self._wanted = 0
                if size - at > MAX_LINE_BYTES:
                    self._transport.abort()
                    return
                break
            stop = self._message(data, at, end) if data[at] in b"MHmh" else 0
            if stop < 0:
                self._wanted = -stop - at
                break
            if not stop:
                stop = end + 2
                self._queue(data[at:stop])
            at = stop
        else:
            self._wanted = 0
        self._rest = data[at:]

    def _message(self, data: bytes, at: int, end: int) -> int:
        """Hand over the message whose line is data[at:end]: where it stops, 0 if it is none, or
        less than 0: minus where it will stop once it is whole.
        """
        words = data[at:end].split()
        kind, count = words[0].upper(), len(words)
        try:
            if kind == b"MSG" and count in (4, 5):
                sid, head_bytes, total = int(words[2]), 0, int(words[-1])
                reply = words[3] if count == 5 else b""
            elif kind == b"HMSG" and count in (5, 6):
                sid, head_bytes, total = int(words[2]), int(words[-2]), int(words[-1])
                reply = words[3] if count == 6 else b""
            else:
                return 0
        except ValueError:
            return 0
        start = end + 2
        stop = start + total + 2
        if len(data) < stop:
            return -stop
        body = start + head_bytes
        if not self._deliver(sid, words[1], reply, data[start:body], data[body : stop - 2]):
            self._queue(data[at:stop])
        return stop

    def _queue(self, whole: bytes) -> None:
        self._queued.append(whole)
        self._news.set()
        if len(self._queued) >= MAX_QUEUED and not self._paused:
            self._paused = True
            self._transport.pause_reading()

    def eof_received(self) -> bool | None:
        self._end()
        return self._inner.eof_received()

    def connection_lost(self, exc: Exception | None) -> None:
        self._end()
        self._inner.connection_lost(exc)

    def _end(self) -> None:
        self.ended = True
        self._news.set()

    def pause_writing(self) -> None:
        self._inner.pause_writing()

    def resume_writing(self) -> None:
        self._inner.resume_writing()


def over(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, deliver: Deliver) -> Reading:
    """Take a connection's reading over from its stream."""
    transport = cast("asyncio.Transport", writer.transport)
    reading = Reading(cast("asyncio.Protocol", transport.get_protocol()), transport, deliver)
    buffered: bytearray = reader._buffer  # type: ignore[attr-defined]
    already, reading.ended = bytes(buffered), reader.at_eof()
    buffered.clear()
    with contextlib.suppress(RuntimeError):  # a stream that was full has paused it
        transport.resume_reading()
    reading.take_over(already)
    return reading
