"""Replay of one shard: scan, check, fold and compare with the tables, in the caller's snapshot.

While one batch is folded the next is fetched. Memory holds live state and two batches, however
long the log. It never writes.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice, zip_longest
from typing import TYPE_CHECKING, Any, Final

from cocoon.contracts.envelope import GENESIS_HASH, StoredEvent
from cocoon.contracts.events import EventData, PaymentSettled, ResultRejected, ResultSealed, decoder
from cocoon.contracts.shapes import checker, reader
from cocoon.domain import ledger
from cocoon.domain.ledger import Entry, OutOfBounds, postings
from cocoon.eventlog import scan as log
from cocoon.eventlog.read import StoredCommand, checkpoint, hash_at, head, stream_events
from cocoon.eventlog.scan import DATA, RECORDED_AT, SCHEMA_VERSION, STREAM, TYPE, Scan
from cocoon.kernel.errors import LogCorrupt
from services.billing import snapshots, store
from services.billing.books import Books
from services.billing.draws import Draws
from services.billing.draws import stream as seeds_stream
from services.billing.earning import DAY_US, Counts, Earnings
from services.billing.ledger import LEDGER_CONSUMER
from services.billing.posting import BEHIND_PARKED, FREEZES
from services.billing.redecide import Decisions, Report

if TYPE_CHECKING:
    from cocoon.eventlog.connection import Connection

BATCH: Final = 2048  # events of a fetch: about 2 MB
SLICE: Final = 128  # events folded before the event loop has a turn
POSITIONS_SHOWN: Final = 20
_REJECTED: Final = ResultRejected.event_type.encode()
_SEALED: Final = ResultSealed.event_type.encode()


Read = Callable[[bytes], Any]  # an event, its fields, or None where nobody asks for them


@lru_cache(maxsize=256)
def whole(event_type: bytes, schema_version: bytes) -> Read:
    """An event's decoder, by two fields of a hashed text. Raises KeyError or ValueError."""
    return decoder(event_type.decode(), int(schema_version))


@lru_cache(maxsize=256)
def if_it_posts(event_type: bytes, schema_version: bytes) -> Read:
    """The same, but an event of a type that posts nothing is checked only: None. Of a result the
    counts are read: a payment follows.
    """
    name, version = event_type.decode(), int(schema_version)
    if name in ledger.POSTED:
        return decoder(name, version)
    return reader(name, version) if event_type == _SEALED else checker(name, version)


