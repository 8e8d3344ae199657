"""An enclave's memory of what it has run: a job runs once, a repeat gets the same ciphertext.

Ask it only after the request authenticated. It lives as long as the key and no longer, is
bounded, and never forgets an unexpired job to make room: a full memory answers `busy`.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from typing import Final, Generic, TypeVar

from cocoon.sealing.refusals import refuse

DEFAULT_CAPACITY: Final = 65_536
Outcome = TypeVar("Outcome")


@dataclass(slots=True)
class Remembered(Generic[Outcome]):
    """A job that was begun. `outcome` is the caller's handle to the stored ciphertext."""

    req_hash: bytes
    not_after_ms: int
    outcome: Outcome | None = None


class ReplayMemory(Generic[Outcome]):
    """Remembers (job_id, enc) until the request's not_after."""

    __slots__ = ("_by_end", "_capacity", "_jobs")

    def __init__(self, capacity: int = DEFAULT_CAPACITY) -> None:
        if capacity < 1:
            raise ValueError("a replay memory holds at least one job")
        self._capacity = capacity
        self._jobs: dict[tuple[bytes, bytes], Remembered[Outcome]] = {}
        self._by_end: list[tuple[int, bytes, bytes]] = []

    def __len__(self) -> int:
        return len(self._jobs)

    def begin(
        self, job_id: bytes, enc: bytes, *, req_hash: bytes, not_after_ms: int, now_ms: int
    ) -> Remembered[Outcome] | None:
        """Return None for a new job (now remembered), or what is remembered of a repeat.

        A repeat whose `outcome` is None is still running. Raises SealingError: replay (another
        envelope under the same header), expired, busy (full).
        """
        self._purge(now_ms)
        known = self._jobs.get((job_id, enc))
        if known is not None:
            if known.req_hash != req_hash:
                refuse("replay", "Another request came under this job's header; make a new job.")
            return known
        if now_ms > not_after_ms:
            refuse("expired", "The request's time is over; make a new one.")
        if len(self._jobs) >= self._capacity:
            refuse("busy", "The enclave remembers as many jobs as it can; try another.")
        self._jobs[job_id, enc] = Remembered(req_hash, not_after_ms)
        heapq.heappush(self._by_end, (not_after_ms, job_id, enc))
        return None

    def finish(self, job_id: bytes, enc: bytes, outcome: Outcome) -> None:
        """Keep the handle of a job's stored ciphertext; a job whose time ended is let go."""
        known = self._jobs.get((job_id, enc))
        if known is not None:
            known.outcome = outcome

    def _purge(self, now_ms: int) -> None:
        while self._by_end and self._by_end[0][0] < now_ms:
            _, job_id, enc = heapq.heappop(self._by_end)
            del self._jobs[job_id, enc]
