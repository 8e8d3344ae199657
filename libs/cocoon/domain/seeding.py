"""Where a decision's seed comes from: a secret of the matcher that the log has a commitment to.

Before a period's first decision its secret is committed to; after the period it is revealed. Then
everybody can see that each draw followed from the job and its epoch, and that none was chosen.
"""

from __future__ import annotations

import hashlib
import hmac
from dataclasses import dataclass, replace
from typing import Final

from cocoon.contracts.commands import (
    CommitMatchingSeed,
    ExpireLease,
    RequestJob,
    RevealMatchingSeed,
)
from cocoon.contracts.events import EventData, MatchingSeedCommitted, MatchingSeedRevealed
from cocoon.kernel.errors import Conflict, Forbidden

SECRET_BYTES: Final = 32


@dataclass(frozen=True, slots=True)
class SeedState:
    """A shard's periods: the last one, and the commitments that are not revealed yet."""

    version: int = 0
    last: int = 0
    open: tuple[tuple[int, str], ...] = ()  # (period, commitment), oldest first

    def commitment(self, period: int) -> str | None:
        return next((text for number, text in self.open if number == period), None)


def commitment(secret: bytes) -> str:
    """What the log holds of a secret before it is revealed."""
    return hashlib.sha256(b"cocoon matching secret\0" + secret).hexdigest()


def seed_of(secret: bytes, job_id: str, epoch: int) -> str:
    """The seed of the decision that gives a job its match of this epoch: 64 hex digits.

    One secret, job and epoch give one seed: a decision made again draws nothing else.
    """
    text = b"cocoon matching seed\0" + bytes.fromhex(job_id) + epoch.to_bytes(4, "big")
    return hmac.digest(secret, text, "sha256").hex()


def epoch_of(command: RequestJob | ExpireLease) -> int:
    """Of the match that the command would make."""
    return 1 if isinstance(command, RequestJob) else command.epoch + 1


def evolve(state: SeedState, event: EventData) -> SeedState:
    state = replace(state, version=state.version + 1)
    match event:
        case MatchingSeedCommitted():
            found = (*state.open, (event.period, event.commitment))
            return replace(state, last=event.period, open=found)
        case MatchingSeedRevealed():
            left = tuple(one for one in state.open if one[0] != event.period)
            return replace(state, open=left)
        case _:
            return state


def decide_commit_seed(state: SeedState, command: CommitMatchingSeed) -> tuple[EventData, ...]:
    """Begin the next period. Raises Conflict for any other number."""
    if command.period != state.last + 1:
        raise Conflict(f"the next period is {state.last + 1}", code="wrong_period")
    return (MatchingSeedCommitted(**command.model_dump()),)


def decide_reveal_seed(state: SeedState, command: RevealMatchingSeed) -> tuple[EventData, ...]:
    """Reveal a period that is over, or say that its secret is lost.

    Raises Conflict for one that is not open and Forbidden for a secret that was not committed to.
    """
    committed = state.commitment(command.period)
    if committed is None:
        raise Conflict("this period is not open", code="wrong_period")
    if command.secret is not None and commitment(bytes.fromhex(command.secret)) != committed:
        raise Forbidden("this secret is not the one that was committed to", code="wrong_secret")
    return (MatchingSeedRevealed(**command.model_dump()),)
