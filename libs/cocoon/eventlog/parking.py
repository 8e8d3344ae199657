"""Parking: a poisoned event stops its own stream (one job), never the consumer.

Once a stream is parked, its later events are parked behind the first, so that unparking replays
them in order. Only the role that owns the consumer may park; call it with the checkpoint.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cocoon.contracts.envelope import StoredEvent
from cocoon.eventlog.connection import tree_errors

if TYPE_CHECKING:
    from cocoon.eventlog.append import LogTransaction
    from cocoon.eventlog.connection import Connection


@dataclass(frozen=True, slots=True)
class Parked:
    """One event that a consumer could not take, or that waits behind such a one."""

    shard: int
    consumer: str
    position: int
    stream: str
    error_class: str  # the error's type, never its text
    attempts: int


async def park(
    tx: LogTransaction, consumer: str, events: Sequence[tuple[StoredEvent, str]]
) -> None:
    """Park events, each with its error's class; again with the same position: one more attempt.

    Raises StaleTerm, or NotGranted for another role's consumer.
    """
    if not events:
        return
    with tree_errors():
        await tx.conn.execute(
            "SELECT log.park($1, $2, $3, $4, $5, $6, $7)",
            tx.shard, tx.role, tx.term, consumer,
            [stored.position for stored, _ in events],
            [stored.stream for stored, _ in events],
            [error_class for _, error_class in events],
        )  # fmt: skip


async def parked(conn: Connection, shard: int, consumer: str | None = None) -> list[Parked]:
    """What is parked on a shard, in order of position; of one consumer or of all."""
    with tree_errors():
        rows = await conn.fetch(
            "SELECT shard, consumer, position, stream, error_class, attempts FROM log.parked"
            " WHERE shard = $1 AND ($2::text IS NULL OR consumer = $2)"
            " ORDER BY position, consumer",
            shard,
            consumer,
        )
    return [Parked(**dict(row)) for row in rows]


async def unpark(tx: LogTransaction, consumer: str, stream: str) -> list[int]:
    """Remove a stream from the parking and return its positions, in the order to replay them.

    Handle those events in the same transaction: a rollback parks them again. Raises as `park`.
    """
    with tree_errors():
        positions = await tx.conn.fetchval(
            "SELECT log.unpark($1, $2, $3, $4, $5)",
            tx.shard, tx.role, tx.term, consumer, stream,
        )  # fmt: skip
    return list(positions)
