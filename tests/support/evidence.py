"""What a live network leaves behind, collected for the invariants: log, bus, tables, files.

It looks from outside: the reader's database role, the relay's view of the streams, the files that
the processes wrote. It changes nothing.
"""

from __future__ import annotations

import asyncio
import base64
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import asyncpg

from cocoon.bus.connection import close, connect
from cocoon.bus.permissions import inbox_prefix
from cocoon.bus.streams import api
from cocoon.contracts import subjects
from cocoon.contracts.envelope import StoredEvent
from cocoon.contracts.events import JOB_ENDS
from cocoon.eventlog.connection import connect as connect_log
from cocoon.eventlog.read import StoredCommand, checkpoint, head, read, read_commands
from cocoon.kernel.errors import CocoonError
from services.billing.ledger import LEDGER_CONSUMER
from tests.support.canaries import files_under, find_canaries
from tests.support.collected import ClientCall, Evidence, LedgerTables, StreamMessage
from tests.support.network import LiveNetwork

if TYPE_CHECKING:
    from nats.aio.client import Client

    from cocoon.eventlog.connection import Connection

DRAIN_S = 45.0
_PAUSE_S = 0.1
_IN_FLIGHT = 64
_CATCH_UP_TRIES = 50


async def reader(network: LiveNetwork) -> asyncpg.Connection[asyncpg.Record]:
    """A connection that may read the log and the ledger."""
    return await connect_log(network.folder.dsn("reader").read_text().strip(), "evidence")


async def drained(network: LiveNetwork, timeout_s: float = DRAIN_S) -> float:
    """Wait until every job has ended, the ledger has posted all and the streams hold the log.

    Returns the seconds that it took. Raises AssertionError with what is left.
    """
    began_s = time.monotonic()
    left = "nothing was looked at"
    while left:
        try:
            left = await _left(network)
        except CocoonError as error:
            left = error.message
        waited_s = time.monotonic() - began_s
        if left:
            assert waited_s < timeout_s, f"after {timeout_s:.0f} s: {left}"
            await asyncio.sleep(_PAUSE_S)
    return time.monotonic() - began_s


async def _left(network: LiveNetwork) -> str:
    shards = network.running.shards
    conn = await reader(network)
    try:
        for shard in shards[1:]:
            rows = await conn.fetch(
                "SELECT stream FROM log.events WHERE shard = $1 AND stream LIKE 'job/%'"
                " GROUP BY stream HAVING count(*) FILTER (WHERE type = ANY($2::text[])) = 0",
                shard, sorted(JOB_ENDS),
            )  # fmt: skip
            if rows:
                return f"{len(rows)} jobs have not ended, one is {rows[0]['stream']}"
            end, posted = (await head(conn, shard)), await checkpoint(conn, shard, LEDGER_CONSUMER)
            if posted < end.position:
                return f"the ledger of shard {shard} is at {posted} of {end.position}"
        nc = await connect(
            network.running.nats_url, network.folder.seed("billing"), "evidence",
            inbox_prefix("billing"),
        )  # fmt: skip
        try:
            for shard in shards:
                info = await api(nc, f"STREAM.INFO.{subjects.events_stream(shard)}")
                if int(info["state"]["last_seq"]) < (await head(conn, shard)).position:
                    return f"EVENTS_{shard} lags behind the log"
        finally:
            await close(nc)
    finally:
        await conn.close(timeout=2)
    return ""


