"""A log as a file, for an auditor: every event as the chain hashed it, with the command behind it.

Gzipped JSON lines: for each shard a header, then a line per command. It holds what the log holds:
ids, digests, sizes and amounts. It can be verified without a database.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, Final

from cocoon.contracts.envelope import GENESIS_HASH, StoredEvent
from cocoon.contracts.events import EventData, LedgerSnapshotTaken
from cocoon.eventlog import scan as log
from cocoon.eventlog.read import StoredCommand
from cocoon.eventlog.scan import Scan
from cocoon.kernel.errors import BadRequest, LogCorrupt
from services.billing.books import Books
from services.billing.draws import stream as seeds_stream
from services.billing.redecide import Report
from services.billing.verify import BATCH, Batch, Fold

FORMAT: Final = "cocoon-log/1"
_GZIP: Final = b"\x1f\x8b"  # how each such file begins
MAX_LINE_BYTES: Final = 256 * 1024 * 1024  # 256 events of 512 KiB, a command of 1 MiB, escapes


@dataclass(frozen=True, slots=True)
class Header:
    """What follows: `events` rows from 1 on, the last one's hash, position -> why it is parked."""

    shard: int
    events: int
    head: str
    parked: Mapping[int, str]


class LogFile:
    """Writes one; `close` makes it whole. Raises BadRequest if there is a file of that name."""

    def __init__(self, path: Path) -> None:
        try:
            self._raw = path.open("xb")
        except OSError as error:
            raise BadRequest(f"{path} cannot be written: {error.strerror}") from None
        # no name and no time inside: the same log gives the same file
        self._file = gzip.GzipFile("", "wb", fileobj=self._raw, mtime=0)

    def begin(self, header: Header) -> None:
        """A shard's part begins."""
        parked = {str(position): reason for position, reason in header.parked.items()}
        self._line(
            {"format": FORMAT, "shard": header.shard, "events": header.events,
             "head": header.head, "parked": parked}
        )  # fmt: skip

    def add(self, command: StoredCommand, texts: Sequence[bytes], hashes: Sequence[bytes]) -> None:
        """A command with its events' hashed texts and hashes, in order."""
        events = [[text.decode(), digest.hex()] for text, digest in zip(texts, hashes, strict=True)]
        self._line({"id": command.command_id, "data": command.data.decode(), "events": events})

    def close(self) -> None:
        self._file.close()
        self._raw.close()

    def _line(self, value: object) -> None:
        self._file.write(json.dumps(value, separators=(",", ":")).encode() + b"\n")


async def export(file: LogFile, header: Header, scans: AsyncIterator[Scan]) -> None:
    """Write one shard. Raises LogCorrupt where an event has no command or the chain breaks."""
    file.begin(header)
    commands: dict[str, StoredCommand] = {}
    pending: list[tuple[str, bytes, bytes]] = []  # cause, text, hash
    prev_hash = GENESIS_HASH
    async for rows in scans:
        fields = list(log.checked(header.shard, prev_hash, rows, rows.last))
        prev_hash = rows.hashes[-1]
        commands.update((command.command_id, command) for command in rows.commands)
        causes = [row[log.CAUSE].decode() for row in fields]
        pending += zip(causes, rows.texts, rows.hashes, strict=True)
        last_cause = pending[-1][0] if rows.last < header.events else ""
        _write_groups(file, commands, (row for row in pending if row[0] != last_cause))
        pending = [row for row in pending if row[0] == last_cause]
        commands = {last_cause: commands[last_cause]} if last_cause in commands else {}


def _write_groups(
    file: LogFile, commands: Mapping[str, StoredCommand], rows: Iterable[tuple[str, bytes, bytes]]
) -> None:
    for cause, group in groupby(rows, key=lambda row: row[0]):
        if cause not in commands:
            raise LogCorrupt("an event has no stored command")
        _, texts, hashes = zip(*group, strict=True)
        file.add(commands[cause], texts, hashes)


async def replay_file(path: Path, *, decisions: bool) -> list[Report]:
    """Verify a file: chain, density, the books' sha256 and, if asked, every decision.

    Raises LogCorrupt for a file that is damaged or cut short, BadRequest for another format.
    """
    return [
        await _replay_part(path, index, part, decisions=decisions)
        for index, part in enumerate(_parts(path))
    ]


@dataclass(frozen=True, slots=True)
class _Part:
    """A shard's header, with what has to be known of its log beforehand."""

    header: Header
    marks: dict[int, str]  # the snapshots that it names
    draws: list[StoredEvent]  # its stream of seeds


def _parts(path: Path) -> list[_Part]:
    found: list[_Part] = []
    for value in _lines(path):
        if "format" in value:
            found.append(_Part(_header(value), {}, []))
            continue
        if not found:
            continue
        shard, data = found[-1].header.shard, value["data"]
        if '"TakeLedgerSnapshot"' in data:
            for event in _stored(shard, value):
                taken = _decoded(event)
                if isinstance(taken, LedgerSnapshotTaken) and taken.position < event.position:
                    found[-1].marks[taken.position] = taken.sha256
        elif '"CommitMatchingSeed"' in data or '"RevealMatchingSeed"' in data:
            rows = [row for row in _stored(shard, value) if row.stream == seeds_stream(shard)]
            found[-1].draws.extend(row for row in rows if _decoded(row))
    if not found:
        raise LogCorrupt("the file holds no log")
    return found


