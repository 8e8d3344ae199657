"""A connection's bytes to its messages, on arrival: no stream, no task and no waiting in between.

It takes the place of nats-py's stream reader once a connection stands. Messages of direct handlers
are handed over at once; whatever else the server says goes to nats-py's own parser, in order.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
from collections import deque
from collections.abc import Callable
from typing import Final, TypeAlias, cast

_log = logging.getLogger("cocoon.bus")
_MESSAGES: Final = (b"MSG ", b"HMSG ")
_VISIBLE: Final = re.compile(rb"[\x21-\x7e]+\Z")
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
            stop = self._message(data, at, end) if data.startswith(_MESSAGES, at) else 0
            if stop is None:  # where the next line begins is not known: nothing after it is
                self._rest = b""
                self._transport.abort()
                return
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

    def _message(self, data: bytes, at: int, end: int) -> int | None:
        """Hand over the message whose line is data[at:end]: where it stops, less than 0 (minus
        where it will stop) until it is whole, None if the line cannot be understood.

        Whoever may publish chooses subject and reply, and the server lets bytes through that are
        white space to others. What is not of visible ASCII is passed by, payload and all.
        """
        words = data[at:end].split(b" ")
        counts = words[-1:] if words[0] == b"MSG" else words[-2:]
        names = words[1:2] + words[3 : -len(counts)]  # the subject, and a reply if there is one
        if len(names) not in (1, 2) or len(words) != 2 + len(names) + len(counts):
            return None
        if not all(map(bytes.isdigit, (words[2], *counts))):
            return None
        sid, total = int(words[2]), int(counts[-1])
        head_bytes = int(counts[0]) if len(counts) == 2 else 0
        if head_bytes > total:
            return None
        reply = names[1] if len(names) == 2 else b""
        if not reply:  # the server's own account writes two spaces where there is none
            names = names[:1]
        start = end + 2
        stop = start + total + 2
        if len(data) < stop:
            return -stop
        body = start + head_bytes
        if not all(map(_VISIBLE.match, names)):
            _log.warning("bus message refused", extra={"kind": "BadSubject"})
        elif not self._deliver(sid, words[1], reply, data[start:body], data[body : stop - 2]):
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
    already, reading.ended = bytes(buffered), reader._eof  # type: ignore[attr-defined]
    buffered.clear()
    with contextlib.suppress(RuntimeError):  # a stream that was full has paused it
        transport.resume_reading()
    reading.take_over(already)
    return reading
