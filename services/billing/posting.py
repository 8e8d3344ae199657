"""Pure: events to what the books take and what they put aside, one event after the other.

An event that cannot be read, or that would take a balance below zero, stands aside with its whole
stream (one job or one account); a hold beyond an account's money also stops that account's later
holds. The others go on. Nothing is skipped and nothing is repaired here.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from cocoon.contracts.envelope import StoredEvent
from cocoon.contracts.events import EventData, FundsHeld, ResultSealed
from cocoon.domain import ledger
from cocoon.domain.ledger import Entry, OutOfBounds
from services.billing.decide import Projection
from services.billing.earning import Earnings, positions_lacking, results_among

BEHIND_PARKED = "behind_parked"  # an earlier event of the stream stands aside
ACCOUNT_FROZEN = "account_frozen"  # an earlier hold of the account does
FREEZES = frozenset({"negative_balance", "balance_overflow"})  # of a hold: its account stands still


@dataclass(frozen=True, slots=True)
class Line:
    """An event with its entries, or with the class of the error that makes it unreadable."""

    stored: StoredEvent
    event: EventData | None = None
    entries: tuple[Entry, ...] = ()
    fault: str = ""


@dataclass(frozen=True, slots=True)
class Standing:
    """What stands aside: streams, and accounts whose holds are no longer posted."""

    parked: frozenset[str] = frozenset()
    frozen: frozenset[str] = frozenset()


@dataclass(slots=True)
class Posting:
    """What a batch does: lines, new balances (nanoTON, 0 = gone), and what is put aside and why."""

    standing: Standing
    projection: Projection = field(default_factory=Projection)
    balances: dict[str, int] = field(default_factory=dict)
    owners: dict[str, str] = field(default_factory=dict)  # hold:<job> -> the client's account id
    aside: list[tuple[StoredEvent, str]] = field(default_factory=list)
    earnings: Earnings = field(default_factory=Earnings)


def read_lines(events: Iterable[StoredEvent]) -> list[Line]:
    """Decode and post each event for itself; an unreadable one keeps its error's class."""
    lines = []
    for stored in events:
        try:
            event = stored.decode()
            lines.append(Line(stored, event, tuple(ledger.postings(event))))
        except (ValueError, KeyError) as error:
            lines.append(Line(stored, fault=type(error).__name__))
    return lines


def accounts_of(lines: Iterable[Line]) -> list[str]:
    """The accounts whose balances must be known to post these lines."""
    return sorted({entry.account for line in lines for entry in line.entries})


def results_lacking(lines: Sequence[Line]) -> list[int]:
    """The positions of results that must be known to post these lines, and are not among them."""
    events = [(line.stored, line.event) for line in lines]
    return positions_lacking(events, results_among(events))


def post(
    lines: Sequence[Line],
    before: Mapping[str, int],
    standing: Standing,
    results: Mapping[int, ResultSealed] | None = None,
) -> Posting:
    """Post in order on the balances `before` (nanoTON; a missing account has 0).

    `results`: position -> the result there, for payments whose result is not among the lines.
    """
    parked, frozen = set(standing.parked), set(standing.frozen)
    posting = Posting(standing)
    now = dict(before)
    sealed = dict(results or {}) | results_among((line.stored, line.event) for line in lines)
    for line in lines:
        reason = _standing_fault(line, parked, frozen)
        if not reason:
            try:
                changed = ledger.apply(now, line.entries)
            except OutOfBounds as error:
                reason = error.reason
                if isinstance(line.event, FundsHeld):
                    frozen.add(line.event.account_id)
        if reason:
            parked.add(line.stored.stream)
            posting.aside.append((line.stored, reason))
            continue
        now.update(changed)
        posting.balances.update(changed)
        assert line.event is not None  # noqa: S101 - a line without an event has a fault
        posting.projection.add(line.stored, line.event, line.entries)
        posting.earnings.take(line.stored, line.event, sealed)
        if isinstance(line.event, FundsHeld):
            posting.owners[ledger.hold(line.event.job_id)] = line.event.account_id
    posting.standing = Standing(frozenset(parked), frozenset(frozen))
    return posting


def _standing_fault(line: Line, parked: Collection[str], frozen: Collection[str]) -> str:
    if line.stored.stream in parked:
        return BEHIND_PARKED
    if isinstance(line.event, FundsHeld) and line.event.account_id in frozen:
        return ACCOUNT_FROZEN
    return line.fault
