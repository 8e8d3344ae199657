"""The log as a list: the same positions, versions, hashes, repeats and conflicts as Postgres gives.

A small real implementation for simulation: `ModelLog` is the rows, `ModelAppender` speaks the
appender's interface over it. Faults are told to it, never drawn inside.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from cocoon.contracts.envelope import GENESIS_HASH, AppendItem, StoredEvent
from cocoon.eventlog.batch import Appended, Conflict, prepare
from cocoon.eventlog.connection import StaleTerm
from cocoon.eventlog.read import StoredCommand
from cocoon.kernel.errors import CocoonError, Fatal, Unavailable


@dataclass
class ModelLog:
    """One shard's rows. `now_us` gives the database's clock; recorded times never step back."""

    shard: int
    now_us: Callable[[], int] = lambda: 1_790_000_000_000_000
    events: list[StoredEvent] = field(default_factory=list)
    commands: dict[str, StoredCommand] = field(default_factory=dict)
    versions: dict[str, int] = field(default_factory=dict)
    terms: dict[str, int] = field(default_factory=dict)
    _streams: dict[str, list[StoredEvent]] = field(default_factory=dict)

    @property
    def head_hash(self) -> bytes:
        return self.events[-1].hash if self.events else GENESIS_HASH

    def acquire_term(self, role: str) -> int:
        self.terms[role] = self.terms.get(role, 0) + 1
        return self.terms[role]

    def stream(self, name: str) -> list[StoredEvent]:
        return self._streams.get(name, [])

    def job_of_command(self, command_id: str) -> str | None:
        known = self.commands.get(command_id)
        return self.events[known.first_position - 1].correlation_id if known else None

    def append(self, item: AppendItem, role: str = "", term: int = 0) -> Appended | Conflict:
        """Append one item whole, or say what it conflicts with. Raises StaleTerm for an old term.

        An empty role skips the fence.
        """
        if role and self.terms.get(role) != term:
            raise StaleTerm("another process owns this shard now; this one must stop")
        known = self.commands.get(item.command_id)
        if known is not None:
            return _appended(self.events[known.first_position - 1 : known.last_position], True)
        for stream, version in item.expects:
            actual = self.versions.get(stream, 0)
            if actual != version:
                return Conflict(stream, version, actual)
        return _appended(self._write(item), False)

    def _write(self, item: AppendItem) -> list[StoredEvent]:
        prepared = prepare(item)
        first = len(self.events) + 1
        recorded_at_us = self.now_us()
        if self.events:
            recorded_at_us = max(recorded_at_us, self.events[-1].recorded_at_us)
        for index, new in enumerate(item.events):
            version = self.versions.get(new.stream, 0) + 1
            self.versions[new.stream] = version
            fields = {
                "shard": self.shard, "position": len(self.events) + 1, "stream": new.stream,
                "version": version, "type": new.data.event_type,
                "schema_version": new.data.schema_version, "event_id": prepared.event_ids[index],
                "causation_id": item.command_id, "correlation_id": item.correlation_id,
                "actor": item.actor, "recorded_at_us": recorded_at_us,
                "data": prepared.data[index].encode(), "prev_hash": self.head_hash,
                "traceparent": item.traceparent,
            }  # fmt: skip
            draft = StoredEvent(**fields, hash=b"")  # type: ignore[arg-type]
            stored = StoredEvent(**fields, hash=draft.compute_hash())  # type: ignore[arg-type]
            self.events.append(stored)
            self._streams.setdefault(new.stream, []).append(stored)
        self.commands[item.command_id] = StoredCommand(
            item.command_id, first, len(self.events), item.command
        )
        return self.events[first - 1 :]


def _appended(events: Iterable[StoredEvent], repeated: bool) -> Appended:
    rows = list(events)
    return Appended(
        positions=tuple(row.position for row in rows),
        versions=tuple(row.version for row in rows),
        events=rows,
        repeated=repeated,
    )


class ModelAppender:
    """Appends to a ModelLog with the public behaviour of cocoon.eventlog.append.LogAppender.

    `hold` keeps calls from being committed until `release`; `fail(error)` makes the next append
    raise (nothing written); `lose_answer` makes the next one commit, lose its answer and be
    repeated, as the real appender does when its connection dies.
    """

    def __init__(self, log: ModelLog, role: str, *, queue_limit: int = 8192) -> None:
        self._log, self._role, self._queue_limit = log, role, queue_limit
        self._term = 0
        self._open = asyncio.Event()
        self._open.set()
        self._faults: deque[CocoonError | None] = deque()
        self._waiting = 0
        self._closed = False

    @property
    def term(self) -> int:
        return self._term

    @property
    def queued(self) -> int:
        return self._waiting

    async def acquire_term(self) -> int:
        self._term = self._log.acquire_term(self._role)
        return self._term

    def hold(self) -> None:
        self._open.clear()

    def release(self) -> None:
        self._open.set()

    def fail(self, error: CocoonError) -> None:
        self._faults.append(error)

    def lose_answer(self) -> None:
        self._faults.append(None)

    async def append(self, item: AppendItem) -> Appended | Conflict:
        if self._closed:
            raise Unavailable("the log's writer is closed")
        if not self._term:
            raise Fatal("take a term before the first append")
        if self._waiting >= self._queue_limit:
            raise Unavailable("the log's queue is full; try again shortly", code="log_queue_full")
        self._waiting += 1
        try:
            await self._open.wait()
        finally:
            self._waiting -= 1
        await asyncio.sleep(0)  # a commit is never instantaneous
        if self._faults:
            fault = self._faults.popleft()
            if fault is not None:
                raise fault
            self._log.append(item, self._role, self._term)
        return self._log.append(item, self._role, self._term)

    async def close(self) -> None:
        self._closed = True
        self.release()
