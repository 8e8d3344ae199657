"""Sealed results on disk until the network has them: ciphertext and receipts only.

A result is durable before its last frame leaves. All results that wait share one write and one
sync. After a restart they are submitted again; the job itself cannot run again, because its key
died with the process.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, TypeVar

from cocoon.kernel.errors import ConfigurationError
from services.provider.journal import (
    RESULT_BYTES,
    Journal,
    Name,
    Segment,
    SpoolHead,
    encode_acks,
    encode_result,
    read_records,
)
from services.provider.spool_files import read_spool_file

MIN_FREE_BYTES: Final = 64 * 1024  # of the disk; room for heads and the folder itself
SEGMENT_BYTES: Final = 4 * 1024 * 1024  # then another one begins
SEGMENT_S: Final = 10.0  # or after so long; and so long a full one may wait for its last results
T = TypeVar("T")


@dataclass(eq=False, slots=True)
class SpoolItem:
    """A result that waits for its acknowledgement. Its place on disk may change."""

    head: SpoolHead
    place: tuple[Segment, int]  # offset of the response; one value, as other threads read it

    @property
    def segment(self) -> Segment:
        return self.place[0]

    @property
    def key(self) -> Name:
        return self.head.name

    @property
    def disk_bytes(self) -> int:
        return RESULT_BYTES + self.head.response_bytes

    def read(self) -> bytes:
        """The response's bytes. Raises OSError or ValueError if they are gone or damaged."""
        response = self.read_unchecked()
        if hashlib.sha256(response).hexdigest() != self.head.blob_hash:
            raise ValueError("the spooled response does not match its hash")
        return response

    def read_unchecked(self) -> bytes:
        segment, offset = self.place
        try:
            return segment.read(offset, self.head.response_bytes)
        except FileNotFoundError:
            if segment is self.segment:
                raise
        segment, offset = self.place  # it was moved meanwhile
        return segment.read(offset, self.head.response_bytes)


@dataclass(eq=False, slots=True)
class _Unwritten:
    head: SpoolHead
    record: bytes
    done: asyncio.Future[SpoolItem]


def _tell(group: list[_Unwritten], error: BaseException) -> None:
    """Whatever happened, nobody waits for ever."""
    told = error if isinstance(error, OSError) else OSError(f"not written: {error!r}")
    told.__cause__ = None if told is error else error
    for unwritten in group:
        if not unwritten.done.done():
            unwritten.done.set_exception(told)


