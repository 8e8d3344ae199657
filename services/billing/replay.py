"""Replay: fold the log again and compare with what is live, bytes against bytes.

One REPEATABLE READ snapshot; density and hash chain row by row; the derived and the live tables
go through the same function. Exit 0: equal. 1: different. 2: the log is corrupt or unreadable.
64: wrong usage.
It never writes.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import os
import sys
from collections import deque
from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from cocoon.contracts.commands import decode_command
from cocoon.contracts.envelope import StoredEvent
from cocoon.domain import decide as domain
from cocoon.domain.decide import State
from cocoon.domain.job import JobState
from cocoon.domain.ledger import postings
from cocoon.eventlog.connection import connect, tree_errors
from cocoon.eventlog.read import checkpoint, head, read, read_commands, stream_events
from cocoon.kernel.errors import BadRequest, CocoonError, LogCorrupt
from services.billing.decide import project
from services.billing.ledger import LEDGER_CONSUMER

if TYPE_CHECKING:
    from cocoon.eventlog.connection import Connection

EQUAL, DIFFERENT, CORRUPT, WRONG_USAGE = 0, 1, 2, 64
POSITIONS_SHOWN = 20
MAX_DIFFERENCES = 20
BATCH = 1024
MAX_ENDED_JOBS = 4096


@dataclass(slots=True)
class Derived:
    """A ledger: the balances that are not zero, the settlements, and a digest of every entry."""

    balances: dict[str, int] = field(default_factory=dict)
    settlements: dict[str, tuple[int, int, int, int]] = field(default_factory=dict)
    entries: int = 0
    entries_digest: hashlib._Hash = field(default_factory=hashlib.sha256)

    def add(self, events: Iterable[StoredEvent]) -> None:
        projection = project(events)
        for row in projection.entries:
            self.add_entry(row)
        for account, change in projection.changes.items():
            self.balances[account] = self.balances.get(account, 0) + change
            if not self.balances[account]:
                del self.balances[account]
        for done in projection.settlements:
            event = done.event
            self.settlements[event.job_id] = (
                done.position, event.price_nanoton, event.provider_nanoton, event.fee_nanoton,
            )  # fmt: skip

    def add_entry(self, row: Sequence[object]) -> None:
        self.entries += 1
        self.entries_digest.update(("|".join(map(str, row)) + "\n").encode())

    def serialise(self) -> bytes:
        """The one byte form of a ledger: sorted lines."""
        lines = [f"balance|{a}|{n}" for a, n in sorted(self.balances.items())]
        lines += [
            f"settlement|{job}|{'|'.join(map(str, row))}"
            for job, row in sorted(self.settlements.items())
        ]
        lines.append(f"entries|{self.entries}|{self.entries_digest.hexdigest()}")
        return "\n".join(lines).encode()


@dataclass(slots=True)
class Report:
    """What a replay found, for one shard."""

    shard: int
    first: int
    last: int
    events: int = 0
    head_hash: str = ""
    derived_sha256: str = ""
    live_sha256: str = ""
    decisions: int = 0
    differences: list[str] = field(default_factory=list)

    def say(self, text: str) -> None:
        if len(self.differences) < MAX_DIFFERENCES:
            self.differences.append(text)


class Decisions:
    """Runs every stored command again on the state that it was decided on."""

    def __init__(self, report: Report) -> None:
        self._report = report
        self._states: dict[str, State] = {}
        self._ended: deque[str] = deque()  # jobs that only a late rejection may still touch

    def lacks(self, first: StoredEvent) -> bool:
        """Whether the stream's state before this event has to be learned: it began earlier."""
        return first.version > 1 and first.stream not in self._states

    def learn(self, stream: str, events: Iterable[StoredEvent]) -> None:
        """Fold what the stream held before the replayed range."""
        state = domain.initial(stream)
        for event in events:
            state = domain.evolve(state, event.decode(), stream)
        self._keep(stream, state)

    def check(self, command_bytes: bytes, events: Sequence[StoredEvent]) -> None:
        """Decide again and compare type, version, stream and bytes with what the log holds."""
        command = decode_command(command_bytes)
        stream = domain.stream_of(command)
        state = self._states.get(stream, domain.initial(stream))
        try:
            decided = domain.decide(state, command)
        except CocoonError as error:
            decided = ()
            self._report.say(f"position {events[0].position}: decides {error.code} now")
        now = [(e.event_type, e.schema_version, e.to_canonical()) for e in decided]
        then = [(e.type, e.schema_version, e.data) for e in events]
        if now != then:
            self._report.say(
                f"position {events[0].position}: {command.command_type} decides "
                f"{[n[0] for n in now]} now, the log has {[t[0] for t in then]}"
            )
        self._report.decisions += 1
        for event in events:
            state = domain.evolve(state, event.decode(), stream)
        self._keep(stream, state)

    def _keep(self, stream: str, state: State) -> None:
        """Live state stays; of the ended jobs only the latest, the others are learned again."""
        self._states[stream] = state
        if isinstance(state, JobState) and state.status.is_terminal:
            self._ended.append(stream)
            if len(self._ended) > MAX_ENDED_JOBS:
                self._states.pop(self._ended.popleft(), None)


