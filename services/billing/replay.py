"""Replay: fold the log again and compare with what is live, bytes against bytes.

One REPEATABLE READ snapshot; density and hash chain row by row; the derived and the live books
have one byte form. Exit 0: equal. 1: different. 2: the log is corrupt or unreadable. 64: wrong
usage. It never writes to the database.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from cocoon.contracts.subjects import NETWORK_SHARD
from cocoon.eventlog.connection import connect, tree_errors
from cocoon.eventlog.read import head
from cocoon.eventlog.scan import scan_all
from cocoon.kernel.errors import BadRequest, CocoonError, LogCorrupt
from services.billing import logfile, store
from services.billing.redecide import Report
from services.billing.verify import BATCH, replay_shard

if TYPE_CHECKING:
    from cocoon.eventlog.connection import Connection

DSN_FILE = "COCOON_REPLAY_POSTGRES_DSN_FILE"
EQUAL, DIFFERENT, CORRUPT, WRONG_USAGE = 0, 1, 2, 64


def rest_collector() -> None:
    """The cycle collector rests: a fold makes no cycles, and to look for them costs a tenth."""
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)


async def replay(
    dsn: str, shards: Sequence[int], first: int, last: int | None, *, decisions: bool
) -> list[Report]:
    """Replay each shard in one snapshot. Raises LogCorrupt, BadRequest for a shard that
    is not there or when all of them end before `first`, Unavailable without Postgres.
    """
    conn = await connect(dsn, "cocoon-replay", patient=True)
    try:
        async with conn.transaction(isolation="repeatable_read", readonly=True):
            await _check_shards(conn, shards)
            await _check_first(conn, shards, first)
            return [
                (await replay_shard(conn, shard, first, last, decisions=decisions))[0]
                for shard in shards
            ]
    finally:
        await conn.close(timeout=5)


async def export(dsn: str, shards: Sequence[int], path: Path) -> list[str]:
    """Write the shards' whole logs into a new file; returns a sentence for each. Raises LogCorrupt,
    BadRequest (no such shard, or the file is there), Unavailable.
    """
    conn = await connect(dsn, "cocoon-export", patient=True)
    try:
        async with conn.transaction(isolation="repeatable_read", readonly=True):
            await _check_shards(conn, shards)
            file = logfile.LogFile(path)
            try:
                return [await _export_shard(conn, shard, file) for shard in shards]
            finally:
                file.close()
    finally:
        await conn.close(timeout=5)


async def _export_shard(conn: Connection, shard: int, file: logfile.LogFile) -> str:
    end = await head(conn, shard)
    parked = await store.parked_between(conn, shard, 1, end.position)
    scans = scan_all(conn, shard, 1, end.position, BATCH)
    header = logfile.Header(shard, end.position, end.hash.hex(), parked)
    await logfile.export(file, header, scans)
    return f"shard {shard}: {end.position} events, the last one's hash is {end.hash.hex()}"


async def _check_shards(conn: Connection, shards: Sequence[int]) -> None:
    with tree_errors():
        rows = await conn.fetch("SELECT shard FROM log.head ORDER BY shard")
    known = [int(row["shard"]) for row in rows]
    unknown = ", ".join(str(shard) for shard in shards if shard not in known)
    if known and unknown:
        there = ", ".join(map(str, known))
        raise BadRequest(f"there is no shard {unknown}; this network has {there}")


async def _check_first(conn: Connection, shards: Sequence[int], first: int) -> None:
    ends = {shard: (await head(conn, shard)).position for shard in shards}
    if first > max(1, *ends.values()):
        told = ", ".join(f"shard {shard} at {end}" for shard, end in ends.items())
        raise BadRequest(f"there is nothing from position {first} on; the log ends on {told}")


def _print(reports: Sequence[Report], chosen: argparse.Namespace) -> int:
    different = any(report.differences for report in reports)
    if chosen.json:
        print(json.dumps([_as_dict(report) for report in reports]))  # noqa: T201
        return DIFFERENT if different else EQUAL
    for report in reports:
        print(_range(report))  # noqa: T201
        for line in _books(report, of_file=chosen.file is not None):
            print(f"  {line}")  # noqa: T201
        if report.decisions:
            print(f"  {report.decisions} decisions made again{_seeds(report)}")  # noqa: T201
        if report.parked:
            print(f"  {report.parked} events stand aside, unposted: see `./cocoon status`")  # noqa: T201
        for note in report.notes:
            print(f"  note       {note}")  # noqa: T201
        for difference in report.differences:
            print(f"  DIFFERENT  {difference}")  # noqa: T201
    print("different" if different else _verdict(reports, chosen))  # noqa: T201
    return DIFFERENT if different else EQUAL


def _seeds(report: Report) -> str:
    return f", {report.seeds} seeds checked against revealed secrets" if report.seeds else ""


def _range(report: Report) -> str:
    if not report.events:
        since = f", nothing from {report.first} on" if report.first > 1 else ""
        return f"shard {report.shard}: ends at {report.last}{since}"
    began = f" (the books from the snapshot of {report.snapshot})" if report.snapshot else ""
    return (
        f"shard {report.shard}: {report.events} events, positions {report.first} to "
        f"{report.last}, chain and density hold{began}"
    )


def _books(report: Report, *, of_file: bool) -> list[str]:
    """What of the books was compared with what, or why there was nothing to compare."""
    if report.derived_sha256:
        lines = [f"log    sha256 {report.derived_sha256}"]
        if report.live_sha256:
            lines.append(f"tables sha256 {report.live_sha256}")
        elif not of_file:
            lines.append("entries compared up to there; balances are those of the log's end")
        return lines
    if not report.events:
        return []
    if report.shard == NETWORK_SHARD:
        return ["no money moves in this range: this shard has no books"]
    return [f"no books: a fold from {report.first} on needs an earlier snapshot"]


def _verdict(reports: Sequence[Report], chosen: argparse.Namespace) -> str:
    """The last line where nothing differs: it claims no more than was compared."""
    if not any(report.events for report in reports):
        return "nothing to check: there are no events"
    if not chosen.file and any(report.derived_sha256 for report in reports):
        return "equal"
    return "chain and decisions hold" if chosen.decisions else "chain holds"


def _as_dict(report: Report) -> dict[str, object]:
    return {name: getattr(report, name) for name in Report.__slots__}


class _Parser(argparse.ArgumentParser):
    """Wrong usage ends with its own code: argparse's 2 would read as a corrupt log."""

    def error(self, message: str) -> NoReturn:
        self.exit(WRONG_USAGE, f"cannot replay: {message}\n")


