"""The ledger's shell: an account shard's events into its tables, with the checkpoint, once each.

What cannot be posted is parked with its stream and said aloud (log, metric, `cocoon status`);
the shard goes on. `unpark` posts it in order once its cause is mended. Nothing is ever skipped.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import TYPE_CHECKING

from cocoon.contracts.envelope import StoredEvent
from cocoon.contracts.events import FundsHeld, ResultSealed
from cocoon.eventlog.append import transaction
from cocoon.eventlog.connection import acquired
from cocoon.eventlog.parking import park, parked, unpark
from cocoon.eventlog.read import read_batch
from cocoon.kernel.errors import Conflict
from cocoon.telemetry import metrics
from cocoon.telemetry.logs import get_logger
from services.billing import posting, store
from services.billing.posting import BEHIND_PARKED, Line, Posting, Standing

if TYPE_CHECKING:
    from cocoon.eventlog.connection import Connection, Pool
    from services.billing.results import LiveJobs

log = get_logger(__name__)
LEDGER_CONSUMER = "ledger"
ROLE = "billing"


class Ledger:
    """One account shard's projection. One transaction at a time."""

    def __init__(self, pool: Pool, shard: int, term: int, live: LiveJobs) -> None:
        self._pool, self._shard, self._term, self._live = pool, shard, term, live
        # None: not known, because it was never read or a COMMIT's answer may be lost
        self._standing: Standing | None = None
        self._one = asyncio.Lock()  # balances are read, checked and written: never two at once

    async def load(self) -> None:
        """Learn what stands aside since earlier; without it the first batch does."""
        async with self._one, acquired(self._pool) as conn:
            self._standing = await self._stored_standing(conn)

    def hear(self, batch: Sequence[StoredEvent]) -> None:
        """Let results find their jobs; the events are posted later, many at once."""
        for stored in batch:
            try:
                self._live.apply(stored)
            except (ValueError, KeyError):
                continue  # posting parks it

    async def on_events(self, batch: Sequence[StoredEvent]) -> None:
        """Post a batch. Raises StaleTerm when another billing has taken over."""
        lines = posting.read_lines(batch)
        accounts = posting.accounts_of(lines)
        async with self._one:
            standing, self._standing = self._standing, None  # until the commit is certain
            async with transaction(self._pool, self._shard, ROLE, self._term) as tx:
                if standing is None:
                    standing = await self._stored_standing(tx.conn)
                before = await store.balances(tx.conn, self._shard, accounts)
                results = await _results_before(tx.conn, self._shard, lines)
                done = posting.post(lines, before, standing, results)
                await store.write(tx.conn, self._shard, done)
                await park(tx, LEDGER_CONSUMER, done.aside)
                await tx.checkpoint(LEDGER_CONSUMER, batch[-1].position)
            self._standing = done.standing
        _tell(done)

    async def unpark(self, stream: str) -> int:
        """Post a parked stream's events in order; returns how many.

        Raises Conflict, with nothing changed, while one of them still cannot be posted.
        """
        async with self._one:
            self._standing = None  # until the commit is certain
            async with transaction(self._pool, self._shard, ROLE, self._term) as tx:
                positions = await unpark(tx, LEDGER_CONSUMER, stream)
                events = [await _event_at(tx.conn, self._shard, position) for position in positions]
                standing = await self._stored_standing(tx.conn)  # without this stream
                lines = posting.read_lines(events)
                before = await store.balances(tx.conn, self._shard, posting.accounts_of(lines))
                results = await _results_before(tx.conn, self._shard, lines)
                done = posting.post(lines, before, standing, results)
                if done.aside:
                    first, reason = done.aside[0]
                    raise Conflict(
                        f"position {first.position} of {stream} still cannot be posted ({reason});"
                        " mend its cause first, nothing was changed",
                        code="still_parked",
                    )
                await store.write(tx.conn, self._shard, done)
            self._standing = standing
        return len(positions)

    async def parked(self) -> list[dict[str, object]]:
        """What stands aside: the first event of each stream, and how many wait behind it."""
        async with acquired(self._pool) as conn:
            rows = await parked(conn, self._shard, LEDGER_CONSUMER)
        found: dict[str, dict[str, object]] = {}
        events: dict[str, int] = {}
        for row in rows:
            events[row.stream] = events.get(row.stream, 0) + 1
            first = {"stream": row.stream, "position": row.position, "reason": row.error_class}
            found.setdefault(row.stream, first)["events"] = events[row.stream]
        return list(found.values())

    async def _stored_standing(self, conn: Connection) -> Standing:
        rows = await parked(conn, self._shard, LEDGER_CONSUMER)
        frozen = set()
        for row in rows:
            if row.error_class in posting.FREEZES:
                event = (await _event_at(conn, self._shard, row.position)).decode()
                if isinstance(event, FundsHeld):
                    frozen.add(event.account_id)
        return Standing(frozenset(row.stream for row in rows), frozenset(frozen))


async def _results_before(
    conn: Connection, shard: int, lines: Sequence[Line]
) -> dict[int, ResultSealed]:
    """The results that a batch's payments belong to, where the batch began after them."""
    found = {}
    for position in posting.results_lacking(lines):
        event = (await _event_at(conn, shard, position)).decode()
        if isinstance(event, ResultSealed):
            found[position] = event
    return found


async def _event_at(conn: Connection, shard: int, position: int) -> StoredEvent:
    return (await read_batch(conn, shard, position, 1))[0]


def _tell(done: Posting) -> None:
    for stored, reason in done.aside:
        if reason == BEHIND_PARKED:
            continue  # its stream was told when it was parked
        metrics.PARKED.inc(LEDGER_CONSUMER)
        log.error(
            "event_parked", shard=stored.shard, position=stored.position, stream=stored.stream,
            event_type=stored.type, kind=reason,
        )  # fmt: skip