@dataclass
class Spool:
    """At most `max_items` results, and `max_bytes` on disk.

    What runs has room reserved, so that a result finds its place when it is done. One thread
    touches the files; everything else is the event loop's.
    """

    folder: Path
    max_items: int
    max_bytes: int
    on_stored: Callable[[SpoolItem], None] | None = None  # also when its writer is gone
    _jobs: dict[str, dict[int, SpoolItem]] = field(default_factory=dict)  # by job, by epoch
    _reserved: dict[str, int] = field(default_factory=dict)  # by job
    _reserved_bytes: int = 0
    _count: int = 0
    _unwritten: list[_Unwritten] = field(default_factory=list)
    _acknowledged: list[Name] = field(default_factory=list)  # not on disk yet
    _writer: asyncio.Task[None] | None = None
    _uncounted: bool = False  # whether a result may be on disk that is in nobody's count
    _turn: asyncio.Lock = field(default_factory=asyncio.Lock)  # from a write to its counting

    def __post_init__(self) -> None:
        self._journal = Journal(self.folder)
        self._segment_bytes = min(SEGMENT_BYTES, self.max_bytes // 8)
        self._thread = ThreadPoolExecutor(1, "spool")

    def open(self) -> None:
        """Read what a former process left, without what is damaged or half-written."""
        try:
            for segment, data in self._journal.open():
                for record in read_records(data):
                    if isinstance(record, list):
                        self._drop(record)
                    else:
                        self._keep(SpoolItem(record[0], (segment, record[1])))
            self._import(self._journal.former_files)
            for segment in [s for s in self._journal.segments if not s.live_bytes]:
                self._journal.remove(segment)
        except OSError:
            raise ConfigurationError(f"the spool folder {self.folder} cannot be used") from None

    def _import(self, paths: list[Path]) -> None:
        """Move a former version's results into the journal. Each is in one of them at any time."""
        group: list[tuple[SpoolHead, bytes]] = []
        read, size = 0, 0
        for at, path in enumerate(paths, start=1):
            found = read_spool_file(path)
            if found and found[0].epoch not in self._jobs.get(found[0].job_id, {}):
                group.append((found[0], encode_result(*found)))
                size += len(group[-1][1])
            if size < self._segment_bytes and at < len(paths):
                continue
            if group:
                segment, offset = self._journal.append(b"".join([record for _, record in group]))
                self._count_in(group, segment, offset + size)
                self._journal.close()
            for moved in paths[read:at]:
                moved.unlink()
            group, read, size = [], at, 0

    async def close(self) -> None:
        """Finish what is being written, and leave as little behind as is owed."""
        while self._writer is not None:
            await asyncio.wait([self._writer])
        async with self._turn:
            await asyncio.to_thread(self._thread.shutdown)
        with contextlib.suppress(OSError):  # what stays is submitted again, which is harmless
            if not (self._jobs or self._uncounted):
                self._clear()
            elif self._acknowledged:
                self._journal.append(encode_acks(self._acknowledged), durable=False)

    # ---- room ----

    @property
    def is_full(self) -> bool:
        """Whether the bounds leave no place for another result, however small."""
        return not self._is_within_bounds(1)

    def has_room(self, size: int = 1) -> bool:
        """Whether another result of `size` bytes fits, within the bounds and on the disk."""
        wanted = self._reserved_bytes + size
        return self._is_within_bounds(size) and wanted + MIN_FREE_BYTES <= self._free_bytes()

    def _is_within_bounds(self, size: int) -> bool:
        return (
            self._count + len(self._reserved) < self.max_items
            and self._journal.disk_bytes + self._reserved_bytes + size <= self.max_bytes
        )

    def reserve(self, job_id: str, size: int) -> None:
        """Keep room for a job that begins; ask `has_room` first."""
        self.release(job_id)
        self._reserved[job_id] = size
        self._reserved_bytes += size

    def release(self, job_id: str) -> None:
        """The job has ended: its result, if any, is counted in."""
        self._reserved_bytes -= self._reserved.pop(job_id, 0)

    def _free_bytes(self) -> int:
        try:
            disk = os.statvfs(self.folder)
        except OSError:
            return self.max_bytes * 2  # it does not tell: what is written there will
        return disk.f_bavail * disk.f_frsize

    # ---- what waits ----

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[SpoolItem]:
        return iter([item for epochs in self._jobs.values() for item in epochs.values()])

    def of_job(self, job_id: str) -> SpoolItem | None:
        """The newest result of a job."""
        epochs = self._jobs.get(job_id)
        return epochs[max(epochs)] if epochs else None

    async def write(self, head: SpoolHead, response: bytes) -> SpoolItem:
        """Keep one result: it is durable and counted in when this returns.

        Raises OSError, a full disk's too, and leaves nothing half-written behind.
        """
        unwritten = _Unwritten(
            head, encode_result(head, response), asyncio.get_running_loop().create_future()
        )
        self._unwritten.append(unwritten)
        if self._writer is None:
            self._writer = asyncio.create_task(self._write())
        return await unwritten.done

    def remove(self, item: SpoolItem) -> None:
        """The network has it: it counts no more. A later write says so on disk."""
        if self._drop([item.key]):
            self._acknowledged.append(item.key)

    async def _write(self) -> None:
        """Write what waits, again and again, until nothing does."""
        try:
            while self._unwritten:
                async with self._turn:
                    await self._write_group(self._next_group())
        except BaseException as error:
            unwritten, self._unwritten = self._unwritten, []
            _tell(unwritten, error)
            raise
        finally:
            self._writer = None

    async def _write_group(self, group: list[_Unwritten]) -> None:
        try:
            place = await self._append([unwritten.record for unwritten in group], acks=True)
            self._wrote(group, *place)
        except BaseException as error:
            _tell(group, error)
            if not isinstance(error, Exception):  # cancelled: the thread may write nevertheless
                self._uncounted = True
                raise

    def _next_group(self) -> list[_Unwritten]:
        size, count = 0, 0
        while count < len(self._unwritten) and size < self._segment_bytes:
            size += len(self._unwritten[count].record)
            count += 1
        group, self._unwritten = self._unwritten[:count], self._unwritten[count:]
        return group

    def _wrote(self, group: list[_Unwritten], segment: Segment, end: int) -> None:
        items = self._count_in([(each.head, each.record) for each in group], segment, end)
        for unwritten, item in zip(group, items, strict=True):
            if self.on_stored is not None:
                self.on_stored(item)
            if not unwritten.done.done():  # the job may have been cancelled meanwhile
                unwritten.done.set_result(item)

    def _count_in(
        self, group: list[tuple[SpoolHead, bytes]], segment: Segment, end: int
    ) -> list[SpoolItem]:
        """Count in what was written up to `end`: heads and their records."""
        start = end - sum(len(record) for _, record in group)
        items = []
        for head, record in group:
            start += len(record)
            items.append(SpoolItem(head, (segment, start - head.response_bytes)))
            self._keep(items[-1])
        return items

    async def _append(
        self, records: list[bytes], *, acks: bool = False, durable: bool = True
    ) -> tuple[Segment, int]:
        """Write records, and say where they end. With `acks`, what was acknowledged goes first."""
        names: list[Name] = []
        if acks:
            names, self._acknowledged = self._acknowledged, []
        try:
            return await self._append_all(names, records, durable=durable)
        except BaseException:
            # the next write tries again; one too many is a result submitted again
            self._acknowledged = [*names, *self._acknowledged][-self.max_items :]
            raise

    async def _append_all(
        self, names: list[Name], records: list[bytes], *, durable: bool
    ) -> tuple[Segment, int]:
        def append() -> tuple[Segment, int]:
            data = b"".join([encode_acks(names), *records] if names else records)
            segment, offset = self._journal.append(data, durable=durable)
            if segment.size >= self._segment_bytes:
                self._journal.close()
            return segment, offset + len(data)

        return await self._on_thread(append)

    async def _on_thread(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    def _keep(self, item: SpoolItem) -> None:
        self._drop([item.key])  # a copy of it, on disk twice
        self._jobs.setdefault(item.head.job_id, {})[item.head.epoch] = item
        self._count += 1
        item.segment.live_bytes += item.disk_bytes

    def _drop(self, names: list[Name]) -> bool:
        found = False
        for job_id, epoch in names:
            epochs = self._jobs.get(job_id, {})
            item = epochs.pop(epoch, None)
            if item is not None:
                found = True
                self._count -= 1
                item.segment.live_bytes -= item.disk_bytes
                if not epochs:
                    del self._jobs[job_id]
        return found

    # ---- what is not needed any more ----

    async def tidy(self, now_s: float) -> None:
        """Give back what results no longer need; call it a few times a second. Raises OSError.

        Segments go whole. One that few results pin gives them to the newest, so that at most half
        of what is old is dead. An acknowledgement may go before the result that it names: after a
        crash that result is submitted again, which is harmless.
        """
        async with self._turn:
            if self._uncounted:
                return  # the process ends; the next one counts
            if not self._jobs:
                self._acknowledged.clear()
                if self._journal.segments:
                    await self._on_thread(self._clear)
                return
            for segment in tuple(self._journal.segments):  # first: it makes room for the rest
                if not segment.live_bytes and segment is not self._journal.growing:
                    await self._remove(segment)
            if self._acknowledged:
                await self._append([], acks=True, durable=False)
            for segment in tuple(self._journal.segments):
                await self._tidy_segment(segment, now_s)

    async def _tidy_segment(self, segment: Segment, now_s: float) -> None:
        if segment.seen_s is None:
            segment.seen_s = now_s
        old = now_s - segment.seen_s >= SEGMENT_S
        if segment is self._journal.growing:
            if old:
                await self._on_thread(self._journal.close)
        elif not segment.live_bytes or (old and segment.live_bytes * 2 <= segment.size):
            segment.seen_s = now_s  # should the disk refuse, not again at once
            await self._move([item for item in self if item.segment is segment])
            await self._remove(segment)

    async def _remove(self, segment: Segment) -> None:
        await self._on_thread(lambda: self._journal.remove(segment))

    async def _move(self, items: list[SpoolItem]) -> None:
        """Write results again, at the end."""
        if not items:
            return
        records = await self._on_thread(
            lambda: [encode_result(item.head, item.read_unchecked()) for item in items]
        )
        segment, end = await self._append(records)
        for item, record in zip(reversed(items), reversed(records), strict=True):
            old, live = item.segment, self._jobs.get(item.head.job_id, {})
            if live.get(item.head.epoch) is item:  # not acknowledged meanwhile
                old.live_bytes -= item.disk_bytes
                segment.live_bytes += item.disk_bytes
                item.place = segment, end - item.head.response_bytes
            end -= len(record)

    def _clear(self) -> None:
        for segment in tuple(self._journal.segments):
            self._journal.remove(segment)
