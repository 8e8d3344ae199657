"""What simulation, fault tests and soak collect for the invariants to judge."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
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
class Before:
    """What stands before the rows of a suffix of one shard's log, where all was checked already.

    `log` and `stream` give the whole log and a whole stream, the suffix included.
    """

    position: int
    hash: bytes
    recorded_at_us: int
    versions: Mapping[str, int]
    balances: Mapping[str, int]
    event_ids: Collection[str]
    log: Sequence[StoredEvent]
    stream: Callable[[str], Sequence[StoredEvent]]


@dataclass(frozen=True)
class Evidence:
    """What was collected. `quiet`: faults have stopped and everything had the time to end.

    With `before`, every part is what came since the last look (a simulator looks after each step).
    """

    logs: Mapping[int, Sequence[StoredEvent]]
    quiet: bool = False
    commands: Mapping[int, Sequence[StoredCommand]] | None = None
    streams: Mapping[int, Sequence[StreamMessage]] | None = None
    ledgers: Mapping[int, LedgerTables] | None = None
    calls: Sequence[ClientCall] | None = None
    canaries_found: Sequence[str] | None = None  # places, see find_canaries
    chain_payouts: Mapping[str, int] | None = None  # payout -> nanoTON seen on chain
    before: Mapping[int, Before] = field(default_factory=dict)

    @cached_property
    def decoded(self) -> dict[int, list[tuple[StoredEvent, e.EventData]]]:
        """Rows with their data; a row that does not decode is left to invariant 16."""
        return {shard: list(_decodable(rows)) for shard, rows in self.logs.items()}

    @cached_property
    def jobs(self) -> dict[str, list[tuple[StoredEvent, e.EventData]]]:
        """The streams of jobs, by job id, over all account shards; of a suffix those it touches."""
        found: dict[str, list[tuple[StoredEvent, e.EventData]]] = defaultdict(list)
        for shard, rows in self.decoded.items():
            before = self.before.get(shard)
            for stored, event in rows:
                aggregate, _, job_id = stored.stream.partition("/")
                if aggregate == "job" and before is None:
                    found[job_id].append((stored, event))
                elif aggregate == "job" and job_id not in found:
                    found[job_id] = list(_decodable(before.stream(stored.stream)))
        return dict(found)

    def job(self, job_id: str) -> list[tuple[StoredEvent, e.EventData]]:
        """One job's stream, also when the suffix does not touch it."""
        if job_id in self.jobs or not self.before:
            return self.jobs.get(job_id, [])
        found: list[tuple[StoredEvent, e.EventData]] = []
        for before in self.before.values():
            found += _decodable(before.stream(f"job/{job_id}"))
        return found

    def whole_log(self, shard: int) -> Sequence[StoredEvent]:
        before = self.before.get(shard)
        return self.logs.get(shard, ()) if before is None else before.log

    def whole_decoded(self, shard: int) -> list[tuple[StoredEvent, e.EventData]]:
        before = self.before.get(shard)
        return self.decoded[shard] if before is None else list(_decodable(before.log))


def _decodable(rows: Iterable[StoredEvent]) -> Iterable[tuple[StoredEvent, e.EventData]]:
    for stored in rows:
        try:
            yield stored, stored.decode()
        except (KeyError, ValueError):
            continue
