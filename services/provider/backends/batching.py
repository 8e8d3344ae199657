"""Continuous batching over the step graph: sequences of equal length share one run.

The graph knows no padding, so a batch is a group whose caches have the same length. Groups are
stepped in turn; who joins with a group's length joins the group. Synchronous, one thread's own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

import numpy as np
from numpy.typing import NDArray

from services.provider.backends.sampling import Pick, Sampler

Cache = NDArray[np.float32]
Run = Callable[[NDArray[np.int64], Cache, Cache], Sequence[Any]]
MAX_BATCH: Final = 8


class Sink(Protocol):
    """Where a sequence's picks go. Returns False when the sequence is over."""

    def take(self, pick: Pick) -> bool: ...

    @property
    def gone(self) -> bool:
        """Whether nobody waits any more."""


@dataclass(slots=True)
class Generation:
    """One answer in the making. Its prompt never prints."""

    prompt: list[int] = field(repr=False)
    sampler: Sampler
    sink: Sink


@dataclass(slots=True)
class _Group:
    members: list[Generation]
    next_ids: NDArray[np.int64]
    keys: Cache
    values: Cache

    @property
    def length(self) -> int:
        return int(self.keys.shape[3])


class Batcher:
    """All running sequences. `step()` gives every one of them its next token."""

    def __init__(self, run: Run, empty_cache: Callable[[int], Cache]) -> None:
        self._run = run
        self._empty_cache = empty_cache
        self._groups: list[_Group] = []

    def __len__(self) -> int:
        return sum(len(group.members) for group in self._groups)

    def add(self, fresh: Sequence[Generation]) -> None:
        """Run new prompts (those of one length together) and draw their first tokens."""
        by_length: dict[int, list[Generation]] = {}
        for sequence in fresh:
            by_length.setdefault(len(sequence.prompt), []).append(sequence)
        for members in by_length.values():
            for at in range(0, len(members), MAX_BATCH):
                part = members[at : at + MAX_BATCH]
                empty = self._empty_cache(len(part))
                ids = np.array([member.prompt for member in part], np.int64)
                group = self._advance(part, ids, empty, empty)
                if group is not None:
                    self._join(group)

    def step(self) -> None:
        """One token for everybody; who has gone or ended leaves."""
        groups, self._groups = self._groups, []
        for group in groups:
            kept = self._without_gone(group)
            if kept is None:
                continue
            moved = self._advance(kept.members, kept.next_ids, kept.keys, kept.values)
            if moved is not None:
                self._join(moved)

    def clear(self) -> None:
        self._groups.clear()

    def members(self) -> list[Generation]:
        return [member for group in self._groups for member in group.members]

    def _advance(
        self, members: list[Generation], ids: NDArray[np.int64], keys: Cache, values: Cache
    ) -> _Group | None:
        logits, keys, values = self._run(ids, keys, values)
        rows, tokens = [], []
        for row, member in enumerate(members):
            pick = member.sampler.pick(logits[row])
            if member.sink.take(pick):
                rows.append(row)
                tokens.append(pick.token)
        if not rows:
            return None
        if len(rows) < len(members):
            members = [members[row] for row in rows]
            keys, values = keys[:, rows], values[:, rows]
        return _Group(members, np.array(tokens, np.int64)[:, None], keys, values)

    @staticmethod
    def _without_gone(group: _Group) -> _Group | None:
        rows = [row for row, member in enumerate(group.members) if not member.sink.gone]
        if len(rows) == len(group.members):
            return group
        if not rows:
            return None
        return _Group(
            [group.members[row] for row in rows],
            group.next_ids[rows],
            group.keys[:, rows],
            group.values[:, rows],
        )

    def _join(self, group: _Group) -> None:
        for other in self._groups:
            fits = len(other.members) + len(group.members) <= MAX_BATCH
            if fits and other.length == group.length:
                other.members += group.members
                other.next_ids = np.concatenate((other.next_ids, group.next_ids))
                other.keys = np.concatenate((other.keys, group.keys), axis=1)
                other.values = np.concatenate((other.values, group.values), axis=1)
                return
        self._groups.append(group)
