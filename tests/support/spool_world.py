"""A spool, results to put into it, and what a test asks of it."""

from __future__ import annotations

import hashlib
from pathlib import Path

from services.provider.journal import RESULT_BYTES, SpoolHead
from services.provider.spool import Spool

RESPONSE = b"CAI1" + bytes(range(256)) + b"\n" * 3
WRITTEN_BYTES = RESULT_BYTES + len(RESPONSE)


def head(job: int = 1, epoch: int = 1, response: bytes = RESPONSE) -> SpoolHead:
    return SpoolHead(
        job_id=f"{job:032x}", epoch=epoch, req_hash="ab" * 32, receipt="cd" * 420,
        blob_hash=hashlib.sha256(response).hexdigest(), response_bytes=len(response),
    )  # fmt: skip


def spool(folder: Path, **changes: int) -> Spool:
    made = Spool(folder, **{"max_items": 3, "max_bytes": 80_000, **changes})
    made.open()
    return made


def jobs(made: Spool) -> list[int]:
    return sorted(int(item.head.job_id, 16) for item in made)


def files(folder: Path) -> list[Path]:
    return sorted(folder.iterdir())
