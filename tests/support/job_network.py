"""Jobs from request to end over model logs, by the services' own items and the pure deciders.

What the matcher and billing would do, without tasks, time or a bus: for simulation of the core.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from nacl.signing import SigningKey

from cocoon.contracts import events as e
from cocoon.contracts import subjects
from cocoon.contracts.commands import Candidate, CreditDeposit, OpenAccount, SettleResult
from cocoon.contracts.envelope import StoredEvent
from cocoon.domain import account as accounts
from cocoon.domain import ledger
from cocoon.domain.job import JobState, fold
from cocoon.domain.leasing import decide_expire_lease, decide_request_job
from cocoon.domain.settling import decide_settle_result
from cocoon.eventlog.batch import Appended, Conflict
from cocoon.kernel.errors import CocoonError
from services.billing import decide as billing
from services.matcher import decide as matcher
from tests.support.collected import Evidence, LedgerTables, StreamMessage
from tests.support.example_events import put
from tests.support.job_world import (
    LEASE_TTL_MS,
    NOW_MS,
    Provider,
    expire_command,
    hex16,
    hex32,
    job_request,
    settle_command,
)  # fmt: skip
from tests.support.model_log import ModelLog


@dataclass
class JobNetwork:
    """One account shard and the network shard."""

    log: ModelLog = field(default_factory=lambda: ModelLog(1))
    network: ModelLog = field(default_factory=lambda: ModelLog(0))
    providers: dict[str, Provider] = field(default_factory=dict)
    attested_at: dict[str, int] = field(default_factory=dict)
    now_ms: int = NOW_MS
    draws: int = 0

    # ---- the world around jobs ----

    def enrol(self, provider: Provider) -> None:
        put(self.network, f"provider/{provider.id}", provider.network_events())
        self.providers[provider.id] = provider
        self.attested_at[provider.id] = len(self.network.events) - 1

    def open(self, account: str, nanoton: int) -> None:
        stream = f"account/{account}"
        version = self.log.versions.get(stream, 0)
        state = accounts.AccountState(opened=version > 0, version=version)
        if not version:
            opened = OpenAccount(account_id=account)
            events = accounts.decide_open_account(state, opened)
            self.log.append(
                billing.account_item(f"open-{account}", opened, account, events, version)
            )
            state = accounts.evolve(state, events[0])
        reference = f"deposit-{len(self.log.events)}"
        credit = CreditDeposit(
            account_id=account, amount_nanoton=nanoton, source="dev", reference=reference
        )
        events = accounts.decide_credit_deposit(state, credit)
        self.log.append(billing.account_item(reference, credit, account, events, state.version))

    def balances(self) -> Counter[str]:
        found: Counter[str] = Counter()
        for stored in self.log.events:
            for entry in ledger.postings(stored.decode()):
                found[entry.account] += entry.amount_nanoton
        return found

    def state(self, job: str) -> JobState:
        return fold(stored.decode() for stored in self.log.stream(f"job/{hex16(job)}"))

    def candidates(self, busy: Sequence[Provider] = ()) -> tuple[Candidate, ...]:
        return tuple(
            p.candidate(
                attested_position=self.attested_at[p.id],
                running=p.concurrency if p in busy else 0,
            )
            for p in self.providers.values()
        )

    def seed(self) -> str:
        self.draws += 1
        return hex32(f"draw {self.draws}")

    # ---- what the matcher does ----

    def request(
        self, job: str, account: str, *, busy: Sequence[Provider] = (), **changes: object
    ) -> Appended | Conflict | CocoonError:
        """Ask for a job; an error is what the gateway would be told."""
        known = tuple(self.providers.values())
        request = job_request(job, account=account, providers=known, **changes)
        available = self.balances()[ledger.client(account)]
        command = matcher.request_command(
            request, available, self.candidates(busy), LEASE_TTL_MS, self.seed(), self.now_ms
        )
        try:
            events = decide_request_job(self.state(job), command)
        except CocoonError as error:
            return error
        version = self.log.versions.get(f"account/{account}", 0)
        return self.log.append(matcher.request_item(request, command, events, version, ""))

    def expire(self, job: str, epoch: int | None = None, **changes: object) -> bool:
        """End a lease; False if there was nothing to end."""
        state = self.state(job)
        command = expire_command(
            job, state.epoch or 1 if epoch is None else epoch,
            **{"candidates": self.candidates(), "seed": self.seed(), "now_ms": self.now_ms,
               **changes},
        )  # fmt: skip
        events = decide_expire_lease(state, command)
        if not events:
            return False
        return isinstance(
            self.log.append(matcher.expire_item(command, state, events, "")), Appended
        )

    # ---- what billing does ----

    def receipt(
        self, state: JobState, *, signer: SigningKey | None = None, **changes: object
    ) -> SettleResult:
        """The submission of the live match's provider."""
        assert state.match is not None
        provider = self.providers[state.match.provider_id]
        return settle_command(state, signer=signer, provider=provider, **changes)  # type: ignore[arg-type]

    def submit(self, command: SettleResult) -> tuple[e.EventData, ...] | CocoonError:
        """Settle or reject; what was written, nothing for a repeat."""
        rows = self.log.stream(f"job/{command.job_id}")
        state = fold(stored.decode() for stored in rows)
        try:
            events = decide_settle_result(state, command)
        except CocoonError as error:
            return error
        if events:
            outcome = self.log.append(billing.settle_item(command, state, events, ""))
            assert isinstance(outcome, Appended)
        return events

    # ---- what is collected ----

    def ledger_tables(self) -> LedgerTables:
        projection = billing.project(self.log.events)
        return LedgerTables(
            applied=len(self.log.events),
            entries=projection.entries,
            balances={a: n for a, n in projection.changes.items() if n},
            settlements={
                s.event.job_id: (
                    s.position, s.event.price_nanoton, s.event.provider_nanoton,
                    s.event.fee_nanoton,
                )
                for s in projection.settlements
            },
        )  # fmt: skip

    def evidence(self, *, quiet: bool = False) -> Evidence:
        logs = {0: tuple(self.network.events), 1: tuple(self.log.events)}
        return Evidence(
            logs=logs,
            quiet=quiet,
            commands={1: list(self.log.commands.values())},
            streams={shard: stream_of(shard, rows) for shard, rows in logs.items()},
            ledgers={1: self.ledger_tables()},
        )


def stream_of(shard: int, rows: Sequence[StoredEvent]) -> list[StreamMessage]:
    """What a relay would have published."""
    return [
        StreamMessage(
            row.position, subjects.event(shard, row.stream, row.type), row.to_headers(), row.data
        )
        for row in rows
    ]
