"""The commands that this matcher has seen accepted, so that a repeat costs no decision.

The log deduplicates commands itself; what is forgotten here is decided again, announced in vain at
worst, and then named by the log. So only running jobs are kept for certain, and the latest others.
"""

from __future__ import annotations

from collections.abc import Container


class AcceptedCommands:
    """command_id -> job_id: every running job's, and of the others the latest `limit` to 2 x
    `limit`.
    """

    def __init__(self, running: Container[str], limit: int) -> None:
        self._running, self._limit = running, limit
        self._new: dict[str, str] = {}
        self._old: dict[str, str] = {}

    def __len__(self) -> int:
        return len(self._new) + len(self._old)

    def get(self, command_id: str) -> str | None:
        """The command's job."""
        return self._new.get(command_id) or self._old.get(command_id)

    def add(self, command_id: str, job_id: str) -> None:
        self._new[command_id] = job_id
        if len(self._new) >= self._limit:
            running = {c: j for c, j in self._old.items() if j in self._running}
            # what still runs is as good as old: it must not fill the new half for ever
            self._old = running | self._new
            self._new = {}
