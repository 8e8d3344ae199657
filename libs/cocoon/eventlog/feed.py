"""What a relay reads, to whoever follows the same shard in the relay's own process.

Billing relays the log and posts it: it need not hear from the bus what it has just read. A Tail
takes a Feed as it takes the bus: density and hashes tell a gap, and Postgres fills it.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Sequence
from typing import Final

from cocoon.contracts.envelope import StoredEvent
from cocoon.kernel.errors import NotFound

KEPT: Final = 2048  # of the newest events, for a reader that joins a moment late
_BUFFER: Final = 65_536


class Feed:
    """One shard's newest events, in order; a relay that starts again repeats some."""

    def __init__(self) -> None:
        self.is_connected = False  # whether the relay reads the log now
        self._kept: deque[StoredEvent] = deque(maxlen=KEPT)
        self._readers: set[FeedReader] = set()

    def push(self, events: Sequence[StoredEvent]) -> None:
        """The relay has read these."""
        if self._kept and events[0].position != self._kept[-1].position + 1:
            self._kept.clear()
        self._kept.extend(events)
        for reader in self._readers:
            reader.push(events)

    def reader(self) -> FeedReader:
        """Somebody who follows; `open` begins."""
        return FeedReader(self._kept, self._readers)


class FeedReader:
    """One follower's bounded buffer."""

    def __init__(self, kept: deque[StoredEvent], readers: set[FeedReader]) -> None:
        self._kept, self._readers = kept, readers
        self._buffer: deque[StoredEvent] = deque()
        self._arrived = asyncio.Event()
        self.overflowed = False

    async def open(self, first: int) -> None:
        """Begin at a position. Raises NotFound if newer events have driven it out."""
        if self._kept and self._kept[0].position > first:
            raise NotFound("the relay is further already; read the log")
        self._readers.add(self)
        self.push([event for event in self._kept if event.position >= first])

    def push(self, events: Sequence[StoredEvent]) -> None:
        if len(self._buffer) + len(events) > _BUFFER:
            self.overflowed = True
            return
        self._buffer.extend(events)
        self._arrived.set()

    async def take(self, limit: int, timeout_s: float) -> list[StoredEvent]:
        """Up to `limit` events; none after `timeout_s` without any."""
        if not self._buffer:
            self._arrived.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(timeout_s):
                    await self._arrived.wait()
        return [self._buffer.popleft() for _ in range(min(limit, len(self._buffer)))]

    def silent_for_s(self) -> float:
        """No heartbeat is due here: whoever follows looks at the log's head instead."""
        return 0.0

    async def close(self) -> None:
        self._readers.discard(self)
