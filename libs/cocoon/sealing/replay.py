"""An enclave's memory of what it has run: a job runs once, a repeat gets the same ciphertext.

Ask it only after the request authenticated. It is exact: 16 bytes of a hash stand for each begun
job until its not_after, in a set a minute that is dropped whole. It is bounded, and never forgets
an unexpired job to make room: a full memory answers `busy`.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Final, Generic, TypeVar

from cocoon.sealing.refusals import refuse

JOB_BYTES: Final = 128  # what CPython takes for one: 64 for the bytes, 27 to 54 in the set
DEFAULT_BYTES: Final = 96 * 1024 * 1024  # 786,432 jobs: 1,092 a second, if all live 12 minutes
MAX_OUTCOMES: Final = 16_384  # the newest jobs' handles; older repeats are told `busy`
MINUTE_MS: Final = 60_000
_KEY_BYTES: Final = 16
Outcome = TypeVar("Outcome")


@dataclass(slots=True)
class Remembered(Generic[Outcome]):
    """A job that was begun. `outcome` is the caller's handle to the stored ciphertext."""

    req_hash: bytes
    outcome: Outcome | None = None


class ReplayMemory(Generic[Outcome]):
    """Remembers (job_id, enc) until the request's not_after."""

    __slots__ = ("_begun", "_capacity", "_count", "_recent")

    def __init__(self, max_bytes: int = DEFAULT_BYTES) -> None:
        if max_bytes < JOB_BYTES:
            raise ValueError("a replay memory holds at least one job")
        self._capacity = max_bytes // JOB_BYTES
        self._begun: dict[int, set[bytes]] = {}  # by the minute in which they end
        self._count = 0
        self._recent: dict[bytes, Remembered[Outcome]] = {}

    def __len__(self) -> int:
        return self._count

    def begin(
        self, job_id: bytes, enc: bytes, *, req_hash: bytes, not_after_ms: int, now_ms: int
    ) -> Remembered[Outcome] | None:
        """Return None for a new job (now remembered), or what is remembered of a repeat.

        A repeat whose `outcome` is None is still running, or too old for its outcome to be known.
        Raises SealingError: replay (another envelope under the same header), expired, busy (full).
        """
        if now_ms > not_after_ms:
            refuse("expired", "The request's time is over; make a new one.")
        self._drop_ended(now_ms)
        key = _key(job_id, enc)
        known = self._recent.get(key)
        if known is not None:
            if known.req_hash != req_hash:
                refuse("replay", "Another request came under this job's header; make a new job.")
            return known
        if any(key in begun for begun in self._begun.values()):
            return Remembered(req_hash)
        if self._count >= self._capacity:
            refuse("busy", "The enclave remembers as many jobs as it can; try another.")
        self._begun.setdefault(not_after_ms // MINUTE_MS, set()).add(key)
        self._count += 1
        self._recent[key] = Remembered(req_hash)
        if len(self._recent) > MAX_OUTCOMES:
            del self._recent[next(iter(self._recent))]
        return None

    def finish(self, job_id: bytes, enc: bytes, outcome: Outcome) -> None:
        """Keep the handle of a job's stored ciphertext, if the job is not let go yet."""
        known = self._recent.get(_key(job_id, enc))
        if known is not None:
            known.outcome = outcome

    def _drop_ended(self, now_ms: int) -> None:
        """Let whole minutes go once the last request of theirs has ended."""
        this_minute = now_ms // MINUTE_MS
        for minute in [minute for minute in self._begun if minute < this_minute]:
            ended = self._begun.pop(minute)
            self._count -= len(ended)
            for key in ended & self._recent.keys():
                del self._recent[key]


def _key(job_id: bytes, enc: bytes) -> bytes:
    return hashlib.sha256(job_id + enc).digest()[:_KEY_BYTES]
