"""Parking: a poisoned event stops its own stream (one job), never the consumer.

Once a stream is parked, its later events are parked behind the first, so that unparking replays
them in order. Call these in the transaction of the checkpoint.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from cocoon.eventlog.connection import tree_errors

if TYPE_CHECKING:
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
    conn: Connection,
    shard: int,
    consumer: str,
    position: int,
    stream: str,
    error_class: str,
    attempts: int = 1,
) -> None:
    """Park an event; again with the same position: one more attempt."""
    with tree_errors():
        await conn.execute(
            "INSERT INTO log.parked AS p"
            " (shard, consumer, position, stream, error_class, attempts)"
            " VALUES ($1, $2, $3, $4, $5, $6) ON CONFLICT (shard, consumer, position) DO UPDATE"
            " SET error_class = excluded.error_class, attempts = p.attempts + excluded.attempts",
            shard, consumer, position, stream, error_class, attempts,
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


async def parked_streams(conn: Connection, shard: int, consumer: str) -> set[str]:
    """The streams whose events must be parked, not handled."""
    return {entry.stream for entry in await parked(conn, shard, consumer)}


async def unpark(conn: Connection, shard: int, consumer: str, stream: str) -> list[int]:
    """Remove a stream from the parking and return its positions, in the order to replay them.

    Handle those events in the same transaction: a rollback parks them again.
    """
    with tree_errors():
        rows = await conn.fetch(
            "DELETE FROM log.parked WHERE shard = $1 AND consumer = $2 AND stream = $3"
            " RETURNING position",
            shard,
            consumer,
            stream,
        )
    return sorted(row["position"] for row in rows)
