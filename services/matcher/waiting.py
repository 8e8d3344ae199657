"""Requests that wait for a free provider: bounded, fair between accounts, each with a deadline."""

from __future__ import annotations

from collections import OrderedDict, deque
from dataclasses import dataclass

from cocoon.contracts.messages import JobRequest
from cocoon.kernel.errors import RateLimited


@dataclass(frozen=True, slots=True)
class Waiting:
    request: JobRequest
    traceparent: str
    deadline_s: float  # monotonic
    refusal: RateLimited  # what the client is told if nobody becomes free


class WaitingRoom:
    """Round robin over accounts, first in first out within one."""

    def __init__(self, limit: int, limit_per_account: int) -> None:
        self._limit = limit
        self._limit_per_account = limit_per_account
        self._queues: OrderedDict[str, deque[Waiting]] = OrderedDict()
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def add(self, waiting: Waiting) -> bool:
        """Queue a request. Returns False when the room or the account's part of it is full."""
        account = waiting.request.account_id
        queue = self._queues.get(account)
        if self._size >= self._limit or (queue and len(queue) >= self._limit_per_account):
            return False
        self._queues.setdefault(account, deque()).append(waiting)
        self._size += 1
        return True

    def remove(self, job_id: str) -> bool:
        """Forget a job (its client has gone). Returns False if it does not wait here."""
        for account, queue in self._queues.items():
            for waiting in queue:
                if waiting.request.job_id == job_id:
                    queue.remove(waiting)
                    self._size -= 1
                    if not queue:
                        del self._queues[account]
                    return True
        return False

    def take(self, limit: int) -> list[Waiting]:
        """Remove and return up to `limit` requests, one account after the other."""
        taken: list[Waiting] = []
        while self._queues and len(taken) < limit:
            account, queue = self._queues.popitem(last=False)
            taken.append(queue.popleft())
            self._size -= 1
            if queue:
                self._queues[account] = queue  # to the back: the others come first
        return taken

    def expired(self, now_s: float) -> list[Waiting]:
        """Remove and return what has waited past its deadline."""
        late = [w for queue in self._queues.values() for w in queue if w.deadline_s <= now_s]
        for waiting in late:
            self.remove(waiting.request.job_id)
        return late
