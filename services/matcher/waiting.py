"""Requests that wait for a free provider: bounded, fair between accounts, each with a deadline.

A priority orders the jobs of its own account and nobody else's: it costs nothing, and takes
nothing from others.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import zip_longest
from typing import Final

from cocoon.contracts.matching import Priority
from cocoon.contracts.messages import JobRequest
from cocoon.kernel.errors import RateLimited

# Whose turn it is within an account: of seven turns four, two and one; who does not wait passes
# its turn on to whoever of the account waits and ranks highest.
TURNS: Final[tuple[Priority, ...]] = (
    "priority", "normal", "priority", "priority", "flex", "normal", "priority",
)  # fmt: skip
_RANKED: Final[tuple[Priority, ...]] = ("priority", "normal", "flex")


@dataclass(frozen=True, slots=True)
class Waiting:
    request: JobRequest
    traceparent: str
    deadline_s: float  # monotonic
    refusal: RateLimited  # what the client is told if nobody becomes free

    @property
    def priority(self) -> Priority:
        asked = self.request.preferences
        return asked.priority if asked else "normal"


class _Queue:
    """One account's: a line for each priority, and whose turn is next."""

    def __init__(self) -> None:
        self._lines: dict[Priority, deque[Waiting]] = {name: deque() for name in _RANKED}
        self._turn = 0

    def __len__(self) -> int:
        return sum(map(len, self._lines.values()))

    def add(self, waiting: Waiting, *, first: bool) -> None:
        line = self._lines[waiting.priority]
        if first:
            line.appendleft(waiting)
        else:
            line.append(waiting)

    def remove(self, waiting: Waiting) -> None:
        self._lines[waiting.priority].remove(waiting)

    def had_a_turn(self) -> None:
        self._turn = (self._turn + 1) % len(TURNS)

    def in_turn(self) -> Iterator[Waiting]:
        """All, in the order of their turns from now on."""
        left = {name: iter(line) for name, line in self._lines.items()}
        heads = {name: next(line, None) for name, line in left.items()}
        turn = self._turn
        while any(heads.values()):
            name = TURNS[turn]
            if heads[name] is None:
                name = next(other for other in _RANKED if heads[other] is not None)
            waiting = heads[name]
            assert waiting is not None  # noqa: S101 - one of them waits
            yield waiting
            heads[name] = next(left[name], None)
            turn = (turn + 1) % len(TURNS)


class WaitingRoom:
    """Round robin over accounts; within one by TURNS, first in first out of one priority.

    A job waits once.
    """

    def __init__(self, limit: int, limit_per_account: int) -> None:
        self._limit = limit
        self._limit_per_account = limit_per_account
        self._queues: OrderedDict[str, _Queue] = OrderedDict()
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
        self._queues.setdefault(request.account_id, _Queue()).add(waiting, first=first)
        self._jobs[request.job_id] = waiting
        return True

    def remove(self, job_id: str) -> bool:
        """Forget a job (its client has gone). Returns False if it does not wait here."""
        waiting = self._jobs.pop(job_id, None)
        if waiting is None:
            return False
        account = waiting.request.account_id
        self._queues[account].remove(waiting)
        if not len(self._queues[account]):
            del self._queues[account]
        return True

    def take(self, job_id: str) -> bool:
        """Like `remove`, for a job that has its turn: its account's next turn comes last."""
        account = self._jobs[job_id].request.account_id if job_id in self._jobs else ""
        if not self.remove(job_id):
            return False
        if account in self._queues:
            self._queues.move_to_end(account)
            self._queues[account].had_a_turn()
        return True

    def in_turn(self) -> list[Waiting]:
        """Everybody in the order of their turns, one account after the other."""
        rounds = zip_longest(*(queue.in_turn() for queue in self._queues.values()))
        return [waiting for round_ in rounds for waiting in round_ if waiting is not None]

    def expired(self, now_s: float) -> list[Waiting]:
        """Remove and return what has waited past its deadline."""
        late = [waiting for waiting in self._jobs.values() if waiting.deadline_s <= now_s]
        for waiting in late:
            self.remove(waiting.request.job_id)
        return late