async def _replay_part(path: Path, index: int, part: _Part, *, decisions: bool) -> Report:
    header, marks = part.header, part.marks
    report = Report(shard=header.shard, first=1, last=header.events)
    books = Books() if header.shard > 0 else None

    async def learn(event: StoredEvent) -> list[StoredEvent]:
        """An ended job's events, read from the file again."""
        found: list[StoredEvent] = []
        for value in _part(path, index):
            rows = _stored(header.shard, value)
            found += [row for row in rows if row.stream == event.stream]
            if len(found) >= event.version - 1:
                break
        return found

    fold = Fold(
        report, books, GENESIS_HASH, parked=header.parked, marks=marks,
        learn=learn if decisions else None, draws=part.draws,
    )  # fmt: skip
    for batch in _batches(_part(path, index), set(marks)):
        await fold.take(batch)
    fold.end()
    if report.events != header.events or fold.hash.hex() != header.head:
        raise LogCorrupt(f"the file ends before the head of shard {header.shard}")
    report.head_hash = header.head
    if books:
        report.derived_sha256 = books.sha256()
    return report


def _batches(values: Iterable[Mapping[str, Any]], ends: set[int]) -> Iterator[Batch]:
    """About BATCH rows each, none across a position of `ends`."""
    first, texts, hashes = 1, list[bytes](), list[bytes]()
    commands: list[StoredCommand] = []
    for value in values:
        at = first + len(texts)
        commands.append(_command(value, at))
        for text, digest in value["events"]:
            texts.append(text.encode())
            hashes.append(bytes.fromhex(digest))
            if len(texts) >= BATCH or first + len(texts) - 1 in ends:
                yield _batch(first, texts, hashes, commands)
                first, texts, hashes = first + len(texts), [], []
                commands = commands[-1:]  # it may go on
    if texts:
        yield _batch(first, texts, hashes, commands)


def _batch(
    first: int, texts: list[bytes], hashes: list[bytes], commands: list[StoredCommand]
) -> Batch:
    rows = Scan(first, texts, hashes, commands)
    return Batch(rows.last, rows, posted=True)


def _command(value: Mapping[str, Any], at: int) -> StoredCommand:
    last = at + len(value["events"]) - 1
    return StoredCommand(value["id"], at, last, value["data"].encode())


def _stored(shard: int, value: Mapping[str, Any]) -> list[StoredEvent]:
    """A line's events, unchecked: the fold checks every one in its turn."""
    try:
        return [
            log.stored_event(text.encode().split(b"\n", log.FIELDS - 1), b"", bytes.fromhex(digest))
            for text, digest in value["events"]
        ]
    except (ValueError, IndexError) as error:
        raise LogCorrupt(f"the file's part of shard {shard} is damaged") from error


def _decoded(event: StoredEvent) -> EventData:
    try:
        return event.decode()
    except (ValueError, KeyError) as error:
        raise LogCorrupt(f"position {event.position} does not decode") from error


def _part(path: Path, index: int) -> Iterator[Mapping[str, Any]]:
    """The lines of one part, without its header."""
    at = -1
    for value in _lines(path):
        at += "format" in value
        if at == index and "format" not in value:
            yield value


def _header(value: Mapping[str, Any]) -> Header:
    try:
        if value["format"] != FORMAT:
            raise BadRequest(f"this replay reads {FORMAT}, not {value['format']}")
        parked = {int(position): str(reason) for position, reason in value["parked"].items()}
        return Header(int(value["shard"]), int(value["events"]), str(value["head"]), parked)
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise LogCorrupt("the file's header is damaged") from error


_DAMAGE = (
    OSError, EOFError, zlib.error, ValueError, TypeError, KeyError, AttributeError, RecursionError,
)  # fmt: skip


def _lines(path: Path) -> Iterator[Mapping[str, Any]]:
    """Each line as an object: a header, or a command with the types that the rest relies on."""
    begun = False
    try:
        with path.open("rb") as raw:
            if raw.read(len(_GZIP)) not in (_GZIP, b""):
                raise _no_log(path)
        with gzip.open(path, "rb") as file:
            while line := _line(file):
                value = json.loads(line)
                begun = begun or "format" in value
                if not begun or ("format" not in value and not _is_command(value)):
                    raise LogCorrupt("the file holds a line that is no command")
                yield value
    except _DAMAGE as error:
        if not begun and isinstance(error, ValueError):
            raise _no_log(path) from None
        raise LogCorrupt(f"the file is damaged ({type(error).__name__})") from error


def _no_log(path: Path) -> BadRequest:
    return BadRequest(f"{path} is not an exported log; `./cocoon replay --export FILE` writes one")


def _line(file: gzip.GzipFile) -> bytes:
    line = file.readline(MAX_LINE_BYTES)
    if line and not line.endswith(b"\n"):
        raise LogCorrupt("the file is cut short")
    return line


def _is_command(value: Any) -> bool:
    """Raises KeyError, TypeError or ValueError too."""
    return (
        isinstance(value["id"], str)
        and bool(value["data"].encode())  # no lone surrogates
        and isinstance(value["events"], list)
        and len(value["events"]) > 0
        and all(
            isinstance(event, list)
            and list(map(type, event)) == [str, str]
            and bool(event[0].encode())
            and len(bytes.fromhex(event[1])) == len(GENESIS_HASH)
            for event in value["events"]
        )
    )
