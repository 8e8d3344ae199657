"""Repeats and retries: which earlier request a new one is, so that nobody pays twice.

By Idempotency-Key, or for an SDK's own retry by its body and caller. Bounded in number, bytes
and time; it lives in memory, so a restart forgets requests without a key.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections import OrderedDict
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Final

from cocoon.chat import ENDPOINT
from cocoon.client.job import Job
from cocoon.client.recording import Reading, Recording
from cocoon.client.session import idempotency_mismatch
from cocoon.kernel.clock import Clock
from cocoon.kernel.errors import Conflict, Unavailable

MAX_ENTRIES: Final = 512
MAX_LIVE: Final = 256
MAX_BYTES: Final = 64 * 1024 * 1024
KEYED_MEMORY_S: Final = 600.0
RETRY_MEMORY_S: Final = 60.0
GRACE_S: Final = 2.0  # how long a job outlives a caller that may retry


@dataclass(frozen=True)
class Asked:
    """What tells one request from another. `caller` is whatever authenticates it."""

    body: bytes = field(repr=False)
    caller: str = field(repr=False)
    key: str | None  # Idempotency-Key
    retry: int | None  # x-stainless-retry-count; None from a client that sends none
    traceparent: str | None = None
    endpoint: str = ENDPOINT

    @cached_property
    def fingerprint(self) -> bytes:
        parts = (self.caller.encode(), self.endpoint.encode(), self.body)
        return hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in parts)).digest()

    @property
    def can_repeat(self) -> bool:
        """Whether the same caller may come back for this answer."""
        return self.key is not None or self.retry is not None


class Entry:
    """One request and its answer, however often it is asked for."""

    def __init__(self, asked: Asked) -> None:
        self.asked = asked
        self.attempt = asked.retry or 0  # the newest attempt that was given this answer
        self.job: Job | None = None  # kept, so that a retry sends the same envelope
        self.recording = Recording()
        self.cancelled = False
        self.delivered = False
        self.ended_s = 0.0
        self.kept_bytes = 0  # as counted when it ended
        self.task: asyncio.Task[None] | None = None
        self.grace: asyncio.TimerHandle | None = None

    @property
    def live(self) -> bool:
        return self.task is not None and not self.task.done()

    @property
    def held_bytes(self) -> int:
        """The answer, the body and its sealed form."""
        return self.recording.kept_bytes + 2 * len(self.asked.body)

    def rank(self) -> int:
        """Which of several equal requests a retry means: one that nobody listens to, then one
        that was answered with an error.
        """
        if not self.delivered and not self.recording.readers:
            return 0
        if self.recording.ended and self.recording.failed:
            return 1
        return 2 if self.live else 3


class Repeats:
    """The memory of recent requests. `work(entry)` produces an entry's answer."""

    def __init__(self, work: Callable[[Entry], Coroutine[Any, Any, None]], *, clock: Clock) -> None:
        self._work = work
        self._clock = clock
        self._entries: dict[int, Entry] = {}
        self._by_key: dict[tuple[str, str], Entry] = {}
        self._by_fingerprint: dict[bytes, list[Entry]] = {}
        self._live = 0
        # those that ended, the oldest end first: what has a key is remembered for longer
        self._keyed: OrderedDict[int, Entry] = OrderedDict()
        self._plain: OrderedDict[int, Entry] = OrderedDict()
        self._kept_bytes = 0  # of those that ended

    def open(self, asked: Asked) -> tuple[Entry, Reading]:
        """Attach to the request that this one repeats, or begin a new one.

        Raises Conflict: idempotency_mismatch, cancelled, not_replayable. Unavailable when too
        many requests run.
        """
        self._forget_old()
        entry = self._find(asked)
        if entry is None:
            entry = self._begin(asked)
        elif entry.cancelled:
            raise Conflict(
                "This request's job was cancelled when its client left; send it as a new request.",
                code="cancelled",
            )
        elif entry.recording.ended and entry.recording.failed:
            entry.recording = Recording()  # nothing was answered: the same envelope goes again
            self._start(entry)
        elif not entry.recording.whole:
            raise Conflict(
                "This request was answered, and its answer is too large to be repeated.",
                code="not_replayable",
            )
        if entry.grace is not None:
            entry.grace.cancel()
            entry.grace = None
        entry.attempt = max(entry.attempt, asked.retry or 0)
        return entry, entry.recording.attach()

    def leave(self, entry: Entry, reading: Reading) -> None:
        """A caller is done, or gone: a job that nobody waits for is cancelled."""
        reading.close()
        entry.delivered = entry.delivered or reading.complete
        if not entry.live or entry.recording.readers or reading.complete:
            return
        if entry.asked.can_repeat:
            loop = asyncio.get_running_loop()
            entry.grace = loop.call_later(GRACE_S, self._abandon, entry)
        else:
            self._abandon(entry)

    async def aclose(self) -> None:
        """Cancel what runs and forget everything."""
        tasks = [entry.task for entry in self._entries.values() if entry.task is not None]
        for entry in self._entries.values():
            if entry.grace is not None:
                entry.grace.cancel()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for entry in list(self._entries.values()):
            self._drop(entry)

    def _find(self, asked: Asked) -> Entry | None:
        if asked.key is not None:
            entry = self._by_key.get((asked.caller, asked.key))
            if entry is not None and entry.asked.fingerprint != asked.fingerprint:
                raise idempotency_mismatch()
            return entry
        if not asked.retry:
            return None  # a first attempt repeats nothing
        earlier = [
            entry
            for entry in self._by_fingerprint.get(asked.fingerprint, ())
            if entry.asked.key is None and entry.attempt < asked.retry
        ]
        return min(earlier, key=Entry.rank, default=None)

    def _begin(self, asked: Asked) -> Entry:
        if self._live >= MAX_LIVE:
            raise Unavailable(
                f"{MAX_LIVE} requests are running already; try again shortly.",
                code="too_many_requests",
                retry_after_s=1,
            )
        entry = Entry(asked)
        self._entries[id(entry)] = entry
        if asked.key is not None:
            self._by_key[(asked.caller, asked.key)] = entry
        self._by_fingerprint.setdefault(asked.fingerprint, []).append(entry)
        self._start(entry)
        return entry

    def _start(self, entry: Entry) -> None:
        self._remember(entry, -1)
        self._live += 1
        entry.task = asyncio.create_task(self._work(entry))
        entry.task.add_done_callback(lambda _: self._ended(entry))

    def _ended(self, entry: Entry) -> None:
        self._live -= 1
        entry.ended_s = self._clock.monotonic_s()
        entry.kept_bytes = entry.held_bytes
        self._remember(entry, 1)
        if entry.grace is not None:
            entry.grace.cancel()
            entry.grace = None

    def _remember(self, entry: Entry, sign: int) -> None:
        """Put an ended entry (1) into its queue, or take it (-1) out again if it is there."""
        queue = self._plain if entry.asked.key is None else self._keyed
        if sign > 0:
            queue[id(entry)] = entry
        elif queue.pop(id(entry), None) is None:
            return
        self._kept_bytes += sign * entry.kept_bytes

    def _abandon(self, entry: Entry) -> None:
        if entry.live and entry.task is not None and not entry.recording.readers:
            entry.cancelled = True
            entry.task.cancel()

    def _forget_old(self) -> None:
        """Drop what has timed out, then the oldest that ended while there is too much."""
        now_s = self._clock.monotonic_s()
        for queue, memory_s in ((self._keyed, KEYED_MEMORY_S), (self._plain, RETRY_MEMORY_S)):
            while queue and now_s - (oldest := next(iter(queue.values()))).ended_s > memory_s:
                self._drop(oldest)
        while len(self._entries) >= MAX_ENTRIES or self._kept_bytes > MAX_BYTES:
            ended = [next(iter(queue.values())) for queue in (self._keyed, self._plain) if queue]
            if not ended:
                return
            self._drop(min(ended, key=lambda entry: entry.ended_s))

    def _drop(self, entry: Entry) -> None:
        self._remember(entry, -1)
        del self._entries[id(entry)]
        asked = entry.asked
        if asked.key is not None:
            del self._by_key[(asked.caller, asked.key)]
        alike = self._by_fingerprint[asked.fingerprint]
        alike.remove(entry)
        if not alike:
            del self._by_fingerprint[asked.fingerprint]
