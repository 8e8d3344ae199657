"""Small items to append, and the checks that every log must pass."""

from __future__ import annotations

import asyncpg

from cocoon.contracts.envelope import GENESIS_HASH, AppendItem, NewEvent, StoredEvent
from cocoon.contracts.events import DepositCredited, EventData, FundsHeld, ResultRejected
from cocoon.eventlog.read import read
from cocoon.kernel import ids

COMMAND = b'{"kind":"test"}'


def job(number: int) -> str:
    return f"{number:032x}"


def job_item(
    number: int,
    events: int = 3,
    expects: int | None = 0,
    name: str = "hold",
    actor: str = "matcher",
) -> AppendItem:
    """`events` events on the stream of job `number`, which must be at version `expects`."""
    stream = f"job/{job(number)}"
    return AppendItem(
        command_id=ids.named_command_id(name, job(number)),
        command=COMMAND,
        actor=actor,
        correlation_id=job(number),
        expects=() if expects is None else ((stream, expects),),
        events=tuple(NewEvent(stream, _event(number, actor)) for _ in range(events)),
        traceparent="00-" + "1" * 32 + "-" + "2" * 16 + "-01",
    )


def _event(number: int, actor: str) -> EventData:
    """One that the role of this name may append."""
    if actor == "billing":
        return ResultRejected(
            job_id=job(number), provider_id="prov_1", epoch=1, reason="late", receipt_hash="0" * 64
        )
    return FundsHeld(job_id=job(number), account_id="acct_1", amount_nanoton=number)


def deposit(account: str, reference: str, amount_nanoton: int = 1) -> AppendItem:
    """One event on an account's stream, expecting nothing."""
    return AppendItem(
        command_id=ids.named_command_id("deposit", reference),
        command=COMMAND,
        actor="billing",
        correlation_id=account,
        expects=(),
        events=(
            NewEvent(
                f"account/{account}",
                DepositCredited(
                    account_id=account,
                    amount_nanoton=amount_nanoton,
                    source="dev",
                    reference=reference,
                ),
            ),
        ),
    )


def assert_sound(events: list[StoredEvent]) -> None:
    """Positions dense from 1, versions contiguous per stream, the chain valid, times in order."""
    previous, versions, recorded = GENESIS_HASH, dict[str, int](), 0
    for position, event in enumerate(events, start=1):
        assert event.position == position
        assert event.prev_hash == previous
        assert event.compute_hash() == event.hash
        assert event.version == versions.get(event.stream, 0) + 1
        assert event.recorded_at_us >= recorded
        previous, recorded = event.hash, event.recorded_at_us
        versions[event.stream] = event.version
    assert len({event.event_id for event in events}) == len(events)


async def whole_log(dsn: str, shard: int = 1) -> list[StoredEvent]:
    conn = await asyncpg.connect(dsn, timeout=10)
    try:
        return [event async for batch in read(conn, shard) for event in batch]
    finally:
        await conn.close()
