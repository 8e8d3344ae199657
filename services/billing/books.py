"""Pure: the books as replay folds them: live balances, and a digest of every line ever written.

Only live state is held: the lines of entries and payments are hashed event by event, so memory
does not grow with the log and a fold can go on from a snapshot with the same bytes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby

from cocoon.contracts.events import EventData, PaymentSettled
from cocoon.domain import ledger
from cocoon.domain.ledger import Entry

_START = bytes(32)
_PAID = "paid"  # the name of a payment's line, after its entries' numbers


@dataclass(slots=True)
class Books:
    """Balances that are not zero (nanoTON), and the digest of the lines (cf. `lines_of`) so far."""

    balances: dict[str, int] = field(default_factory=dict)
    events: int = 0  # that wrote lines
    digest: bytes = _START

    def post(
        self, position: int, event: EventData, entries: Sequence[Entry], *, bounded: bool = True
    ) -> str:
        """Take an event; returns its lines, "" for one that moves no money and pays nobody.

        Raises OutOfBounds with nothing changed; unbounded, a balance may be what none may be.
        """
        if not entries and type(event) is not PaymentSettled:
            return ""
        balances = self.balances
        if bounded:
            changed = ledger.apply(balances, entries)
        else:
            changed = {}
            for account, amount in entries:
                changed[account] = changed.get(account, balances.get(account, 0)) + amount
        for account, amount in changed.items():
            if amount:
                balances[account] = amount
            else:
                balances.pop(account, None)
        lines = lines_of(position, event, entries)
        self._chain(lines)
        return lines

    def read(self, text: str) -> None:
        """Take the lines of many events, whose balances are told otherwise."""
        lines = text.splitlines(keepends=True)
        for _, group in groupby(lines, key=lambda line: line.partition(" ")[0]):
            self._chain("".join(group))

    def _chain(self, lines: str) -> None:
        self.events += 1
        self.digest = hashlib.sha256(self.digest + lines.encode()).digest()

    def serialise(self) -> bytes:
        """The one byte form of a ledger: a line per balance, sorted, then the lines' digest."""
        lines = [f"balance {account} {n}\n" for account, n in sorted(self.balances.items())]
        lines.append(f"lines {self.events} {self.digest.hex()}\n")
        return "".join(lines).encode()

    @staticmethod
    def parse(data: bytes) -> Books:
        """What `serialise` wrote. Raises ValueError for anything else."""
        books = Books()
        *balances, last = data.decode().splitlines()
        for line in balances:
            kind, account, amount = line.split(" ")
            books.balances[account] = int(amount)
        kind, events, digest = last.split(" ")
        books.events, books.digest = int(events), bytes.fromhex(digest)
        if kind != "lines" or len(books.digest) != len(_START) or books.serialise() != data:
            raise ValueError("these are no serialised books")
        return books

    def sha256(self) -> str:
        return hashlib.sha256(self.serialise()).hexdigest()


def lines_of(position: int, event: EventData, entries: Sequence[Entry]) -> str:
    """An event's rows in the ledger's tables, as text (services.billing.store makes the same)."""
    at = f"{position} "
    lines = "".join([f"{at}{line} {a} {n}\n" for line, (a, n) in enumerate(entries)])
    if type(event) is PaymentSettled:
        return (
            f"{lines}{at}{_PAID} {event.job_id} {event.account_id} {event.api_key_id}"
            f" {event.provider_id} {event.price_nanoton} {event.provider_nanoton}"
            f" {event.fee_nanoton}\n"
        )
    return lines
