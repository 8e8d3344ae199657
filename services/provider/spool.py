"""Sealed results on disk until the network has them: ciphertext and receipts only.

A result is fsynced before its last frame leaves. After a restart it is submitted again; the job
itself cannot run again, because its key died with the process.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Final

from pydantic import Field

from cocoon.contracts.base import Contract, Count, Hex16, Hex32
from cocoon.contracts.events import Epoch
from cocoon.kernel import canonical
from cocoon.kernel.errors import ConfigurationError

SUFFIX: Final = ".sealed"
MAX_HEAD_BYTES: Final = 4096
MIN_FREE_BYTES: Final = 64 * 1024  # of the disk; room for heads and the folder itself


class SpoolHead(Contract):
    """The first line of a spool file; the response's bytes follow."""

    job_id: Hex16
    epoch: Epoch
    req_hash: Hex32
    receipt: Annotated[str, Field(pattern=r"^[0-9a-f]{840}$")]
    blob_hash: Hex32
    response_bytes: Count


@dataclass(frozen=True, slots=True)
class SpoolItem:
    """A result that waits for its acknowledgement."""

    head: SpoolHead
    path: Path

    @property
    def key(self) -> tuple[str, int]:
        return self.head.job_id, self.head.epoch

    def read(self) -> bytes:
        """The response's bytes. Raises OSError or ValueError if the file is gone or damaged."""
        _, _, response = self.path.read_bytes().partition(b"\n")
        if hashlib.sha256(response).hexdigest() != self.head.blob_hash:
            raise ValueError("the spooled response does not match its hash")
        return response


@dataclass(slots=True)
class Spool:
    """A folder of at most `max_items` results and `max_bytes` of ciphertext.

    What runs has room reserved, so that a result finds its place when it is done.
    """

    folder: Path
    max_items: int
    max_bytes: int
    _jobs: dict[str, dict[int, SpoolItem]] = field(default_factory=dict)  # by job, by epoch
    _reserved: dict[str, int] = field(default_factory=dict)  # by job
    _reserved_bytes: int = 0
    _count: int = 0
    _bytes: int = 0

    def open(self) -> None:
        """Read what a former process left. Damaged and half-written files are removed."""
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            for path in sorted(self.folder.iterdir()):
                item = _load(path) if path.suffix == SUFFIX else None
                if item is None:
                    path.unlink()
                    continue
                self.keep(item)
        except OSError:
            raise ConfigurationError(f"the spool folder {self.folder} cannot be used") from None

    def has_room(self, size: int = 1) -> bool:
        """Whether another result of `size` bytes fits, within the bounds and on the disk."""
        wanted = self._reserved_bytes + size
        return (
            self._count + len(self._reserved) < self.max_items
            and self._bytes + wanted <= self.max_bytes
            and wanted + MIN_FREE_BYTES <= self._free_bytes()
        )

    def reserve(self, job_id: str, size: int) -> bool:
        """Keep room for a job that begins. False if there is none."""
        if job_id in self._reserved or not self.has_room(size):
            return False
        self._reserved[job_id] = size
        self._reserved_bytes += size
        return True

    def release(self, job_id: str) -> None:
        """The job has ended: its result, if any, is counted in."""
        self._reserved_bytes -= self._reserved.pop(job_id, 0)

    def _free_bytes(self) -> int:
        try:
            disk = os.statvfs(self.folder)
        except OSError:
            return self.max_bytes * 2  # it does not tell: what is written there will
        return disk.f_bavail * disk.f_frsize

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[SpoolItem]:
        return iter([item for epochs in self._jobs.values() for item in epochs.values()])

    def of_job(self, job_id: str) -> SpoolItem | None:
        """The newest result of a job."""
        epochs = self._jobs.get(job_id)
        return epochs[max(epochs)] if epochs else None

    def write(self, head: SpoolHead, response: bytes) -> SpoolItem:
        """Write and fsync one result; call it off the event loop.

        Raises OSError, a full disk's too, and leaves nothing half-written behind.
        """
        path = self.folder / f"{head.job_id}.{head.epoch}{SUFFIX}"
        partial = path.with_suffix(".partial")
        try:
            _write_durably(partial, head.to_canonical() + b"\n" + response)
            partial.replace(path)
        except OSError:
            partial.unlink(missing_ok=True)  # it would hold the very space that lacks
            raise
        folder = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
        return SpoolItem(head, path)

    def keep(self, item: SpoolItem) -> None:
        """Count a written result in."""
        epochs = self._jobs.setdefault(item.head.job_id, {})
        if item.head.epoch not in epochs:
            self._count += 1
            self._bytes += item.head.response_bytes
        epochs[item.head.epoch] = item

    def remove(self, item: SpoolItem) -> None:
        """The network has it: it counts no more. `delete` takes it from the disk."""
        epochs = self._jobs.get(item.head.job_id, {})
        if epochs.pop(item.head.epoch, None) is not None:
            self._count -= 1
            self._bytes -= item.head.response_bytes
        if not epochs:
            self._jobs.pop(item.head.job_id, None)

    def delete(self, items: Sequence[SpoolItem]) -> None:
        """Erase removed results; call it off the event loop. What a crash leaves is sent again."""
        for item in items:
            item.path.unlink(missing_ok=True)


def _write_durably(path: Path, data: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    try:
        left = memoryview(data)
        while left:
            left = left[os.write(descriptor, left) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _load(path: Path) -> SpoolItem | None:
    try:
        with path.open("rb") as file:
            line = file.readline(MAX_HEAD_BYTES)
        item = SpoolItem(SpoolHead.model_validate(canonical.loads_object(line.rstrip(b"\n"))), path)
        item.read()
    except ValueError:  # pydantic's ValidationError is one
        return None
    return item
