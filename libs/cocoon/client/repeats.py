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

from cocoon.client.recording import Reading, Recording
from cocoon.client.session import Job
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

    @cached_property
    def fingerprint(self) -> bytes:
        caller = hashlib.sha256(self.caller.encode()).digest()
        return hashlib.sha256(caller + hashlib.sha256(self.body).digest()).digest()

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
        self.ended_s: float | None = None
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
        self._entries: OrderedDict[int, Entry] = OrderedDict()
        self._by_key: dict[tuple[str, str], Entry] = {}
        self._by_fingerprint: dict[bytes, list[Entry]] = {}

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
        self._entries.clear()
        self._by_key.clear()
        self._by_fingerprint.clear()

    def _find(self, asked: Asked) -> Entry | None:
        if asked.key is not None:
            entry = self._by_key.get((asked.caller, asked.key))
            if entry is not None and entry.asked.fingerprint != asked.fingerprint:
                raise Conflict(
                    "This Idempotency-Key was used for another request; use a new key.",
                    param="Idempotency-Key",
                    code="idempotency_mismatch",
                )
            return entry
        retry = asked.retry or 0
        earlier = [
            entry
            for entry in self._by_fingerprint.get(asked.fingerprint, ())
            if entry.asked.key is None and entry.attempt < retry
        ]
        return min(earlier, key=Entry.rank, default=None)

    def _begin(self, asked: Asked) -> Entry:
        if sum(entry.live for entry in self._entries.values()) >= MAX_LIVE:
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
        entry.ended_s = None
        entry.task = asyncio.create_task(self._work(entry))
        entry.task.add_done_callback(lambda _: self._ended(entry))

    def _ended(self, entry: Entry) -> None:
        entry.ended_s = self._clock.monotonic_s()
        if entry.grace is not None:
            entry.grace.cancel()
            entry.grace = None

    def _abandon(self, entry: Entry) -> None:
        if entry.live and entry.task is not None and not entry.recording.readers:
            entry.cancelled = True
            entry.task.cancel()

    def _forget_old(self) -> None:
        """Drop what has timed out, then the oldest that ended while there is too much."""
        now_s = self._clock.monotonic_s()
        kept = sum(entry.held_bytes for entry in self._entries.values())
        for entry in list(self._entries.values()):
            if entry.live or entry.ended_s is None:
                continue
            memory_s = RETRY_MEMORY_S if entry.asked.key is None else KEYED_MEMORY_S
            if (
                now_s - entry.ended_s > memory_s
                or len(self._entries) >= MAX_ENTRIES
                or kept > MAX_BYTES
            ):
                kept -= entry.held_bytes
                self._drop(entry)

    def _drop(self, entry: Entry) -> None:
        del self._entries[id(entry)]
        asked = entry.asked
        if asked.key is not None:
            del self._by_key[(asked.caller, asked.key)]
        alike = self._by_fingerprint[asked.fingerprint]
        alike.remove(entry)
        if not alike:
            del self._by_fingerprint[asked.fingerprint]
