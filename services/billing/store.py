"""Billing's SQL: the ledger's tables. The log's own tables belong to cocoon.eventlog."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from services.billing.decide import Projection

if TYPE_CHECKING:
    from cocoon.eventlog.connection import Connection


async def write(conn: Connection, shard: int, projection: Projection) -> None:
    """Write a batch in the caller's transaction. The tables' checks refuse a negative balance."""
    if projection.entries:
        await conn.execute(
            "INSERT INTO ledger.entries (shard, position, line, account, amount)"
            " SELECT * FROM unnest($1::int[], $2::bigint[], $3::int[], $4::text[], $5::bigint[])",
            *map(list, zip(*projection.entries, strict=True)),
        )
    changes = {account: amount for account, amount in projection.changes.items() if amount}
    if changes:
        # A hold that opens and closes in one batch never has a row; one that closes loses it.
        await conn.execute(
            "INSERT INTO ledger.balances (shard, account, amount)"
            " SELECT $1, a, 0 FROM unnest($2::text[]) AS a ON CONFLICT DO NOTHING",
            shard,
            list(changes),
        )
        await conn.execute(
            "UPDATE ledger.balances AS b SET amount = b.amount + c.amount"
            " FROM unnest($2::text[], $3::bigint[]) AS c(account, amount)"
            " WHERE b.shard = $1 AND b.account = c.account",
            shard,
            list(changes),
            list(changes.values()),
        )
        await conn.execute(
            "DELETE FROM ledger.balances WHERE shard = $1 AND account = ANY($2::text[])"
            " AND amount = 0",
            shard,
            list(changes),
        )
    if projection.settlements:
        rows = [
            (
                s.event.job_id, s.shard, s.position, s.event.account_id, s.event.api_key_id,
                s.event.provider_id, s.event.price_nanoton, s.event.provider_nanoton,
                s.event.fee_nanoton,
            )
            for s in projection.settlements
        ]  # fmt: skip
        await conn.execute(
            "INSERT INTO ledger.settlements (job_id, shard, position, account_id, api_key_id,"
            " provider_id, price, provider_part, fee) SELECT * FROM unnest($1::text[], $2::int[],"
            " $3::bigint[], $4::text[], $5::text[], $6::text[], $7::bigint[], $8::bigint[],"
            " $9::bigint[])",
            *map(list, zip(*rows, strict=True)),
        )


@dataclass(frozen=True, slots=True)
class Balance:
    """A client's money in nanoTON: what is free, and what its running jobs hold."""

    available: int
    held: int


async def client_balance(conn: Connection, shard: int, account_id: str) -> Balance:
    available = await conn.fetchval(
        "SELECT amount FROM ledger.balances WHERE shard = $1 AND account = $2",
        shard,
        f"client:{account_id}",
    )
    held = await conn.fetchval(
        "SELECT coalesce(sum(b.amount), 0) FROM ledger.balances b JOIN log.events e"
        " ON e.shard = b.shard AND e.stream = 'job/' || substr(b.account, 6) AND e.version = 1"
        " WHERE b.shard = $1 AND b.account LIKE 'hold:%'"
        " AND (e.data::json ->> 'account_id') = $2",
        shard,
        account_id,
    )
    return Balance(available=int(available or 0), held=int(held or 0))


async def heads(conn: Connection, consumer: str) -> dict[int, tuple[int, int]]:
    """Shard -> the log's last position, and the last that the consumer has applied."""
    rows = await conn.fetch(
        "SELECT h.shard, h.position, coalesce(c.position, 0) AS applied FROM log.head h"
        " LEFT JOIN log.checkpoints c ON c.shard = h.shard AND c.consumer = $1",
        consumer,
    )
    return {row["shard"]: (row["position"], row["applied"]) for row in rows}


async def sums(conn: Connection) -> dict[int, int]:
    """Shard -> the sum of its books in nanoTON, which is zero or an alarm."""
    rows = await conn.fetch(
        "SELECT shard, sum(amount)::bigint AS amount FROM ledger.balances GROUP BY shard"
    )
    return {row["shard"]: int(row["amount"]) for row in rows}
