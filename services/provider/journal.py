"""The spool's files: segments that only grow, and the records in them.

record = magic | kind u8 | u32 bytes of the body | digest 16 | body. A result's body is its head
(hashed by the digest) and its response (hashed in the head); an acknowledgement's are names.
Whatever is damaged or torn is left out, and reading goes on at the next record.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from cocoon.kernel.errors import ConfigurationError
from cocoon.sealing.receipt import RECEIPT_BYTES

SUFFIX: Final = ".journal"
FORMER_SUFFIX: Final = ".sealed"  # of the files before the journal, see spool_files
_MAGIC: Final = b"\xc0CJ\x01"
_RECORD: Final = struct.Struct(">4sBI16s")
_RESULT: Final = 1
_ACKS: Final = 2
_HEAD: Final = struct.Struct(f">16sI32s{RECEIPT_BYTES}s32s")
_NAME: Final = struct.Struct(">16sI")
RESULT_BYTES: Final = _RECORD.size + _HEAD.size  # of a result's record, beside its response
Name = tuple[str, int]  # job, epoch


@dataclass(frozen=True, slots=True)
class SpoolHead:
    """What is known of a sealed result; ids, hashes and the receipt in hex."""

    job_id: str
    epoch: int
    req_hash: str
    receipt: str
    blob_hash: str
    response_bytes: int

    @property
    def name(self) -> Name:
        return self.job_id, self.epoch


def encode_result(head: SpoolHead, response: bytes) -> bytes:
    packed = _HEAD.pack(
        bytes.fromhex(head.job_id), head.epoch, bytes.fromhex(head.req_hash),
        bytes.fromhex(head.receipt), bytes.fromhex(head.blob_hash),
    )  # fmt: skip
    size = len(packed) + len(response)
    return _RECORD.pack(_MAGIC, _RESULT, size, _digest(_RESULT, size, packed)) + packed + response


def encode_acks(names: Iterable[Name]) -> bytes:
    body = b"".join([_NAME.pack(bytes.fromhex(job_id), epoch) for job_id, epoch in names])
    return _RECORD.pack(_MAGIC, _ACKS, len(body), _digest(_ACKS, len(body), body)) + body


def read_records(data: bytes) -> Iterator[tuple[SpoolHead, int] | list[Name]]:
    """What is whole in a segment's bytes, in order: results (and where their responses begin),
    acknowledged names. Raises nothing, whatever the bytes.
    """
    at = data.find(_MAGIC)
    while at >= 0:
        found = _read_record(data, at)
        if found is not None:
            yield found[0]
        at = data.find(_MAGIC, at + 1 if found is None else found[1])


def _read_record(data: bytes, at: int) -> tuple[tuple[SpoolHead, int] | list[Name], int] | None:
    start = at + _RECORD.size
    if start > len(data):
        return None
    _, kind, size, digest = _RECORD.unpack_from(data, at)
    end = start + size
    if end > len(data):
        return None
    if kind == _ACKS and size % _NAME.size == 0 and _digest(kind, size, data[start:end]) == digest:
        names = [(job.hex(), epoch) for job, epoch in _NAME.iter_unpack(data[start:end])]
        return names, end
    response_at = start + _HEAD.size
    if kind != _RESULT or response_at > end:
        return None
    packed = data[start:response_at]
    if _digest(kind, size, packed) != digest:
        return None
    job_id, epoch, req_hash, receipt, blob_hash = _HEAD.unpack(packed)
    if hashlib.sha256(data[response_at:end]).digest() != blob_hash:
        return None
    head = SpoolHead(
        job_id.hex(), epoch, req_hash.hex(), receipt.hex(), blob_hash.hex(), end - response_at
    )
    return (head, response_at), end


def _digest(kind: int, size: int, hashed: bytes) -> bytes:
    return hashlib.sha256(b"%c%b%b" % (kind, size.to_bytes(4, "big"), hashed)).digest()[:16]


@dataclass(eq=False, slots=True)
class Segment:
    """One file. `live_bytes` are those of results that wait; `seen_s` is when it was first seen
    to be as it is now, growing or closed.
    """

    path: Path
    size: int = 0
    live_bytes: int = 0
    seen_s: float | None = None

    def read(self, offset: int, size: int) -> bytes:
        """Raises FileNotFoundError once it is removed."""
        with self.path.open("rb") as file:
            file.seek(offset)
            return file.read(size)


class Journal:
    """The segments of a folder, oldest first. Not for two threads at once."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._number = 0
        self._growing: int | None = None  # the last segment's descriptor, while it takes more
        self.segments: list[Segment] = []
        self.former_files: list[Path] = []  # found by `open`
        self.disk_bytes = 0
        self._lock: int | None = None

    def open(self) -> Iterator[tuple[Segment, bytes]]:
        """What a former process left. It is never written to again. Other files are removed.

        Raises ConfigurationError while another process has the folder.
        """
        missing = [path for path in (self._folder, *self._folder.parents) if not path.exists()]
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        for path in missing:  # what is synced in a folder is lost with the folder
            _sync_folder(path.parent)
        self._claim()
        for path in sorted(self._folder.iterdir()):
            if path.suffix == FORMER_SUFFIX:
                self.former_files.append(path)
                continue
            if path.suffix != SUFFIX or not path.stem.isdecimal():
                path.unlink()
                continue
            self._number = int(path.stem)
            with path.open("rb") as file:
                os.fdatasync(file.fileno())  # a killed process may have written and not synced
                data = file.read()
            segment = Segment(path, len(data))
            self.segments.append(segment)
            self.disk_bytes += segment.size
            yield segment, data

    def _claim(self) -> None:
        """Until this process ends. Not flock: a child would inherit it and outlive us with it."""
        lock = self._folder.with_name(f"{self._folder.name}.lock")
        self._lock = os.open(lock, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._lock)
            raise ConfigurationError(
                f"another agent works in {self._folder}; stop it, or give this one a data folder "
                "of its own"
            ) from None

    @property
    def growing(self) -> Segment | None:
        return None if self._growing is None else self.segments[-1]

    def append(self, data: bytes, *, durable: bool = True) -> tuple[Segment, int]:
        """Write at the end, and say where. Raises OSError and leaves nothing half-written."""
        descriptor = self._begin() if self._growing is None else self._growing
        segment = self.segments[-1]
        offset = segment.size
        try:
            _write(descriptor, data)
            if durable:
                os.fdatasync(descriptor)
        except BaseException:
            self._undo(descriptor, offset)
            raise
        segment.size += len(data)
        self.disk_bytes += len(data)
        return segment, offset

    def close(self) -> None:
        """The segment that grows is full: the next write begins another."""
        if self._growing is not None:
            descriptor, self._growing = self._growing, None  # gone, whatever `close` says
            self.segments[-1].seen_s = None
            os.close(descriptor)

    def remove(self, segment: Segment) -> None:
        if segment is self.growing:
            self.close()
        self.segments.remove(segment)
        self.disk_bytes -= segment.size
        segment.path.unlink(missing_ok=True)

    def _begin(self) -> int:
        self._number += 1
        path = self._folder / f"{self._number:08d}{SUFFIX}"
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        self.segments.append(Segment(path))
        self._growing = descriptor
        try:
            _sync_folder(self._folder)
        except BaseException:
            self._undo(descriptor, 0)
            raise
        return descriptor

    def _undo(self, descriptor: int, size: int) -> None:
        """Cut a failed write off. What the disk makes of this file now is unsure: begin another."""
        segment = self.segments[-1]
        if size == 0:
            self.remove(segment)
            return
        with contextlib.suppress(OSError):
            os.ftruncate(descriptor, size)
        self.close()


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write(descriptor: int, data: bytes) -> None:
    left = memoryview(data)
    while left:
        left = left[os.write(descriptor, left) :]
