"""Pure: whether each stored seed is the one that its job, its epoch and its period's secret give.

Decisions under a secret that is not revealed yet cannot be checked, and are counted.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass

from cocoon.contracts.commands import ExpireLease, RequestJob
from cocoon.contracts.envelope import StoredEvent
from cocoon.contracts.events import MatchingSeedCommitted, MatchingSeedRevealed
from cocoon.domain.seeding import commitment, epoch_of, seed_of


def stream(shard: int) -> str:
    """Where a shard's secrets are committed to and revealed."""
    return f"matching/{shard}"


@dataclass(slots=True)
class _Period:
    commitment: str
    committed_at: int  # position
    revealed_at: int = 0  # 0: not yet
    secret: bytes | None = None


class Draws:
    """One shard's. `check` gives a sentence for a seed that is wrong; `notes` what to know."""

    def __init__(self, events: Iterable[StoredEvent]) -> None:
        """`events`: all of the shard's stream of seeds, also those after what is checked."""
        self.checked = 0
        self._unrevealed = self._kept_back = self._lost = self._late = 0
        self._periods: dict[int, _Period] = {}  # dense from 1
        self._begins: list[int] = []  # their positions
        self._wrong: list[str] = []
        seen: set[str] = set()
        for stored in events:
            event = stored.decode()
            if isinstance(event, MatchingSeedCommitted):
                if event.commitment in seen:  # the earlier one's reveal would tell it
                    told = f"position {stored.position}: commits to a secret of an earlier period"
                    self._wrong.append(told)
                seen.add(event.commitment)
                self._periods[event.period] = _Period(event.commitment, stored.position)
                self._begins.append(stored.position)
            elif isinstance(event, MatchingSeedRevealed):
                self._reveal(event, stored.position)

    def _reveal(self, event: MatchingSeedRevealed, position: int) -> None:
        period = self._periods.get(event.period)
        secret = None if event.secret is None else bytes.fromhex(event.secret)
        if period is None or (secret is not None and commitment(secret) != period.commitment):
            self._wrong.append(f"position {position}: reveals what was not committed to")
            return
        period.revealed_at, period.secret = position, secret

    def check(self, command: RequestJob | ExpireLease, position: int) -> str | None:
        """`position`: of the command's first event. None: right, or not to be checked yet."""
        number = command.seed_period
        newest = bisect_left(self._begins, position)
        if not number:
            told = f"position {position}: its seed comes from no secret, though there are some"
            return told if newest else None
        period = self._periods.get(number)
        if period is None or period.committed_at > position:
            return f"position {position}: the secret of its seed was not committed to before"
        if 0 < period.revealed_at < position or number < newest - 1:
            return f"position {position}: the period of its seed was over"
        self._late += number < newest
        if period.secret is None:
            self._lost += period.revealed_at > 0
            kept_back = number < len(self._begins) - 1  # two newer ones came
            self._kept_back += not period.revealed_at and kept_back
            self._unrevealed += not period.revealed_at and not kept_back
            return None
        self.checked += 1
        if seed_of(period.secret, command.job_id, epoch_of(command)) != command.seed:
            return f"position {position}: its seed is not the one that its secret gives"
        return None

    def differences(self) -> list[str]:
        """What is wrong with the commitments themselves."""
        return self._wrong

    def notes(self) -> list[str]:
        """What an auditor should know beside."""
        told = (
            (self._unrevealed, "seeds of a secret that is not revealed yet"),
            (self._kept_back, "seeds of a secret that is kept back though two newer ones came"),
            (self._lost, "seeds of a secret that was lost, which nobody can check"),
            (self._late, "seeds of the secret before the newest one"),
        )
        return [f"{what}: {count}" for count, what in told if count]