def _position(text: str) -> int:
    if (position := int(text)) < 1:
        raise argparse.ArgumentTypeError("positions begin at 1")
    return position


_position.__name__ = "position"  # argparse names it in its sentence


def _shards(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


_shards.__name__ = "list of shards"  # argparse names it in its sentence


def main(arguments: Sequence[str] | None = None) -> int:
    """`python -m services.billing.replay`: see --help. The DSN comes from the environment."""
    parser = _Parser(prog="cocoon replay", description=__doc__)
    parser.add_argument("--verify", action="store_true", help="compare with the live tables")
    parser.add_argument("--decisions", action="store_true", help="make every decision again")
    parser.add_argument("--from", dest="first", type=_position, default=1, metavar="N")
    parser.add_argument("--to", dest="last", type=_position, default=None, metavar="M")
    parser.add_argument("--shards", type=_shards, default=[0, 1], metavar="0,1")
    parser.add_argument("--json", action="store_true")
    files = parser.add_mutually_exclusive_group()
    files.add_argument("--export", type=Path, metavar="FILE", help="write the log into a new file")
    files.add_argument("--file", type=Path, metavar="FILE", help="verify such a file instead")
    chosen = parser.parse_args(arguments)
    if (chosen.export or chosen.file) and (chosen.first, chosen.last) != (1, None):
        parser.error("a file holds the whole log: leave out --from and --to")
    if chosen.last is not None and chosen.first > chosen.last:
        parser.error(f"--from {chosen.first} is above --to {chosen.last}")
    if chosen.file and not chosen.file.is_file():
        parser.error(f"there is no file {chosen.file}")
    dsn = "" if chosen.file else Path(os.environ[DSN_FILE]).read_text(encoding="utf-8").strip()
    try:
        return asyncio.run(_run(chosen, dsn))
    except LogCorrupt as error:
        print(f"the log is corrupt: {error.message}")  # noqa: T201
        return CORRUPT
    except BadRequest as error:
        print(f"cannot replay: {error.message}", file=sys.stderr)  # noqa: T201
        return WRONG_USAGE
    except CocoonError as error:
        print(f"cannot replay: {error.message}")  # noqa: T201
        return CORRUPT


async def _run(chosen: argparse.Namespace, dsn: str) -> int:
    if chosen.file:
        reports = await logfile.replay_file(chosen.file, decisions=chosen.decisions)
        return _print(reports, chosen)
    if chosen.export:
        for sentence in await export(dsn, chosen.shards, chosen.export):
            print(sentence)  # noqa: T201
        return EQUAL
    reports = await replay(
        dsn, chosen.shards, chosen.first, chosen.last, decisions=chosen.decisions
    )
    return _print(reports, chosen)


if __name__ == "__main__":
    rest_collector()
    sys.exit(main())
