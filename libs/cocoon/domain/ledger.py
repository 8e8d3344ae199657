"""Postings: a pure function from an event to ledger entries that sum to zero.

Accounts: client:<id>, hold:<job>, provider:<id>, platform:fees, escrow:<client> (the chain's side
of deposits), faucet (the devnet's side of them).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, NamedTuple

from cocoon.contracts.events import (
    DepositCredited,
    EventData,
    FundsHeld,
    JobCancelled,
    JobFailed,
    PaymentSettled,
)
from cocoon.kernel.money import MAX_NANOTON

FEES = "platform:fees"
FAUCET = "faucet"


class OutOfBounds(ValueError):
    """A balance that no account may have. `reason`: negative_balance or balance_overflow."""

    def __init__(self, account: str, reason: str) -> None:
        beyond = "fall below zero" if reason == "negative_balance" else "pass 2**63-1 nanoTON"
        super().__init__(f"{account} would {beyond}")
        self.reason = reason


class Entry(NamedTuple):
    """One line of a posting: nanoTON, signed (positive = the account gains)."""

    account: str
    amount_nanoton: int


_entry = partial(tuple.__new__, Entry)  # of a pair: without the call of Entry's own constructor


def client(account_id: str) -> str:
    return f"client:{account_id}"


def hold(job_id: str) -> str:
    return f"hold:{job_id}"


def provider(provider_id: str) -> str:
    return f"provider:{provider_id}"


def _hold(event: FundsHeld) -> list[Entry]:
    return [
        _entry((client(event.account_id), -event.amount_nanoton)),
        _entry((hold(event.job_id), event.amount_nanoton)),
    ]


def _settle(event: PaymentSettled) -> list[Entry]:
    return [
        _entry((hold(event.job_id), -event.held_nanoton)),
        _entry((provider(event.provider_id), event.provider_nanoton)),
        _entry((FEES, event.fee_nanoton)),
        _entry((client(event.account_id), event.released_nanoton)),
    ]


def _release(event: JobFailed | JobCancelled) -> list[Entry]:
    return [
        _entry((hold(event.job_id), -event.released_nanoton)),
        _entry((client(event.account_id), event.released_nanoton)),
    ]


def _deposit(event: DepositCredited) -> list[Entry]:
    other_side = FAUCET if event.source == "dev" else f"escrow:{event.account_id}"
    return [
        _entry((client(event.account_id), event.amount_nanoton)),
        _entry((other_side, -event.amount_nanoton)),
    ]


_POSTINGS: dict[type[EventData], Callable[[Any], list[Entry]]] = {
    FundsHeld: _hold,
    PaymentSettled: _settle,
    JobFailed: _release,
    JobCancelled: _release,
    DepositCredited: _deposit,
}
POSTED = frozenset(event.event_type for event in _POSTINGS)  # the types that move money


def postings(event: EventData) -> list[Entry]:
    """Return the event's entries without zero lines. They sum to 0 for every event."""
    post = _POSTINGS.get(type(event))
    if post is None:
        return []
    entries = post(event)
    total = sum([amount for _, amount in entries])
    if total:
        raise ValueError(f"the entries of {event.event_type} sum to {total}, not 0")
    return [entry for entry in entries if entry[1]]


def apply(balances: Mapping[str, int], entries: Iterable[Entry]) -> dict[str, int]:
    """Return the changed balances only: account -> new balance, in nanoTON.

    Raises OutOfBounds if a client's, hold's, provider's or the fees' balance would fall below
    zero, or any account's magnitude would pass 2**63-1.
    """
    changed: dict[str, int] = {}
    for account, amount in entries:
        before = changed[account] if account in changed else balances.get(account, 0)
        changed[account] = before + amount
    for account, amount in changed.items():
        if 0 <= amount <= MAX_NANOTON:
            continue
        if amount < 0 and account.startswith(("client:", "hold:", "provider:", FEES)):
            raise OutOfBounds(account, "negative_balance")
        if abs(amount) > MAX_NANOTON:
            raise OutOfBounds(account, "balance_overflow")
    return changed
