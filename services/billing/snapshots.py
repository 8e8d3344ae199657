"""Snapshots of the books: what the log vouches for, so that a replay may begin late.

Billing replays its own log every so many events and, when log and tables agree, keeps the books
and appends their sha256. A row of the table alone proves nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cocoon.contracts.events import LedgerSnapshotTaken
from cocoon.eventlog.read import stream_events
from cocoon.kernel.errors import LogCorrupt
from services.billing import store
from services.billing.books import Books
from services.billing.redecide import Report

if TYPE_CHECKING:
    from cocoon.eventlog.connection import Connection


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The books after the event at `position`."""

    position: int
    books: Books


def stream_of(shard: int) -> str:
    return f"ledger/{shard}"


async def named(conn: Connection, shard: int) -> dict[int, str]:
    """Position -> sha256 of every snapshot that the log names. Raises LogCorrupt."""
    found = {}
    for stored in await stream_events(conn, shard, stream_of(shard)):
        try:
            event = stored.decode()
        except (ValueError, KeyError) as error:
            raise LogCorrupt(f"shard {shard} position {stored.position} does not decode") from error
        if isinstance(event, LedgerSnapshotTaken) and event.position < stored.position:
            found[event.position] = event.sha256
    return found


async def newest_named(conn: Connection, shard: int, below: int) -> int:
    """The position of the newest snapshot before `below` that is kept and named, 0 without one."""
    marks = await named(conn, shard)
    kept = await store.snapshot_positions(conn, shard, below)
    return next((position for position in kept if position in marks), 0)


async def newest_below(
    conn: Connection, shard: int, first: int, marks: Mapping[int, str], report: Report
) -> Snapshot | None:
    """The newest snapshot before `first` that the log names, or None.

    One whose bytes are not what the log names is a difference, and the fold does without it.
    """
    for position in await store.snapshot_positions(conn, shard, first):
        if position not in marks:
            continue  # billing died between keeping and naming it
        data = await store.snapshot(conn, shard, position)
        if hashlib.sha256(data).hexdigest() == marks[position]:
            return Snapshot(position, Books.parse(data))
        report.say(f"the snapshot of position {position} is not the one that the log names")
        return None
    report.note(f"there is no snapshot below position {first}: no table is compared")
    return None
