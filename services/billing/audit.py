"""Billing replays its own log every so many events, and seals what it found as a snapshot.

A snapshot is what the log gives, never what the tables hold: where the two differ, none is taken
and it is said aloud. Nothing is repaired here.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

from cocoon.contracts.commands import TakeLedgerSnapshot
from cocoon.contracts.envelope import AppendItem, NewEvent
from cocoon.domain.decide import decide, stream_of
from cocoon.eventlog.append import LogAppender
from cocoon.eventlog.connection import acquired
from cocoon.eventlog.read import checkpoint
from cocoon.kernel.errors import LogCorrupt, Transient
from cocoon.kernel.ids import named_command_id
from cocoon.telemetry.logs import get_logger
from services.billing import snapshots, store
from services.billing.decide import ACTOR
from services.billing.ledger import LEDGER_CONSUMER
from services.billing.verify import replay_shard

if TYPE_CHECKING:
    from cocoon.eventlog.connection import Pool

log = get_logger(__name__)
LOOK_S: Final = 5.0
AGAIN_S: Final = 600.0  # after a replay that gave no snapshot: it costs a second of work
KEPT: Final = 16  # of a shard's snapshots, the newest


async def keep_snapshots(
    pool: Pool, appenders: Mapping[int, LogAppender], every_events: int
) -> None:
    """Take them for ever. Raises StaleTerm when another billing has taken over."""
    while True:
        wait_s = LOOK_S
        for shard, appender in appenders.items():
            try:
                taken = await take_snapshot(pool, shard, appender, every_events)
            except LogCorrupt:
                log.exception("log_corrupt", shard=shard)
                taken = False
            except Transient as error:
                log.warning("snapshot_not_taken", shard=shard, code=error.code)
                taken = None
            if taken is False:
                wait_s = AGAIN_S
        await asyncio.sleep(wait_s)


async def take_snapshot(
    pool: Pool, shard: int, appender: LogAppender, every_events: int
) -> bool | None:
    """Replay what the ledger has posted since the newest snapshot, and take the next.

    None: fewer than `every_events` events since. False: log and tables differ, or an event stands
    aside (it may be posted later, behind the snapshot). Raises LogCorrupt, Transient.
    """
    async with (
        acquired(pool) as conn,
        conn.transaction(isolation="repeatable_read", readonly=True),
    ):
        applied = await checkpoint(conn, shard, LEDGER_CONSUMER)
        newest = await snapshots.newest_named(conn, shard, applied + 1)
        if applied - newest < every_events:
            return None
        report, fold = await replay_shard(conn, shard, newest + 1, applied, decisions=False)
    if report.differences or report.parked or fold.books is None:
        log.error(
            "snapshot_refused", shard=shard, position=applied,
            differences=len(report.differences), parked=report.parked,
        )  # fmt: skip
        return False
    data = fold.books.serialise()
    async with acquired(pool) as conn, conn.transaction():
        await store.keep_snapshot(conn, shard, applied, data, KEPT)
    await appender.append(_item(shard, applied, report.derived_sha256))
    log.info("snapshot_taken", shard=shard, position=applied)
    return True


def _item(shard: int, position: int, sha256: str) -> AppendItem:
    command = TakeLedgerSnapshot(shard=shard, position=position, sha256=sha256)
    stream = stream_of(command)
    return AppendItem(
        command_id=named_command_id("snapshot", str(shard), str(position)),
        command=command.to_stored(),
        actor=ACTOR,
        correlation_id=stream,
        expects=(),
        events=tuple(NewEvent(stream, event) for event in decide(None, command)),
    )