async def collect(
    network: LiveNetwork,
    calls: Sequence[ClientCall],
    canaries: Sequence[bytes] = (),
    *,
    quiet: bool = True,
) -> Evidence:
    """Everything that the invariants look at, from one snapshot of the database."""
    shards = network.running.shards
    conn = await reader(network)
    try:
        async with conn.transaction(isolation="repeatable_read", readonly=True):
            logs = {shard: await _log(conn, shard) for shard in shards}
            commands = {shard: await _commands(conn, shard, len(logs[shard])) for shard in shards}
            ledgers = {shard: await _ledger(conn, shard) for shard in shards[1:]}
    finally:
        await conn.close(timeout=2)
    places = files_under(network.data) if canaries else ()
    found = await asyncio.to_thread(find_canaries, places, canaries)
    return Evidence(
        logs=logs,
        quiet=quiet,
        commands=commands,
        streams={shard: await _messages(network, shard, len(logs[shard])) for shard in shards},
        ledgers=ledgers,
        calls=calls,
        canaries_found=found,
        chain_payouts={},
    )


async def _log(conn: Connection, shard: int) -> list[StoredEvent]:
    return [event async for batch in read(conn, shard) for event in batch]


async def _commands(conn: Connection, shard: int, last: int) -> list[StoredCommand]:
    return await read_commands(conn, shard, 1, last)


async def _ledger(conn: Connection, shard: int) -> LedgerTables:
    entries = await conn.fetch(
        "SELECT shard, position, line, account, amount FROM ledger.entries WHERE shard = $1"
        " ORDER BY position, line", shard,
    )  # fmt: skip
    balances = await conn.fetch(
        "SELECT account, amount FROM ledger.balances WHERE shard = $1", shard
    )
    settlements = await conn.fetch(
        "SELECT job_id, position, price, provider_part, fee FROM ledger.settlements"
        " WHERE shard = $1", shard,
    )  # fmt: skip
    return LedgerTables(
        applied=await checkpoint(conn, shard, LEDGER_CONSUMER),
        entries=[tuple(row.values()) for row in entries],
        balances={row["account"]: row["amount"] for row in balances},
        settlements={row["job_id"]: tuple(row.values())[1:] for row in settlements},
    )


async def _messages(network: LiveNetwork, shard: int, until: int) -> list[StreamMessage]:
    """The stream, message by message, as the relay may read it, up to the snapshot's end.

    Providers' keys change also in a quiet network. Only what is ahead of the log as it is now is
    taken in beyond the snapshot: that is a violation.
    """
    stream = subjects.events_stream(shard)
    nc = await connect(
        network.running.nats_url, network.folder.seed("billing"), "evidence",
        inbox_prefix("billing"),
    )  # fmt: skip
    try:
        state = await _caught_up(nc, stream, until)
        if not state["messages"]:
            return []
        last = int(state["last_seq"])
        if last <= await _head(network, shard):
            last = min(last, until)
        sequences = range(int(state["first_seq"]), last + 1)
        found: list[StreamMessage] = []
        for start in range(0, len(sequences), _IN_FLIGHT):
            found += await asyncio.gather(
                *(_message(nc, stream, n) for n in sequences[start : start + _IN_FLIGHT])
            )
        return found
    finally:
        await close(nc)


async def _caught_up(nc: Client, stream: str, until: int) -> dict[str, Any]:
    """The stream's state, once it holds the snapshot's end or has had the time to."""
    for _ in range(_CATCH_UP_TRIES):
        state: dict[str, Any] = (await api(nc, f"STREAM.INFO.{stream}"))["state"]
        if int(state["last_seq"]) >= until:
            break
        await asyncio.sleep(_PAUSE_S)
    return state


async def _head(network: LiveNetwork, shard: int) -> int:
    conn = await reader(network)
    try:
        return (await head(conn, shard)).position
    finally:
        await conn.close(timeout=2)


async def _message(nc: Client, stream: str, sequence: int) -> StreamMessage:
    answer = await api(nc, f"STREAM.MSG.GET.{stream}", {"seq": sequence})
    message = answer["message"]
    lines = base64.b64decode(message.get("hdrs", "")).decode().split("\r\n")
    headers = dict(line.split(": ", 1) for line in lines if ": " in line)
    return StreamMessage(
        sequence=int(message["seq"]),
        subject=message["subject"],
        headers=headers,
        body=base64.b64decode(message.get("data", "")),
    )
