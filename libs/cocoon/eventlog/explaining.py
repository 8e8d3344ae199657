"""Why a job went where it went, from the log: each decision made again from its stored command."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cocoon.contracts.commands import ExpireLease, RequestJob, decode_command
from cocoon.domain.explaining import Explanation, explain_decision
from cocoon.domain.job import JobState, evolve
from cocoon.eventlog.read import commands_of, stream_events

if TYPE_CHECKING:
    from cocoon.eventlog.connection import Connection


async def explanations(conn: Connection, shard: int, job_id: str) -> list[Explanation]:
    """The decisions of a job that looked for a provider, oldest first; none if there is no job.

    Raises Unavailable, or LogCorrupt for a stream whose rows do not hang together.
    """
    events = await stream_events(conn, shard, f"job/{job_id}")
    state, found = JobState(), []
    for stored in await commands_of(conn, shard, events):
        command = decode_command(stored.data)
        if isinstance(command, RequestJob | ExpireLease):
            explanation = explain_decision(state, command)
            if explanation is not None:
                found.append(explanation)
        for event in events:
            if stored.first_position <= event.position <= stored.last_position:
                state = evolve(state, event.decode())
    return found