Learn = Callable[[StoredEvent], Awaitable[list[StoredEvent]]]


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows up to `last`; `posted`: the ledger has passed them, and `live` is what it wrote."""

    last: int
    rows: Scan
    posted: bool
    live: str | None = None
    refused: str = ""  # the rows of ledger.refusals


class Fold:
    """A shard's events, in order, into books and decisions; what is wrong goes into the report."""

    def __init__(
        self,
        report: Report,
        books: Books | None,
        prev_hash: bytes,
        *,
        parked: Mapping[int, str],
        marks: Mapping[int, str],
        learn: Learn | None,
        draws: Sequence[StoredEvent] = (),
    ) -> None:
        """`books` None: nothing is posted. `parked`: position -> why it stands aside. `marks`:
        position -> sha256 that the log gives for the books there. `learn`: decide again too; it
        answers an event with its stream's earlier events. `draws`: the shard's stream of seeds.
        """
        self.books, self.hash = books, prev_hash
        self.live = Books()  # the digest of the tables' lines
        self.earnings = Earnings()  # since the fold began
        self._sealed: tuple[int, Counts | None] = (0, None)  # the last result's position, and it
        self._report, self._parked, self._marks, self._learn = report, parked, marks, learn
        self._decisions = Decisions(report, Draws(draws)) if learn else None
        self._pending: list[StoredEvent] = []
        self._commands: dict[str, StoredCommand] = {}
        self._aside: set[str] = set()
        self._differs = False
        self._refused: list[str] = []

    async def take(self, batch: Batch) -> None:
        """Raises LogCorrupt for a hole, a broken chain or bytes that do not decode."""
        await asyncio.sleep(0)  # the next fetch sets out
        rows = log.checked(self._report.shard, self.hash, batch.rows, batch.last)
        before = (self.books.events, self.books.digest) if self.books else (0, b"")
        lines: list[str] = []
        self._refused = []
        start = 0
        while part := list(islice(rows, SLICE)):
            events = self._post(part, batch.rows.first + start, batch.posted, lines)
            if self._decisions:
                self._hold(part, events, batch.rows.hashes[start : start + SLICE])
            start += len(part)
            await asyncio.sleep(0)
        self.hash = batch.rows.hashes[-1] if start else self.hash
        self._report.events += start
        if self.books and batch.posted:
            self._compare("".join(lines), batch.live, before)
            if batch.live is not None and "".join(self._refused) != batch.refused:
                self._report.say(
                    f"the refused results up to position {batch.last} are not the log's: "
                    f"it gives {len(self._refused)}, the table {batch.refused.count(chr(10))}"
                )
            self._check_mark(batch.last)
        if self._decisions:
            self._commands.update((c.command_id, c) for c in batch.rows.commands)
            await self._decide_again()

    def end(self) -> None:
        """Call it once, after the last batch."""
        if self._decisions:
            self._decisions.end()

    def _post(
        self, rows: Sequence[list[bytes]], first: int, posted: bool, lines: list[str]
    ) -> list[EventData | None]:
        """Read these rows' events and, where the ledger has passed them, post them into `lines`."""
        read = whole if self._decisions else if_it_posts
        books, parked, events = self.books if posted else None, self._parked, []
        sealed_at, sealed = self._sealed
        for position, fields in enumerate(rows, first):
            try:
                event = read(fields[TYPE], fields[SCHEMA_VERSION])(fields[DATA])
                entries = postings(event) if event else []
            except (ValueError, KeyError) as error:
                raise LogCorrupt(
                    f"shard {self._report.shard} position {position} does not decode"
                ) from error
            events.append(event)
            if books is None:
                continue
            if fields[TYPE] == _REJECTED and position not in parked:
                self._refused.append(_refusal_line(position, fields))
            if position in parked:
                self._stands_aside(books, position, fields[STREAM].decode(), entries)
            elif event:
                try:
                    lines.append(books.post(position, event, entries))
                except OutOfBounds as error:
                    # It stood aside and was unparked later, when there was money; where not, the
                    # balances differ in the end.
                    self._report.note(f"position {position} was not covered when it came: {error}")
                    lines.append(books.post(position, event, entries, bounded=False))
                if type(event) is PaymentSettled:
                    result = sealed if sealed_at == position - 1 else None
                    day = int(fields[RECORDED_AT]) // DAY_US
                    self.earnings.pay(self._report.shard, day, event, result)
            if fields[TYPE] == _SEALED:
                sealed_at, sealed = position, event
        self._sealed = sealed_at, sealed
        return events

    def _hold(
        self,
        rows: Sequence[list[bytes]],
        events: Sequence[EventData | None],
        hashes: Sequence[bytes],
    ) -> None:
        """Keep these events until their command is whole."""
        for fields, event, row_hash in zip(rows, events, hashes, strict=True):
            stored = log.stored_event(fields, b"", row_hash)  # its chain is checked
            object.__setattr__(stored, "decoded", event)  # frozen: parsed once, as it does
            self._pending.append(stored)

    def _stands_aside(self, books: Books, position: int, stream: str, entries: list[Entry]) -> None:
        reason = self._parked[position]
        self._report.parked += 1
        self._report.note(f"position {position} of {stream} stands aside: {reason}")
        without_reason = reason == BEHIND_PARKED and stream not in self._aside
        if reason in FREEZES:
            try:
                ledger.apply(books.balances, entries)
                without_reason = True
            except OutOfBounds:
                pass
        if without_reason:
            self._report.say(f"position {position} stands aside, but nothing kept it from posting")
        self._aside.add(stream)

    def _compare(self, lines: str, live: str | None, before: tuple[int, bytes]) -> None:
        assert self.books is not None  # noqa: S101 - the caller's condition
        if live is None:
            return
        if not self._differs and lines != live:
            self._differs = True
            self.live.events, self.live.digest = before
            pairs = zip_longest(lines.splitlines(), live.splitlines(), fillvalue="nothing")
            want, have = next(pair for pair in pairs if pair[0] != pair[1])
            self._report.say(f"the log gives the line ({want}), the tables ({have})")
        if self._differs:
            self.live.read(live)
        else:
            self.live.events, self.live.digest = self.books.events, self.books.digest

    def _check_mark(self, position: int) -> None:
        assert self.books is not None  # noqa: S101 - the caller's condition
        if self._marks.get(position, "") not in ("", self.books.sha256()):
            self._report.say(f"the log's snapshot of position {position} has another sha256")

    async def _decide_again(self) -> None:
        """Check every whole command among the pending events; what is left may go on."""
        assert self._decisions is not None and self._learn is not None  # noqa: S101, PT018
        events, at = self._pending, 0
        while at < len(events):
            if not at % SLICE:
                await asyncio.sleep(0)
            command = self._commands.get(events[at].causation_id)
            if command is None:
                raise LogCorrupt(f"position {events[at].position} has no stored command")
            if command.first_position < events[at].position:
                at += command.last_position - events[at].position + 1  # the range begins inside it
                continue
            size = command.last_position - command.first_position + 1
            group = events[at : at + size]
            if len(group) < size:
                break
            if self._decisions.lacks(group[0]):
                before = await self._learn(group[0])
                self._decisions.learn(group[0].stream, before[: group[0].version - 1])
            self._decisions.check(command.data, group)
            at += size
        self._pending = events[at:]
        kept = {event.causation_id for event in self._pending}
        self._commands = {name: c for name, c in self._commands.items() if name in kept}


