"""What simulation, fault tests and soak collect for the invariants to judge."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from cocoon.contracts import events as e
from cocoon.contracts.envelope import StoredEvent
from cocoon.eventlog.read import StoredCommand


@dataclass(frozen=True)
class StreamMessage:
    """A message of EVENTS_<shard> as JetStream holds it."""

    sequence: int
    subject: str
    headers: dict[str, str]
    body: bytes


@dataclass(frozen=True)
class LedgerTables:
    """The live tables of one shard: entries (shard, position, line, account, nanoTON)."""

    applied: int  # the ledger's checkpoint
    entries: Sequence[tuple[int, int, int, str, int]]
    balances: Mapping[str, int]
    settlements: Mapping[str, tuple[int, int, int, int]]  # job -> position, price, parts


@dataclass(frozen=True)
class ClientCall:
    """What a client saw of one request."""

    account_id: str
    idempotency_key: str
    job_id: str
    status: int  # HTTP
    received_bytes: int  # of the response's body
    response_sha256: str | None = None  # of a whole response
    epoch: int = 0


@dataclass(frozen=True)
class Evidence:
    """What was collected. `quiet`: faults have stopped and everything had the time to end."""

    logs: Mapping[int, Sequence[StoredEvent]]
    quiet: bool = False
    commands: Mapping[int, Sequence[StoredCommand]] | None = None
    streams: Mapping[int, Sequence[StreamMessage]] | None = None
    ledgers: Mapping[int, LedgerTables] | None = None
    calls: Sequence[ClientCall] | None = None
    canaries_found: Sequence[str] | None = None  # places, see find_canaries
    chain_payouts: Mapping[str, int] | None = None  # payout -> nanoTON seen on chain

    @cached_property
    def decoded(self) -> dict[int, list[tuple[StoredEvent, e.EventData]]]:
        """Rows with their data; a row that does not decode is left to invariant 16."""
        return {shard: list(_decodable(rows)) for shard, rows in self.logs.items()}

    @cached_property
    def jobs(self) -> dict[str, list[tuple[StoredEvent, e.EventData]]]:
        """The streams of jobs, by job id, over all account shards."""
        found: dict[str, list[tuple[StoredEvent, e.EventData]]] = defaultdict(list)
        for rows in self.decoded.values():
            for stored, event in rows:
                aggregate, _, job_id = stored.stream.partition("/")
                if aggregate == "job":
                    found[job_id].append((stored, event))
        return dict(found)


def _decodable(rows: Iterable[StoredEvent]) -> Iterable[tuple[StoredEvent, e.EventData]]:
    for stored in rows:
        try:
            yield stored, stored.decode()
        except (KeyError, ValueError):
            continue
