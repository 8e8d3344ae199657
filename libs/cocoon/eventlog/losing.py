"""The jobs that one provider lost, from the log: newest first, a bounded piece at a time."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from cocoon.contracts.commands import ExpireLease, RequestJob, decode_command
from cocoon.domain.job import JobState, evolve
from cocoon.domain.losing import Decision, Lost, lost_by
from cocoon.eventlog.read import (
    StoredCommand,
    first_position_since,
    head,
    read_commands,
    stream_events,
)

if TYPE_CHECKING:
    from cocoon.eventlog.connection import Connection

STEP: Final = 512  # events of the log at a time
MAX_SCANNED: Final = 16_384  # events of one page
MAX_ITEMS: Final = 200


@dataclass(frozen=True, slots=True)
class LostPage:
    """Newest first. `before`: give it to read on; 0 at the window's end."""

    items: tuple[Lost, ...]
    before: int


async def lost_page(
    conn: Connection, shard: int, provider_id: str, *, since_us: int, before: int = 0,
    limit: int = MAX_ITEMS, models: Collection[str] = (),
) -> LostPage:  # fmt: skip
    """What the provider lost since a time, up to `limit` and one piece of the log more.

    `before`: the position that the last page gave; 0 begins at the log's end. `models`: the ids
    that it offers (see `lost_by`). Raises Unavailable, or LogCorrupt.
    """
    first = await first_position_since(conn, shard, since_us)
    end = (before or (await head(conn, shard)).position + 1) - 1
    lowest = max(first, end - MAX_SCANNED + 1)
    found: list[Lost] = []
    while end >= lowest and len(found) < min(limit, MAX_ITEMS):
        start = max(lowest, end - STEP + 1)
        decisions = [
            await _decision(conn, shard, stored)
            for stored in await read_commands(conn, shard, start, end)
            if start <= stored.first_position <= end
        ]
        lost = lost_by(provider_id, [one for one in decisions if one is not None], models)
        found += reversed(lost)
        end = start - 1
    return LostPage(tuple(found), end + 1 if end >= first else 0)


async def _decision(conn: Connection, shard: int, stored: StoredCommand) -> Decision | None:
    """The command and its job's state before it; None for what seeks nobody."""
    command = decode_command(stored.data)
    if isinstance(command, RequestJob):
        return JobState(), command
    if not isinstance(command, ExpireLease):
        return None
    state = JobState()
    for event in await stream_events(conn, shard, f"job/{command.job_id}"):
        if event.position < stored.first_position:
            state = evolve(state, event.decode())
    return state, command
