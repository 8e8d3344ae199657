"""Reading the log: dense, in order, hash chain checked row by row. It never writes."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import asyncpg

from cocoon.contracts.commands import RequestJob, decode_command
from cocoon.contracts.envelope import GENESIS_HASH, StoredEvent
from cocoon.eventlog.connection import tree_errors
from cocoon.kernel.errors import LogCorrupt

if TYPE_CHECKING:
    from cocoon.eventlog.connection import Connection

_COLUMNS = (
    "position, stream, version, type, schema_version, event_id, causation_id, correlation_id,"
    " actor, traceparent, recorded_at, data, hash"
)


@dataclass(frozen=True, slots=True)
class Head:
    """The last row of a shard: position 0 and the genesis hash when it is empty."""

    position: int
    hash: bytes
    recorded_at_us: int


@dataclass(frozen=True, slots=True)
class StoredCommand:
    """A command as the log keeps it: its bytes and the positions that it produced."""

    command_id: str
    first_position: int
    last_position: int
    data: bytes


async def head(conn: Connection, shard: int) -> Head:
    """Where the log of this shard ends. Raises LogCorrupt if the shard does not exist."""
    with tree_errors():
        row = await conn.fetchrow(
            "SELECT position, hash, recorded_at FROM log.head WHERE shard = $1", shard
        )
    if row is None:
        raise LogCorrupt(f"the database has no shard {shard}; run the migrations")
    return Head(row["position"], row["hash"], row["recorded_at"])


async def checkpoint(conn: Connection, shard: int, consumer: str) -> int:
    """The last position whose effects this consumer has committed (0 at first)."""
    with tree_errors():
        position = await conn.fetchval(
            "SELECT position FROM log.checkpoints WHERE shard = $1 AND consumer = $2",
            shard,
            consumer,
        )
    return int(position or 0)


async def read_batch(
    conn: Connection, shard: int, first: int, limit: int, prev_hash: bytes | None = None
) -> list[StoredEvent]:
    """Up to `limit` events from position `first`, none if the log ends before it.

    `prev_hash` is the hash at first - 1; it is looked up when None. Raises LogCorrupt for a hole
    or a broken chain.
    """
    if first < 1:
        raise ValueError("positions start at 1")
    with tree_errors():
        rows = await conn.fetch(
            f"SELECT {_COLUMNS} FROM log.events"  # noqa: S608 - constants only
            " WHERE shard = $1 AND position >= $2 AND position < $3 ORDER BY position",
            shard,
            first,
            first + limit,
        )
        if rows and prev_hash is None:
            prev_hash = await _hash_before(conn, shard, first)
    events = []
    for offset, row in enumerate(rows):
        if row["position"] != first + offset:
            raise LogCorrupt(f"shard {shard} has no position {first + offset}")
        assert prev_hash is not None  # noqa: S101 - looked up above
        event = _stored(shard, row, prev_hash)
        if event.compute_hash() != event.hash:
            raise LogCorrupt(f"the hash chain of shard {shard} breaks at position {event.position}")
        prev_hash = event.hash
        events.append(event)
    return events


async def read(
    conn: Connection, shard: int, first: int = 1, last: int | None = None, batch: int = 1024
) -> AsyncIterator[list[StoredEvent]]:
    """Batches of the events first..last (to the end when None). Errors as `read_batch`.

    Inside a REPEATABLE READ transaction all batches come from one snapshot.
    """
    prev_hash: bytes | None = None
    while last is None or first <= last:
        limit = batch if last is None else min(batch, last - first + 1)
        events = await read_batch(conn, shard, first, limit, prev_hash)
        if events:
            yield events
            first, prev_hash = events[-1].position + 1, events[-1].hash
        if len(events) < limit:
            return


async def stream_events(conn: Connection, shard: int, stream: str) -> list[StoredEvent]:
    """The whole history of one stream ("job/<id>"), oldest first, each row's hash checked."""
    with tree_errors():
        rows = await conn.fetch(
            f"SELECT {_COLUMNS}, COALESCE((SELECT p.hash FROM log.events p"  # noqa: S608
            " WHERE p.shard = $1 AND p.position = e.position - 1), $3) AS prev_hash"
            " FROM log.events e WHERE shard = $1 AND stream = $2 ORDER BY version",
            shard,
            stream,
            GENESIS_HASH,
        )
    events = [_stored(shard, row, row["prev_hash"]) for row in rows]
    for version, event in enumerate(events, start=1):
        if event.version != version or event.compute_hash() != event.hash:
            raise LogCorrupt(f"stream {stream} of shard {shard} breaks at version {version}")
    return events


