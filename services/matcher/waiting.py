"""Requests that wait for a free provider: bounded, fair between accounts, each with a deadline."""

from __future__ import annotations

from collections import OrderedDict, deque
from dataclasses import dataclass
from itertools import zip_longest

from cocoon.contracts.messages import JobRequest
from cocoon.kernel.errors import RateLimited


@dataclass(frozen=True, slots=True)
class Waiting:
    request: JobRequest
    traceparent: str
    deadline_s: float  # monotonic
    refusal: RateLimited  # what the client is told if nobody becomes free


class WaitingRoom:
    """Round robin over accounts, first in first out within one. A job waits once."""

    def __init__(self, limit: int, limit_per_account: int) -> None:
        self._limit = limit
        self._limit_per_account = limit_per_account
        self._queues: OrderedDict[str, deque[Waiting]] = OrderedDict()
        self._jobs: dict[str, Waiting] = {}

    def __len__(self) -> int:
        return len(self._jobs)

    def add(self, waiting: Waiting, *, first: bool = False) -> bool:
        """Queue a request, at the front of its account's for one that had its turn in vain.

        Returns False when the room or the account's part of it is full. A repeat of a request
        that waits already keeps its place and its deadline.
        """
        request = waiting.request
        known = self._jobs.get(request.job_id)
        if known is not None:
            return known.request.command_id == request.command_id
        queue = self._queues.get(request.account_id)
        if len(self._jobs) >= self._limit or len(queue or ()) >= self._limit_per_account:
            return False
        queue = self._queues.setdefault(request.account_id, deque())
        if first:
            queue.appendleft(waiting)
        else:
            queue.append(waiting)
        self._jobs[request.job_id] = waiting
        return True

    def remove(self, job_id: str) -> bool:
        """Forget a job (its client has gone). Returns False if it does not wait here."""
        waiting = self._jobs.pop(job_id, None)
        if waiting is None:
            return False
        account = waiting.request.account_id
        self._queues[account].remove(waiting)
        if not self._queues[account]:
            del self._queues[account]
        return True

    def take(self, job_id: str) -> bool:
        """Like `remove`, for a job that has its turn: its account's next turn comes last."""
        account = self._jobs[job_id].request.account_id if job_id in self._jobs else ""
        if not self.remove(job_id):
            return False
        if account in self._queues:
            self._queues.move_to_end(account)
        return True

    def in_turn(self) -> list[Waiting]:
        """Everybody in the order of their turns, one account after the other."""
        rounds = zip_longest(*self._queues.values())
        return [waiting for round_ in rounds for waiting in round_ if waiting is not None]

    def expired(self, now_s: float) -> list[Waiting]:
        """Remove and return what has waited past its deadline."""
        late = [waiting for waiting in self._jobs.values() if waiting.deadline_s <= now_s]
        for waiting in late:
            self.remove(waiting.request.job_id)
        return late
