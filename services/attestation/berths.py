"""Who lives in which berth, and whose may be given to another. Pure; the table is the truth."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

MOVE_IN_MS = 20_000  # for a newcomer to connect again


@dataclass(frozen=True, slots=True)
class Berth:
    """`held_until_ms`: when the last login that was given to its provider ends."""

    number: int
    provider_id: str
    held_until_ms: int
    taken_ms: int = 0


class Berths:
    """All berths of the network, as far as the table was read.

    A provider keeps its berth while it logs in, and `patience_ms` longer; after that a newcomer
    may have it, once no other is free. Losing it costs a provider nothing but its place.
    """

    def __init__(self, count: int, patience_ms: int, move_in_ms: int = MOVE_IN_MS) -> None:
        self._count, self._patience_ms, self._move_in_ms = count, patience_ms, move_in_ms
        self._by_provider: dict[str, Berth] = {}
        self._by_number: dict[int, Berth] = {}

    def __len__(self) -> int:
        return len(self._by_number)

    def load(self, taken: Iterable[Berth]) -> None:
        """Take the table over; berths beyond the count are nobody's."""
        self._by_provider.clear()
        self._by_number.clear()
        for berth in taken:
            if berth.number <= self._count:
                self.put(berth)

    def of(self, provider_id: str) -> Berth | None:
        return self._by_provider.get(provider_id)

    def put(self, berth: Berth) -> None:
        """The table says so now."""
        for former in (
            self._by_number.get(berth.number), self._by_provider.get(berth.provider_id)
        ):  # fmt: skip
            if former is not None:
                self._by_number.pop(former.number, None)
                self._by_provider.pop(former.provider_id, None)
        self._by_number[berth.number] = self._by_provider[berth.provider_id] = berth

    def free(self, now_ms: int) -> int | None:
        """The number of a berth to give away: an empty one, else the one deserted longest."""
        if len(self._by_number) < self._count:
            return next(n for n in range(1, self._count + 1) if n not in self._by_number)
        deserted = [
            berth
            for berth in self._by_number.values()
            if now_ms > berth.held_until_ms + self._patience_ms
            and now_ms > berth.taken_ms + self._move_in_ms
        ]
        if not deserted:
            return None
        return min(deserted, key=lambda berth: (berth.held_until_ms, berth.number)).number
