"""One answer as it is told to local callers: kept, so that a repeat gets the very same bytes.

Bounded: a large answer forgets its beginning once it was read, and waits for a slow reader.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Final

from cocoon.kernel.errors import Unavailable

KEEP_BYTES: Final = 8 * 1024 * 1024  # an answer up to this size can be replayed whole
WINDOW_BYTES: Final = 1024 * 1024  # how far a larger answer runs ahead of its slowest reader


@dataclass(frozen=True, slots=True)
class Head:
    """The status line and headers of a local answer."""

    status: int
    headers: tuple[tuple[str, str], ...]


@dataclass(slots=True)
class _Reader:
    position: int = 0


class Recording:
    """Written by one task, read by any number, from the beginning."""

    def __init__(self) -> None:
        self._head: Head | None = None
        self._parts: list[bytes] = []
        self._dropped = 0
        self._readers: list[_Reader] = []
        self._waiting: list[asyncio.Future[None]] = []
        self.kept_bytes = 0
        self.ended = False
        self.failed = False  # it ended with an error before any content

    @property
    def begun(self) -> bool:
        return self._head is not None

    @property
    def readers(self) -> int:
        return len(self._readers)

    @property
    def whole(self) -> bool:
        """Whether a new reader can have it from its first byte."""
        return not self._dropped

    def begin(self, head: Head, *, failed: bool = False) -> None:
        self._head = head
        self.failed = failed
        self._tell()

    async def write(self, part: bytes) -> None:
        """Append. Waits while a large answer is far ahead of its slowest reader."""
        self.put(part)
        while self.kept_bytes > KEEP_BYTES and self._readers:
            self._drop_read()
            if self.kept_bytes <= KEEP_BYTES + WINDOW_BYTES:
                break
            await self._change()

    def put(self, part: bytes) -> None:
        """Append without waiting: for an answer's last words."""
        self._parts.append(part)
        self.kept_bytes += len(part)
        self._tell()

    def end(self) -> None:
        self.ended = True
        self._tell()

    def attach(self) -> Reading:
        reader = _Reader()
        self._readers.append(reader)
        return Reading(self, reader)

    def _detach(self, reader: _Reader) -> None:
        if reader in self._readers:
            self._readers.remove(reader)
            self._tell()

    def _drop_read(self) -> None:
        """Forget what every reader has had, down to what may be kept."""
        had = min(reader.position for reader in self._readers) - self._dropped
        dropped = 0
        while dropped < had and self.kept_bytes > KEEP_BYTES:
            self.kept_bytes -= len(self._parts[dropped])
            dropped += 1
        del self._parts[:dropped]
        self._dropped += dropped

    def _tell(self) -> None:
        waiting, self._waiting = self._waiting, []
        for future in waiting:
            if not future.done():
                future.set_result(None)

    async def _change(self) -> None:
        future = asyncio.get_running_loop().create_future()
        self._waiting.append(future)
        await future

    async def _next(self, reader: _Reader) -> bytes | None:
        """All that this reader has not had yet, as one piece; None at the end."""
        while True:
            parts = self._parts[reader.position - self._dropped :]
            if parts:
                reader.position += len(parts)
                if self.kept_bytes > KEEP_BYTES:
                    self._tell()
                return parts[0] if len(parts) == 1 else b"".join(parts)
            if self.ended:
                return None
            await self._change()

    async def _wait_head(self) -> Head:
        while self._head is None:
            if self.ended:  # its task was ended from outside: the client is closing
                raise Unavailable("The client is closing; try again.", retry_after_s=1)
            await self._change()
        return self._head


class Reading:
    """One caller's way through a recording. Close it when the caller leaves."""

    def __init__(self, recording: Recording, reader: _Reader) -> None:
        self._recording = recording
        self._reader = reader
        self.complete = False  # the caller was given all of it

    async def head(self) -> Head:
        return await self._recording._wait_head()

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        part = await self._recording._next(self._reader)
        if part is None:
            self.complete = True
            raise StopAsyncIteration
        return part

    def close(self) -> None:
        self._recording._detach(self._reader)
