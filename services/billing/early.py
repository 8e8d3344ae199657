"""Pure: how many results may wait for a match that the log does not hold yet.

Each waits in the queue's window of unacknowledged messages, which all providers share. What finds
no room is dropped unanswered: its provider keeps it and submits it again, later and later.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

MAX_OF_ONE: Final = 32  # of one provider; honest ones wait for one commit, milliseconds
MAX_OF_ALL: Final = 1024  # a quarter of the window, so that many liars together do not fill it


def has_room(of_one: int, of_all: int) -> bool:
    """Whether one more early result may wait: `of_one` by its provider, `of_all` by everybody."""
    return of_one < MAX_OF_ONE and of_all < MAX_OF_ALL


@dataclass(slots=True)
class EarlyResults:
    """Who waits: provider -> (job, epoch) -> until when. Each is forgotten after `wait_s`."""

    wait_s: float
    _until_s: dict[str, dict[tuple[str, int], float]] = field(default_factory=dict)

    def may_wait(self, provider_id: str, job_id: str, epoch: int, now_s: float) -> bool:
        """Whether a result waits already or finds room."""
        self._expire(provider_id, now_s)
        mine = self._until_s.get(provider_id, {})
        if (job_id, epoch) in mine or has_room(len(mine), len(self)):
            return True
        for other in tuple(self._until_s):
            self._expire(other, now_s)
        return has_room(len(mine), len(self))

    def admit(self, provider_id: str, job_id: str, epoch: int, now_s: float) -> bool:
        """Let a result wait, now or again. False: drop it."""
        if not self.may_wait(provider_id, job_id, epoch, now_s):
            return False
        mine = self._until_s.setdefault(provider_id, {})
        mine.setdefault((job_id, epoch), now_s + self.wait_s)
        return True

    def forget(self, provider_id: str, job_id: str, epoch: int) -> None:
        """It waits no longer: it was decided."""
        mine = self._until_s.get(provider_id, {})
        mine.pop((job_id, epoch), None)
        if not mine:
            self._until_s.pop(provider_id, None)

    def __len__(self) -> int:
        return sum(map(len, self._until_s.values()))

    def _expire(self, provider_id: str, now_s: float) -> None:
        for (job_id, epoch), until_s in tuple(self._until_s.get(provider_id, {}).items()):
            if until_s <= now_s:
                self.forget(provider_id, job_id, epoch)