async def replay_shard(
    conn: Connection, shard: int, first: int, last: int | None, *, decisions: bool
) -> Report:
    """Fold one shard inside the caller's snapshot and compare.

    Live tables are compared when the fold starts at 1 and ends at the ledger's checkpoint.
    Raises LogCorrupt.
    """
    end = await head(conn, shard)
    applied = await checkpoint(conn, shard, LEDGER_CONSUMER)
    stop = min(end.position, last or end.position)
    report = Report(shard=shard, first=first, last=stop)
    derived = Derived()
    replayed = Decisions(report) if decisions else None
    pending: list[StoredEvent] = []
    async for batch in read(conn, shard, first, stop, BATCH):
        report.events += len(batch)
        report.head_hash = batch[-1].hash.hex()
        _check_postings(batch)
        derived.add(e for e in batch if e.position <= applied)
        if replayed:
            pending = await _decide_again(conn, shard, replayed, pending + batch)
    if stop == end.position and report.events and report.head_hash != end.hash.hex():
        raise LogCorrupt(f"shard {shard}: the head's hash is not the last event's")
    report.derived_sha256 = hashlib.sha256(derived.serialise()).hexdigest()
    if first == 1 and stop >= applied and shard > 0:
        live = await _live(conn, shard, applied)
        report.live_sha256 = hashlib.sha256(live.serialise()).hexdigest()
        if derived.serialise() != live.serialise():
            await _explain(conn, shard, derived, live, report)
    return report


def _check_postings(batch: Sequence[StoredEvent]) -> None:
    for stored in batch:
        try:
            postings(stored.decode())
        except (ValueError, KeyError) as error:
            raise LogCorrupt(
                f"shard {stored.shard} position {stored.position} does not decode"
            ) from error


async def _decide_again(
    conn: Connection, shard: int, replayed: Decisions, events: list[StoredEvent]
) -> list[StoredEvent]:
    """Check every whole command in `events`; return the tail that may go on in the next batch."""
    commands = {
        c.command_id: c
        for c in await read_commands(conn, shard, events[0].position, events[-1].position)
    }
    at = 0
    while at < len(events):
        command = commands.get(events[at].causation_id)
        if command is None:
            raise LogCorrupt(f"position {events[at].position} has no stored command")
        if command.first_position < events[at].position:
            at += command.last_position - events[at].position + 1  # the range begins inside it
            continue
        size = command.last_position - command.first_position + 1
        group = events[at : at + size]
        if len(group) < size and group[-1].position < command.last_position:
            break
        if replayed.lacks(group[0]):
            before = await stream_events(conn, shard, group[0].stream)
            replayed.learn(group[0].stream, before[: group[0].version - 1])
        replayed.check(command.data, group)
        at += size
    return events[at:]


async def _live(conn: Connection, shard: int, applied: int) -> Derived:
    """The live tables as a ledger."""
    live = Derived()
    async for row in _rows(
        conn,
        "SELECT shard, position, line, account, amount FROM ledger.entries"
        " WHERE shard = $1 AND position <= $2 ORDER BY position, line",
        shard, applied,
    ):  # fmt: skip
        live.add_entry(tuple(row))
    async for row in _rows(
        conn, "SELECT account, amount FROM ledger.balances WHERE shard = $1", shard
    ):
        live.balances[str(row[0])] = int(str(row[1]))
    async for row in _rows(
        conn,
        "SELECT job_id, position, price, provider_part, fee FROM ledger.settlements"
        " WHERE shard = $1", shard,
    ):  # fmt: skip
        live.settlements[str(row[0])] = tuple(int(str(n)) for n in row[1:])  # type: ignore[assignment]
    return live


async def _rows(conn: Connection, sql: str, *arguments: object) -> AsyncIterator[list[object]]:
    async for row in conn.cursor(sql, *arguments, prefetch=5000):
        yield list(row.values())