async def replay_shard(
    conn: Connection, shard: int, first: int, last: int | None, *, decisions: bool
) -> tuple[Report, Fold]:
    """Fold one shard inside the caller's snapshot and compare.

    The fold starts at 1, or at the newest snapshot below `first` that the log vouches for; without
    one only chain and decisions are checked from there. Of a shard that ends before `first`
    nothing is checked. Raises LogCorrupt.
    """
    end = await head(conn, shard)
    applied = await checkpoint(conn, shard, LEDGER_CONSUMER)
    stop = min(end.position, last or end.position)
    report = Report(shard=shard, first=first, last=stop)
    if first > max(end.position, 1):
        return report, Fold(report, None, end.hash, parked={}, marks={}, learn=None)
    books: Books | None = Books() if first == 1 and shard > 0 else None
    marks = await snapshots.named(conn, shard)
    if first > 1 and shard > 0:
        found = await snapshots.newest_below(conn, shard, min(first, stop), marks, report)
        if found is not None:
            report.snapshot, books, first = found.position, found.books, found.position + 1
    lock = asyncio.Lock()  # one connection: the next fetch and a stream's earlier events take turns

    async def learn(event: StoredEvent) -> list[StoredEvent]:
        async with lock:
            return await stream_events(conn, shard, event.stream)

    async def load(start: int, until: int) -> Batch:
        posted = until <= applied
        async with lock:
            compared = books is not None and posted
            live = await store.lines(conn, shard, start, until) if compared else None
            refused = await store.refusal_lines(conn, shard, start, until) if compared else ""
            rows = await log.scan(conn, shard, start, until, commands=decisions)
        return Batch(until, rows, posted, live, refused)

    fold = Fold(
        report, books, await hash_at(conn, shard, first - 1) if first > 1 else GENESIS_HASH,
        parked=await store.parked_between(conn, shard, first, stop),
        marks=marks, learn=learn if decisions else None,
        draws=await stream_events(conn, shard, seeds_stream(shard)) if decisions else (),
    )  # fmt: skip
    async with aclosing(_batches(first, stop, {applied, *marks}, load)) as batches:
        async for batch in batches:
            await fold.take(batch)
    fold.end()
    report.head_hash = fold.hash.hex()
    if stop == end.position and stop >= first and fold.hash != end.hash:
        raise LogCorrupt(f"shard {shard}: the head's hash is not the last event's")
    if books:
        report.derived_sha256 = books.sha256()
        if stop >= applied:
            await _compare_tables(conn, applied, fold, report)
            if first == 1:
                await _compare_earnings(conn, fold.earnings, report)
    return report, fold


def _refusal_line(position: int, fields: Sequence[bytes]) -> str:
    """A row of ledger.refusals as `store.refusal_lines` writes it."""
    event = whole(fields[TYPE], fields[SCHEMA_VERSION])(fields[DATA])
    assert isinstance(event, ResultRejected)  # noqa: S101 - by its type
    return f"{position} {event.provider_id} {event.job_id} {event.epoch} {event.reason}\n"


async def _compare_earnings(conn: Connection, earnings: Earnings, report: Report) -> None:
    """The sums by provider, day and model, and the first that is not the log's."""
    want, have = earnings.by_share, await store.all_earnings(conn, report.shard)
    if want == have:
        return
    first = min(s for s in want.keys() | have.keys() if want.get(s) != have.get(s))
    report.say(
        f"what {first.provider_id} on day {first.day} with model {first.model_id} earned is not "
        "what its payments say; ledger.earnings is wrong there"
    )


async def _batches(
    first: int, stop: int, ends: set[int], load: Callable[[int, int], Awaitable[Batch]]
) -> AsyncGenerator[Batch, None]:
    """The batches of first..stop, none across a position of `ends`; the next is on its way."""

    def ahead(start: int) -> asyncio.Task[Batch] | None:
        if start > stop:
            return None
        full = min(start + BATCH - 1, stop)
        until = min((end for end in ends if start <= end < full), default=full)
        return asyncio.ensure_future(load(start, until))

    coming = ahead(first)
    try:
        while coming is not None:
            batch = await coming
            coming = ahead(batch.last + 1)
            yield batch
    finally:
        if coming is not None:  # let it end: the connection goes on
            await asyncio.gather(coming, return_exceptions=True)


async def _compare_tables(conn: Connection, applied: int, fold: Fold, report: Report) -> None:
    """The tables as books, and the first account that differs with what touched it."""
    books, live = fold.books, fold.live
    assert books is not None  # noqa: S101 - the caller's condition
    if report.snapshot >= applied:
        live.events, live.digest = books.events, books.digest
    live.balances = await store.all_balances(conn, report.shard)
    report.live_sha256 = live.sha256()
    outside = await store.row_outside(conn, report.shard, applied)
    if outside is not None:
        report.say(f"the tables hold a line of position {outside}, which the ledger has not read")
    for account in sorted(books.balances.keys() | live.balances.keys()):
        want, have = books.balances.get(account, 0), live.balances.get(account, 0)
        if want != have:
            positions = await store.touched(conn, report.shard, account, POSITIONS_SHOWN)
            report.say(
                f"{account}: the log says {want} nanoTON, the table {have}; last touched at "
                f"positions {', '.join(map(str, positions)) or 'none'}"
            )
            return
    if books.serialise() != live.serialise() and not report.differences:
        report.say("the tables' lines differ")
