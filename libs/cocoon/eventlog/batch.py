"""One call of log.append: items to its arrays and its answer back to outcomes. Pure.

An item is encoded when it is queued, while an earlier call is still being committed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cocoon.contracts.envelope import AppendItem, StoredEvent
from cocoon.kernel import ids

MAX_DATA_BYTES = 524_288  # half a bus payload: every event fits one message with its headers
MAX_COMMAND_BYTES = 1_048_576
MAX_ITEM_EVENTS = 256
_APPENDED, _REPEATED, _CONFLICT = 0, 1, 2

APPEND_SQL = (
    "SELECT * FROM log.append($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15,"
    " $16, $17, $18)"
)


@dataclass(frozen=True, slots=True)
class Appended:
    """The item is in the log. `repeated`: it was there before, and these are its first rows."""

    positions: tuple[int, ...]
    versions: tuple[int, ...]
    events: list[StoredEvent]
    repeated: bool = False


@dataclass(frozen=True, slots=True)
class Conflict:
    """Nothing was written: a stream that the decision depended on has grown."""

    stream: str
    expected: int
    actual: int


@dataclass(frozen=True, slots=True)
class Repeated:
    """The command is in the log already; its rows are to be read: first..last (may be empty)."""

    first: int
    last: int


@dataclass(frozen=True, slots=True)
class Prepared:
    """An item with its events' bytes and ids."""

    item: AppendItem
    command: str
    data: tuple[str, ...]
    event_ids: tuple[str, ...]


def prepare(item: AppendItem) -> Prepared:
    """Encode an item. Raises ValueError if it is larger than the log or the bus can hold."""
    if len(item.events) > MAX_ITEM_EVENTS:
        raise ValueError(f"one command appends at most {MAX_ITEM_EVENTS} events")
    if len(item.command) > MAX_COMMAND_BYTES:
        raise ValueError(f"a command is at most {MAX_COMMAND_BYTES} bytes")
    encoded = [event.data.to_canonical() for event in item.events]
    if any(len(data) > MAX_DATA_BYTES for data in encoded):
        raise ValueError(f"an event's data is at most {MAX_DATA_BYTES} bytes")
    return Prepared(
        item=item,
        command=item.command.decode("utf-8"),
        data=tuple(data.decode("utf-8") for data in encoded),
        event_ids=tuple(ids.event_id(item.command_id, index) for index in range(len(encoded))),
    )


def call_arguments(shard: int, role: str, term: int, batch: Sequence[Prepared]) -> tuple[Any, ...]:
    """The arguments of APPEND_SQL."""
    streams: dict[str, int] = {}
    items = [prepared.item for prepared in batch]
    for item in items:
        for stream, _ in item.expects:
            streams.setdefault(stream, len(streams) + 1)
        for event in item.events:
            streams.setdefault(event.stream, len(streams) + 1)
    events = [event for item in items for event in item.events]
    return (
        shard,
        role,
        term,
        [item.command_id for item in items],
        [prepared.command for prepared in batch],
        [item.actor for item in items],
        [item.correlation_id for item in items],
        [item.traceparent for item in items],
        [len(item.expects) for item in items],
        [len(item.events) for item in items],
        list(streams),
        [streams[stream] for item in items for stream, _ in item.expects],
        [version for item in items for _, version in item.expects],
        [streams[event.stream] for event in events],
        [event.data.event_type for event in events],
        [event.data.schema_version for event in events],
        [event_id for prepared in batch for event_id in prepared.event_ids],
        [data for prepared in batch for data in prepared.data],
    )


def outcomes(
    shard: int, batch: Sequence[Prepared], streams: Sequence[str], row: Mapping[str, Any]
) -> list[Appended | Conflict | Repeated]:
    """Read the answer of log.append: one outcome per item, in order."""
    result: list[Appended | Conflict | Repeated] = []
    previous: bytes = row["previous_hash"]
    recorded_at_us: int = row["recorded_at_us"]
    versions, hashes = row["versions"] or [], row["hashes"] or []
    at = 0
    for index, prepared in enumerate(batch):
        item = prepared.item
        count = len(item.events)
        status = row["status"][index]
        if status == _CONFLICT:
            stream = streams[row["conflict_streams"][index] - 1]
            result.append(
                Conflict(stream, dict(item.expects)[stream], row["conflict_versions"][index])
            )
        elif status == _REPEATED:
            result.append(Repeated(row["first_positions"][index], row["last_positions"][index]))
        else:
            first = row["first_positions"][index]
            stored = []
            for offset, event in enumerate(item.events):
                stored.append(
                    StoredEvent(
                        shard=shard,
                        position=first + offset,
                        stream=event.stream,
                        version=versions[at + offset],
                        type=event.data.event_type,
                        schema_version=event.data.schema_version,
                        event_id=prepared.event_ids[offset],
                        causation_id=item.command_id,
                        correlation_id=item.correlation_id,
                        actor=item.actor,
                        recorded_at_us=recorded_at_us,
                        data=prepared.data[offset].encode("utf-8"),
                        prev_hash=previous,
                        hash=hashes[at + offset],
                        traceparent=item.traceparent,
                        decoded=event.data,
                    )
                )
                previous = hashes[at + offset]
            result.append(_appended(stored))
        at += count
    return result


def _appended(events: list[StoredEvent], *, repeated: bool = False) -> Appended:
    return Appended(
        positions=tuple(event.position for event in events),
        versions=tuple(event.version for event in events),
        events=events,
        repeated=repeated,
    )


def repeated(events: list[StoredEvent]) -> Appended:
    """The outcome of a command that the log held already."""
    return _appended(events, repeated=True)