async def read_commands(conn: Connection, shard: int, first: int, last: int) -> list[StoredCommand]:
    """The commands behind the events first..last, in order: what a re-decision runs on."""
    with tree_errors():
        rows = await conn.fetch(
            "SELECT command_id, first_position, last_position, data FROM log.commands"
            " WHERE shard = $1 AND command_id IN (SELECT causation_id FROM log.events"
            " WHERE shard = $1 AND position BETWEEN $2 AND $3) ORDER BY first_position",
            shard,
            first,
            last,
        )
    return [
        StoredCommand(
            row["command_id"], row["first_position"], row["last_position"], row["data"].encode()
        )
        for row in rows
    ]


async def commands_of(
    conn: Connection, shard: int, events: Sequence[StoredEvent]
) -> list[StoredCommand]:
    """The commands that wrote these events, in the log's order."""
    with tree_errors():
        rows = await conn.fetch(
            "SELECT command_id, first_position, last_position, data FROM log.commands"
            " WHERE shard = $1 AND command_id = ANY($2) ORDER BY first_position",
            shard,
            sorted({event.causation_id for event in events}),
        )
    return [
        StoredCommand(
            row["command_id"], row["first_position"], row["last_position"], row["data"].encode()
        )
        for row in rows
    ]


async def job_of_command(conn: Connection, shard: int, command_id: str) -> str | None:
    """What the events of a command correlate with, None if the log has no such command."""
    with tree_errors():
        found = await conn.fetchval(
            "SELECT e.correlation_id FROM log.commands c JOIN log.events e"
            " ON e.shard = c.shard AND e.position = c.first_position"
            " WHERE c.shard = $1 AND c.command_id = $2 AND c.last_position >= c.first_position",
            shard,
            command_id,
        )
    return None if found is None else str(found)


async def requests_of_jobs(
    conn: Connection, shard: int, job_ids: Sequence[str]
) -> list[RequestJob]:
    """The stored commands that began these jobs; unknown ones are left out."""
    with tree_errors():
        rows = await conn.fetch(
            "SELECT c.data FROM log.events e JOIN log.commands c"
            " ON c.shard = e.shard AND c.command_id = e.causation_id"
            " WHERE e.shard = $1 AND e.version = 1 AND e.stream = ANY($2)",
            shard,
            [f"job/{job_id}" for job_id in job_ids],
        )
    found = [decode_command(row["data"].encode()) for row in rows]
    return [command for command in found if isinstance(command, RequestJob)]


async def hash_at(conn: Connection, shard: int, position: int) -> bytes:
    """The chain's hash at a position, genesis at 0. Raises LogCorrupt if the row is missing."""
    with tree_errors():
        return await _hash_before(conn, shard, position + 1)


async def first_position_since(conn: Connection, shard: int, recorded_at_us: int) -> int:
    """The first position recorded at or after a time: one past the head if there is none."""
    low, high = 1, (await head(conn, shard)).position + 1
    while low < high:  # times never decrease along the log
        middle = (low + high) // 2
        with tree_errors():
            found = await conn.fetchval(
                "SELECT recorded_at FROM log.events WHERE shard = $1 AND position = $2",
                shard,
                middle,
            )
        if found is None:
            raise LogCorrupt(f"shard {shard} has no position {middle}")
        low, high = (middle + 1, high) if found < recorded_at_us else (low, middle)
    return low


async def _hash_before(conn: Connection, shard: int, first: int) -> bytes:
    if first == 1:
        return GENESIS_HASH
    found = await conn.fetchval(
        "SELECT hash FROM log.events WHERE shard = $1 AND position = $2", shard, first - 1
    )
    if found is None:
        raise LogCorrupt(f"shard {shard} has no position {first - 1}")
    return bytes(found)


def _stored(shard: int, row: asyncpg.Record, prev_hash: bytes) -> StoredEvent:
    return StoredEvent(
        shard=shard,
        position=row["position"],
        stream=row["stream"],
        version=row["version"],
        type=row["type"],
        schema_version=row["schema_version"],
        event_id=row["event_id"],
        causation_id=row["causation_id"],
        correlation_id=row["correlation_id"],
        actor=row["actor"],
        recorded_at_us=row["recorded_at"],
        data=row["data"].encode("utf-8"),
        prev_hash=prev_hash,
        hash=row["hash"],
        traceparent=row["traceparent"],
    )
