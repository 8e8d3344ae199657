"""Reading the whole log fast, for replay: each row's hashed text and hash, checked row by row.

Postgres joins the columns into the very text that the chain hashes; what is read out of a row is
read out of that text, so nothing unhashed is believed. It never writes.
"""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from cocoon.contracts.envelope import StoredEvent
from cocoon.eventlog.connection import tree_errors
from cocoon.eventlog.read import StoredCommand, read_commands
from cocoon.kernel.errors import LogCorrupt

if TYPE_CHECKING:
    from cocoon.eventlog.connection import Connection

FIELDS: Final = (
    12  # of a hashed text (cocoon.contracts.envelope); the last, data, may hold anything
)
SHARD, POSITION, STREAM, VERSION, TYPE, SCHEMA_VERSION, EVENT_ID, CAUSE = range(8)
CORRELATION, ACTOR, RECORDED_AT, DATA = range(8, FIELDS)

_SCAN = """
SELECT convert_to(shard || E'\\n' || position || E'\\n' || stream || E'\\n' || version || E'\\n'
    || type || E'\\n' || schema_version || E'\\n' || event_id || E'\\n' || causation_id || E'\\n'
    || correlation_id || E'\\n' || actor || E'\\n' || recorded_at || E'\\n' || data, 'UTF8'), hash
  FROM log.events WHERE shard = $1 AND position BETWEEN $2 AND $3 ORDER BY position
"""


@dataclass(frozen=True, slots=True)
class Scan:
    """Rows `first`, first + 1, ...: hashed texts and hashes; the commands behind them if asked."""

    first: int
    texts: Sequence[bytes]
    hashes: Sequence[bytes]
    commands: Sequence[StoredCommand] = ()

    @property
    def last(self) -> int:
        return self.first + len(self.texts) - 1


async def scan(conn: Connection, shard: int, first: int, last: int, *, commands: bool) -> Scan:
    """The rows first..last as they lie there. Raises Unavailable; nothing is checked yet."""
    with tree_errors():
        rows = await conn.fetch(_SCAN, shard, first, last)
    texts, hashes = zip(*rows, strict=True) if rows else ((), ())
    behind = await read_commands(conn, shard, first, last) if commands else ()
    return Scan(first, texts, hashes, behind)


async def scan_all(
    conn: Connection, shard: int, first: int, last: int, batch: int
) -> AsyncIterator[Scan]:
    """Scans of first..last with their commands, `batch` rows each."""
    for start in range(first, last + 1, batch):
        yield await scan(conn, shard, start, min(start + batch - 1, last), commands=True)


def checked(shard: int, prev_hash: bytes, rows: Scan, last: int) -> Iterator[list[bytes]]:
    """The fields of every row first..last after the hash before them; chain and density hold.

    Raises LogCorrupt, naming the position.
    """
    sha256, position = hashlib.sha256, rows.first - 1
    name = b"%d" % shard
    for text, row_hash in zip(rows.texts, rows.hashes, strict=True):
        position += 1
        fields = text.split(b"\n", FIELDS - 1)
        if len(fields) != FIELDS or fields[POSITION] != b"%d" % position or fields[SHARD] != name:
            raise LogCorrupt(f"shard {shard} has no position {position}")
        prev_hash = sha256(prev_hash + text).digest()
        if prev_hash != row_hash:
            raise LogCorrupt(f"the hash chain of shard {shard} breaks at position {position}")
        yield fields
    if position < last:
        raise LogCorrupt(f"shard {shard} has no position {position + 1}")


def stored_event(fields: Sequence[bytes], prev_hash: bytes, row_hash: bytes) -> StoredEvent:
    """A checked row as the rest of the code knows it (without its traceparent)."""
    return StoredEvent(
        shard=int(fields[SHARD]),
        position=int(fields[POSITION]),
        stream=fields[STREAM].decode(),
        version=int(fields[VERSION]),
        type=fields[TYPE].decode(),
        schema_version=int(fields[SCHEMA_VERSION]),
        event_id=fields[EVENT_ID].decode(),
        causation_id=fields[CAUSE].decode(),
        correlation_id=fields[CORRELATION].decode(),
        actor=fields[ACTOR].decode(),
        recorded_at_us=int(fields[RECORDED_AT]),
        data=fields[DATA],
        prev_hash=prev_hash,
        hash=row_hash,
    )
