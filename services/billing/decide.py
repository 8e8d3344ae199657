"""Billing's pure part: results to settlements, events to ledger lines.

A batch of events becomes entries, balance changes and settlements that one transaction writes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

from cocoon.contracts.commands import Command, OpenDispute, SettleResult
from cocoon.contracts.envelope import AppendItem, NewEvent, StoredEvent
from cocoon.contracts.events import EventData, PaymentSettled, ResultRejected, ResultSealed
from cocoon.contracts.messages import ResultAck, SubmitResult
from cocoon.domain.job import JobState
from cocoon.domain.ledger import Entry, postings
from cocoon.domain.metering import RULE as METERING_RULE
from cocoon.kernel.ids import named_command_id

ACTOR = "billing"


@dataclass(frozen=True, slots=True)
class Settlement:
    """One paid job: a row of ledger.settlements."""

    shard: int
    position: int
    event: PaymentSettled


@dataclass(slots=True)
class Projection:
    """What a batch of events does to the ledger."""

    entries: list[tuple[int, int, int, str, int]] = field(default_factory=list)
    changes: dict[str, int] = field(default_factory=dict)  # account -> sum of changes
    settlements: list[Settlement] = field(default_factory=list)

    def add(self, stored: StoredEvent, event: EventData, entries: Iterable[Entry]) -> None:
        """Take one event with its entries."""
        for line, entry in enumerate(entries):
            self.entries.append(
                (stored.shard, stored.position, line, entry.account, entry.amount_nanoton)
            )
            self.changes[entry.account] = self.changes.get(entry.account, 0) + entry.amount_nanoton
        if isinstance(event, PaymentSettled):
            self.settlements.append(Settlement(stored.shard, stored.position, event))


def project(events: Iterable[StoredEvent]) -> Projection:
    """Fold a batch of one shard's events: entries are (shard, position, line, account, amount)."""
    projection = Projection()
    for stored in events:
        event = stored.decode()
        projection.add(stored, event, postings(event))
    return projection


def settle_command(result: SubmitResult) -> SettleResult:
    return SettleResult(
        job_id=result.job_id,
        provider_id=result.provider_id,
        epoch=result.epoch,
        receipt=result.receipt,
        blob_hash=result.blob_hash,
        response_bytes=result.response_bytes,
        metering=METERING_RULE,
    )


def settle_item(
    command: SettleResult, state: JobState, events: Iterable[EventData], traceparent: str
) -> AppendItem:
    """Fenced by the job's version: whoever is first, expiry or result, wins."""
    receipt_hash = hashlib.sha256(command.receipt.encode()).hexdigest()
    stream = f"job/{command.job_id}"
    return AppendItem(
        command_id=named_command_id("settle", command.job_id, str(command.epoch), receipt_hash),
        command=command.to_stored(),
        actor=ACTOR,
        correlation_id=command.job_id,
        expects=((stream, state.version),),
        events=tuple(NewEvent(stream, event) for event in events),
        traceparent=traceparent,
    )


def dispute_item(command: OpenDispute, events: Iterable[EventData]) -> AppendItem:
    """Once a job: the stream must be empty."""
    stream = f"dispute/{command.job_id}"
    return AppendItem(
        command_id=named_command_id("dispute", command.job_id),
        command=command.to_stored(),
        actor=ACTOR,
        correlation_id=command.job_id,
        expects=((stream, 0),),
        events=tuple(NewEvent(stream, event) for event in events),
    )


def account_item(
    command_id: str, command: Command, account_id: str, events: Iterable[EventData], version: int
) -> AppendItem:
    stream = f"account/{account_id}"
    return AppendItem(
        command_id=command_id,
        command=command.to_stored(),
        actor=ACTOR,
        correlation_id=account_id,
        expects=((stream, version),),
        events=tuple(NewEvent(stream, event) for event in events),
    )


def ack_for(result: SubmitResult, events: Iterable[EventData], state: JobState) -> ResultAck:
    """What the provider is told; a repeat is told what was decided the first time."""
    outcome: Literal["result_sealed", "result_rejected"] = "result_rejected"
    reason = "repeated"
    for event in events:
        if isinstance(event, ResultSealed):
            outcome, reason = "result_sealed", "none"
        elif isinstance(event, ResultRejected):
            reason = event.reason
    paid = state.result
    if paid is not None and (paid.epoch, paid.provider_id) == (result.epoch, result.provider_id):
        outcome, reason = "result_sealed", "none"
    return ResultAck(job_id=result.job_id, epoch=result.epoch, outcome=outcome, reason=reason)
