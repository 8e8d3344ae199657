"""What may go wrong in one history and how often: drawn once from its seed, counted as it happens.

Each history has its own mix, many of them without some kinds: a fault that always happens hides
what only happens without it.
"""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, field
from typing import Final

KINDS: Final = (
    "drop", "duplicate", "reorder", "delay", "kill", "freeze", "zombie", "lost_request",
    "lost_answer", "postgres_restart", "bus_outage", "bus_wipe", "partition", "clock_step",
    "revocation", "disk_full", "sealed_full", "forgery", "disconnect", "slow_reader",
)  # fmt: skip


@dataclass
class Faults:
    """`on` is False in the drain. Rates are per message, call or occasion."""

    random: random.Random
    on: bool = True
    rates: dict[str, float] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)

    @classmethod
    def drawn(cls, source: random.Random) -> Faults:
        """A mix of faults: a third of the kinds is left out, the others get a rate each."""
        rates = {}
        for kind in KINDS:
            left_out = source.random() < 0.33
            rates[kind] = 0.0 if left_out else source.choice((0.003, 0.02, 0.08))
        return cls(source, rates=rates)

    def happens(self, kind: str, times: float = 1.0) -> bool:
        """Draw whether a fault happens now, at its rate times a factor; count it."""
        if not self.on:
            return False
        found = self.random.random() < self.rates[kind] * times
        if found:
            self.counts[kind] += 1
        return found

    def enabled(self, kind: str) -> bool:
        return self.on and self.rates[kind] > 0

    def count(self, kind: str) -> None:
        self.counts[kind] += 1