async def _explain(
    conn: Connection, shard: int, derived: Derived, live: Derived, report: Report
) -> None:
    """Name the first account that differs and every position that touched it."""
    accounts = sorted(derived.balances.keys() | live.balances.keys())
    for account in accounts:
        want, have = derived.balances.get(account, 0), live.balances.get(account, 0)
        if want != have:
            rows = await conn.fetch(
                "SELECT position FROM ledger.entries WHERE shard = $1 AND account = $2"
                " ORDER BY position DESC LIMIT $3",
                shard, account, POSITIONS_SHOWN,
            )  # fmt: skip
            touched = ", ".join(str(row["position"]) for row in reversed(rows))
            report.say(
                f"{account}: the log says {want} nanoTON, the table {have}; "
                f"last touched at positions {touched or 'none'}"
            )
            return
    for job in sorted(derived.settlements.keys() | live.settlements.keys()):
        if derived.settlements.get(job) != live.settlements.get(job):
            report.say(f"settlement of job {job} differs")
            return
    report.say(f"entries differ: {derived.entries} from the log, {live.entries} in the table")


async def replay(
    dsn: str, shards: Sequence[int], first: int, last: int | None, *, decisions: bool
) -> list[Report]:
    """Replay each shard in one snapshot. Raises LogCorrupt, BadRequest for a shard that
    is not there, Unavailable without Postgres.
    """
    conn = await connect(dsn, "cocoon-replay")
    try:
        async with conn.transaction(isolation="repeatable_read", readonly=True):
            await _check_shards(conn, shards)
            return [
                await replay_shard(conn, shard, first, last, decisions=decisions)
                for shard in shards
            ]
    finally:
        await conn.close(timeout=5)


async def _check_shards(conn: Connection, shards: Sequence[int]) -> None:
    with tree_errors():
        rows = await conn.fetch("SELECT shard FROM log.head ORDER BY shard")
    known = [int(row["shard"]) for row in rows]
    unknown = ", ".join(str(shard) for shard in shards if shard not in known)
    if known and unknown:
        there = ", ".join(map(str, known))
        raise BadRequest(f"there is no shard {unknown}; this network has {there}")


def _print(reports: Sequence[Report], as_json: bool) -> int:
    different = any(report.differences for report in reports)
    if as_json:
        print(json.dumps([_as_dict(report) for report in reports]))  # noqa: T201
        return DIFFERENT if different else EQUAL
    for report in reports:
        print(  # noqa: T201
            f"shard {report.shard}: {report.events} events, positions {report.first} to "
            f"{report.last}, chain and density hold\n"
            f"  log    sha256 {report.derived_sha256}\n"
            f"  tables sha256 {report.live_sha256 or '(no ledger tables of this range)'}"
        )
        if report.decisions:
            print(f"  {report.decisions} decisions made again")  # noqa: T201
        for difference in report.differences:
            print(f"  DIFFERENT  {difference}")  # noqa: T201
    print("different" if different else "equal")  # noqa: T201
    return DIFFERENT if different else EQUAL


def _as_dict(report: Report) -> dict[str, object]:
    return {name: getattr(report, name) for name in Report.__slots__}


class _Parser(argparse.ArgumentParser):
    """Wrong usage ends with its own code: argparse's 2 would read as a corrupt log."""

    def error(self, message: str) -> NoReturn:
        self.exit(WRONG_USAGE, f"cannot replay: {message}\n")


def _shards(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


_shards.__name__ = "list of shards"  # argparse names it in its sentence


def main(arguments: Sequence[str] | None = None) -> int:
    """`python -m services.billing.replay`: see --help. The DSN comes from the environment."""
    parser = _Parser(prog="cocoon replay", description=__doc__)
    parser.add_argument("--verify", action="store_true", help="compare with the live tables")
    parser.add_argument("--decisions", action="store_true", help="make every decision again")
    parser.add_argument("--from", dest="first", type=int, default=1, metavar="N")
    parser.add_argument("--to", dest="last", type=int, default=None, metavar="M")
    parser.add_argument("--shards", type=_shards, default=[0, 1], metavar="0,1")
    parser.add_argument("--json", action="store_true")
    chosen = parser.parse_args(arguments)
    dsn_file = Path(os.environ["COCOON_REPLAY_POSTGRES_DSN_FILE"])
    try:
        reports = asyncio.run(
            replay(
                dsn_file.read_text(encoding="utf-8").strip(),
                chosen.shards,
                chosen.first,
                chosen.last,
                decisions=chosen.decisions,
            )
        )
    except LogCorrupt as error:
        print(f"the log is corrupt: {error.message}")  # noqa: T201
        return CORRUPT
    except BadRequest as error:
        print(f"cannot replay: {error.message}", file=sys.stderr)  # noqa: T201
        return WRONG_USAGE
    except CocoonError as error:
        print(f"cannot replay: {error.message}")  # noqa: T201
        return CORRUPT
    return _print(reports, chosen.json)


if __name__ == "__main__":
    sys.exit(main())
